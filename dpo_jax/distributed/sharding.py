"""Sharding rules: how parameters and activations are divided over a mesh of four axes.

  data      divides the rows of a batch; every device along it has a copy of the parameters
  fsdp      divides the rows of a batch and the parameters; each parameter is gathered for its use
  sequence  divides the tokens of a row; for attention, it divides the heads instead
  tensor    divides the parameters and the matrix products with them, but not the rows

Parameters, reference, gradients and optimizer state follow the same rules, which match the end of
a leaf's path in the tree. A dimension that its axis does not divide evenly stays undivided.

This module depends on structs alone, so that the mathematics and the models can use it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dpo_jax.structs import Array

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # the axes that divide the rows of a batch
_SEQUENCE = ("sequence",)

# The order is important: the first pattern that matches the end of a path decides, so special cases
# stand before the general "kernel". The axes are those of the last dimensions; dimensions before
# them (layers, experts) stay undivided, because layers are scanned over one by one. A leaf that
# matches no pattern is replicated.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"(embed|head)/embedding", ("tensor", "fsdp")),  # the vocabulary is divided
  (r"positions/embedding", (None, "fsdp")),
  (r"router/kernel", ("fsdp", None)),  # every device must see the scores of all experts
  # The input of these two is the divided output of the maps before them. With the same axis on
  # their input dimension, only their sum has to be communicated, once per block.
  (r"(out|down)/kernel", ("tensor", "fsdp")),
  (r"(out|down)/lora_a", ("tensor", None)),
  (r"(out|down)/lora_b", (None, "fsdp")),
  (r"kernel", ("fsdp", "tensor")),
  (r"lora_a", ("fsdp", None)),
  (r"lora_b", (None, "tensor")),
  (r"(query|key|value|gate|up)/bias", ("tensor",)),
)


def spec(path: tuple[Any, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
  """Returns the partition spec of one leaf.

  Args:
    path: the leaf's path, as `jax.tree_util.tree_map_with_path` passes it.
    shape: the leaf's shape.
    sizes: number of devices along each axis of the mesh.
  """
  name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
  for pattern, axes in RULES:
    if re.search(rf"(^|/){pattern}$", name) and len(shape) >= len(axes):
      break
  else:
    return PartitionSpec()
  axes = (None,) * (len(shape) - len(axes)) + axes

  def fits(axis: str | None, size: int) -> str | None:
    return axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None

  return PartitionSpec(*map(fits, axes, shape))


# --- activations ----------------------------------------------------------------------------------

# Constraints set where arrays are stored and change no value. Outside a mesh of these axes, or in a
# `shard_map`, they do nothing, so models and losses also run without a mesh.

_FREE = PartitionSpec.UNCONSTRAINED  # the compiler chooses


def by_rows(x_NLD: Array) -> Array:
  """Divides rows over data and fsdp, and tokens over sequence; the last axis is left free."""
  # Without this the compiler may divide activations like the parameters, along the width, and then
  # communicate activations in place of parameters.
  return _constrain(x_NLD, ROWS, _SEQUENCE, _FREE)


def by_heads(x_NLHHd: Array) -> Array:
  """Divides rows and tokens, and the heads over tensor if possible; never within a head."""
  return _constrain(x_NLHHd, ROWS, _SEQUENCE, ("tensor",), None)


def sequence_parts(length: int) -> int:
  """Returns over how many devices a row of `length` tokens is divided; 1 outside a mesh."""
  mesh = _mesh()
  parts = mesh.shape["sequence"] if mesh else 1
  return 1 if length % parts else parts


def by_vocabulary(table_VD: Array) -> Array:
  """Gathers a table over fsdp and divides its vocabulary over tensor."""
  # Before a loop over chunks, so that the table is gathered once and not once per chunk.
  return _constrain(table_VD, ("tensor",), None)


def copy_per_group(table_VD: Array, groups: int) -> Array:
  """Broadcasts a table to one copy per group of tokens: [G, V, D].

  Each device stores only the copy of its own group, divided as in `by_vocabulary`.
  """
  # With copies of its own, each group sums its gradient over all chunks locally. The transpose of
  # this broadcast then adds the groups up: one all-reduce per step, not one per chunk.
  table_GVD = jax.numpy.broadcast_to(table_VD, (groups, *table_VD.shape))
  return _constrain(table_GVD, ROWS + _SEQUENCE, ("tensor",), None)


def head_axes(length: int) -> tuple[int, int]:
  """Returns how many devices of the tensor and of the sequence axis share a row's heads."""
  mesh = _mesh()
  return (mesh.shape["tensor"], sequence_parts(length)) if mesh else (1, 1)


def map_over_shards(fn: Callable[..., Array], *, length: int) -> Callable[..., Array]:
  """Makes `fn` run on every device with its own rows, complete, and its own heads.

  It serves what the compiler cannot divide: custom kernels, and loops whose number of turns depends
  on the data. Where tokens are divided over sequence, the heads are divided over it for `fn` alone.

  Args:
    fn: (arrays [N, L, H, Hd], tree of arrays [N or G, ...], tree of any arrays) -> [N, L, H, Hd],
      computed row by row and head by head. The numbers of heads must be divisible by the product of
      `head_axes`.
    length: L of the complete arrays.

  Returns:
    A function of the complete arrays; outside a mesh of these axes, `fn` itself.
  """
  mesh = _mesh()
  if mesh is None:
    return fn
  apart = sequence_parts(length) > 1

  def exchange(x_NLHHd: Array, split: int, join: int) -> Array:
    return jax.lax.all_to_all(x_NLHHd, "sequence", split, join, tiled=True) if apart else x_NLHHd

  def on_device(arrays: Any, rows: Any, shared: Any) -> Array:
    whole = jax.tree.map(functools.partial(exchange, split=2, join=1), arrays)
    return exchange(fn(whole, rows, shared), split=1, join=2)

  divided = PartitionSpec(ROWS, "sequence" if apart else None, "tensor")
  specs = divided, PartitionSpec(ROWS), PartitionSpec()
  # check_vma=False: a custom kernel does not declare along which axes its output varies.
  return jax.shard_map(on_device, in_specs=specs, out_specs=divided, check_vma=False)


def map_over_groups(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `fn` run on every device with its own rows of all arrays; outside a mesh, `fn` itself.

  Args:
    fn: tree of arrays [N, ...] -> tree of arrays whose first axis belongs to these rows.
  """
  rows = PartitionSpec(ROWS)
  return jax.shard_map(fn, in_specs=rows, out_specs=rows, check_vma=False) if _mesh() else fn


def _mesh() -> Any:
  """Returns the mesh around the traced code, None if it lacks these axes or is in a shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  # manual_axes are those of a shard_map, inside which arrays are local and have no sharding.
  return None if not set(AXES) <= set(mesh.axis_names) or mesh.manual_axes else mesh


def _constrain(x: Array, *axes: Any) -> Array:
  """Constrains the sharding of x; axes that do not divide their dimension evenly are left out."""
  mesh = _mesh()
  if mesh is None:
    return x

  def fits(names: Any, size: int) -> Any:
    if not isinstance(names, tuple):
      return names
    return None if size % math.prod(mesh.shape[name] for name in names) else names

  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(fits, axes, x.shape)))
