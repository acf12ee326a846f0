"""Bytes that arrays take on a device, and the error message when a device runs out of memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax

from dpo_jax.structs import PyTree, UserError

GIB = 2**30
HOST = "pinned_host"  # JAX's name for memory of the host that devices can read directly


def device_bytes(tree: PyTree) -> int:
  """Returns the bytes of a tree on one device, without leaves that are stored on the host.

  Leaves are arrays or shapes. A leaf without a sharding counts as complete on the device.
  """
  return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if not _is_on_host(leaf))


def host_bytes(tree: PyTree) -> int:
  """Returns the bytes of a tree that are stored in the host's memory for one device."""
  return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if _is_on_host(leaf))


def _is_on_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
  return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def _shard_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
  # Shards of one array are all equally large, so any of them stands for the fullest device.
  sharding = getattr(leaf, "sharding", None)
  shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
  return math.prod(shape) * leaf.dtype.itemsize


@contextlib.contextmanager
def explain_out_of_memory(parts: dict[str, PyTree], capacity: int | None = None) -> Iterator[None]:
  """Turns an out-of-memory error inside the block into one line that says what to change.

  Args:
    parts: name to tree, for what the run stores on the devices.
    capacity: bytes of a device, if known.

  Raises:
    UserError: in place of JAX's error, with the size of each part and the largest buffers.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    # JAX has no class of its own for this error; the status code in the message is all there is.
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(_describe(parts, capacity)) from error


def _gib(count: int) -> str:
  return f"{count / GIB:.2f} GiB"


def _describe(parts: dict[str, PyTree], capacity: int | None) -> str:
  """Returns the line: sizes of the parts, the three largest buffers, and the settings to change."""
  sums = ", ".join(f"{name} {_gib(device_bytes(tree))}" for name, tree in parts.items())
  # The largest single buffers often name the cause, such as a table of the vocabulary.
  leaves = [
    (_shard_bytes(leaf), f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}")
    for name, tree in parts.items()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if not _is_on_host(leaf)
  ]
  largest = ", ".join(f"{name} {_gib(count)}" for count, name in sorted(leaves, reverse=True)[:3])
  total = f" of {_gib(capacity)}" if capacity else ""
  return (
    f"out of memory{total} per device. Stored on each: {sums}; the largest buffers: {largest}. The"
    " rest is activations: reduce them with a higher train.accumulate, model.remat=full or a lower"
    " data.max_length. Reduce what is stored with parallel.fsdp, lora.rank, model.param_dtype and"
    " reference.param_dtype bfloat16, parallel.offload_optimizer or a reference.store"
  )


def device_free() -> int | None:
  """Returns the bytes that arrays may still take on a device of this process, None if unknown."""
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  return None if limit is None else limit - stats.get("bytes_in_use", 0)


def device_capacity() -> int | None:
  """Returns the bytes that a device of this process has for arrays, or None if unknown.

  GPUs and TPUs report it; the CPU does not.
  """
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
