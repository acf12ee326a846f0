"""Chooses micro-batches and what the backward pass recomputes, from the memory of the devices.

This is for `train.accumulate=0` and `model.remat=auto`. What was chosen takes the place of these
values in the configuration, so that a run stores it, and has it again when it is resumed on other
devices. Where the memory is not known, as on a CPU, the choice is one micro-batch and `dots`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from dpo_jax import logprobs
from dpo_jax.data import batches
from dpo_jax.data.batches import Batching
from dpo_jax.data.examples import Example, Measured
from dpo_jax.distributed import memory, processes
from dpo_jax.model import attention_kernels
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.lora import LoRA
from dpo_jax.training.setup import footprint
from dpo_jax.training.setup.checks import AUTO, Checked
from dpo_jax.utils import messages
from dpo_jax.utils import workdir as workdirs

USUAL_REMAT = "dots"
# Tokens of a micro-batch on a device that keep it busy: on an H200, 8 pairs of 800 tokens were
# trained at 86% of the rate of 32 (docs/benchmarks.md).
ENOUGH = 6144
# Share of the free memory that an estimate may fill: buffers do not fit without gaps.
FILLED = 0.95


class Micro(NamedTuple):
  """The share of a device in one micro-batch.

  Attributes:
    tokens: positions of its rows.
    scored: scored tokens, padding included.
    in_sequences: positions of its sequences; 0 where attention reads rows.
  """

  tokens: int
  scored: int
  in_sequences: int = 0


class Choice(NamedTuple):
  """A way to take a step, and what it needs.

  Attributes:
    accumulate: micro-batches.
    remat: what the backward pass recomputes.
    needed: bytes of a device, by estimate; 0 where none was made.
  """

  accumulate: int
  remat: str
  needed: int = 0


def is_settled(config: ConfigDict) -> bool:
  """Returns whether both fields have values of their own."""
  return config.train.accumulate > 0 and config.model.remat != AUTO


def apply(config: ConfigDict, choice: Choice) -> None:
  """Puts a choice in the place of the fields that are left open."""
  config.train.accumulate = config.train.accumulate or choice.accumulate
  if config.model.remat == AUTO:
    config.model.remat = choice.remat


def take_stored(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Takes fields that are left open from the run in a folder, if there is one."""
  stored = workdirs.stored_config(workdir)
  if stored is None:
    return
  # A run that began before the fields could be left open had the usual values.
  train, model = stored.get("train", {}), stored.get("model", {})
  apply(config, Choice(train.get("accumulate", 1), model.get("remat", USUAL_REMAT)))


def settle(
  config: ConfigDict,
  checked: Checked,
  model_config: ModelConfig,
  adapters: LoRA | None,
  attention: str,
  examples: Sequence[Example] | Measured,
  *,
  room: int | None = None,
) -> None:
  """Replaces the fields that are left open by what fits, and reports it.

  Args:
    config: of the run, changed in place.
    checked, model_config, adapters, attention: of the run.
    examples: that it trains on, or their lengths.
    room: bytes of a device that are free; None asks the devices.
  """
  if is_settled(config):
    return
  if room is None:
    room = _free(checked)
  if room is None:
    apply(config, Choice(1, USUAL_REMAT))
    return
  executor = checked.executor
  given = config.train.accumulate
  counts = [given] if given else divisors(config.train.batch_size // executor.groups)
  remats = [USUAL_REMAT, "narrow", "full"] if config.model.remat == AUTO else [config.model.remat]
  batching = Batching(
    layout=config.data.layout,
    row_length=config.data.row_length,
    groups=executor.groups,
    per_line=attention_kernels.sequences_per_line(attention, model_config, executor.devices[0]),
  )

  @functools.cache
  def micro(accumulate: int) -> Micro:
    shape = batches.usual_shape(
      examples,
      batch_size=config.train.batch_size,
      batching=batching,
      accumulate=accumulate,
      balance=config.data.balance,
    )
    # Devices of the axis "sequence" share the positions of a group.
    parts = config.parallel.sequence
    rows = shape.rows // shape.groups
    return Micro(
      rows * shape.length // parts, shape.scored // parts, shape.lines * shape.width // parts
    )

  held, _ = footprint.needed(config, checked, model_config, adapters, planned=True)
  platform = executor.devices[0].platform
  step_bytes = functools.partial(
    _step_bytes, config, model_config, held, platform, executor.memory or room
  )

  def estimate(accumulate: int, remat: str) -> int:
    return step_bytes(micro(accumulate), accumulate, remat)

  options = in_order(counts, remats, lambda count: micro(count).tokens)
  choice = choose(options, estimate, int(FILLED * room))
  _report(config, choice, room)
  apply(config, choice)


def divisors(pairs: int) -> list[int]:
  """Returns the numbers of micro-batches that divide the pairs of a device evenly, from 1."""
  return [count for count in range(1, pairs + 1) if pairs % count == 0]


def in_order(
  counts: Sequence[int], remats: Sequence[str], tokens: Callable[[int], int]
) -> Iterator[tuple[int, str]]:
  """Yields micro-batches and remat, those first that take less time.

  Args:
    counts: numbers of micro-batches, from the least.
    remats: what the backward pass recomputes, from the least.
    tokens: number of micro-batches -> tokens of one of them on a device.
  """
  # The order is important: to recompute everything takes a third of the step more, and two
  # micro-batches for one next to nothing, as long as each keeps the device busy.
  *cheaper, last = remats
  for remat in cheaper:
    yield from ((count, remat) for count in counts if count == counts[0] or tokens(count) >= ENOUGH)
  yield from ((count, last) for count in counts)


def choose(
  options: Iterable[tuple[int, str]], estimate: Callable[[int, str], int], room: int
) -> Choice:
  """Returns the first option that fits, or if none does the one that needs least.

  Args:
    options: micro-batches and remat, the best first.
    estimate: bytes that an option needs.
    room: bytes of a device that may be used.
  """
  least = None
  for accumulate, remat in options:
    found = Choice(accumulate, remat, estimate(accumulate, remat))
    if found.needed <= room:
      return found
    if least is None or found.needed < least.needed:
      least = found
  assert least is not None, "there is one option or more"
  return least


def _free(checked: Checked) -> int | None:
  """Returns the free bytes of a device, the same in all processes; None where it is not known."""
  device = checked.executor.devices[0]
  # A CPU's memory is that of the whole machine, and shared: nothing is chosen by it.
  free = None if device.platform == "cpu" else memory.device_free()
  # The devices of two processes differ by a little, and the choice must not.
  said = processes.from_main_process(str(free or 0))
  return int(said) or None


def _report(config: ConfigDict, choice: Choice, room: int) -> None:
  """Says what was chosen, and why."""
  chosen = []
  if not config.train.accumulate:
    chosen.append(f"train.accumulate auto: {choice.accumulate}")
  if config.model.remat == AUTO:
    chosen.append(f"model.remat auto: {choice.remat}")
  size = f"{choice.needed / memory.GIB:.1f} of {room / memory.GIB:.1f} GiB by estimate"
  line = f"{', '.join(chosen)} ({size})"
  if choice.needed <= room:
    messages.show(line)
  else:
    messages.warn(
      f"{line}: it may run out of memory; divide the model by parallel.fsdp, set a"
      " lower train.batch_size or data.max_length, or --lora_rank=16"
    )


# --- the estimate ---------------------------------------------------------------------------------


def _step_bytes(
  config: ConfigDict,
  model_config: ModelConfig,
  held: dict[str, int],
  platform: str,
  room: int,
  micro: Micro,
  accumulate: int,
  remat: str,
) -> int:
  """Estimates the bytes that a device needs for a step: what it stores, and `working_bytes`.

  Args:
    config, model_config: of the run.
    held: bytes by part, from `footprint.needed`.
    platform: of the device, such as "tpu".
    room: bytes of the device.
    micro: what the device has of a micro-batch.
    accumulate, remat: how the step is taken.
  """
  parallel, itemsize = config.parallel, jnp.dtype(config.model.compute_dtype).itemsize
  trained = held.get("weights", held.get("adapters", 0))
  # Those of a micro-batch, and their sum where there are several.
  gradients = trained * (2 if accumulate > 1 else 1)
  stored = sum(held.values()) - held["gradients"] + gradients
  if platform == "tpu" and config.model.param_dtype != config.model.compute_dtype:
    # Its compiler casts the weights of all layers before the loop over layers.
    stored += held.get("weights", held.get("base", 0)) // 2
  return stored + working_bytes(
    model_config,
    micro,
    remat,
    itemsize=itemsize,
    budget=logprobs.logit_budget(platform, room),
    tensor=parallel.tensor,
    fsdp=parallel.fsdp,
    adapted="adapters" in held,
  )


def working_bytes(
  model: ModelConfig,
  micro: Micro,
  remat: str,
  *,
  itemsize: int,
  budget: logprobs.LogitBudget = logprobs.LOGIT_BUDGET_ELSEWHERE,
  tensor: int = 1,
  fsdp: int = 1,
  adapted: bool = False,
) -> int:
  """Estimates the bytes that a device needs within a step alone, without sums of gradients.

  They are what the backward pass reads of all layers and of the head, and the larger of two peaks:
  that of one layer with its gradients, or that of a chunk of logits.

  Args:
    model: its shape.
    micro: what the device has of a micro-batch.
    remat: what the backward pass recomputes.
    itemsize: bytes of a number in activations.
    budget: limits on logits.
    tensor: devices that the products are divided among.
    fsdp: devices that parameters are divided among, and gathered where they are used.
    adapted: whether adapters are trained, and not the model.
  """
  width, chosen = model.width, model.experts.chosen if model.experts else 1
  queries = model.heads * model.head_width // tensor
  keys = model.kv_heads * model.head_width // tensor
  inner = chosen * model.mlp_width // tensor
  # Numbers for every token: the linear maps' outputs that the backward pass reads and the result of
  # attention; then what lies between them (norms, rotated heads, the gate's product, sums).
  wide = (2 if model.gated else 1) * inner
  outputs = 2 * queries + 2 * keys + width + wide
  between = 4 * width + queries + keys + 2 * inner
  kept = {"full": 0, "narrow": outputs - wide, "dots": outputs, "none": outputs + between}[remat]
  layers = model.layers * micro.tokens * (width + kept)
  # A layer's values and their gradients at once.
  layer = 2 * micro.tokens * (outputs + between)
  # Queries, keys, values and results are copied to sequences; so are their gradients.
  layer += 2 * micro.in_sequences * 2 * (queries + keys)
  gathered = 0
  if fsdp > 1:
    # One layer's weights while the next are on their way; of the model, their gradients in float32
    # too, before they are divided. Tables stay divided.
    experts = (model.experts.count if model.experts else 1) * model.mlp_width // tensor
    of_layer = width * (2 * queries + 2 * keys) + (3 if model.gated else 2) * width * experts
    gathered = itemsize * 2 * of_layer + (0 if adapted else 4 * of_layer)
  # Devices that have parts of the vocabulary compute the logits of each other's tokens.
  vocab, scored = model.vocab // (tensor * fsdp), micro.scored * fsdp
  slopes = itemsize * scored * vocab
  stored = slopes if slopes <= 4 * budget.kept else 0
  chunk = min(scored, max(1, budget.chunk // vocab)) * vocab * (4 + itemsize)
  # The table in the type of products; the hidden states that are scored, and their gradients.
  read = itemsize * (vocab * width + 2 * scored * width)
  return itemsize * layers + stored + gathered + max(itemsize * layer, chunk + read)
