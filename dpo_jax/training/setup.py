"""A configuration becomes a run: sections are unpacked here, once, into plain arguments.

`setup`, `datasets` and `train` are the only readers of a `ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpo_jax import logprobs, losses, step
from dpo_jax.data import chat_template, encode, packing
from dpo_jax.data.examples import Lazy
from dpo_jax.data.tokenizer import Tokenizer, load_tokenizer
from dpo_jax.distributed import processes
from dpo_jax.distributed.executor import Executor
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import attention_kernels, families, lora, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import Model, PyTree, UserError
from dpo_jax.training import datasets, optimizer, reference_cache

DTYPES = ("float32", "bfloat16")


class Run(NamedTuple):
  """A run, built: everything the loop reads and nothing that evolves."""

  workdir: pathlib.Path
  config: ConfigDict
  executor: Executor
  objective: step.Objective
  model: Model
  model_config: ModelConfig
  tokenizer: Tokenizer
  data: datasets.TrainingData
  steps: int
  schedule: optax.Schedule
  tx: optax.GradientTransformation
  adapter: peft.Adapter | None
  attention: str = "blocked"  # that is taken
  store: reference_cache.Store | None = None
  lacking: tuple[Lazy, ...] = ()  # whose reference log-probs it lacks


def build(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, PyTree, PyTree | None, dict]:
  """Everything a run needs, cheap checks first.

  Returns:
    The run; what is trained as it starts (the policy's parameters, or its adapters) and what stays
    frozen (the reference's; None if the loss reads none and nothing is adapted), for
    `Executor.place` to take, no array in both; and the ledger of the data.
  """
  loss, settings, executor = check(config)
  model_config, tokenizer = describe_model(config.model, config.data.template)
  for path in filter(None, (config.model.path, config.reference.path)):
    hf_checkpoint.check(path)
  _check_tokenizer(config.reference.path, tokenizer)
  start = None if settings is None else _start(config, model_config, settings)
  attention = choose_attention(config, model_config, executor)
  model, objective = make_objective(config, model_config, loss, settings, attention)
  training_data, ledger = datasets.load(
    config,
    loss,
    tokenizer,
    model_config,
    executor.groups,
    texts=attention in attention_kernels.TEXTS,
  )
  device = executor.devices[0]
  store, lacking, training_data = datasets.stored(
    config, model_config, device, attention, training_data
  )
  passes = config.train.epochs * len(training_data.examples) / config.train.batch_size
  steps = config.train.steps or max(1, round(passes))
  schedule, tx = make_optimizer(config, steps)
  places = executor.shardings(transformer.param_shapes(model_config))
  trained = _load(config, model_config, places)
  reference_params, adapter = None, None
  if settings:
    trained, reference_params, adapter = _adapted(config, settings, start, trained)
  elif loss.needs_reference and (lacking or not store):
    reference_params = _reference(config, model_config, places, trained)
  run = Run(
    workdir=workdir,
    config=config,
    executor=executor,
    objective=objective._replace(completions=training_data.completions),
    model=model,
    model_config=model_config,
    tokenizer=tokenizer,
    data=training_data,
    steps=steps,
    schedule=schedule,
    tx=tx,
    adapter=adapter,
    attention=attention,
    store=store,
    lacking=lacking,
  )
  return run, trained, reference_params, ledger


def check(config: ConfigDict) -> tuple[losses.Loss, LoRA | None, Executor]:
  """What can be said against a configuration before anything is read; loss, adapters, devices."""
  given = {k: v for k, v in config.loss.items() if k != "name" and v is not None}
  loss = losses.resolve(config.loss.name, **given)
  _sync(config.reference, loss)
  settings = _lora(config, loss)
  datasets.check(config, loss)
  executor = Executor(**{name: config.parallel[name] for name in Executor.SETTINGS})
  attention_kernels.check(config.model.attention)
  _check_numbers(config)
  _check_divides(config.train.batch_size, config.train.accumulate, executor.groups)
  return loss, settings, executor


def choose_attention(config: ConfigDict, model_config: ModelConfig, executor: Executor) -> str:
  """The attention that a run takes; says why where it is not the one that was asked for."""
  name = config.model.attention
  taken, why = attention_kernels.choose(
    name,
    model_config,
    dtype=config.model.compute_dtype,
    device=executor.devices[0],
    sequence=config.parallel.sequence,
    divided=executor.mode == "mesh" and len(executor.devices) > 1,
  )
  if why:
    print(f"model.attention is {name}, but {why}: {taken} is taken", file=sys.stderr)
  return taken


def make_objective(
  config: ConfigDict,
  model_config: ModelConfig,
  loss: losses.Loss,
  settings: LoRA | None,
  attention: str,
) -> tuple[Model, step.Objective]:
  """The model as it is computed, and what is minimised of rows with two answers."""
  model = transformer.build(
    model_config,
    dtype=config.model.compute_dtype,
    remat=config.model.remat,
    dropout=config.lora.dropout if settings else 0.0,
    attention=attention,
  )
  stored = bool(config.reference.store)
  objective = step.Objective(
    logps_fn=logprobs.make_logps_fn(model, beyond_shorter=loss.ld_alpha),
    loss=loss,
    scored_fn=logprobs.make_scored_fn(model, beyond_shorter=loss.ld_alpha, aligned=loss.wpo),
    balance=_balance(config.train.router_balance, model_config),
    sync=_sync(config.reference, loss),
    stored_fn=logprobs.make_stored_fn(beyond_shorter=loss.ld_alpha) if stored else None,
  )
  if settings:
    objective = objective._replace(
      policy=lambda trained, reference_params: lora.attach(
        reference_params, trained, settings.scale
      ),
      dropout_seed=config.seed if settings.dropout else None,
    )
  return model, objective


def make_optimizer(
  config: ConfigDict, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Of a run of so many steps."""
  schedule_args, rest = _split(
    config.optimizer, ("learning_rate", "schedule", "warmup_steps", "final_fraction")
  )
  schedule = optimizer.make_schedule(total_steps=steps, **schedule_args)
  tx = optimizer.make_optimizer(schedule, **rest)
  return schedule, optimizer.from_host(tx) if config.parallel.offload_optimizer else tx


def fill_store(run: Run, reference_params: PyTree | None) -> PyTree | None:
  """Computes what the store lacks, of a placed reference; says how far it is.

  Returns:
    What is needed of the reference from then on: with a store, only the base of adapters.
  """
  if not run.store:
    return reference_params
  forward = run.executor.compile_forward(logprobs.make_token_fn(run.model))
  token_fn = lambda batch: forward(reference_params, jax.tree.map(lambda x: x[None], batch))
  # All processes compute, the first one writes.
  store = run.store if processes.is_main_process() else None
  settings = run.config.train
  size = settings.batch_size // settings.accumulate
  started = said = time.perf_counter()
  for examples in run.lacking:
    batching = run.data.batching | {"batch_size": size}
    for done in reference_cache.fill(store, examples, token_fn, **batching):
      now = time.perf_counter()
      if now - said >= 5 or done == len(examples):
        said = now
        print(f"reference store: {done:,} of {len(examples):,} examples computed", file=sys.stderr)
  if run.lacking:
    print(f"reference store: filled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
  processes.wait("reference store")
  run.store.refresh()
  if run.adapter:
    return reference_params
  jax.tree.map(lambda x: x.delete(), reference_params)
  return None


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


def _lora(config: ConfigDict, loss: losses.Loss) -> LoRA | None:
  """What adapters are made of, None where the model itself is trained."""
  section = config.lora
  given = dict(section)
  path = given.pop("path")
  set_ = [name for name, usual in LoRA._field_defaults.items() if given[name] != usual]
  if path and (section.rank or set(set_) - {"dropout"}):
    name = "rank" if section.rank else min(set(set_) - {"dropout"})
    raise UserError(
      f"lora.{name} is {section[name]!r}, but the adapter {path} brings its own; leave it as it is"
    )
  if not path and not section.rank:
    if set_:
      raise UserError(
        f"lora.{set_[0]} is {given[set_[0]]!r}, but lora.rank is 0, so nothing would be adapted;"
        " set lora.rank, such as 16"
      )
    return None
  settings = LoRA(**given)
  if path:
    settings = peft.read_settings(path)[0]._replace(dropout=section.dropout)
  lora.check(settings)
  _check_base(config, loss)
  return settings


def _check_base(config: ConfigDict, loss: losses.Loss) -> None:
  """What adapters ask of the other sections: the reference is their base."""
  reference = config.reference
  if not config.model.path and not config.model.scratch:
    raise UserError("lora adapts a model that exists; name it, --config.model.path=DIR")
  if reference.path:
    raise UserError(
      f"reference.path is {reference.path!r}, but with lora the reference is the base, and the"
      " adapter of lora.path; leave it empty"
    )
  if reference.sync_every:
    raise UserError(
      f"reference.sync_every is {reference.sync_every}, but with lora the reference is the base,"
      " which stays as it is; leave it 0"
    )
  if loss.needs_reference and reference.param_dtype != config.model.param_dtype:
    raise UserError(
      f"reference.param_dtype is {reference.param_dtype!r} and model.param_dtype"
      f" {config.model.param_dtype!r}; with lora both are the same arrays: set them alike"
    )


def _start(config: ConfigDict, model_config: ModelConfig, settings: LoRA) -> PyTree:
  """The adapters that training starts from."""
  if config.lora.path:
    return peft.load(config.lora.path, model_config)[1]
  return lora.init(model_config, settings, config.seed)


def _adapted(
  config: ConfigDict, settings: LoRA, start: PyTree, base: PyTree
) -> tuple[PyTree, PyTree, peft.Adapter]:
  """What is trained, what stays frozen, and what is known of the adapters."""
  path = config.model.path
  base_name = str(pathlib.Path(path).resolve()) if path and pathlib.Path(path).is_dir() else path
  about = peft.Adapter(settings, base_name, peft.mark_of(base))
  if not config.lora.path:
    return start, base, about
  peft.check_base(config.lora.path, about.mark)
  # The adapter one starts from stays in the reference: without it the policy would not start there.
  return start, lora.attach(base, start, settings.scale), about


def _balance(weight: float | None, model_config: ModelConfig) -> float:
  """Of the term that spreads tokens over experts: as given, or as the model's folder has it."""
  if weight is None:
    return model_config.experts.balance if model_config.experts else 0.0
  if not model_config.experts:
    raise UserError(
      f"train.router_balance is {weight}, but {model_config.family} has no experts; leave it None"
    )
  if not 0 <= weight < float("inf"):
    raise UserError(f"train.router_balance is {weight}; it must be 0 or above")
  return weight


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


def describe_model(section: ConfigDict, template: str = "") -> tuple[ModelConfig, Tokenizer]:
  """The shape of the model and its tokenizer, no weights loaded; `template` as `data.template`."""
  if not section.path and not section.scratch:
    raise UserError("model.path is empty; name a Hugging Face folder, --config.model.path=DIR")
  if section.path and section.scratch:
    raise UserError("model.path and model.scratch are both given; keep one")
  if section.scratch and not section.tokenizer:
    raise UserError("model.tokenizer is empty; a model trained from scratch needs its folder")
  if section.path and not pathlib.Path(section.path).is_dir():
    raise UserError(
      f"model.path={section.path} is no folder that is there; name a Hugging Face model folder"
    )
  tokenizer = load_tokenizer(
    section.tokenizer or section.path,
    template_arguments=chat_template.read_arguments(template, "data.template"),
  )
  if section.path and peft.holds_one(section.path):
    raise UserError(
      f"model.path={section.path} is an adapter; name its base by model.path, itself by lora.path"
    )
  if section.path:
    model_config = hf_checkpoint.read_config(section.path)
  else:
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    fields = {"vocab_size": tokenizer.vocab_size} | special | section.scratch.to_dict()
    model_config = families.from_hf(fields)
  encode.check_vocabulary(tokenizer, model_config.vocab)
  return model_config, tokenizer


def _load(config: ConfigDict, model_config: ModelConfig, places: PyTree) -> PyTree:
  """Initial parameters of the policy, on the devices, in the type they are held in."""
  dtype = config.model.param_dtype
  if config.model.path:
    return hf_checkpoint.load(config.model.path, dtype=dtype, shardings=places)[1]
  make = lambda: transformer.init_params(model_config, config.seed, dtype=dtype)
  return jax.jit(make, out_shardings=places)()


def _reference(
  config: ConfigDict, model_config: ModelConfig, places: PyTree, policy: PyTree
) -> PyTree:
  """Parameters of the reference, in their own type and in buffers of their own."""
  path, dtype = config.reference.path, config.reference.param_dtype
  if not path:
    # Of the policy's numbers as it holds them: both start from the very same.
    return _copied(policy, dtype)
  _check_alike(hf_checkpoint.read_config(path), model_config, path)
  return hf_checkpoint.load(path, dtype=dtype, shardings=places)[1]


def _check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
  """The reference reads ids as the policy does, as far as its folder says."""
  if not path or not (pathlib.Path(path) / "tokenizer.json").is_file():
    return
  if not tokenizer.same_ids(load_tokenizer(path)):
    raise UserError(
      f"the reference {path} has another tokenizer than the policy; the two must share one"
    )


def _check_alike(reference, policy, path: str) -> None:
  """One compiled forward pass serves both, and one tokenizer: all that shapes a log-prob agrees."""
  for field in dataclasses.fields(policy):
    ours, theirs = getattr(policy, field.name), getattr(reference, field.name)
    if field.name not in ("init_std", "bos_id", "eos_ids", "pad_id") and ours != theirs:
      raise UserError(
        f"the reference {path} has {field.name} {theirs!r}, the policy {ours!r}; they must be of"
        " one shape and share one tokenizer"
      )


def _copied(params: PyTree, dtype: str) -> PyTree:
  """In another type, where they are; arrays on devices never share a buffer with the old ones."""
  on_device = jax.jit(lambda x: jnp.copy(x.astype(dtype)))
  on_host = lambda x: np.asarray(x, jnp.dtype(dtype))
  return jax.tree.map(lambda x: (on_device if isinstance(x, jax.Array) else on_host)(x), params)
