"""Stochastic rounding, for numbers that are kept in fewer bits than they are computed in.

A bfloat16 number has 8 significant bits, so its neighbours are 0.4% to 0.8% away. An update that is
smaller than half of that disappears when it is rounded to nearest, at every step again. Rounded
stochastically, it moves the number to the neighbour with a probability that makes the expectation
right, so small updates add up. Gupta et al. 2015, section 3; Zamirai et al. 2020, "Revisiting
BFloat16 Training", section 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PyTree

_CUT = 16  # bits that bfloat16 lacks of a float32, at its end


def is_narrow(x: Array) -> bool:
  """Returns True for the type that is rounded stochastically."""
  return x.dtype == jnp.bfloat16


def has_narrow(tree: PyTree) -> bool:
  """Returns True if some leaf of a tree is kept in fewer bits than float32."""
  return any(is_narrow(x) for x in jax.tree.leaves(tree))


def widen(tree: PyTree) -> PyTree:
  """Returns a tree whose narrow leaves are float32, and whose other leaves are what they were."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x) else x, tree)


def stochastic(x: Array, key: jax.Array) -> Array:
  """Rounds float32 to one of its two bfloat16 neighbours, so that the expectation is x.

  The probability of each neighbour is the other one's share of the distance. What bfloat16 can
  represent stays as it is. Every sharding, and every number of devices, gives the same result.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # A number is up to 2^16 - 1 of the last bits above its lower neighbour. Adding as many at random
  # carries into the bits that are kept with just the right probability. Sign and magnitude are
  # apart in a float, so this holds for negative numbers too.
  kept = ((bits + (_noise(x.shape, key) >> _CUT)) >> _CUT).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
  # The carry would turn some NaNs into numbers.
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _noise(shape: tuple[int, ...], key: jax.Array) -> Array:
  """Returns uint32 bits, each a function of the key and the element's place in the whole array.

  A hash of the place, as in counter-based generators (Salmon et al. 2011), by the last steps of
  MurmurHash3 (Appleby 2011), applied twice. `jax.random.bits` would do, but on a CPU it is a loop
  that keeps four numbers for every element in memory; this becomes a part of the update itself.
  """
  first, second = jax.random.key_data(key).astype(jnp.uint32)[:2]
  place, stride = first, 1
  for axis in reversed(range(len(shape))):
    # Modulo 2^32: elements that are so far apart may have the same bits.
    place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return _mix(_mix(place) ^ second)


def _mix(x: Array) -> Array:
  """Computes the finalizer of MurmurHash3, a bijection in which an input bit flips half of all."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def round_as(tree: PyTree, like: PyTree, key: jax.Array | None) -> PyTree:
  """Rounds each leaf to the type of the same leaf of `like`.

  Args:
    tree: what was computed, with narrow leaves widened.
    like: what it replaces.
    key: each leaf is rounded by a key made from this one and its number; None rounds to nearest.
  """
  leaves, structure = jax.tree.flatten(tree)
  rounded = [
    stochastic(x, jax.random.fold_in(key, number))
    if key is not None and is_narrow(old)
    else x.astype(old.dtype)
    for number, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
  ]
  return structure.unflatten(rounded)


def apply_updates(
  params: PyTree, updates: PyTree, key: jax.Array | None
) -> tuple[PyTree, dict[str, Array]]:
  """Adds updates to parameters, and measures how much of them bfloat16 parameters keep.

  Args:
    params, updates: parameters, and what is added to them in float32 or wider.
    key: of the rounding, as in `round_as`.

  Returns:
    The parameters, and where some of them are bfloat16:

      update/changed   share of the weights that are another number than before
      update/kept      Σ u v / Σ u², with the update u and the change v that the weights really
                       made: 1 in expectation if rounded stochastically, 0 if nothing arrives
  """
  if not has_narrow(params):
    return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates), {}
  before, updates = widen((params, updates))
  params = round_as(jax.tree.map(jnp.add, before, updates), params, key)
  moved = jax.tree.map(jnp.subtract, widen(params), before)

  def total(fn, *trees: PyTree) -> Array:
    # In float32, which counts billions well enough for a share.
    parts = jax.tree.map(lambda *x: fn(*x).astype(jnp.float32).sum(), *trees)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))

  wanted = total(jnp.square, updates)
  return params, {
    "update/changed": total(lambda v: v != 0, moved) / sum(x.size for x in jax.tree.leaves(moved)),
    # A learning rate of 0 wants nothing, and all of it arrives.
    "update/kept": jnp.where(wanted > 0, total(jnp.multiply, updates, moved) / wanted, 1.0),
  }
