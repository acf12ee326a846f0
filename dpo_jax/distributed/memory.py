"""What a run holds on a device, and what to do where that is too much."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax

from dpo_jax.structs import PyTree, UserError

GIB = 2**30
HOST = "pinned_host"  # JAX's name of the host's memory that devices read directly


def held(tree: PyTree) -> int:
  """Bytes of a tree that lie on the fullest device, without what is kept on the host.

  Leaves are arrays, or shapes that know their sharding; one without is whole on a device.
  """
  return sum(_held(leaf) for leaf in jax.tree.leaves(tree) if not _is_kept(leaf))


def kept(tree: PyTree) -> int:
  """Bytes of a tree that lie in the host's memory for one device."""
  return sum(_held(leaf) for leaf in jax.tree.leaves(tree) if _is_kept(leaf))


def _is_kept(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
  return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def _held(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
  sharding = getattr(leaf, "sharding", None)
  shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
  return math.prod(shape) * leaf.dtype.itemsize


@contextlib.contextmanager
def told(parts: dict[str, PyTree], room: int | None = None) -> Iterator[None]:
  """Makes one line of running out of memory: what is held, the largest buffers, the ways out.

  Args:
    parts: what it is called, and the tree.
    room: bytes of a device, where known.

  Raises:
    UserError: in place of the error of JAX.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(_line(parts, room)) from error


def _line(parts: dict[str, PyTree], room: int | None) -> str:
  size = lambda count: f"{count / GIB:.2f} GiB"
  sums = ", ".join(f"{name} {size(held(tree))}" for name, tree in parts.items())
  leaves = [
    (_held(leaf), f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}")
    for name, tree in parts.items()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if not _is_kept(leaf)
  ]
  largest = ", ".join(f"{name} {size(count)}" for count, name in sorted(leaves, reverse=True)[:3])
  whole = f" of {size(room)}" if room else ""
  return (
    f"out of memory{whole} a device. Held on each: {sums}; the largest buffers: {largest}. The rest"
    " is activations, which fall with a higher train.accumulate, model.remat=full and a lower"
    " data.max_length; what is held falls with parallel.fsdp, lora.rank, model.param_dtype and"
    " reference.param_dtype bfloat16, parallel.offload_optimizer and a reference.store"
  )


def limit() -> int | None:
  """Bytes that a device of this process has for arrays, None where it does not say."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
