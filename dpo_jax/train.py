"""Trains a policy: supervised, or from preferences. Run the same command again to resume.

  python -m dpo_jax.train --config=configs/preferences.py --workdir=runs/mine \\
    --config.model.path=MODEL_DIR --config.data.path=PREFERENCES.jsonl

This is the only reader of a configuration: sections are unpacked here, into plain arguments.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax import cli, logprobs, losses, metrics, optim, parallel, report, step, workdirs
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data import chat, layout, packing, pipeline
from dpo_jax.loggers import Loggers
from dpo_jax.model import config as model_configs
from dpo_jax.model import hf, transformer
from dpo_jax.structs import Model, PyTree, TokenBatch, UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py or configs/NAME.py:ARG")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a run found there is resumed")


DTYPES = ("float32", "bfloat16")


class Run(NamedTuple):
  """A run, built: everything the loop reads and nothing that evolves."""

  workdir: pathlib.Path
  config: ConfigDict
  executor: parallel.Executor
  objective: step.Objective
  model: Model
  model_config: model_configs.ModelConfig
  tokenizer: chat.Tokenizer
  examples: list[layout.Example]
  held_out: list[layout.Example]
  batching: dict[str, Any]
  steps: int
  schedule: optax.Schedule
  tx: optax.GradientTransformation


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
  workdirs.claim(workdir, config.to_json_best_effort(indent=2), ledger)
  final = train(run, params, reference)
  print(f"exporting to {workdir / 'export'}", flush=True)
  hf.save(
    workdir / "export",
    run.model_config,
    final,
    source=config.model.path or config.model.tokenizer,
  )
  report.write(workdir)
  print(f"done: {workdir / 'export'} (the model), {workdir / 'report.html'} (what happened)")


# -- building ------------------------------------------------------------------------------------


def build(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, PyTree, PyTree | None, dict]:
  """Everything a run needs, cheap checks first.

  Returns:
    The run, the policy's initial parameters and the reference's (None if supervised), both on
    host, and the ledger of the data.
  """
  given = {k: v for k, v in config.loss.items() if k != "name" and v is not None}
  loss_fn = losses.resolve(config.loss.name, **given)
  supervised = config.loss.name in losses.SUPERVISED
  beta = given.get("beta", losses.arguments(config.loss.name).get("beta", 1.0))
  executor = parallel.Executor(**config.parallel)
  _check_numbers(config)
  _check_divides(config.train.batch_size, config.train.accumulate, executor.groups)

  model_config, tokenizer = _describe_model(config.model)
  model = transformer.build(
    model_config, dtype=config.model.compute_dtype, remat=config.model.remat
  )
  examples, held_out, ledger = _load_data(config, tokenizer, supervised)
  per_update = config.train.batch_size
  steps = config.train.steps or max(1, round(config.train.epochs * len(examples) / per_update))
  schedule_args, rest = _split(
    config.optimizer, ("learning_rate", "schedule", "warmup_steps", "final_fraction")
  )
  schedule = optim.make_schedule(total_steps=steps, **schedule_args)
  objective = step.Objective(logprobs.make_logps_fn(model), loss_fn, supervised, beta)
  run = Run(
    workdir=workdir,
    config=config,
    executor=executor,
    objective=objective,
    model=model,
    model_config=model_config,
    tokenizer=tokenizer,
    examples=examples,
    held_out=held_out,
    batching={
      "layout": config.data.layout,
      "row_length": config.data.row_length
      or layout.fit_row_length(examples + held_out, config.data.layout),
      "groups": executor.groups,
    },
    steps=steps,
    schedule=schedule,
    tx=optim.make_optimizer(schedule, **rest),
  )
  return run, *_load_params(config, model_config, supervised), ledger


def _split(section: ConfigDict, names: tuple[str, ...]) -> tuple[dict, dict]:
  first = {k: v for k, v in section.items() if k in names}
  return first, {k: v for k, v in section.items() if k not in names}


def _check_numbers(config: ConfigDict) -> None:
  """Values that would only fail, or silently do nothing, after the data and the model are loaded."""
  for name in ("train.steps", "eval.every", "eval.batch_size", "checkpoint.every", "data.eval_limit"):
    section, field = name.split(".")
    if config[section][field] < 0:
      raise UserError(f"{name} is {config[section][field]}; it must be 0 or above")
  if config.checkpoint.keep < 1:
    raise UserError(f"checkpoint.keep is {config.checkpoint.keep}; it must be 1 or above")
  if not config.train.steps and not 0 < config.train.epochs < float("inf"):
    raise UserError(f"train.epochs is {config.train.epochs}; it must be above 0")
  if not 0 <= config.data.eval_fraction < 1:
    raise UserError(f"data.eval_fraction is {config.data.eval_fraction}; it must lie in [0, 1)")
  if config.data.max_length < 2:
    raise UserError(f"data.max_length is {config.data.max_length}; a pair needs 2 tokens or more")
  if config.data.layout not in packing.LAYOUTS:
    raise UserError(
      f"data.layout is {config.data.layout!r}; known: {', '.join(packing.LAYOUTS)}"
    )
  for name in ("model.compute_dtype", "model.param_dtype", "reference.param_dtype"):
    section, field = name.split(".")
    if config[section][field] not in DTYPES:
      raise UserError(f"{name} is {config[section][field]!r}; known: {', '.join(DTYPES)}")


def _check_divides(batch_size: int, accumulate: int, devices: int) -> None:
  if batch_size < 1 or accumulate < 1:
    raise UserError(
      f"train.batch_size is {batch_size} and train.accumulate {accumulate}; both must be 1 or more"
    )
  unit = accumulate * devices
  if batch_size % unit:
    lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
    raise UserError(
      f"train.batch_size {batch_size} is not divisible by {devices} devices x {accumulate}"
      f" micro-batches; try {f'{lower} or {upper}' if lower else upper}"
    )


def _describe_model(
  section: ConfigDict,
) -> tuple[model_configs.ModelConfig, chat.Tokenizer]:
  """The shape of the model and its tokenizer, no weights loaded."""
  if not section.path and not section.scratch:
    raise UserError("model.path is empty; name a Hugging Face folder, --config.model.path=DIR")
  if section.path and section.scratch:
    raise UserError("model.path and model.scratch are both given; keep one")
  if section.scratch and not section.tokenizer:
    raise UserError("model.tokenizer is empty; a model trained from scratch needs its folder")
  tokenizer = chat.load_tokenizer(section.tokenizer or section.path)
  if section.path:
    model_config = hf.read_config(section.path)
  else:
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    fields = {"vocab_size": tokenizer.vocab_size} | special | section.scratch.to_dict()
    model_config = model_configs.from_hf(fields)
  pipeline.check_vocabulary(tokenizer, model_config.vocab)
  return model_config, tokenizer


def _load_data(config, tokenizer, supervised):
  """Training and held-out examples, and the ledger of both."""
  data = config.data
  if not data.path:
    raise UserError("data.path is empty; name a file of rows, --config.data.path=FILE")
  read = functools.partial(
    pipeline.load_examples,
    tokenizer=tokenizer,
    answers=1 if supervised else 2,
    max_length=data.max_length,
    prompt_floor=data.prompt_floor,
    truncation=data.truncation,
    fields={k: v for k, v in data.fields.items() if v},
  )
  examples, ledger, form = read(data.path)
  ledger = {"format": form, **ledger.to_json()}
  if data.eval_path:
    held_out, more, form = read(data.eval_path)
    ledger["eval"] = {"format": form, **more.to_json()}
  else:
    examples, held_out = pipeline.split(examples, data.eval_fraction, config.seed)
  held_out = held_out[: data.eval_limit]
  if data.row_length and data.layout != "padded":
    layout.check_fits(examples + held_out, data.layout, data.row_length)
  return examples, held_out, ledger


def _load_params(config, model_config, supervised) -> tuple[PyTree, PyTree | None]:
  """Initial parameters of policy and reference, on host, each in its own dtype."""
  if config.model.path:
    _, params = hf.load(config.model.path)
  else:
    params = transformer.init_params(model_config, config.seed)
  reference = None
  if not supervised:
    reference = params
    if config.reference.path:
      other, reference = hf.load(config.reference.path)
      if other.vocab != model_config.vocab:
        raise UserError(
          f"the reference {config.reference.path} has a vocabulary of {other.vocab}, the policy"
          f" {model_config.vocab}; they must share one tokenizer"
        )
    reference = _cast(reference, config.reference.param_dtype)
  return _cast(params, config.model.param_dtype), reference


def _cast(params: PyTree, dtype: str) -> PyTree:
  return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)


# -- training ------------------------------------------------------------------------------------


def train(run: Run, params: PyTree, reference: PyTree | None) -> PyTree:
  """From the initial parameters, or the latest checkpoint, to the last step.

  Returns:
    The policy's final parameters, on host.
  """
  settings = run.config.checkpoint
  checkpoints = Checkpoints(
    run.workdir / "checkpoints",
    keep=settings.keep,
    best="loss" if run.objective.supervised else "rewards/accuracies",
    higher=not run.objective.supervised,
  )
  init = functools.partial(step.init_state, tx=run.tx)
  start = checkpoints.latest() or 0
  if start:
    like = jax.eval_shape(init, params)
    state = run.executor.place(checkpoints.restore(like, start))
  else:
    state = run.executor.compile_init(init)(run.executor.place(params))
  placed = None if reference is None else run.executor.place(reference)
  if placed is not None:
    parallel.assert_separate(state, placed)
  del params, reference
  try:
    with Loggers(run.workdir, start_step=start, total_steps=run.steps) as log:
      if start:
        log.say(f"resuming after step {start} of {run.steps}")
      state = _loop(run, state, placed, start, checkpoints, log)
  finally:
    checkpoints.close()
  return run.executor.fetch(state.params)


def _loop(run, state, reference, start, checkpoints, log) -> step.TrainState:
  """Steps start + 1 to the last, with evaluation and checkpoints where they fall due."""
  settings = run.config.train
  stream = pipeline.batches(
    run.examples,
    batch_size=settings.batch_size,
    accumulate=settings.accumulate,
    seed=run.config.seed,
    start=start,
    **run.batching,
  )
  take = run.executor.compile_step(
    functools.partial(step.train_step, objective=run.objective, tx=run.tx)
  )
  judge = _Judge(run, reference)
  if start == 0:
    first = next(stream)
    stream = itertools.chain([first], stream)
    prove(run, state.params, reference, first, log)
    log.write_eval(0, judge(state.params))
  meter = _Meter(run, checkpoints, log)
  for index in range(start + 1, run.steps + 1):
    batch = next(stream)
    state, means = take(state, reference, run.executor.place_batch(batch))
    meter.add(index, means, batch)
    evaluating = index == run.steps or _due(index, run.config.eval.every)
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
    if not self.batches:
      return {}
    sums, count = [], 0.0
    for batch, reference in zip(self.batches, self.reference, strict=True):
      part, _ = step.batch_sums(
        self.run.objective, self._logps(params, batch), reference, batch
      )
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
      f" {kept}. Try a lower optimizer.learning_rate, or look at those rows"
    )


# -- the run proves itself -----------------------------------------------------------------------


def prove(run: Run, params: PyTree, reference: PyTree | None, batch: TokenBatch, log) -> None:
  """Checks at step 0 that the policy is the reference and the loss what it must then be.

  With a reference of its own folder, the two may differ: then the distance is only stated.

  Raises:
    UserError: the parts do not belong together; nothing has been trained yet.
  """
  if reference is None:
    return
  first = jax.tree.map(lambda x: x[:1], batch)
  forward = run.executor.compile_forward(run.objective.logps_fn)
  policy_NS, reference_NS = forward(params, first), forward(reference, first)
  micro = jax.tree.map(lambda x: x[0], batch)
  count = step.loss_count(run.objective, micro)
  loss = lambda x_NS: float(
    step.batch_sums(run.objective, x_NS, reference_NS, micro)[0]["loss"] / count
  )
  found, expected = loss(policy_NS), loss(reference_NS)
  if run.config.reference.path:
    log.say(f"step 0: loss {found:.6f}; {expected:.6f} if the policy were the reference")
    return
  tolerance = 1e-5 if run.config.model.param_dtype == run.config.reference.param_dtype else 1e-2
  if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
    raise UserError(
      f"at step 0 policy and reference are the same weights, yet the loss is {found:.6f} and not"
      f" {expected:.6f}; this should not happen: check model.param_dtype and reference.param_dtype"
    )
  log.say(f"step 0: loss {found:.6f}, as it must be where the policy is the reference")


if __name__ == "__main__":
  cli.run(main)
