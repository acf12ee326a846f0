"""Sharding rules: how parameters and activations are divided over a mesh of four axes.

  data      divides the rows of a batch; every device along it has a copy of the parameters
  fsdp      divides the rows of a batch and the parameters; each parameter is gathered for its use,
            but of embedding and head, which stay divided by vocabulary
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dpo_jax.structs import Array

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # the axes that divide the rows of a batch
_SEQUENCE = ("sequence",)
_VOCABULARY = ("tensor", "fsdp")

# The order is important: the first pattern that matches the end of a path decides, so special cases
# stand before the general "kernel". The axes are those of the last dimensions; dimensions before
# them (layers, experts) stay undivided, because layers are scanned over one by one. A leaf that
# matches no pattern is replicated. Tables are divided by vocabulary, and by width where fsdp does
# not divide the vocabulary.
RULES: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = (
  (r"(embed|head)/embedding", (_VOCABULARY, "fsdp")),
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
  found: list[tuple[str, ...]] = []
  for axis, size in zip(axes, shape, strict=True):
    # An axis divides one dimension: the first that it can, of those that ask for it.
    free = [x for x in _names(axis) if x not in {name for names in found for name in names}]
    found.append(_dividing(free, size, sizes))
  return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in found))


def _names(axis: Any) -> tuple[str, ...]:
  """Returns the axes of one entry of a partition spec."""
  return axis if isinstance(axis, tuple) else (axis,) if axis else ()


def _dividing(axes: Sequence[str], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns those of the axes, from the first on, that together divide a dimension evenly."""
  found: tuple[str, ...] = ()
  for axis in axes:
    if sizes[axis] > 1 and size % math.prod(sizes[name] for name in (*found, axis)) == 0:
      found = (*found, axis)
  return found


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
  """Divides the vocabulary of a table over tensor and fsdp, as its parameter is."""
  return _constrain(table_VD, _vocabulary_axes(len(table_VD)), None)


def vocabulary_axes(vocab: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the axes that divide a vocabulary, given the number of devices along each axis."""
  return _dividing([name for name in _VOCABULARY if name in sizes], vocab, sizes)


def _vocabulary_axes(vocab: int) -> tuple[str, ...]:
  mesh = _mesh()
  return vocabulary_axes(vocab, mesh.shape) if mesh else ()


def vocabulary_parts(vocab: int, axes: Sequence[str] = _VOCABULARY) -> int:
  """Returns over how many devices of some axes a vocabulary is divided; 1 outside a mesh."""
  mesh = _mesh()
  dividing = [name for name in _vocabulary_axes(vocab) if name in axes]
  return math.prod(mesh.shape[name] for name in dividing) if mesh else 1


def copy_over_fsdp(x_NL: Array) -> Array:
  """Divides rows over data alone, and tokens over sequence: fsdp devices get the same rows."""
  return _constrain(x_NL, ("data",), _SEQUENCE, *(None,) * (x_NL.ndim - 2))


def join_groups(x_GM: Array, parts: int) -> Array:
  """Joins the scored tokens of groups, [G, M, ...], to [G / parts, parts M, ...].

  Devices that each have a part of the vocabulary need the tokens of all of them.
  """
  groups, scored, *rest = x_GM.shape
  x_GM = x_GM.reshape(groups // parts, parts * scored, *rest)
  return _constrain(x_GM, ("data",), _SEQUENCE, *(None,) * len(rest))


def chunk_by_group(x_Gm: Array, *, logits: bool) -> Array:
  """Keeps a chunk of joined groups, [G, m, D or V], where `chunks_by_group` keeps all.

  Its logits are divided by vocabulary. Without this the compiler may divide tokens in between, and
  gather them again.
  """
  last = _vocabulary_axes(x_Gm.shape[-1]) if logits else None
  return _constrain(x_Gm, ("data", "sequence"), None, last)


def chunks_by_group(x_cGm: Array) -> Array:
  """Keeps chunks of joined groups, [c, G, m, ...], whole on every device that has a group."""
  return _constrain(x_cGm, None, ("data", "sequence"), *(None,) * (x_cGm.ndim - 2))


def copy_per_group(table_VD: Array, groups: int) -> Array:
  """Broadcasts a table to one copy per group of tokens: [G, V, D].

  Each device stores only the copy of its own group, divided as in `by_vocabulary`.
  """
  # With copies of its own, each group sums its gradient over all chunks locally. The transpose of
  # this broadcast then adds the groups up: one all-reduce per step, not one per chunk.
  table_GVD = jax.numpy.broadcast_to(table_VD, (groups, *table_VD.shape))
  vocabulary = _vocabulary_axes(len(table_VD))
  # An axis that divides the vocabulary cannot divide the groups, too.
  axes = tuple(name for name in ROWS + _SEQUENCE if name not in vocabulary)
  return _constrain(table_GVD, axes, vocabulary, None)


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
    return None if size % math.prod(mesh.shape[name] for name in names) else names or None

  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(fits, axes, x.shape)))
