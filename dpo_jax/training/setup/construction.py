"""The third part of set-up: weights are loaded, objective and optimizer made."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpo_jax import logprobs, losses, step
from dpo_jax.data.examples import Lazy
from dpo_jax.distributed import processes
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft, safetensors_files
from dpo_jax.model import attention_kernels, lora, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import Device, Model, PyTree
from dpo_jax.training import optimizer, reference_cache
from dpo_jax.training.checkpoint import latest_step
from dpo_jax.training.run import LoopSettings, Run
from dpo_jax.training.setup.checks import Checked
from dpo_jax.training.setup.description import Described


def construct(
  config: ConfigDict, workdir: pathlib.Path, checked: Checked, described: Described
) -> tuple[Run, PyTree, PyTree | None]:
  """Loads the weights and makes the programs' parts: the run, and the trees as `build` has them.

  The order is important: the store comes first, since a store that lacks nothing spares the
  reference; and the reference comes after the policy, whose numbers it copies.
  """
  model_config, adapters, executor = described.model_config, described.adapters, checked.executor
  schedule, tx = make_optimizer(config, described.steps)
  model, objective = make_objective(
    config, model_config, checked, adapters, described.attention, described.data.completions
  )
  data, store = described.data, None
  if data.mixture:
    objective = objective._replace(sources=data.mixture.names, row_starts=data.mixture.row_starts)
  lacking: tuple[Lazy, ...] = ()
  if config.reference.store:
    device = executor.devices[0]
    key = reference_key(config, model_config, device, described.attention)
    store = reference_cache.Store(config.reference.store, key)
    lacking, (examples, held_out) = reference_cache.look_up(store, data.examples, data.held_out)
    data = data._replace(examples=examples, held_out=held_out)
  # Weights are read straight to the devices that need them: no host has the whole model.
  places = executor.shardings(transformer.param_shapes(model_config))
  trained = _load_policy(config, model_config, places)
  reference_params, adapter = None, None
  if adapters:
    trained, reference_params, adapter = _adapt(config, adapters, described.start, trained)
  elif checked.loss.needs_reference and (lacking or not store):
    # With a store, only to compute what it lacks; `loop.fill_store` then deletes it.
    reference_params = _load_reference(config, places, trained)
  run = Run(
    workdir=workdir,
    settings=_loop_settings(config),
    executor=executor,
    objective=objective,
    model=model,
    model_config=model_config,
    tokenizer=described.tokenizer,
    data=data,
    steps=described.steps,
    schedule=schedule,
    tx=tx,
    adapter=adapter,
    attention=described.attention,
    store=store,
    lacking=lacking,
  )
  return run, trained, reference_params


def _loop_settings(config: ConfigDict) -> LoopSettings:
  """Returns the plain values that the loop needs."""
  own, theirs = config.model.param_dtype, config.reference.param_dtype
  return LoopSettings(
    seed=config.seed,
    eval_every=config.eval.every,
    # As many as a micro-batch: evaluation then fits wherever a step does.
    eval_batch_size=config.eval.batch_size or config.train.batch_size // config.train.accumulate,
    eval_samples=config.eval.samples,
    eval_max_tokens=config.on_policy.max_tokens if config.on_policy.reward else 0,
    checkpoint_every=config.checkpoint.every,
    checkpoint_minutes=config.checkpoint.minutes,
    checkpoint_keep=config.checkpoint.keep,
    export_best=config.export.best,
    # A wider type keeps the policy's numbers as they are, a narrower one rounds them.
    starts_as_reference=not config.reference.path and theirs in (own, "float32"),
    learning_rate=config.optimizer.learning_rate,
    compute_dtype=config.model.compute_dtype,
    data_path=config.data.path,
    # From scratch, the folder that was named for the tokenizer is all there is to copy from.
    source=config.model.path or config.model.tokenizer,
  )


def make_objective(
  config: ConfigDict,
  model_config: ModelConfig,
  checked: Checked,
  adapters: LoRA | None,
  attention: str,
  completions: int,
) -> tuple[Model, step.Objective]:
  """Returns the model as it is computed, and the objective that a step minimises."""
  loss = checked.loss
  model = transformer.build(
    model_config,
    dtype=config.model.compute_dtype,
    remat=config.model.remat,
    dropout=config.lora.dropout if adapters else 0.0,  # of the inputs of adapters
    attention=attention,
  )
  weight = config.train.router_balance
  if weight is None:  # as the model's folder has it
    weight = model_config.experts.balance if model_config.experts else 0.0
  objective = step.Objective(
    logps_fn=logprobs.make_scored_fn(
      model,
      # That of the devices which run it, not of those at hand: a plan compiles for others.
      budget=logprobs.logit_budget(checked.executor.devices[0].platform, checked.executor.memory),
      beyond_shorter=loss.ld_alpha,
      aligned=loss.wpo,
    ),
    loss=loss,
    completions=completions,
    reference=_reference_kind(config, loss, checked.sync),
    balance=weight,
    rounding_seed=config.seed,
  )
  if adapters:

    def policy(trained: PyTree, reference_params: PyTree | None) -> PyTree:
      return lora.attach(reference_params, trained, adapters.scale)

    objective = objective._replace(
      policy=policy, dropout_seed=config.seed if adapters.dropout else None
    )
  return model, objective


def _reference_kind(
  config: ConfigDict, loss: losses.Loss, sync: step.Sync | None
) -> step.Reference:
  """Returns how the reference's log-probs come about."""
  if not loss.needs_reference:
    return step.NoReference()
  if config.reference.store:
    return step.StoredReference(logprobs.make_stored_fn(beyond_shorter=loss.ld_alpha))
  return step.LiveReference(sync)


def make_optimizer(
  config: ConfigDict, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns the learning-rate schedule and the optimizer of a run of so many steps."""
  schedule, tx = optimizer.build(steps, seed=config.seed, **config.optimizer)
  return schedule, optimizer.from_host(tx) if config.parallel.offload_optimizer else tx


def _load_policy(config: ConfigDict, model_config: ModelConfig, places: PyTree) -> PyTree:
  """Returns the policy's initial parameters, on the devices, in the type they are kept in."""
  dtype = config.model.param_dtype
  if config.model.path:
    return hf_checkpoint.load(config.model.path, dtype=dtype, shardings=places)[1]

  def make() -> PyTree:
    return transformer.init_params(model_config, config.seed, dtype=dtype)

  # Sampled straight to their places: a large model would not fit on one device first.
  return jax.jit(make, out_shardings=places)()


def _load_reference(config: ConfigDict, places: PyTree, policy: PyTree) -> PyTree:
  """Returns the reference's parameters, in their own type and in buffers of their own."""
  path, dtype = config.reference.path, config.reference.param_dtype
  if path:
    return hf_checkpoint.load(path, dtype=dtype, shardings=places)[1]
  # From the policy's arrays, not from its folder: both start from the very same rounded numbers.
  return _copy(policy, dtype)


def _copy(params: PyTree, dtype: str) -> PyTree:
  """Copies a tree in another type, where it is; no array shares a buffer with the old ones."""

  @jax.jit
  def on_device(x: jax.Array) -> jax.Array:
    return jnp.copy(x.astype(dtype))  # without the copy, one of the same type would be an alias

  def copy(x: Any) -> Any:
    return on_device(x) if isinstance(x, jax.Array) else np.asarray(x, jnp.dtype(dtype))

  return jax.tree.map(copy, params)


def _adapt(
  config: ConfigDict, adapters: LoRA, start: PyTree, base: PyTree
) -> tuple[PyTree, PyTree, peft.Adapter]:
  """Returns what is trained, what stays frozen, and the facts that an exported adapter states."""
  path = config.model.path
  # Absolute, since the exported adapter names its base from another folder.
  base_name = str(pathlib.Path(path).resolve()) if path and pathlib.Path(path).is_dir() else path
  about = peft.Adapter(adapters, base_name, peft.fingerprint_of(base))
  if not config.lora.path:
    return start, base, about
  peft.check_base(config.lora.path, about.fingerprint)
  # The adapter one starts from stays in the reference: without it the policy would not start there.
  return start, lora.attach(base, start, adapters.scale), about


# -- descriptions of a run, as plain dictionaries --------------------------------------------------


def reference_key(
  config: ConfigDict, model_config: ModelConfig, device: Device, attention: str
) -> dict[str, Any]:
  """Returns all that the reference's log-probs depend on besides prompt and completion.

  It is the key of a folder of the store, so its names must not change.
  """
  path, types = config.reference.path, [config.reference.param_dtype]
  if not path:  # it has the policy's numbers, in the type that the policy keeps them in
    path, types = config.model.path, [config.model.param_dtype, *types]
  weights: Any = {"scratch": config.model.scratch.to_dict(), "seed": config.seed}
  # Every attention over rows gives the same to rounding, as every topology does.
  kernel = {"attention": attention} if attention in attention_kernels.SEQUENCE_KERNELS else {}
  return kernel | {
    "weights": safetensors_files.digest(pathlib.Path(path)) if path else weights,
    "adapter": peft.digest(config.lora.path) if config.lora.path else None,
    "model": dataclasses.asdict(model_config),
    "param_dtypes": types,
    "compute_dtype": config.model.compute_dtype,
    "layout": config.data.layout,
    # Other devices and compilers round differently: what they computed is not found.
    "device": device.device_kind,
    "jax": jax.__version__,
  }


def facts(config: ConfigDict, run: Run) -> dict[str, Any]:
  """Returns what must be identical in all processes of a run, by the names that errors use."""
  sections = json.loads(config.to_json_best_effort())
  sections["parallel"].pop("process")  # the one field in which processes differ
  return {
    **{f"config.{name}": value for name, value in sections.items()},
    "the code": processes.code_digest(),
    **run.inputs,
    "what the reference store lacks": [len(some) for some in run.lacking],
    "how far the run has come": latest_step(run.workdir / "checkpoints"),
  }
