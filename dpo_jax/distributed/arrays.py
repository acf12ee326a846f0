"""Arrays over devices, brought to the host: whole ones, or one layer of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Lead = tuple[int, ...]  # which layer, and which expert, of a stacked leaf


def gathered(x: Any, lead: Lead = ()) -> np.ndarray:
  """x[lead] on host, of an array on host or on devices.

  All processes that hold a part of it call it together.
  """
  if not isinstance(x, jax.Array):
    return np.asarray(x)[lead]
  if not x.is_fully_addressable and not x.is_fully_replicated:
    return np.asarray(_take_whole(NamedSharding(x.sharding.mesh, PartitionSpec()))(x, lead))
  if lead:
    return np.asarray(_take(x, lead))
  # A second array over the same buffers: the first would keep what np.asarray copies to host.
  shards = [shard.data for shard in x.addressable_shards]
  return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards))


@jax.jit
def _take(leaf: jax.Array, lead: Lead) -> jax.Array:
  """leaf[lead], compiled once for all layers."""
  return leaf[lead]


@functools.cache
def _take_whole(everywhere: Sharding) -> Any:
  """As `_take`, to where every process has it whole."""
  return jax.jit(lambda leaf, lead: leaf[lead], out_shardings=everywhere)
