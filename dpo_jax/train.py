"""Trains a policy: supervised, or from preferences. Run the same command again to resume.

  python -m dpo_jax.train --config=configs/preferences.py --workdir=runs/mine \\
    --config.model.path=MODEL_DIR --config.data.path=PREFERENCES.jsonl

Flags and the loop; `build` makes of a configuration what the loop needs.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax import cli, metrics, parallel, report, step, workdirs
from dpo_jax.build import Run, build
from dpo_jax.checkpoint import Checkpoints, latest_step
from dpo_jax.data import pipeline
from dpo_jax.loggers import Loggers
from dpo_jax.model import hf
from dpo_jax.structs import PyTree, TokenBatch, UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py or configs/NAME.py:ARG")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a run found there is resumed")


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  execute(_CONFIG.value, pathlib.Path(_WORKDIR.value))


def execute(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks what is cheap to check, loads, trains, exports and reports.

  Raises:
    UserError: bad input; nothing that was in `workdir` has been touched.
  """
  workdirs.check(workdir, config.to_json_best_effort())
  run, params, reference, ledger = build(config, workdir)
  claim = lambda: workdirs.claim(workdir, config.to_json_best_effort(indent=2), ledger)
  final = train(run, params, reference, claim)
  print(f"exporting to {workdir / 'export'}", flush=True)
  hf.save(
    workdir / "export",
    run.model_config,
    final,
    source=config.model.path or config.model.tokenizer,
  )
  report.write(workdir)
  print(f"done: {workdir / 'export'} (the model), {workdir / 'report.html'} (what happened)")


# -- training ------------------------------------------------------------------------------------


def train(run: Run, params: PyTree, reference: PyTree | None, claim: Callable[[], None]) -> PyTree:
  """From the initial parameters, or the latest checkpoint, to the last step.

  Args:
    run: what is trained.
    params, reference: initial parameters of both, on host; no reference if supervised.
    claim: makes the workdir this run's own; called when nothing but training is left to fail.

  Returns:
    The policy's final parameters, on host.
  """
  directory = run.workdir / "checkpoints"
  start = latest_step(directory) or 0
  init = functools.partial(step.init_state, tx=run.tx)
  like = jax.eval_shape(init, params)
  placed = None if reference is None else run.executor.place(reference)
  if not start:
    state = run.executor.compile_init(init)(run.executor.place(params))
    prove(run, state.params, placed)
  del params, reference
  claim()
  supervised = run.objective.supervised
  checkpoints = Checkpoints(
    directory,
    keep=run.config.checkpoint.keep,
    best="loss" if supervised else "rewards/accuracies",
    higher=not supervised,
    tidy=True,
  )
  try:
    if start:
      state = run.executor.place(checkpoints.restore(like, start))
    if placed is not None:
      parallel.assert_separate(state, placed)
    with Loggers(run.workdir, start_step=start, total_steps=run.steps) as log:
      if start:
        log.say(f"resuming after step {start} of {run.steps}")
      state = _loop(run, state, placed, start, checkpoints, log)
  finally:
    checkpoints.close()
  return run.executor.fetch(state.params)


def _loop(run, state, reference, start, checkpoints, log) -> step.TrainState:
  """Steps start + 1 to the last, with evaluation and checkpoints where they fall due."""
  stream = _stream(run, start)
  take = run.executor.compile_step(
    functools.partial(step.train_step, objective=run.objective, tx=run.tx)
  )
  judge = _Judge(run, reference)
  if start == 0 and run.held_out:
    log.write_eval(0, judge(state.params))
  meter = _Meter(run, checkpoints, log)
  for index in range(start + 1, run.steps + 1):
    batch = next(stream)
    state, means = take(state, reference, run.executor.place_batch(batch))
    meter.add(index, means, batch)
    evaluating = run.held_out and (index == run.steps or _due(index, run.config.eval.every))
    saving = index == run.steps or _due(index, run.config.checkpoint.every)
    if not (evaluating or saving):
      continue
    meter.flush()  # raises on a loss that is not finite, before anything is kept
    scores = judge(state.params) if evaluating else None
    if scores:
      log.write_eval(index, scores)
    if saving:
      checkpoints.save(index, run.executor.single(state), scores)
    meter.restart()
  return state


def _stream(run: Run, start: int) -> Iterator[TokenBatch]:
  settings = run.config.train
  return pipeline.batches(
    run.examples,
    batch_size=settings.batch_size,
    accumulate=settings.accumulate,
    seed=run.config.seed,
    start=start,
    **run.batching,
  )


def _due(index: int, every: int) -> bool:
  return every > 0 and index % every == 0


class _Judge:
  """Held-out metrics, the reference's log-probs computed once."""

  def __init__(self, run: Run, reference: PyTree | None):
    settings = run.config
    self.run = run
    self.forward = run.executor.compile_forward(run.objective.logps_fn)
    size = settings.eval.batch_size or settings.train.batch_size // settings.train.accumulate
    self.batches = []
    if run.held_out:
      self.batches = list(pipeline.eval_batches(run.held_out, batch_size=size, **run.batching))
    self.reference = [None] * len(self.batches)
    if reference is not None:
      self.reference = [self._logps(reference, batch) for batch in self.batches]

  def _logps(self, params: PyTree, batch: TokenBatch) -> np.ndarray:
    return self.forward(params, jax.tree.map(lambda x: x[None], batch))

  def __call__(self, params: PyTree) -> dict[str, float]:
    """Means over every held-out pair: sums and counts added over batches, divided once."""
    sums, count = [], 0.0
    for batch, reference in zip(self.batches, self.reference, strict=True):
      part, _ = step.batch_sums(self.run.objective, self._logps(params, batch), reference, batch)
      sums.append(part)
      count += step.loss_count(self.run.objective, batch)
    total = jax.tree.map(lambda *parts: sum(parts), *sums)
    return {k: float(v) for k, v in metrics.divide(total, count).items()}


class _Meter:
  """Writes the metrics of each step one step late, so that the device never waits for the host."""

  def __init__(self, run: Run, checkpoints: Checkpoints, log: Loggers):
    self.run, self.checkpoints, self.log = run, checkpoints, log
    self.pending: tuple[int, dict, TokenBatch] | None = None
    self.restart()

  def restart(self) -> None:
    """Leaves evaluation and saving out of the pairs a second."""
    self.since = time.perf_counter()

  def add(self, index: int, means: dict, batch: TokenBatch) -> None:
    self.flush()
    self.pending = index, means, batch

  def flush(self) -> None:
    """Writes the pending step.

    Raises:
      UserError: its loss or gradient is not finite; names the rows.
    """
    if self.pending is None:
      return
    (index, means, batch), self.pending = self.pending, None
    means = self.run.executor.metrics_to_host(means)  # waits for the step
    bad_ANS = means.pop("nonfinite_ANS")
    now = time.perf_counter()
    elapsed, self.since = now - self.since, now
    if not (np.isfinite(means["loss"]) and np.isfinite(means["grad_norm"])):
      self.fail(index, means, batch, bad_ANS)
    answers = 1 if self.run.objective.supervised else 2
    self.log.write(
      index,
      {k: float(v) for k, v in means.items()}
      | {
        "learning_rate": float(self.run.schedule(index - 1)),
        "pairs_per_second": (batch.row_NS >= 0).sum() / answers / elapsed,
        "tokens_per_second": (batch.pair_NL >= 0).sum() / elapsed,
      },
    )

  def fail(self, index: int, means: dict, batch: TokenBatch, bad_ANS: np.ndarray) -> None:
    rows = batch.row_NS[bad_ANS] if bad_ANS.any() else batch.row_NS[batch.row_NS >= 0]
    named = ", ".join(str(row) for row in sorted(set(rows.tolist()))[:8])
    self.checkpoints.wait()
    last = self.checkpoints.latest()
    kept = f"the checkpoint of step {last} is kept" if last else "no checkpoint was due before"
    raise UserError(
      f"step {index}: the loss is {means['loss']}, its gradient's norm {means['grad_norm']}, in"
      f" rows {named}{', …' if len(set(rows.tolist())) > 8 else ''} of {self.run.config.data.path};"
      f" {kept}. Try a lower optimizer.learning_rate in a new --workdir, or look at those rows"
    )


# -- the run proves itself -----------------------------------------------------------------------


def prove(run: Run, params: PyTree, reference: PyTree | None) -> None:
  """Checks on the first pairs that the policy is the reference and the loss what it must then be.

  With a reference of its own folder, or one rounded to a narrower type, the two differ: then the
  distance is only stated.

  Raises:
    UserError: the parts do not belong together; nothing has been trained or written yet.
  """
  first = jax.tree.map(lambda x: x[:1], next(_stream(run, 0)))
  micro = jax.tree.map(lambda x: x[0], first)
  forward = run.executor.compile_forward(run.objective.logps_fn)
  policy_NS = forward(params, first)
  if not np.isfinite(policy_NS).all():
    raise UserError(
      f"the model gives log-probs that are not finite before any training, on rows"
      f" {sorted(set(micro.row_NS[~np.isfinite(policy_NS)].tolist()))[:8]}; its weights or its"
      " configuration are broken"
    )
  example, decode = run.examples[0], run.tokenizer.decode
  print(f"first row: {decode(example.prompt)[-60:]!r} -> {decode(example.answers[0])[:60]!r}")
  if reference is None:
    return
  reference_NS = forward(reference, first)
  count = step.loss_count(run.objective, micro)
  loss = lambda x_NS: float(
    step.batch_sums(run.objective, x_NS, reference_NS, micro)[0]["loss"] / count
  )
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
  flags.mark_flags_as_required(["config", "workdir"])
  cli.run(main)
