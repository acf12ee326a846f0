"""Which part of what a device holds, on a mesh of four axes.

  data      copies of everything; rows of a batch are divided
  fsdp      rows of a batch are divided, and parameters too: each is gathered where it is used
  sequence  the tokens of a row are divided; keys and values are gathered, a layer at a time
  tensor    parameters are divided, and the products with them: rows are not

Parameters, reference, gradients and optimiser state follow the same rules, by the end of their path
in the tree. Where a dimension does not divide by its axis, it stays whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dpo_jax.structs import Array

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")
_SEQUENCE = ("sequence",)

# The first that matches the end of a path; its axes are those of the last dimensions, those before
# (layers, experts) stay whole. What matches none is held whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"(embed|head)/embedding", ("tensor", "fsdp")),  # the vocabulary is divided
  (r"positions/embedding", (None, "fsdp")),
  (r"router/kernel", ("fsdp", None)),
  (r"(out|down)/kernel", ("tensor", "fsdp")),  # its input is what the maps before it divided
  (r"(out|down)/lora_a", ("tensor", None)),
  (r"(out|down)/lora_b", (None, "fsdp")),
  (r"kernel", ("fsdp", "tensor")),
  (r"lora_a", ("fsdp", None)),
  (r"lora_b", (None, "tensor")),
  (r"(query|key|value|gate|up)/bias", ("tensor",)),
)


def spec(path: tuple[Any, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
  """How one leaf is divided.

  Args:
    path: of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
    shape: of the leaf.
    sizes: devices along every axis of the mesh.
  """
  name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
  for pattern, axes in RULES:
    if re.search(rf"(^|/){pattern}$", name) and len(shape) >= len(axes):
      break
  else:
    return PartitionSpec()
  axes = (None,) * (len(shape) - len(axes)) + axes
  fits = lambda axis, size: axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None
  return PartitionSpec(*map(fits, axes, shape))


_FREE = PartitionSpec.UNCONSTRAINED


def by_rows(x_NLD: Array) -> Array:
  """Says that rows and their tokens are divided, and leaves the last axis as it is.

  Without it the compiler may divide activations as it finds the parameters, and send those instead.
  Like its neighbours it changes nothing outside a mesh of these axes, or within a `shard_map`.
  """
  return _constrain(x_NLD, ROWS, _SEQUENCE, _FREE)


def by_heads(x_NLHK: Array) -> Array:
  """Rows and tokens divided, and heads over tensor if they divide by it: never a head in itself."""
  return _constrain(x_NLHK, ROWS, _SEQUENCE, ("tensor",), None)


def whole_rows(x_NJLK: Array) -> Array:
  """Keys or values of whole rows, on each of the devices that divide their tokens."""
  return _constrain(x_NJLK, ROWS, ("tensor",), None, None)


def sequence_parts(length: int) -> int:
  """Among how many devices so many tokens of a row are divided: 1 outside a mesh of these axes."""
  mesh = _mesh()
  parts = mesh.shape["sequence"] if mesh else 1
  return 1 if length % parts else parts


def in_parts(x_NL: Array, parts: int) -> Array:
  """[N, L, …] to [N, P, L / P, …], a part on each of the devices that divide the tokens."""
  rows, length, *rest = x_NL.shape
  x_NPl = x_NL.reshape(rows, parts, length // parts, *rest)
  return _constrain(x_NPl, ROWS, _SEQUENCE, None, *(_FREE,) * len(rest))


def by_vocabulary(table_VD: Array) -> Array:
  """A table as it is used: gathered over fsdp once, its entries divided over tensor."""
  return _constrain(table_VD, ("tensor",), None)


def for_each_group(table_VD: Array, groups: int) -> Array:
  """A table once for every group of tokens, [G, V, D], so that each sums its own gradient.

  Devices hold one of them, as of `by_vocabulary`; what they sum up is added once, at the end.
  """
  table_GVD = jax.numpy.broadcast_to(table_VD, (groups, *table_VD.shape))
  return _constrain(table_GVD, ROWS + _SEQUENCE, ("tensor",), None)


def for_own_rows(fn: Callable[..., Array], *, heads: int) -> Callable[..., Array]:
  """`fn` of its own rows, groups and heads on each device, for what no compiler divides.

  Args:
    fn: (arrays [N, L, H, K], tree of arrays [G, …]) -> [N, L, H, K], nothing across rows.
    heads: they are divided over tensor if this divides by it, and else whole on each.

  Returns:
    The same function of whole arrays; `fn` itself outside a mesh of these axes.
  """
  mesh = _mesh()
  if mesh is None:
    return fn
  divided = PartitionSpec(ROWS, None, None if heads % mesh.shape["tensor"] else "tensor")
  return jax.shard_map(
    fn, in_specs=(divided, PartitionSpec(ROWS)), out_specs=divided, check_vma=False
  )


def _mesh() -> Any:
  """That of the devices at work, if it has the axes of this module."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if not set(AXES) <= set(mesh.axis_names) or mesh.manual_axes else mesh


def _constrain(x: Array, *axes: Any) -> Array:
  mesh = _mesh()
  if mesh is None:
    return x

  def fits(names: Any, size: int) -> Any:
    if not isinstance(names, tuple):
      return names
    return None if size % math.prod(mesh.shape[name] for name in names) else names

  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(fits, axes, x.shape)))
