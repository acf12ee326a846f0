"""A configuration becomes a run: sections are unpacked here, once, into plain arguments.

`build`, `feeds` and `train` are the only readers of a `ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpo_jax import feeds, logprobs, losses, optim, parallel, step
from dpo_jax.data import chat, packing, pipeline
from dpo_jax.model import config as model_configs
from dpo_jax.model import families, hf, transformer
from dpo_jax.structs import Model, PyTree, UserError

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
  material: feeds.Material
  steps: int
  schedule: optax.Schedule
  tx: optax.GradientTransformation


def build(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, PyTree, PyTree | None, dict]:
  """Everything a run needs, cheap checks first.

  Returns:
    The run, the policy's initial parameters and the reference's (None if the loss reads none),
    both on host, and the ledger of the data.
  """
  given = {k: v for k, v in config.loss.items() if k != "name" and v is not None}
  loss = losses.resolve(config.loss.name, **given)
  sync = _sync(config.reference, loss)
  feeds.check(config, loss)
  executor = parallel.Executor(**config.parallel)
  _check_numbers(config)
  _check_divides(config.train.batch_size, config.train.accumulate, executor.groups)

  model_config, tokenizer = describe_model(config.model)
  model = transformer.build(
    model_config, dtype=config.model.compute_dtype, remat=config.model.remat
  )
  material, ledger = feeds.load(config, loss, tokenizer, model_config, executor.groups)
  passes = config.train.epochs * len(material.examples) / config.train.batch_size
  steps = config.train.steps or max(1, round(passes))
  schedule_args, rest = _split(
    config.optimizer, ("learning_rate", "schedule", "warmup_steps", "final_fraction")
  )
  schedule = optim.make_schedule(total_steps=steps, **schedule_args)
  objective = step.Objective(
    logps_fn=logprobs.make_logps_fn(model, beyond_shorter=loss.ld_alpha),
    loss=loss,
    answers=material.answers,
    aligned_fn=logprobs.make_aligned_fn(model, beyond_shorter=loss.ld_alpha),
    sync=sync,
  )
  run = Run(
    workdir=workdir,
    config=config,
    executor=executor,
    objective=objective,
    model=model,
    model_config=model_config,
    tokenizer=tokenizer,
    material=material,
    steps=steps,
    schedule=schedule,
    tx=optim.make_optimizer(schedule, **rest),
  )
  return run, *_load_params(config, model_config, loss.needs_reference), ledger


def _sync(section: ConfigDict, loss: losses.Loss) -> step.Sync | None:
  """How the reference follows the policy (TR-DPO), None for never."""
  every, alpha = section.sync_every, section.sync_alpha
  if every < 0:
    raise UserError(f"reference.sync_every is {every}; it must be 0 (never) or a number of steps")
  if not 0 < alpha <= 1:
    raise UserError(f"reference.sync_alpha is {alpha}; it must lie above 0 and be 1 at most")
  if every and not loss.needs_reference:
    raise UserError(
      f"reference.sync_every is {every}, but loss {loss.name!r} reads no reference; leave it 0"
    )
  return step.Sync(every, alpha) if every else None


def _split(section: ConfigDict, names: tuple[str, ...]) -> tuple[dict, dict]:
  first = {k: v for k, v in section.items() if k in names}
  return first, {k: v for k, v in section.items() if k not in names}


def _check_numbers(config: ConfigDict) -> None:
  """Values that would otherwise fail, or silently do nothing, only after everything is loaded."""
  for name in (
    "train.steps",
    "eval.every",
    "eval.batch_size",
    "checkpoint.every",
    "data.eval_limit",
    "eval.samples",
  ):
    section, field = name.split(".")
    if config[section][field] < 0:
      raise UserError(f"{name} is {config[section][field]}; it must be 0 or above")
  if not 0 <= config.seed < 2**32:
    raise UserError(f"seed is {config.seed}; it must lie between 0 and 2^32 - 1")
  if config.data.prompt_floor < 1:
    raise UserError(f"data.prompt_floor is {config.data.prompt_floor}; it must be 1 or above")
  if config.checkpoint.keep < 1:
    raise UserError(f"checkpoint.keep is {config.checkpoint.keep}; it must be 1 or above")
  if not config.train.steps and not 0 < config.train.epochs < float("inf"):
    raise UserError(f"train.epochs is {config.train.epochs}; it must be above 0")
  if not 0 <= config.data.eval_fraction < 1:
    raise UserError(f"data.eval_fraction is {config.data.eval_fraction}; it must lie in [0, 1)")
  if config.data.max_length < 2:
    raise UserError(f"data.max_length is {config.data.max_length}; a pair needs 2 tokens or more")
  if config.data.layout not in packing.LAYOUTS:
    raise UserError(f"data.layout is {config.data.layout!r}; known: {', '.join(packing.LAYOUTS)}")
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


def describe_model(
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
    model_config = families.from_hf(fields)
  pipeline.check_vocabulary(tokenizer, model_config.vocab)
  return model_config, tokenizer


def _load_params(config, model_config, needs_reference) -> tuple[PyTree, PyTree | None]:
  """Initial parameters of policy and reference, on host, each in its own dtype."""
  if config.model.path:
    _, params = hf.load(config.model.path)
  else:
    params = transformer.init_params(model_config, config.seed)
  # Rounded before the reference is taken from it: both start from the very same numbers.
  params = _cast(params, config.model.param_dtype)
  reference = None
  if needs_reference:
    reference = params
    if config.reference.path:
      other, reference = hf.load(config.reference.path)
      _check_alike(other, model_config, config.reference.path)
    reference = _cast(reference, config.reference.param_dtype)
  return params, reference


def _check_alike(reference, policy, path: str) -> None:
  """One compiled forward pass serves both, and one tokenizer: all that shapes a log-prob agrees."""
  for field in dataclasses.fields(policy):
    ours, theirs = getattr(policy, field.name), getattr(reference, field.name)
    if field.name not in ("init_std", "bos_id", "eos_ids", "pad_id") and ours != theirs:
      raise UserError(
        f"the reference {path} has {field.name} {theirs!r}, the policy {ours!r}; they must be of"
        " one shape and share one tokenizer"
      )


def _cast(params: PyTree, dtype: str) -> PyTree:
  return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
