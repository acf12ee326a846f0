"""Copies of sharded arrays on the host: an entire array, or one layer of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Lead = tuple[int, ...]  # indices of the layer, and of the expert, in a stacked leaf


def gather_to_host(x: Any, lead: Lead = ()) -> np.ndarray:
  """Returns x[lead] as a NumPy array, from an array on the host or on devices.

  If other processes store parts of the array, all processes must call this together.
  """
  if not isinstance(x, jax.Array):
    return np.asarray(x)[lead]
  # There are three cases on devices: 1. parts lie in other processes, so a compiled gather brings
  # them here; 2. one layer is taken, on the device, so that only that layer is copied; 3. the
  # entire array is copied from the shards that this process has.
  if not x.is_fully_addressable and not x.is_fully_replicated:
    assert isinstance(x.sharding, NamedSharding)  # the one kind that crosses processes here
    return np.asarray(_index_replicated(NamedSharding(x.sharding.mesh, PartitionSpec()))(x, lead))
  if lead:
    return np.asarray(_index(x, lead))
  # np.asarray caches the host copy inside the array it is given, for as long as that array lives.
  # So it is given a second array over the same device buffers, which is dropped at once.
  shards = [shard.data for shard in x.addressable_shards]
  return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards))


@jax.jit
def _index(leaf: jax.Array, lead: Lead) -> jax.Array:
  """Returns leaf[lead]; `lead` is traced, so one program serves all layers."""
  return leaf[lead]


@functools.cache  # one jitted function per sharding: a new one would compile again at every call
def _index_replicated(everywhere: Sharding) -> Any:
  """Returns a function like `_index` whose result is complete on every device."""

  def index(leaf: jax.Array, lead: Lead) -> jax.Array:
    return leaf[lead]

  return jax.jit(index, out_shardings=everywhere)
