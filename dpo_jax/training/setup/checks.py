"""The first part of set-up: everything that can be said against a configuration without a file.

Nothing here opens a file or places an array. Devices are counted, since a batch must divide among
them. A mistake found here would otherwise show after minutes of loading, or silently do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpo_jax import losses, step
from dpo_jax.data import mixture, packing
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import attention_kernels, lora, transformer
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import Device, UserError
from dpo_jax.training import on_policy, optimizer
from dpo_jax.utils import following

DTYPES = ("float32", "bfloat16")
AUTO = "auto"  # of model.remat: chosen from the memory of the devices
# What other programs call them. float16 needs a scaled loss, or small gradients become 0.
_OTHER_DTYPES = {
  "bfloat16": ("bfloat16", "bf16", "bfloat", "bf16-mixed"),
  "float32": ("float32", "fp32", "f32", "float", "single", "32", "tf32"),
  "float16": ("float16", "fp16", "f16", "half", "16", "16-mixed"),
}


class Checked(NamedTuple):
  """The parts of a run that its configuration alone decides.

  Attributes:
    loss: the loss.
    sync: how the reference follows the policy (TR-DPO); None for a reference that stays.
    executor: the devices, with nothing on them.
  """

  loss: losses.Loss
  sync: step.Sync | None
  executor: Executor


def check(config: ConfigDict, devices: Sequence[Device] | None = None) -> Checked:
  """Checks all sections of a configuration, alone and against each other.

  Args:
    config: of the run.
    devices: those that the run is compiled for; None for devices of this machine, as
      `parallel.devices` has them.

  Raises:
    UserError: one line with the value, the rule and a way out.
  """
  # The loss first: whether it reads a reference decides what the other sections may say.
  given = {k: v for k, v in config.loss.items() if k != "name" and v is not None}
  loss = losses.resolve(config.loss.name, **given)
  sync = _check_sync(config.reference, loss)
  _check_lora(config, loss)
  _check_on_policy(config, loss)
  _check_store(config, loss)
  _check_sources(config)
  # From here on JAX has started its devices, which may take seconds on an accelerator.
  settings: dict[str, Any] = {name: config.parallel[name] for name in Executor.SETTINGS}
  if devices is not None:
    settings["devices"] = devices
  executor = Executor(**settings)
  attention_kernels.check(config.model.attention)
  _check_numbers(config)
  _check_divides(config.train.batch_size, config.train.accumulate, executor.groups)
  _check_optimizer(config)
  return Checked(loss, sync, executor)


def check_inputs(config: ConfigDict) -> None:
  """Checks that a model and data are named; `plan` does without data and tokenizer.

  Raises:
    UserError: one of them is missing, or named twice.
  """
  section = config.model
  if not section.path and not section.scratch:
    raise UserError("model.path is empty; name a Hugging Face folder, --model=DIR")
  if section.path and section.scratch:
    raise UserError("model.path and model.scratch are both given; keep one")
  if section.scratch and not section.tokenizer:
    raise UserError("model.tokenizer is empty; a model trained from scratch needs its folder")
  if config.data.path and config.data.mix:
    raise UserError(f"data.path={config.data.path} and data.mix are both given; keep one")
  if not config.data.path and not config.data.mix:
    what = "prompts" if config.on_policy.reward else "rows"
    raise UserError(f"data.path is empty; name a file of {what}, --data=FILE")


def check_base_is_kept(config: ConfigDict) -> None:
  """Refuses to train adapters of random weights, which no folder has; to time them is fine."""
  if config.model.scratch and (config.lora.rank or config.lora.path):
    raise UserError(
      "lora would adapt a model made from nothing (model.scratch), which is kept nowhere; name one"
      " that exists, --config.model.path=DIR, or train the model itself"
    )


def _check_sync(section: ConfigDict, loss: losses.Loss) -> step.Sync | None:
  """Returns how the reference follows the policy (TR-DPO), None for never."""
  every, alpha = section.sync_every, section.sync_alpha
  if every < 0:
    raise UserError(f"reference.sync_every is {every}; it must be 0 (never) or a number of steps")
  # Also where nothing is synchronised: a value out of range is never passed over in silence.
  if not 0 < alpha <= 1:
    raise UserError(f"reference.sync_alpha is {alpha}; it must lie above 0 and be 1 at most")
  if every and not loss.needs_reference:
    raise UserError(
      f"reference.sync_every is {every}, but loss {loss.name!r} reads no reference; leave it 0"
    )
  average = _check_average(section)
  return step.Sync(every, alpha, average) if every else None


def _check_average(section: ConfigDict) -> following.Average | None:
  """Returns the rule of a reference that is an average of the policy (BEMA); None if it is none."""
  usual = following.Average()
  average = following.Average(section.bema_power, section.bema_bias_power, section.bema_lag)
  if not section.bema:
    for name, value in average._asdict().items():
      if value != getattr(usual, name):
        raise UserError(
          f"reference.bema_{name} is {value}, but reference.bema is False, so nothing reads it; set"
          " --config.reference.bema=True"
        )
    return None
  if not section.sync_every:
    raise UserError(
      "reference.bema is True, but reference.sync_every is 0, so that the reference never moves;"
      " set it, such as --config.reference.sync_every=400"
    )
  if section.path:
    raise UserError(
      f"reference.path is {section.path!r}, but with reference.bema the reference is an average of"
      " the policy, which begins at the policy itself; leave it empty"
    )
  if section.sync_alpha != 0.6:
    raise UserError(
      f"reference.sync_alpha is {section.sync_alpha}, but with reference.bema the reference is an"
      " average, and nothing reads it; leave it 0.6"
    )
  for name, value in average._asdict().items():
    if not 0 <= value < float("inf"):
      raise UserError(f"reference.bema_{name} is {value}; it must be a number of 0 or above")
  return average


def _check_lora(config: ConfigDict, loss: losses.Loss) -> None:
  """Checks the section of adapters; those of an adapter folder are read later."""
  section = config.lora
  given = dict(section)
  path = given.pop("path")
  # Fields that differ from their default: one that was set and does nothing would be a mistake.
  set_ = [name for name, usual in LoRA._field_defaults.items() if given[name] != usual]
  # Dropout alone may be set beside a folder: it belongs to training, not to the adapter.
  if path and (section.rank or set(set_) - {"dropout"}):
    name = "rank" if section.rank else min(set(set_) - {"dropout"})
    raise UserError(
      f"lora.{name} is {section[name]!r}, but the adapter of lora.path={path} has its own; leave"
      " it out"
    )
  if not path and not section.rank:
    if set_:
      raise UserError(
        f"lora.{set_[0]} is {given[set_[0]]!r}, but lora.rank is 0, so nothing would be adapted;"
        " set it, such as --lora_rank=16"
      )
    return
  # Settings of an adapter folder are checked once it is read.
  if not path:
    lora.check(LoRA(**given))
  _check_base(config, loss)


def _check_base(config: ConfigDict, loss: losses.Loss) -> None:
  """Checks what adapters require of the other sections: the reference is their base."""
  reference = config.reference
  if not config.model.path and not config.model.scratch:
    raise UserError("lora adapts a model that exists; name it, --model=DIR")
  if reference.path:
    raise UserError(
      f"reference.path is {reference.path!r}, but with adapters the reference is the model itself"
      " (and the adapter of lora.path); leave --reference out"
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


def _check_on_policy(config: ConfigDict, loss: losses.Loss) -> None:
  """Checks the settings of on-policy training, or that the loss can do without it."""
  if config.on_policy.reward:
    # A reward of one's own is imported here: a mistake in it shows before anything is loaded.
    on_policy.check(loss, **config.on_policy)
  elif loss.is_on_policy:
    raise UserError(
      f"loss {loss.name!r} learns from samples of the policy itself; name a reward for them,"
      " --config.on_policy.reward=NAME, and prompts, --data=FILE"
    )


def _check_store(config: ConfigDict, loss: losses.Loss) -> None:
  """Checks that log-probs of the reference could be stored; the folder is looked at later."""
  path, sync_every = config.reference.store, config.reference.sync_every
  if not path:
    return
  why = None
  if not loss.needs_reference:
    why = f"loss {loss.name!r} reads no reference"
  elif sync_every:
    why = f"the reference follows the policy (reference.sync_every={sync_every})"
  elif config.on_policy.reward:
    why = "the completions are sampled anew at every step (on_policy.reward)"
  if why:
    raise UserError(f"reference.store is {path!r}, but {why}; leave it empty")


def _check_sources(config: ConfigDict) -> None:
  """Checks the descriptions of the mix and of evaluation sets; files are looked at later."""
  data = config.data
  mixture.read_sources(data.mix.to_dict(), "data.mix")
  mixture.read_evaluation_sets(data.eval_sets.to_dict(), "data.eval_sets")
  if not config.on_policy.reward:
    return
  for name in ("mix", "eval_sets", "drop_duplicates"):
    if data[name]:
      raise UserError(
        f"data.{name} is of rows with completions, and on_policy.reward samples from prompts; leave"
        " it out, and name files of prompts by data.path and data.eval_path"
      )


def _check_numbers(config: ConfigDict) -> None:
  """Checks the range of every number that no other part of set-up checks."""
  for name in (
    "train.steps",
    "eval.every",
    "eval.batch_size",
    "checkpoint.every",
    "checkpoint.minutes",
    "data.eval_limit",
    "eval.samples",
  ):
    section, field = name.split(".")
    if not 0 <= config[section][field] < float("inf"):
      zero = " (0: as many as train.epochs takes)" if name == "train.steps" else ""
      raise UserError(f"{name} is {config[section][field]}; it must be 0 or above{zero}")
  # Sampling packs the seed and the step into 64 bits.
  if not 0 <= config.seed < 2**32:
    raise UserError(f"seed is {config.seed}; it must lie between 0 and 2^32 - 1")
  if config.data.prompt_floor < 1:
    raise UserError(f"data.prompt_floor is {config.data.prompt_floor}; it must be 1 or above")
  if config.checkpoint.keep < 1:
    raise UserError(f"checkpoint.keep is {config.checkpoint.keep}; it must be 1 or above")
  if not config.train.steps and not 0 < config.train.epochs < float("inf"):
    raise UserError(f"train.epochs is {config.train.epochs}; it must be above 0")
  # At 1 nothing would be left to train on.
  if not 0 <= config.data.eval_fraction < 1:
    raise UserError(
      f"data.eval_fraction is {config.data.eval_fraction}; it must be 0 or above and below 1"
      " (0.1 is 10%)"
    )
  if config.data.max_length < 2:
    raise UserError(f"data.max_length is {config.data.max_length}; a pair needs 2 tokens or more")
  known = (AUTO, *transformer.REMAT)
  if config.model.remat not in known:
    raise UserError(f"model.remat is {config.model.remat!r}; known: {', '.join(known)}")
  if config.data.layout not in packing.LAYOUTS:
    raise UserError(f"data.layout is {config.data.layout!r}; known: {', '.join(packing.LAYOUTS)}")
  for name in ("model.compute_dtype", "model.param_dtype", "reference.param_dtype"):
    section, field = name.split(".")
    if config[section][field] not in DTYPES:
      raise UserError(
        f"{name} is {config[section][field]!r}; {_dtype_hint(config[section][field])}"
      )


def _dtype_hint(given: str) -> str:
  """Says which type was probably meant."""
  word = given.lower().rpartition(".")[2]  # torch.bfloat16
  meant = next((dtype for dtype, others in _OTHER_DTYPES.items() if word in others), None)
  if meant == "float16":
    return "float16 is not supported; use bfloat16"
  return f"did you mean {meant}?" if meant else f"known: {', '.join(DTYPES)}"


def _check_divides(batch_size: int, accumulate: int, devices: int) -> None:
  """Checks that every device has as many pairs of every micro-batch as any other."""
  if batch_size < 1:
    raise UserError(f"train.batch_size is {batch_size}; it must be 1 or more")
  if accumulate < 0:
    raise UserError(
      f"train.accumulate is {accumulate}; it must be 1 or more, or 0 for as few as the memory of"
      " the devices suffices for"
    )
  # Loads are equal, and shapes are the same on all devices, only where every one has as many. What
  # is chosen divides the pairs of a device.
  unit = max(1, accumulate) * devices
  if batch_size % unit:
    lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
    many = f"{devices} device{'s' * (devices != 1)}"
    if accumulate > 1:
      many += f" x {accumulate} micro-batches"
    way = f"try {f'{lower} or {upper}' if lower else upper}"
    # Fewer micro-batches keep the batch as it is.
    fewer = [n for n in range(1, accumulate) if batch_size % (n * devices) == 0]
    if fewer:
      way += f", or --accumulate={fewer[-1]}"
    raise UserError(f"train.batch_size {batch_size} is not divisible by {many}; {way}")


def _check_optimizer(config: ConfigDict) -> None:
  """Makes the optimizer and throws it away, for what it says against its settings."""
  steps, section = config.train.steps, config.optimizer
  if steps:
    optimizer.build(steps, **section)
  else:
    # How many steps there are is known once the data is read. A warm-up longer than that is refused
    # then; until then only the other settings can be.
    optimizer.build(1, **{**section, "warmup_steps": None})
