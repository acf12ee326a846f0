"""What an optimised program does in one step: products, collectives, kernels, time and arrays.

All figures are of one device, with loops multiplied out. Times are lower bounds: what the compiler
estimates for a TPU, or for a GPU the larger of bytes over bandwidth and FLOPs over peak rate of
every kernel. Collectives are taken to be hidden behind them.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.benchmarking.hlo import Instruction, Program, Runs, Shape, elements, shapes_in

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# Instructions that take neither time nor memory of their own.
_FREE = {
  "after-all",
  "bitcast",
  "call",
  "conditional",
  "constant",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "partition-id",
  "tuple",
  "while",
}
# Products of a kernel of attention, each of queries x keys x size of a head.
_ATTENTION = (
  (re.compile(r"fmha\w*Backward"), 5),
  (re.compile(r"fmha"), 2),
  (re.compile(r"(flash|splash).*dkv"), 4),
  (re.compile(r"(flash|splash).*dq"), 3),
  (re.compile(r"flash|splash"), 2),
)


# --- products -------------------------------------------------------------------------------------


def product_flops(one: Instruction, table: Mapping[str, Instruction]) -> float:
  """Returns the FLOPs of one run of an instruction, 0 if it is no product.

  Args:
    one: the instruction.
    table: the instructions of its computation, by name.
  """
  if one.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    return _contracted_flops(one, table, contracted[1] if contracted else "")
  if one.opcode == "convolution":
    return _convolution_flops(one, table)
  if "gemm" in one.target or "cublas" in one.target:
    found = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', one.rest)
    return _contracted_flops(one, table, found[1].replace('"', "") if found else "")
  return 0


def _contracted_flops(one: Instruction, table: Mapping[str, Instruction], axes: str) -> float:
  left = table[one.operands[0]].shapes[0].dims
  contracted = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
  # A call of a library also returns its workspace.
  return 2 * max(math.prod(shape.dims) for shape in one.shapes) * contracted


def _convolution_flops(one: Instruction, table: Mapping[str, Instruction]) -> float:
  """Returns the FLOPs of a convolution, which is what a product is for a TPU.

  Axes of a batch are spatial axes there, whose windows are such that all but one place is padding;
  only places within the input count.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
  if labels is None:
    return 0
  left, right = (table[name].shapes[0].dims for name in one.operands[:2])
  out = one.shapes[0].dims
  window = re.search(r"window=\{([^}]*)\}", one.rest)
  given = dict(part.split("=") for part in window[1].split()) if window else {}

  def values(name: str, usual: str, count: int) -> list[str]:
    return given[name].split("x") if name in given else [usual] * count

  spatial = sorted(label for label in labels[3] if label.isdigit())
  names = (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
  settings = [values(name, usual, len(spatial)) for name, usual in names]
  places = 1
  for label, size, stride, pad, spread, apart in zip(spatial, *settings, strict=True):
    steps = np.arange(out[labels[3].index(label)]) * int(stride) - int(pad.partition("_")[0])
    at = steps[:, None] + np.arange(int(size)) * int(apart)
    inside = (at >= 0) & (at % int(spread) == 0)
    places *= int((inside & (at // int(spread) < left[labels[1].index(label)])).sum())
  groups = re.search(r"feature_group_count=(\d+)", one.rest)
  batches = re.search(r"batch_group_count=(\d+)", one.rest)
  inputs = left[labels[1].index("f")] // int(groups[1] if groups else 1)
  rows = left[labels[1].index("b")] // int(batches[1] if batches else 1)
  return 2 * places * rows * inputs * right[labels[2].index("o")]


def products(program: Program, runs: Runs) -> dict[str, float]:
  """Returns the FLOPs of products by the types of their inputs, such as "bf16" or "bf16 x f32"."""
  found: collections.Counter[str] = collections.Counter()
  for one, count, table in _all(program, runs):
    flops = product_flops(one, table)
    if flops:
      types = [table[name].shapes[0].dtype for name in one.operands[:2]]
      kind = types[0] if types[0] == types[1] else " x ".join(sorted(types))
      found[kind] += flops * count  # pyright: ignore[reportArgumentType]
  return dict(found.most_common())


def _all(
  program: Program, runs: Runs
) -> Iterator[tuple[Instruction, float, dict[str, Instruction]]]:
  """Yields every instruction, how often it runs, and its computation by names."""
  for name, count in runs.times.items():
    table = program.table(name)
    for one in table.values():
      yield one, count, table


# --- collectives ----------------------------------------------------------------------------------


class Collective(NamedTuple):
  """A collective operation.

  Attributes:
    kind: a name in `COLLECTIVES`.
    runs: in one step.
    bytes: of its result, in one run.
    sent: bytes that a device sends in one run, by the algorithm of a ring.
    shapes: of the result.
    source: line that it comes from.
  """

  kind: str
  runs: float
  bytes: float
  sent: float
  shapes: list[Shape]
  source: str


def collectives(program: Program, runs: Runs, devices: int) -> list[Collective]:
  """Returns the collectives of a program that communicate, each once."""
  found = []
  for name, count in runs.times.items():
    # A TPU divides a collective into a start, steps beside other work and an end, and each part
    # repeats the instruction. It is counted at its start.
    table = program.table(name)
    later = name.startswith("async_collective_fusion")
    if later or any(one.target == "AsyncCollectiveDone" for one in table.values()):
      continue
    for one in table.values():
      kind = one.opcode.removesuffix("-start")
      if kind not in COLLECTIVES or one.opcode.endswith("-done"):
        continue
      group = _group(one.rest, devices)
      # Types of a start: operands, results, and what the end needs.
      several = elements(one.type)
      gives = kind != "all-reduce" and one.opcode.endswith("-start") and len(several) > 1
      shapes = shapes_in(several[1] if gives else one.type)
      if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        # One kernel, in which each device keeps its part of the sum.
        kind = "reduce-scatter"
        shapes = [
          shape._replace(dims=(*shape.dims[:-1], shape.dims[-1] // group)) for shape in shapes
        ]
      if group > 1:
        size = sum(shape.bytes for shape in shapes)
        source = program.source(one)
        found.append(Collective(kind, count, size, _sent(kind, size, group), shapes, source))
  return found


def _sent(kind: str, size: float, group: int) -> float:
  """Returns the bytes that a device of a group sends for a result of so many bytes."""
  share = (group - 1) / group
  if kind == "all-reduce":
    return 2 * share * size
  if kind == "reduce-scatter":
    return share * size * group
  return share * size if kind in ("all-gather", "all-to-all", "ragged-all-to-all") else size


def _group(rest: str, devices: int) -> int:
  """Returns the number of devices that take part in a collective together."""
  if "source_target_pairs=" in rest:
    return 2
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  if listed:
    return listed[1].count(",") + 1
  counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
  if counted:
    return int(counted[1])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # A part of an axis is written 'name':(what lies before it)size.
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes.get(name, 1)) for name, part in named)
  return devices


def summary(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
  """Adds collectives up by kind: `runs`, `bytes` of the results, and `sent_bytes` by a device."""
  sums: dict[str, dict[str, float]] = {}
  for one in sorted(found, key=lambda one: -one.bytes * one.runs):
    new = {"runs": one.runs, "bytes": one.bytes * one.runs, "sent_bytes": one.sent * one.runs}
    old = sums.get(one.kind, dict.fromkeys(new, 0.0))
    sums[one.kind] = {name: round(old[name] + value) for name, value in new.items()}
  return sums


# --- kernels of attention -------------------------------------------------------------------------


class Kernel(NamedTuple):
  """A kernel of attention.

  Attributes:
    name: what it is called.
    runs: in one step.
    products: how many products it computes, each of queries x keys x size of a head.
    rows: rows times heads.
    queries, keys: positions of a row.
    head: size of a head.
  """

  name: str
  runs: float
  products: int
  rows: float
  queries: int
  keys: int
  head: int

  def flops(self, share: Callable[[int, int], float], lanes: int = 1) -> float:
    """Returns the FLOPs of all runs.

    Args:
      share: (queries, keys) -> the share of all pairs of them that the mask lets through.
      lanes: a head takes a multiple of so many lanes of the matrix units.
    """
    head = -(-self.head // lanes) * lanes
    area = self.queries * self.keys * share(self.queries, self.keys)
    return self.runs * self.products * 2 * self.rows * area * head


def attention_kernels(program: Program, runs: Runs) -> list[Kernel]:
  """Returns the kernels of attention that a program calls, cuDNN's and Pallas's."""
  found = []
  for one, count, _ in _all(program, runs):
    name = one.name if one.target == "tpu_custom_call" else one.target
    count_of = [number for pattern, number in _ATTENTION if pattern.search(name)]
    if one.opcode != "custom-call" or not count_of:
      continue
    inputs = re.search(r"operand_layout_constraints=\{(.*?\})\}", one.rest)
    arrays = shapes_in(inputs[1]) if inputs else []
    # The queries come first, then the keys; before them, facts of the mask in small integers.
    wide = [a for a in arrays if a.dtype in ("bf16", "f16", "f32") and len(a.dims) >= 3][:2]
    if len(wide) == 2:
      # cuDNN has [rows, positions, heads, size], Pallas [rows, heads, positions, size].
      at = -2 if one.target == "tpu_custom_call" else 1
      queries, keys = (array.dims[at] for array in wide)
      head = wide[0].dims[-1]
      rows = math.prod(wide[0].dims) / head / queries
      found.append(Kernel(name, count, count_of[0], rows, queries, keys, head))
  return found


# --- time -----------------------------------------------------------------------------------------


def estimated_cycles(program: Program, runs: Runs) -> float:
  """Returns the cycles that a TPU's compiler estimates; kernels of Pallas and gathers have none."""
  total = 0.0
  for one, count, _ in _alone(program, runs):
    found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
    total += int(found[1]) * count if found else 0
  return total


def _alone(
  program: Program, runs: Runs
) -> Iterator[tuple[Instruction, float, dict[str, Instruction]]]:
  """Yields the instructions that are kernels of their own, as `_all` yields them."""
  for one, count, table in _all(program, runs._replace(times=_unfused(runs))):
    if one.opcode not in _FREE and not one.opcode.endswith("-done"):
      yield one, count, table


def _unfused(runs: Runs) -> dict[str, float]:
  return {name: count for name, count in runs.times.items() if name not in runs.fused}


def roofline(program: Program, runs: Runs, *, flops: float, bandwidth: float) -> float:
  """Returns the seconds of all kernels but those of attention, each at the device's best rate.

  Args:
    program, runs: the program.
    flops, bandwidth: peak rates of the device, per second.
  """
  total = 0.0
  for one, count, table in _alone(program, runs):
    if one.opcode.removesuffix("-start") in COLLECTIVES or "fmha" in one.target:
      continue
    done = product_flops(one, table)
    if one.opcode in ("fusion", "fusion-start"):
      done = _fused_flops(program, one.attribute("calls"))
    total += count * max(_moved(program, one, table) / bandwidth, done / flops)
  return total


def _fused_flops(program: Program, name: str) -> float:
  """Returns the FLOPs of products of a fused computation and of those that it calls."""
  table = program.table(name)
  inner = [one.attribute("calls") for one in table.values() if one.opcode == "fusion"]
  own = sum(product_flops(one, table) for one in table.values())
  return own + sum(_fused_flops(program, name) for name in inner)


def _moved(program: Program, one: Instruction, table: Mapping[str, Instruction]) -> float:
  """Returns the bytes that one run of a kernel reads and writes."""

  def size(name: str, inside: Mapping[str, Instruction]) -> float:
    return sum(shape.bytes for shape in inside[name].shapes) if name in inside else 0

  results = sum(shape.bytes for shape in shapes_in(_result(one)))
  if one.opcode in ("dynamic-slice", "gather", "slice"):
    return 2 * results
  if one.opcode == "dynamic-update-slice":
    return 2 * size(one.operands[1], table)
  reads = [size(name, table) for name in one.operands]
  if one.opcode not in ("fusion", "fusion-start"):
    return results + sum(reads)
  # A fusion that reads a slice of an operand, or writes one of a result, moves the slice alone.
  body = program.table(one.attribute("calls"))
  for inner in body.values():
    if inner.opcode == "parameter":
      number = re.match(r"\((\d+)\)", inner.rest)
      at = int(number[1]) if number else len(reads)
      users = [user for user in body.values() if inner.name in user.operands]
      sliced = [u for u in users if u.opcode in ("dynamic-slice", "gather")]
      updated = [u for u in users if u.opcode == "dynamic-update-slice"]
      if at < len(reads) and users and len(sliced) + len(updated) == len(users):
        reads[at] = min(reads[at], sum(size(user.name, body) for user in sliced))
    elif inner.opcode == "dynamic-update-slice":
      whole = size(inner.name, body)
      if results >= whole:
        results -= whole - size(inner.operands[1], body)
  return results + sum(reads)


def _result(one: Instruction) -> str:
  """Returns the type of what a kernel computes, without the operands that a start repeats."""
  several = elements(one.type)
  return several[1] if one.opcode == "fusion-start" and len(several) > 1 else one.type


# --- arrays ---------------------------------------------------------------------------------------


class Array(NamedTuple):
  """Arrays of one shape that a program makes in a device's main memory.

  Attributes:
    bytes: of one of them, padding included.
    shape: as HLO writes it.
    count: instructions that make one.
    source: line of the first of them.
  """

  bytes: float
  shape: str
  count: int
  source: str


def largest_arrays(program: Program, runs: Runs, most: int = 5) -> list[Array]:
  """Returns the largest arrays that are made on the way; those of the next state are left out."""
  root = next(one for one in program.computations[program.entry] if one.is_root)
  results = set(root.operands)
  found: dict[str, Array] = {}
  for name in _unfused(runs):
    for one in program.table(name).values():
      if one.opcode in _FREE or (name == program.entry and one.name in results):
        continue
      for shape in shapes_in(_result(one)):
        if shape.in_main_memory:
          old = found.get(str(shape))
          source = (old.source if old else "") or program.source(one)
          size = max(shape.padded_bytes, old.bytes if old else 0)
          found[str(shape)] = Array(size, str(shape), (old.count if old else 0) + 1, source)
  return sorted(found.values(), key=lambda array: -array.bytes)[:most]
