"""Who sees whom, from where, and what of it: attention over the rows of a `TokenBatch`.

It follows the mask rule of `TokenBatch`, in blocks of queries: a key never comes later in its row,
so a block needs only the keys up to its own end, and no length x length array is kept for the
backward pass.

Axes beyond the key in `structs`: `J` key/value heads, `Q` queries and `C` keys of one block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.distributed import sharding
from dpo_jax.model.config import ROTARY, ModelConfig, RopeScaling
from dpo_jax.structs import Array

QUERY_BLOCK = 128


class Tokens(NamedTuple):
  """The part of a `TokenBatch` that decides who sees whom."""

  position_NL: Array
  pair_NL: Array
  branch_NL: Array

  def columns(self, start: int, stop: int) -> Tokens:
    return Tokens(*(x_NL[:, start:stop] for x_NL in self))


def visible(query: Tokens, key: Tokens, window: Array | None = None) -> Array:
  """Who sees whom: same pair, key not later, key in the prompt or in my branch: [N, Q, C].

  With a window, the key is also less than so many positions back.
  """
  q = [x_NL[:, :, None] for x_NL in query]
  k = [x_NL[:, None, :] for x_NL in key]
  (position_q, pair_q, branch_q), (position_k, pair_k, branch_k) = q, k
  seen_NQC = (
    (pair_q == pair_k) & (position_q >= position_k) & ((branch_k == 0) | (branch_k == branch_q))
  )
  return seen_NQC if window is None else seen_NQC & (position_q - position_k < window)


class Keys(NamedTuple):
  """Keys and values of C columns, heads first: products over a cache are four times quicker so."""

  k_NJCK: Array
  v_NJCK: Array


def attend(
  q_NQHK: Array, parts: list[tuple[Keys, Array]], *, scale: float = 0.0, cap: float = 0.0
) -> Array:
  """Softmax attention of grouped queries, scores and sums in float32: [N, Q, H, K].

  Args:
    q_NQHK: queries.
    parts: keys, each with its visible_NQC; the softmax runs over all of them together.
    scale: of query times key; 0 is 1 / sqrt(K).
    cap: c of c tanh(score / c); 0 for none.
  """
  N, Q, H, K = q_NQHK.shape
  J = parts[0][0].k_NJCK.shape[1]
  # Heads first and the division last: plain batched products, the quickest form on CPU.
  q_NJxK = q_NQHK.reshape(N, Q, J, H // J, K).transpose(0, 2, 3, 1, 4).reshape(N, J, -1, K)

  def scores(keys: Keys, visible_NQC: Array) -> Array:
    s = jnp.einsum("njxk,njck->njxc", q_NJxK, keys.k_NJCK, preferred_element_type=jnp.float32)
    s = s.reshape(N, J, H // J, Q, -1) * (scale or 1.0 / math.sqrt(K))
    s = cap * jnp.tanh(s / cap) if cap else s
    return jnp.where(visible_NQC[:, None, None], s, -1e30)

  def mix(weights_NJGQC: Array, keys: Keys) -> Array:
    weights = weights_NJGQC.astype(keys.v_NJCK.dtype).reshape(N, J, H // J * Q, -1)
    return jnp.einsum("njxc,njck->njxk", weights, keys.v_NJCK, preferred_element_type=jnp.float32)

  scored = [scores(*part) for part in parts]
  top = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scored])
  weights = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scored]
  total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
  out = sum(mix(w, keys) for w, (keys, _) in zip(weights, parts, strict=True))
  out = (out.reshape(N, J, H // J, Q, K) / total).astype(q_NQHK.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(N, Q, H, K)


def attend_blocks(
  q_NLHK: Array, keys: Keys, tokens: Tokens, window: Array | None = None, **shape: float
) -> Array:
  """`attend` over whole rows, a block of queries at a time, scores never kept: [N, L, H, K]."""

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(q_NQHK, keys, query, key):
    return attend(q_NQHK, [(keys, visible(query, key, window))], **shape)

  def blocks(q_NLHK, queries, last):
    """Of queries of which the one in column i sees keys up to column last + i at most."""
    length, out = q_NLHK.shape[1], []
    for start in range(0, length, QUERY_BLOCK):
      stop = min(start + QUERY_BLOCK, length)
      earlier = Keys(*(x_NJLK[:, :, : last + stop] for x_NJLK in keys))
      query, key = queries.columns(start, stop), tokens.columns(0, last + stop)
      out.append(block(q_NLHK[:, start:stop], earlier, query, key))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)

  length = q_NLHK.shape[1]
  parts = sharding.sequence_parts(length)
  if parts == 1:
    return blocks(q_NLHK, tokens, 0)
  # Every device has a part of the queries and all keys, of which the last part sees all.
  keys = Keys(*map(sharding.gather_sequence, keys))
  own = jax.tree.map(lambda x: sharding.split_sequence(x, parts), (q_NLHK, tokens))
  each = functools.partial(blocks, last=length - length // parts)
  return jax.vmap(each, in_axes=1, out_axes=1)(*own).reshape(q_NLHK.shape)


# --- positions ------------------------------------------------------------------------------------


def rotary_names(config: ModelConfig) -> tuple[str, ...]:
  """The tables that some layer turns by, in the order of `ROTARY`."""
  return tuple(name for name in ROTARY if name in (config.rotary_layers or ("main",)))


def rotary_frequencies(config: ModelConfig, name: str = "main") -> np.ndarray:
  """Radians a position turns each pair of a head's dimensions: [K / 2], float64.

  Su et al. 2021, eq. 15; "llama3" is the stretch of the Llama 3.1 release, "yarn" that of Peng et
  al. 2023.
  """
  turned = config.rotary_width or config.head_width
  if name == "none":
    return np.zeros(turned // 2)
  base = config.rope_theta if name == "main" else config.local_theta
  inverse = base ** -(np.arange(0, turned, 2) / turned)
  scaling = config.rope_scaling
  if scaling is None or name == "local":
    return inverse
  if scaling.kind == "linear":
    return inverse / scaling.factor
  if scaling.kind == "llama3":
    turns = scaling.original_positions * inverse / (2 * np.pi)
    keep = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
  else:
    keep = 1 - _yarn_ramp(scaling, turned, base)
  keep = np.clip(keep, 0, 1)
  return inverse * (keep + (1 - keep) / scaling.factor)


def _yarn_ramp(scaling: RopeScaling, turned: int, base: float) -> np.ndarray:
  """From 0 at the dimension that makes high_factor turns to 1 at the one that makes low_factor."""
  dimension = lambda turns: (
    turned * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))
  )
  low, high = dimension(scaling.high_factor), dimension(scaling.low_factor)
  if scaling.whole:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, turned - 1)
  return (np.arange(turned // 2) - low) / (high - low or 0.001)


def _magnitude(config: ModelConfig, name: str) -> float:
  """What cosine and sine are multiplied by: 1 but for "yarn"."""
  scaling = config.rope_scaling
  if name != "main" or scaling is None or scaling.kind != "yarn":
    return 1.0
  return scaling.magnitude or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def rotary_table(config: ModelConfig, position_NL: Array) -> tuple[Array, Array] | None:
  """Cosine and sine of every position's angles, float32, once for all layers: [N, L, 1, K / 2].

  Where layers differ, a leading axis lists the tables of `rotary_names`.
  """
  if config.positions != "rotary":
    return None

  def one(name: str) -> tuple[Array, Array]:
    frequencies = jnp.asarray(rotary_frequencies(config, name), jnp.float32)
    angle = position_NL[:, :, None, None].astype(jnp.float32) * frequencies
    size = _magnitude(config, name)
    return jnp.cos(angle) * size, jnp.sin(angle) * size

  tables = [one(name) for name in rotary_names(config)]
  return tables[0] if len(tables) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *tables)


def rotate(x_NLHK: Array, table: tuple[Array, Array] | None) -> Array:
  """Turns (x_i, x_{i + R/2}) of the first R dimensions by the position's angle.

  Unchanged where positions are learned.
  """
  if table is None:
    return x_NLHK
  cos, sin = table
  half = cos.shape[-1]
  a, b, rest = jnp.split(x_NLHK.astype(jnp.float32), (half, 2 * half), axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_NLHK.dtype)
