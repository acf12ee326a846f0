"""Refuses a run that certainly needs more memory than there is, before anything is loaded.

What is counted must all be there at one moment: the weights, the optimizer's moments, the
reference, and all gradients, where an update must wait for the last of them. Activations come on
top, so a run that passes may still run out of memory (`distributed.memory`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpo_jax import step
from dpo_jax.distributed import host_memory, memory
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import lora, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import PyTree, UserError
from dpo_jax.training import optimizer
from dpo_jax.training.setup.checks import Checked
from dpo_jax.training.setup.checks import check as check_config
from dpo_jax.utils import following

GB = 1e9
_BF16 = {"model.param_dtype": "bfloat16", "reference.param_dtype": "bfloat16"}
_LORA = {"lora.rank": 16, "reference.path": "", "reference.sync_every": 0}
_FSDP = {"parallel.fsdp": 0}  # 0 stands for all devices
# Changes that save memory. One that set-up refuses, or that saves nothing, is not suggested.
_CHANGES: tuple[dict[str, Any], ...] = (
  _LORA,
  _BF16,
  {"reference.param_dtype": "bfloat16"},
  {"reference.store": "DIR"},
  _FSDP,
  {"parallel.offload_optimizer": True},
  _LORA | _BF16,
  _LORA | _FSDP,
  _LORA | _BF16 | _FSDP,
)
_MOST = 3  # suggestions
MOST_BYTES = 64  # for each number of a model: more than any run stores, adapters included
_SHORT = {"lora.rank": "--lora_rank"}


def check(
  config: ConfigDict, checked: Checked, model_config: ModelConfig, adapters: LoRA | None
) -> None:
  """Checks that what a run stores fits in the memory that is free.

  Args:
    config, checked: of the run.
    model_config: shape of its model.
    adapters: how adapters are made, or None.

  Raises:
    UserError: one line with the least that is needed, what there is, and changes that help.
  """
  executor = checked.executor
  free = _free(executor)
  # Most models are far from any limit, and the shapes of their moments need not be traced.
  numbers = sum(x.size for x in jax.tree.leaves(transformer.param_shapes(model_config)))
  room = host_memory.available()
  most = MOST_BYTES * numbers * len(executor.devices)
  if free is not None and room is not None and most < min(free, room):
    return
  parts, on_host = needed(config, checked, model_config, adapters)
  least = sum(parts.values())
  if free is not None and least > free:
    each = ", ".join(f"{name} {count / GB:.1f}" for name, count in parts.items() if count)
    where = "this machine has" if _is_cpu(executor) else "each device has"
    raise UserError(
      f"training needs at least {least / GB:.1f} GB ({each}), and {where} {free / GB:.1f} GB free;"
      f" {_way_out(config, executor, model_config, adapters, least, free)}"
    )
  if room is not None and on_host > room:
    raise UserError(
      f"parallel.offload_optimizer needs {on_host / GB:.1f} GB of this machine's memory, which has"
      f" {room / GB:.1f} GB free; leave it off, or set --lora_rank=16"
    )


def needed(
  config: ConfigDict,
  checked: Checked,
  model_config: ModelConfig,
  adapters: LoRA | None,
  *,
  planned: bool = False,
) -> tuple[dict[str, int], int]:
  """Returns the bytes by part on the fullest device, and those in the host's memory.

  On a CPU, of all devices of this process together: they share one memory.

  Args:
    config, checked, model_config, adapters: of the run.
    planned: whether CPU devices stand for others, each with a memory of its own.
  """
  executor = checked.executor
  is_cpu = _is_cpu(executor) and not planned
  policy = _as(transformer.param_shapes(model_config), config.model.param_dtype)
  trained = lora.shapes(model_config, adapters) if adapters else policy
  reference = None
  if adapters:
    reference = policy  # the base, which is there for any loss, and once
  elif checked.loss.needs_reference and not config.reference.store:
    reference = _as(policy, config.reference.param_dtype)
  # How many steps there are changes no shape.
  settings = {**config.optimizer, "warmup_steps": None}
  _, tx = optimizer.build(1000, seed=config.seed, **settings)
  # No array is made: the model may be larger than any memory.
  state = jax.eval_shape(functools.partial(step.init_state, tx=tx, loss=checked.loss), trained)
  if checked.sync and checked.sync.average:
    average = jax.eval_shape(following.init_average, trained, reference)
    state = state._replace(reference=average)
  elif checked.sync:
    state, reference = state._replace(reference=reference), None
  state = executor.abstract(state)
  if reference is not None:
    reference = executor.abstract(reference)
  local = sum(device.process_index == jax.process_index() for device in executor.devices)
  copies = local if is_cpu else 1

  on_host = local * memory.host_bytes(state)

  def count(tree: PyTree) -> int:
    # A CPU's devices have no memory besides that of the host.
    stored = memory.host_bytes(tree) if is_cpu else 0
    return copies * (memory.device_bytes(tree) + stored)

  weights = count(state.params)
  # An update waits for all gradients to clip their norm, or to sum them over micro-batches.
  waits = config.optimizer.clip_norm > 0 or config.train.accumulate > 1
  parts = {
    "weights" if not adapters else "adapters": weights,
    # One of every number that is trained, in its type.
    "gradients": weights if waits else 0,
    "optimizer": count(state.opt_state),
    "base" if adapters else "reference": count((reference, state.reference)),
  }
  return parts, 0 if is_cpu else on_host


def _as(shapes: PyTree, dtype: str) -> PyTree:
  """Returns the same shapes in another type."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def _is_cpu(executor: Executor) -> bool:
  return executor.devices[0].platform == "cpu"


def _free(executor: Executor) -> int | None:
  """Returns the bytes that arrays may still take on a device; None where it is not known."""
  return host_memory.available() if _is_cpu(executor) else memory.device_free()


def _way_out(
  config: ConfigDict,
  executor: Executor,
  model_config: ModelConfig,
  adapters: LoRA | None,
  least: int,
  free: int,
) -> str:
  """Returns changes that save memory, as a phrase: those that are enough, if there are any."""
  savings = _savings(config, model_config, adapters)
  found = sorted((one for one in savings if one[0] < least), key=lambda one: one[0])
  enough = [(count, flags) for count, flags in found if count <= free]
  # Of two changes that are enough, one that does all of the other and more is not needed.
  sets = [set(flags.split()) for _, flags in enough]
  enough = [one for one, mine in zip(enough, sets, strict=True) if not any(x < mine for x in sets)]
  more = "a machine with more memory" if _is_cpu(executor) else "more devices"
  if not found:
    return f"use a smaller model or {more}"
  named = " or ".join(f"{flags} ({n / GB:.1f} GB)" for n, flags in (enough or found)[:_MOST])
  if enough:
    return f"use {named}"
  return f"it takes a smaller model or {more}; what saves most is {named}"


def _savings(
  config: ConfigDict, model_config: ModelConfig, adapters: LoRA | None
) -> Iterator[tuple[int, str]]:
  """Yields the bytes that each change would need, and the flags that make it."""
  seen: list[dict[str, Any]] = []
  devices = len(jax.devices()[: config.parallel.devices or None])
  fsdp = devices // (config.parallel.tensor * config.parallel.sequence)
  for change in _CHANGES:
    # A copy, so that each change is made to the user's own configuration and to no other change.
    other = config.copy_and_resolve_references()
    values = change | ({"parallel.fsdp": fsdp} if change.keys() & _FSDP.keys() else {})
    values = {name: value for name, value in values.items() if _value(config, name) != value}
    if adapters:
      values = {name: value for name, value in values.items() if name not in _LORA}
    if not values or values in seen:
      continue
    seen.append(values)
    other.update_from_flattened_dict(values)
    try:
      checked = check_config(other)
      added = LoRA(rank=other.lora.rank) if other.lora.rank else None
      parts, _ = needed(other, checked, model_config, adapters or added)
    except UserError:
      continue
    flags = (f"{_SHORT.get(n, f'--config.{n}')}={value}" for n, value in values.items())
    yield sum(parts.values()), " ".join(flags)


def _value(config: ConfigDict, name: str) -> Any:
  section, field = name.split(".")
  return config[section][field]
