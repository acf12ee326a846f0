"""Attention on whole rows, with the heads of a row divided among devices instead of its tokens.

A token looks at other tokens, but a head never looks at another head. So devices that share the
tokens of a row exchange parts before attention (all-to-all): each gives away most heads of its own
tokens, and gets all tokens for its share of the heads. It then runs the same attention as a single
device would, and a second exchange undoes the first (Jacobs et al. 2023, "DeepSpeed Ulysses").

No gradient is added up over devices: where several devices need one key/value head, each gets a
copy of its own, and the gradients of the copies are added up after they came back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from dpo_jax.distributed import sharding
from dpo_jax.structs import Array


class Shares(NamedTuple):
  """The heads that each device computes. Heads of zeros fill up what does not divide evenly.

  Attributes:
    copies: how many times every key/value head occurs. Each copy serves an equal part of the query
      heads that share it.
    keys: number of key/value heads of a device.
    queries: number of query heads that share a key/value head of a device.
  """

  copies: int
  keys: int
  queries: int


def share_heads(heads: int, kv_heads: int, devices: int) -> Shares:
  """Chooses the shares that leave the fewest query heads, then key/value heads, to a device.

  Key/value heads are not copied where their number divides evenly. Two key/value heads with seven
  query heads each, over four devices, occur twice each: one for four of the seven, one for the
  other three and a head of zeros.
  """
  group = heads // kv_heads

  def of_device(copies: int) -> Shares:
    return Shares(copies, keys=-(-kv_heads * copies // devices), queries=-(-group // copies))

  # More copies than query heads or devices would have nobody to serve.
  choices = [of_device(copies) for copies in range(1, min(group, devices) + 1)]
  return min(choices, key=lambda shares: (shares.keys * shares.queries, shares.keys, shares.copies))


def attend_by_heads(
  attend: Callable[[tuple[Array, Array, Array], Any, Any], Array],
  qkv: tuple[Array, Array, Array],
  rows: Any,
  shared: Any = None,
) -> Array:
  """Computes attention with the heads divided over the tensor and sequence axes: [N, L, H, Hd].

  Args:
    attend: ((q_NLHHd, k_NLJHd, v_NLJHd), rows, shared) -> [N, L, H, Hd], with any number of heads,
      computed row by row and, for the J key/value heads, head by head.
    qkv: queries, keys and values.
    rows: a tree of arrays whose first axis are rows or groups of rows.
    shared: a tree of arrays that all rows share.
  """
  q_NLHHd, k_NLJHd, v_NLJHd = qkv
  length, heads = q_NLHHd.shape[1:3]
  kv_heads = k_NLJHd.shape[2]
  over_shards = sharding.map_over_shards(attend, length=length)
  tensor, sequence = sharding.head_axes(length)
  # Devices of the tensor axis already have heads of their own if these divide evenly. Each of
  # those runs of heads is then shared among the devices of the sequence axis alone.
  runs = 1 if kv_heads % tensor else tensor
  shares = share_heads(heads // runs, kv_heads // runs, tensor * sequence // runs)
  fill = functools.partial(_fill, runs=runs, total=tensor * sequence * shares.keys)
  k, v = (fill(jnp.repeat(x, shares.copies, axis=2)) for x in (k_NLJHd, v_NLJHd))
  # Query heads of one key/value head, filled up to the same number for each of its copies.
  grouped = _fill(q_NLHHd, runs=kv_heads, total=kv_heads * shares.copies * shares.queries)
  q = fill(grouped, size=shares.queries)
  out = over_shards((q, k, v), rows, shared)
  out = _cut(out, runs=runs, total=kv_heads * shares.copies * shares.queries)
  return _cut(out, runs=kv_heads, total=heads)


def _fill(x_NLHHd: Array, *, runs: int, total: int, size: int = 1) -> Array:
  """Adds heads of zeros, at the end of each of `runs` equal runs, up to `total` times `size`."""
  missing = (total * size - x_NLHHd.shape[2]) // runs
  if not missing:
    return x_NLHHd
  rows, length, _, head_width = x_NLHHd.shape
  x = x_NLHHd.reshape(rows, length, runs, -1, head_width)
  x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing), (0, 0)])
  return x.reshape(rows, length, total * size, head_width)


def _cut(x_NLHHd: Array, *, runs: int, total: int) -> Array:
  """Removes what `_fill` added, so that `total` heads remain."""
  if x_NLHHd.shape[2] == total:
    return x_NLHHd
  rows, length, _, head_width = x_NLHHd.shape
  x = x_NLHHd.reshape(rows, length, runs, -1, head_width)
  return x[:, :, :, : total // runs].reshape(rows, length, total, head_width)
