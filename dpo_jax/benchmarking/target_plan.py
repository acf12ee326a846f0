"""Plans a run for accelerators that are not here: their own compiler compiles the very step.

Memory is what the compiler plans. Products, collectives and times are read off the optimised
program. No step is run, so times are estimates and utilisations what they would allow at most.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpo_jax.benchmarking import hlo, hlo_costs, planner, targets
from dpo_jax.benchmarking.planner import Lengths, Outline
from dpo_jax.benchmarking.targets import Target
from dpo_jax.distributed import memory
from dpo_jax.structs import UserError

_LANES = 128  # a TPU's matrix units take the size of a head in multiples of it
_BLOCK = 512  # queries and keys of a block, of which attention computes all or nothing
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What compilers say of a program that needs more memory than there is: its need, then the limit.
_TOO_LARGE = (
  re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds .*?\(([\d.]+)([KMGT]?)"),
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
# Keys of a plan that are known only of a step that compiles.
_OF_PROGRAM = (
  "products_done",
  "products_by_type",
  "utilization_by_products",
  "utilization_by_cycles",
  "utilization_by_roofline",
  "estimated_seconds",
  "attention_kernels",
  "collectives",
  "sent_seconds",
  "largest_temporaries",
  "loops_by_data",
)


class Step(NamedTuple):
  """A step and what a compiler made of it.

  Attributes:
    run: the step, in shapes.
    compiled: the program; None if it needs more memory than there is.
    needs: bytes that the compiler says it needs, where there is no program; else 0.
    seconds: that lowering and compiling took.
  """

  run: Outline
  compiled: jax.stages.Compiled | None
  needs: int
  seconds: float


def compile_step(
  config: ConfigDict, lengths: Lengths, target: Target, limit: int | None = None
) -> Step:
  """Compiles the step of a run for a target.

  Args:
    config: of the run.
    lengths: of the examples.
    target: as `targets.find` returns it.
    limit: bytes of a device that the run may use; None for those of the target.

  Raises:
    UserError: as `setup.build` raises it, or the compiler refuses the step for another reason than
      its memory.
  """
  _check_devices(config, target)
  with targets.compiling_for(target):
    run = planner.outline(config, lengths, target.devices, limit or target.limit)
    began = time.perf_counter()
    compiled, needs = None, 0
    try:
      compiled = run.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      found = _needed(str(error))
      if found is None:
        raise UserError(_refusal(target, str(error))) from error
      needs = found
    return Step(run, compiled, needs, time.perf_counter() - began)


def plan(
  config: ConfigDict, lengths: Lengths, target: Target, *, limit: int | None = None
) -> dict[str, Any]:
  """Compiles the step of a run for a target and describes it, as `describe` does.

  Raises:
    UserError: as `compile_step` raises it.
  """
  return describe(compile_step(config, lengths, target, limit), target, limit=limit)


def describe(step: Step, target: Target, *, limit: int | None = None) -> dict[str, Any]:
  """Describes a compiled step.

  Args:
    step: as `compile_step` returns it.
    target: what it was compiled for.
    limit: bytes that a device has; None for what the target's devices have.

  Returns:
    What identifies the run: `topology`, `devices`, `attention`, `parameters`, `trained`, `rows`
      and `row_length` of a micro-batch on all devices, `micro_batches`.
    Memory of the fullest device, in bytes: `limit_bytes`, `held_bytes` (weights, moments and the
      reference, each of them in `held`), `temporary_bytes`, `peak_bytes`; `fits`; `host_bytes`, of
      the host's memory for each device.
    FLOPs of products in a step, on all devices: `products_needed` by the objective,
      `products_done` by the program, those by the type of their inputs in `products_by_type`,
      and the quotient of the two, `utilization_by_products`.
    Time: `estimated_seconds`; the share of the device's peak rate that the objective's products
      would reach in it, `utilization_by_cycles` on TPUs and `utilization_by_roofline` on GPUs.
    `collectives`: kind -> `runs`, `bytes` of the results, `sent_bytes`, in a step and by a device;
      `sent_seconds`: their time at the rate of all links together.
    `attention_kernels`: how often kernels run; `largest_temporaries`; `loops_by_data`: source lines
      of loops whose number of turns depends on data; `compile_seconds`.

    Where the step does not fit, its compiler may say no more than what it needs: the rest is None.
  """
  limit = limit or target.limit
  if step.compiled is None:
    found = _too_large(step.run, step.needs)
  else:
    found = _memory(step.compiled, target, limit)
    found |= _program(step.run, step.compiled.as_text() or "", target)
  seconds = {"compile_seconds": round(step.seconds, 1)}
  return _facts(step.run, target) | {"limit_bytes": limit} | found | seconds


def _check_devices(config: ConfigDict, target: Target) -> None:
  """Refuses a number of devices in the configuration that is not that of the target."""
  given = config.parallel.devices
  if given not in (0, len(target.devices)):
    raise UserError(
      f"parallel.devices is {given}, but --topology={target.name} has {len(target.devices)}; leave"
      " it out"
    )


def _refusal(target: Target, said: str) -> str:
  line = " ".join(said.split())
  return f"the compiler for {target.name} refuses the step: {line[:400]}{'…' * (len(line) > 400)}"


def _needed(message: str) -> int | None:
  """Returns the bytes that a program needs, from the error of a compiler; None for other errors."""
  for pattern in _TOO_LARGE:
    found = pattern.search(message)
    if found:
      return int(float(found[1]) * _SIZES[found[2]])
  return None


def _facts(run: Outline, target: Target) -> dict[str, Any]:
  """Returns what is known of a run without a compiler."""
  held = planner.held_bytes(run)
  return {
    "topology": target.name,
    "devices": len(target.devices),
    "attention": run.attention,
    "parameters": planner.count(run.policy),
    "trained": run.trained,
    "micro_batches": run.batch.ids_NL.shape[0],
    "rows": run.batch.ids_NL.shape[1],
    "row_length": run.batch.ids_NL.shape[2],
    "held": held,
    "held_bytes": sum(held.values()),
    "host_bytes": memory.host_bytes(run.state),
    "products_needed": run.flops,
  }


def _too_large(run: Outline, needs: int) -> dict[str, Any]:
  """Describes a step that the compiler gave up, since it needs so many bytes."""
  temporary = max(0, needs - sum(planner.held_bytes(run).values()))
  sizes = {"fits": False, "temporary_bytes": temporary, "peak_bytes": needs}
  return sizes | dict.fromkeys(_OF_PROGRAM)


def _memory(compiled: jax.stages.Compiled, target: Target, limit: int) -> dict[str, Any]:
  """Returns the memory of a compiled step."""
  about = compiled.memory_analysis()
  assert about is not None, "the compiler reports no memory"
  arguments = about.argument_size_in_bytes
  if target.is_gpu:
    # The donated state is argument and output in the same bytes, which are counted once.
    returned = about.output_size_in_bytes - about.alias_size_in_bytes
    peak = arguments + about.temp_size_in_bytes + returned
  else:
    # What the compiler compares with the limit. Sums of its other figures are up to a third higher.
    peak = about.peak_memory_in_bytes
  return {
    "fits": peak <= limit,
    "temporary_bytes": max(0, peak - arguments),
    "peak_bytes": peak,
  }


def _program(run: Outline, text: str, target: Target) -> dict[str, Any]:
  """Returns what an optimised program does."""
  program = hlo.parse(text)
  runs = hlo.count_runs(program, run.chunks)
  devices = len(target.devices)
  done = {kind: n * devices for kind, n in hlo_costs.products(program, runs).items()}
  total = sum(done.values())
  kernels = hlo_costs.attention_kernels(program, runs)
  seconds = _seconds(program, runs, kernels, target, run.windows)
  used = run.flops / (seconds * devices * target.chip.flops)
  exchanged = hlo_costs.summary(hlo_costs.collectives(program, runs, devices))
  arrays = hlo_costs.largest_arrays(program, runs)
  return {
    "products_done": total,
    "products_by_type": done,
    "utilization_by_products": round(run.flops / total, 4),
    "utilization_by_cycles": None if target.is_gpu else round(used, 4),
    "utilization_by_roofline": round(used, 4) if target.is_gpu else None,
    "estimated_seconds": round(seconds, 5),
    "attention_kernels": sum(kernel.runs for kernel in kernels),
    "collectives": exchanged,
    "sent_seconds": round(sum(x["sent_bytes"] for x in exchanged.values()) / target.links, 5),
    "largest_temporaries": [array._asdict() for array in arrays],
    "loops_by_data": sorted({program.source(loop) or "unknown" for loop in runs.unknown}),
  }


def _seconds(
  program: hlo.Program,
  runs: hlo.Runs,
  kernels: list[hlo_costs.Kernel],
  target: Target,
  windows: tuple[int, ...],
) -> float:
  """Returns the time of a step by the compiler's estimate, or by the roofline of each kernel.

  Nothing estimates kernels of attention: their products count at the peak rate. A TPU's take about
  as long: a block of 512 x 512 with a head of 64 is 1,202 bundles forward, 1,024 of them products.
  """
  chip = target.chip

  def share(queries: int, keys: int) -> float:
    del queries
    # A window of 0 is none: causal attention, of which blocks on the diagonal are whole.
    causal = (1 + min(1.0, _BLOCK / keys)) / 2
    areas = [min(causal, (window + _BLOCK) / keys) if window else causal for window in windows]
    return sum(areas) / len(areas) if areas else causal

  lanes = 1 if target.is_gpu else _LANES
  attention = sum(kernel.flops(share, lanes) for kernel in kernels) / chip.flops
  if chip.clock is None:
    rates = {"flops": chip.flops, "bandwidth": chip.bandwidth}
    return attention + hlo_costs.roofline(program, runs, **rates)
  return attention + hlo_costs.estimated_cycles(program, runs) / chip.clock


# --- text -----------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> Iterator[str]:
  """Yields the lines of a plan."""
  trained, whole = found["trained"], found["parameters"]
  yield f"parameters   {whole:,}" + ("" if trained == whole else f", trained {trained:,}")
  yield (
    f"micro-batch  {found['rows']} rows of {found['row_length']} tokens,"
    f" {found['micro_batches']} a step"
  )
  yield f"attention    {found['attention']}"
  where = "the device" if found["devices"] == 1 else f"each of {found['devices']} devices"
  yield f"on {where} of {found['topology']}:"
  parts = found["held"] | {"temporary": found["temporary_bytes"], "in all": found["peak_bytes"]}
  for name, count in parts.items():
    yield f"  {name:<10} {count / memory.GIB:9.3f} GiB"
  if found["host_bytes"]:
    yield f"  and {found['host_bytes'] / memory.GIB:.3f} GiB in the memory of its host"
  yield f"{verdict(found)} in {found['limit_bytes'] / memory.GIB:.2f} GiB"
  yield from _show_program(found)
  yield f"compiled in  {found['compile_seconds']:.0f} s"


def verdict(found: dict[str, Any]) -> str:
  """Says whether a step fits."""
  return "fits" if found["fits"] else "does not fit"


def _show_program(found: dict[str, Any]) -> Iterator[str]:
  """Yields the lines about what the program does, none for one that was not compiled."""
  if found["products_done"] is None:
    return
  types = ", ".join(
    f"{kind} {flops / found['products_done']:.1%}"
    for kind, flops in found["products_by_type"].items()
  )
  yield (
    f"products     {found['products_needed']:.3e} FLOPs needed, {found['products_done']:.3e} done:"
    f" {found['utilization_by_products']:.0%} of them needed ({types})"
  )
  yield (
    f"time         about {found['estimated_seconds']:.3f} s a step, {utilization(found):.0%} of the"
    " peak rate, collectives hidden"
  )
  if found["collectives"]:
    yield f"collectives  {found['sent_seconds']:.3f} s a step at the rate of all links:"
  for kind, sums in found["collectives"].items():
    yield (
      f"  {kind:<18} {sums['runs']:,.0f} runs, {sums['bytes'] / 1e9:.3f} GB, sends"
      f" {sums['sent_bytes'] / 1e9:.3f} GB"
    )
  yield "largest temporaries:"
  for array in found["largest_temporaries"]:
    yield (
      f"  {array['bytes'] / memory.GIB:8.3f} GiB  {array['shape']}, made by {array['count']}"
      f" operations  {array['source']}"
    )


def utilization(found: dict[str, Any]) -> float:
  """Returns the share of the peak rate, by cycles or by roofline."""
  by_cycles = found["utilization_by_cycles"]
  return found["utilization_by_roofline"] if by_cycles is None else by_cycles


def brief(found: dict[str, Any]) -> str:
  """Returns the figures of a plan that are compared with those of others, on one line."""
  size = f"{found['peak_bytes'] / memory.GIB:8.2f} GiB"
  if found["products_done"] is None:
    return size
  return (
    f"{size}  {found['estimated_seconds']:8.3f} s  {found['utilization_by_products']:4.0%} needed "
    f" {utilization(found):4.0%} of peak"
  )
