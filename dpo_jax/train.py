"""Trains a policy: supervised, or from preferences. Run the same command again to resume.

Sent SIGTERM, it saves after the step it is at and exits with status 75.

  python -m dpo_jax.train --config=configs/preferences.py --workdir=runs/mine \\
    --config.model.path=MODEL_DIR --config.data.path=PREFERENCES.jsonl

Flags and the loop; `setup` makes of a configuration what the loop needs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax import logprobs, metrics, step
from dpo_jax.data import batches
from dpo_jax.distributed import executor, memory, preemption, processes
from dpo_jax.distributed.arrays import gathered
from dpo_jax.evaluation import sample_probe
from dpo_jax.generation import rollouts
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft, safetensors_files
from dpo_jax.monitoring import report
from dpo_jax.monitoring.loggers import Loggers, Silent
from dpo_jax.structs import PyTree, TokenBatch, UserError
from dpo_jax.training import datasets
from dpo_jax.training.checkpoint import Checkpoints, latest_step
from dpo_jax.training.setup import Run, build, fill_store
from dpo_jax.utils import cli
from dpo_jax.utils import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file("config", None, "NAME, NAME:ARG, or FILE.py in place of NAME")
  flags.DEFINE_string("workdir", None, "folder of the run; a run found there is resumed")
  flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  """Trains as the flags say."""
  del argv
  execute(FLAGS.config, pathlib.Path(FLAGS.workdir))


def execute(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks what is cheap to check, loads, trains, exports and reports.

  Raises:
    UserError: bad input; nothing that was in `workdir` has been touched.
  """
  section = config.parallel
  processes.start(section.coordinator, section.processes, section.process)
  with processes.Touch(), processes.quiet(), contextlib.ExitStack() as stack:
    workdirs.check(workdir, config.to_json_best_effort())
    if workdir.exists() and processes.is_main_process():
      stack.enter_context(workdirs.alone(workdir))
    _execute(config, workdir, stack)


def _execute(config: ConfigDict, workdir: pathlib.Path, stack: contextlib.ExitStack) -> None:
  if config.model.scratch and (config.lora.rank or config.lora.path):
    raise UserError(
      "lora would adapt a model made from nothing (model.scratch), which is kept nowhere; name one"
      " that exists, --config.model.path=DIR, or train the model itself"
    )
  new = not workdir.exists()
  run, trained, reference_params, ledger = build(config, workdir)

  def claim() -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    if new:
      stack.enter_context(workdirs.alone(workdir))
    workdirs.claim(workdir, config.to_json_best_effort(indent=2), ledger)

  final = train(run, trained, reference_params, lambda: processes.on_main_process(claim, "claim"))
  _export(run, final)


def _export(run: Run, final: PyTree) -> None:
  """The trained model, or adapter, and the report; the first process writes them."""
  workdir, config = run.workdir, run.config
  out, source = workdir / "export", config.model.path or config.model.tokenizer
  print(f"exporting to {out}", flush=True)
  if run.adapter:
    final = jax.tree.map(gathered, final)
  if processes.is_main_process():
    if run.adapter:
      peft.save(out, run.model_config, final, run.adapter, source=source)
    else:
      hf_checkpoint.save(out, run.model_config, final, source=source)
    report.write(workdir)
  elif not run.adapter:
    hf_checkpoint.lend(run.model_config, final)
  what = "the adapter" if run.adapter else "the model"
  print(f"done: {out} ({what}), {workdir / 'report.html'} (what happened)")


# -- training ------------------------------------------------------------------------------------


def train(
  run: Run, trained: PyTree, reference_params: PyTree | None, claim: Callable[[], None]
) -> PyTree:
  """From the initial parameters, or the latest checkpoint, to the last step.

  Args:
    run: the run.
    trained, reference_params: as `build` returns them; taken over, and gone afterwards.
    claim: makes the workdir this run's own; called when nothing but training is left to fail.

  Returns:
    What was trained as it ends: one copy of it, on device.
  """
  directory = run.workdir / "checkpoints"
  start = latest_step(directory) or 0
  init = functools.partial(step.init_state, tx=run.tx, loss=run.objective.loss)
  follows = run.objective.sync is not None  # then it is part of what evolves
  like = jax.eval_shape(init, trained)._replace(reference=reference_params if follows else None)
  like = run.executor.abstract(like)
  sampler = run.data.sampler
  sizes = None
  if sampler:
    sizes = sampler.sizes(
      run.executor.gather_locally(run.objective.policy(trained, reference_params))
    )
  feed_after = functools.partial(datasets.make_feed, run.config, run.data, sizes)
  processes.assert_consistent(_facts(run))
  if reference_params is not None:
    reference_params = run.executor.place(reference_params)
  reference_params = fill_store(run, reference_params)
  if start:
    # The checkpoint's take their place.
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, trained)
  else:
    state = run.executor.compile_init(init)(run.executor.place(trained))
    prove(run, state, reference_params, feed_after(0))
    if follows:
      state = state._replace(reference=reference_params)
  if follows:
    reference_params = None
  del trained
  claim()
  ranks = run.objective.loss.kind in ("pairs", "ranked")
  checkpoints = Checkpoints(
    directory,
    keep=run.config.checkpoint.keep,
    best="rewards/accuracies" if ranks else "loss",
    higher=ranks,
    tidy=True,
  )
  try:
    if start:
      start, saved = checkpoints.restore_latest(like)
      state = run.executor.place(saved)
      del saved
    parts = {"policy": like.params, "optimiser": like.opt_state, "reference": reference_params}
    if reference_params is not None:
      executor.assert_separate(state, reference_params)
    logs = Silent()
    if processes.is_main_process():
      logs = Loggers(run.workdir, start_step=start, total_steps=run.steps)
    with preemption.Notice() as notice, logs as log:
      if start:
        log.say(f"resuming after step {start} of {run.steps}")
      feed = feed_after(start, share=run.executor.share)
      with memory.told(parts, memory.limit()):
        state = _loop(run, state, reference_params, feed, start, checkpoints, log, notice)
  finally:
    checkpoints.close()
  return run.executor.unreplicate(state.params)


def _loop(run, state, reference_params, feed, start, checkpoints, log, notice) -> step.TrainState:
  """Steps start + 1 to the last, with evaluation and checkpoints where they fall due.

  At a notice it saves and exits, after the step that it is at.
  """
  take = run.executor.compile_step(
    functools.partial(step.train_step, objective=run.objective, tx=run.tx)
  )
  judge = _Judge(run, reference_params)
  if start == 0 and judge.ready:
    log.write_eval(0, judge(state))
  meter, shapes = _Meter(run, checkpoints, log), set()
  for index in range(start + 1, run.steps + 1):
    batch, facts = feed(index, _policy(run, state, reference_params) if run.data.sampler else None)
    shape = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes and shape not in shapes:
      log.say(f"step {index}: compiles for batches of another shape, number {len(shapes) + 1}")
    shapes.add(shape)
    state, means = take(state, reference_params, run.executor.place_batch(batch))
    meter.add(index, means, facts, batch)
    evaluating = judge.ready and (index == run.steps or _due(index, run.config.eval.every))
    leaving = notice.leaving(index) and index < run.steps
    saving = leaving or index == run.steps or _due(index, run.config.checkpoint.every)
    if not (evaluating or saving):
      continue
    meter.flush()  # raises on a loss that is not finite, before anything is kept
    scores = judge(state) if evaluating else None
    if scores:
      log.write_eval(index, scores)
    if saving:
      checkpoints.save(index, run.executor.unreplicate(state), scores)
    if leaving:
      checkpoints.wait()
      preemption.leave(index)
    meter.restart()
  return state


def _policy(run: Run, state: step.TrainState, reference_params: PyTree | None) -> PyTree:
  """The policy's parameters, one copy of them, on device."""
  local_copy = run.executor.local_copy
  return run.objective.policy(
    local_copy(state.params), None if reference_params is None else local_copy(reference_params)
  )


def _due(index: int, every: int) -> bool:
  return every > 0 and index % every == 0


class _Judge:
  """Held-out metrics, and facts of samples; a frozen reference's log-probs are computed once."""

  def __init__(self, run: Run, reference_params: PyTree | None):
    settings, data = run.config, run.data
    self.run, self.reference_params = run, reference_params
    self.probe = _probe(run)
    self.forward = run.executor.compile_forward(run.objective.logps_fn)
    size = settings.eval.batch_size or settings.train.batch_size // settings.train.accumulate
    self.batches: list[TokenBatch] = []
    if data.held_out and data.sampler is None:
      self.batches = list(batches.eval_batches(data.held_out, batch_size=size, **data.batching))
    self.reference = self._stored()
    if self.reference is None:
      self.reference = self._logps(reference_params if run.objective.loss.needs_reference else None)
    self.ready = bool(self.batches or self.probe)

  def _logps(self, params: PyTree | None) -> np.ndarray | None:
    """Log-probs of every slot of every batch, below each other."""
    if params is None or not self.batches:
      return None
    parts = [self.forward(params, jax.tree.map(lambda x: x[None], b)) for b in self.batches]
    return np.concatenate(parts)

  def _stored(self) -> np.ndarray | None:
    """As `_logps` of the reference, where the batches bring them along."""
    if self.run.objective.stored_fn is None or not self.batches:
      return None
    return np.concatenate([self.run.objective.stored_fn(batch) for batch in self.batches])

  def __call__(self, state: step.TrainState) -> dict[str, float]:
    """Means over every held-out row, all of them before the loss at once; and of samples."""
    found = {}
    if self.probe:
      found = self.probe(*self._both(state))
    return found | (self._means(state) if self.batches else {})

  def _both(self, state: step.TrainState) -> tuple[PyTree, PyTree | None]:
    """One copy of the policy and of the reference, which share the base of adapters."""
    local_copy = self.run.executor.local_copy
    reference_params = self.reference_params if state.reference is None else state.reference
    if reference_params is not None:
      reference_params = local_copy(reference_params)
    policy = self.run.objective.policy(local_copy(state.params), reference_params)
    return policy, reference_params if self.run.objective.loss.needs_reference else None

  def _means(self, state: step.TrainState) -> dict[str, float]:
    slots = jax.tree.map(lambda *x: np.concatenate(x), *map(logprobs.slots_of, self.batches))
    followed = self._logps(state.reference)
    reference = self.reference if followed is None else followed
    running_stats = self.run.executor.to_host(state.running_stats)
    policy = self._logps(self.run.objective.policy(state.params, self.reference_params))
    sums, _ = step.batch_sums(self.run.objective, policy, reference, slots, running_stats)
    return {k: float(v) for k, v in metrics.divide(sums).items()}


def _probe(run: Run) -> sample_probe.Probe | None:
  """What samples answers to held-out prompts; None where none are asked for."""
  if not run.config.eval.samples:
    return None
  return sample_probe.make_probe(
    run.model_config,
    run.objective.logps_fn,
    run.data.held_out,
    samples=run.config.eval.samples,
    eos_ids=rollouts.eos_ids(run.model_config, run.tokenizer),
    max_tokens=run.config.on_policy.max_tokens if run.data.sampler else 0,
    seed=run.config.seed,
  )


class _Meter:
  """Writes the metrics of each step one step late, so that the device never waits for the host."""

  def __init__(self, run: Run, checkpoints: Checkpoints, log: Loggers):
    self.run, self.checkpoints, self.log = run, checkpoints, log
    self.pending: tuple[int, dict, dict, TokenBatch] | None = None
    self.restart()

  def restart(self) -> None:
    """Leaves evaluation and saving out of the pairs a second."""
    self.since = time.perf_counter()

  def add(self, index: int, means: dict, facts: dict, batch: TokenBatch) -> None:
    """`means` of the step are on device still, `facts` of its batch on host."""
    self.flush()
    self.pending = index, means, facts, batch

  def flush(self) -> None:
    """Writes the pending step.

    Raises:
      UserError: its loss or gradient is not finite; names the rows.
    """
    if self.pending is None:
      return
    (index, means, facts, batch), self.pending = self.pending, None
    means = self.run.executor.metrics_to_host(means)  # waits for the step
    bad_row_ANS, rows, tokens = (means.pop(key) for key in ("nonfinite_row_ANS", "rows", "tokens"))
    now = time.perf_counter()
    elapsed, self.since = now - self.since, now
    if not (np.isfinite(means["loss"]) and np.isfinite(means["grad_norm"])):
      self.fail(index, means, batch, bad_row_ANS[bad_row_ANS >= 0])
    self.log.write(
      index,
      {k: float(v) for k, v in means.items()}
      | facts
      | {
        "learning_rate": float(self.run.schedule(index - 1)),
        "pairs_per_second": rows / elapsed,
        "tokens_per_second": tokens / elapsed,
      },
    )

  def fail(self, index: int, means: dict, batch: TokenBatch, rows: np.ndarray) -> None:
    if not len(rows):
      rows = batch.row_NS[batch.row_NS >= 0]
    named = ", ".join(str(row) for row in sorted(set(rows.tolist()))[:8])
    self.checkpoints.wait()
    last = self.checkpoints.latest()
    kept = f"the checkpoint of step {last} is kept" if last else "no checkpoint was due before"
    raise UserError(
      f"step {index}: the loss is {means['loss']}, its gradient's norm {means['grad_norm']}, in"
      f" rows {named}{', …' if len(set(rows.tolist())) > 8 else ''} of {self.run.config.data.path};"
      f" {kept}. Try a lower optimizer.learning_rate in a new --workdir, or look at those rows"
    )


def _facts(run: Run) -> dict[str, Any]:
  """What all processes of a run must have alike."""
  config = json.loads(run.config.to_json_best_effort())
  config["parallel"].pop("process")
  folders = filter(None, (run.config.model.path, run.config.reference.path))
  return {
    **{f"config.{name}": value for name, value in config.items()},
    "the code": processes.code_digest(),
    "the data": datasets.digest(run.data),
    "the model folder": [safetensors_files.sampled_digest(pathlib.Path(path)) for path in folders],
    "what the reference store lacks": [len(some) for some in run.lacking],
    "how far the run has come": latest_step(run.workdir / "checkpoints"),
  }


# -- the run proves itself -----------------------------------------------------------------------


def prove(
  run: Run, state: step.TrainState, reference_params: PyTree | None, feed: datasets.Feed
) -> None:
  """Checks on the first pairs that the policy is the reference and the loss what it must then be.

  With a reference of its own folder, or one rounded to a narrower type, the two differ: then the
  distance is only stated.

  Raises:
    UserError: the parts do not belong together; nothing has been trained or written yet.
  """
  batch, _ = feed(1, _policy(run, state, reference_params) if run.data.sampler else None)
  first = jax.tree.map(lambda x: x[:1], batch)
  micro = jax.tree.map(lambda x: x[0], first)
  forward = run.executor.compile_forward(run.objective.logps_fn)
  policy_NS = forward(run.objective.policy(state.params, reference_params), first)
  if not np.isfinite(policy_NS).all():
    raise UserError(
      f"the model gives log-probs that are not finite before any training, on rows"
      f" {sorted(set(micro.row_NS[~np.isfinite(policy_NS)].tolist()))[:8]}; its weights or its"
      " configuration are broken"
    )
  if run.data.sampler is None:
    example, decode = run.data.examples[0], run.tokenizer.decode
    print(f"first row: {decode(example.prompt)[-60:]!r} -> {decode(example.completions[0])[:60]!r}")
  if not run.objective.loss.needs_reference:
    return
  stored_fn = run.objective.stored_fn
  reference_NS = (
    forward(reference_params, first) if stored_fn is None else np.asarray(stored_fn(micro))
  )
  sums = lambda x_NS: step.batch_sums(
    run.objective, x_NS, reference_NS, logprobs.slots_of(micro), run.objective.loss.running_stats
  )[0]
  loss = lambda x_NS: float(metrics.divide(sums(x_NS))["loss"])
  found, expected = loss(policy_NS), loss(reference_NS)
  own, theirs = run.config.model.param_dtype, run.config.reference.param_dtype
  if run.config.reference.path or theirs not in (own, "float32"):
    print(
      f"step 0: loss {found:.6f}; it would be {expected:.6f} if policy and reference were equal"
    )
    return
  if not abs(found - expected) <= 1e-5 * max(1.0, abs(expected)):
    raise UserError(
      f"at step 0 policy and reference are the same weights, yet the loss is {found:.6f} and not"
      f" {expected:.6f}: the two were not computed alike, and training would not be what it says"
    )
  print(f"step 0: loss {found:.6f}, as it must be where the policy is the reference", flush=True)


if __name__ == "__main__":
  cli.run(main, define_flags)
