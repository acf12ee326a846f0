"""Attention for CPUs: a tile of queries at a time, against no more keys than its own pairs have.

A row holds several pairs, and a query sees none but its own: of all that lies before it in the row,
most need not be looked at. Where the pairs of a tile begin is known from the batch alone. Tiles are
sorted by how many keys they look back on, in a few widths, and each width has a loop of as many
turns as it has tiles. The backward pass keeps a log-sum-exp for every query and forms the weights
again from it: five products, and no length x length array.

Axes beyond the key in `structs`: `T` tiles, `J` key/value heads, `Q` queries of a tile with the
query heads that share a key/value head, `C` keys of a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.model.attention import Keys, Tokens, visible
from dpo_jax.structs import Array

TILE = 64
# What `remat` keeps of this attention: its result and the log-sum-exps.
KEPT = "attention"
_UNSEEN = -1e30


class Kind(NamedTuple):
  """What is the same for all layers.

  Attributes:
    scale: of query times key; 0 is 1 / sqrt(K).
    cap: c of c tanh(score / c); 0 for none.
  """

  scale: float = 0.0
  cap: float = 0.0


class Plan(NamedTuple):
  """Which tiles look back on how much.

  Attributes:
    order_T: tiles, those that look at fewest keys first.
    bounds_X: where in it each width begins, and the end; tiles of padding come before the first.
  """

  order_T: Array
  bounds_X: Array


def widths(tiles: int) -> tuple[int, ...]:
  """How many tiles of keys a tile may look at: 1, 2, 3, 4, 6, 8, 12, … and all there are."""
  powers = [2**i for i in range(tiles.bit_length())]
  steps = sorted({*powers, *(3 * power // 2 for power in powers)})
  return (*(step for step in steps if step < tiles), tiles)


def plan(tokens: Tokens) -> Plan:
  """Of the rows of a batch."""
  tokens = _whole_tiles(tokens)
  rows, length = tokens.pair_NL.shape
  count = length // TILE
  at_L = jnp.arange(length)
  begins_NL = jnp.diff(tokens.pair_NL, axis=1, prepend=-2) != 0
  start_NL = jax.lax.cummax(jnp.where(begins_NL, at_L, 0), axis=1)
  start_NL = jnp.where(tokens.pair_NL < 0, length, start_NL)
  first_NT = start_NL.reshape(rows, count, TILE).min(axis=2) // TILE
  need_NT = jnp.maximum(jnp.arange(1, count + 1) - first_NT, 0)  # 0 where all is padding
  need_T = need_NT.reshape(-1)
  kind_T = jnp.searchsorted(jnp.array((0, *widths(count))), need_T)
  order_T = jnp.argsort(kind_T)
  bounds_X = jnp.searchsorted(kind_T[order_T], jnp.arange(1, len(widths(count)) + 2))
  return Plan(order_T, bounds_X)


def attend_tiles(
  q_NLHK: Array, keys: Keys, tokens: Tokens, plan: Plan, window: Array | None, kind: Kind
) -> Array:
  """`attention.attend_blocks` but for rounding, and 0 where a tile is padding: [N, L, H, K]."""
  rows, length, heads, size = q_NLHK.shape
  q_NLHK, tokens = _padded(q_NLHK, 1), _whole_tiles(tokens)
  keys = Keys(*(_padded(x_NJLK, 2) for x_NJLK in keys))
  groups = heads // keys.k_NJCK.shape[1]
  count = q_NLHK.shape[1] // TILE
  q = q_NLHK.reshape(rows, count, TILE, heads // groups, groups, size)
  q_TJQK = q.transpose(0, 1, 3, 4, 2, 5).reshape(rows * count, heads // groups, -1, size)
  out_TJQK = _attend(q_TJQK, keys, tokens, window, plan, kind)
  out = out_TJQK.reshape(rows, count, heads // groups, groups, TILE, size)
  return out.transpose(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, size)[:, :length]


def _padded(x: Array, axis: int, value: int = 0) -> Array:
  """As long along an axis as a multiple of `TILE`."""
  short = [0] * x.ndim
  short[axis] = -x.shape[axis] % TILE
  if not short[axis]:
    return x
  return jnp.pad(x, [(0, count) for count in short], constant_values=value)


def _whole_tiles(tokens: Tokens) -> Tokens:
  padding = Tokens(0, -1, 0)
  return Tokens(*(_padded(x_NL, 1, value) for x_NL, value in zip(tokens, padding, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_TJQK, keys, tokens, window, plan, kind):
  return _forward(q_TJQK, keys, tokens, window, plan, kind)[0]


def _forward(q_TJQK, keys, tokens, window, plan, kind):
  def turn(tile, carry):
    out_TJQK, norm_TJQ = carry
    s_JQC = _scores(q_TJQK[tile.index], tile.of(keys.k_NJCK), tile.seen(tokens, window), kind)
    top_JQ1 = s_JQC.max(axis=-1, keepdims=True)
    w_JQC = jnp.exp(s_JQC - top_JQ1)
    total_JQ1 = w_JQC.sum(axis=-1, keepdims=True)
    out_JQK = _product("jqc,jck->jqk", w_JQC, tile.of(keys.v_NJCK)) / total_JQ1
    norm_JQ = (top_JQ1 + jnp.log(total_JQ1))[..., 0]
    put = jax.lax.dynamic_update_index_in_dim
    out_TJQK = put(out_TJQK, out_JQK.astype(out_TJQK.dtype), tile.index, 0)
    return out_TJQK, put(norm_TJQ, norm_JQ, tile.index, 0)

  start = jnp.zeros_like(q_TJQK), jnp.zeros(q_TJQK.shape[:-1], jnp.float32)
  out_TJQK, norm_TJQ = _each(turn, tokens, plan, start)
  out_TJQK, norm_TJQ = checkpoint_name((out_TJQK, norm_TJQ), KEPT)
  return out_TJQK, (q_TJQK, keys, tokens, window, plan, out_TJQK, norm_TJQ)


def _backward(kind, saved, slope_TJQK):
  q_TJQK, keys, tokens, window, plan, out_TJQK, norm_TJQ = saved
  wide = lambda x: x.astype(jnp.float32)
  mean_TJQ = (wide(slope_TJQK) * wide(out_TJQK)).sum(axis=-1)

  def turn(tile, carry):
    dq_TJQK, dk_NJCK, dv_NJCK = carry
    q_JQK, slope_JQK = q_TJQK[tile.index], slope_TJQK[tile.index]
    k_JCK, v_JCK = tile.of(keys.k_NJCK), tile.of(keys.v_NJCK)
    s_JQC = _scores(q_JQK, k_JCK, tile.seen(tokens, window), kind)
    w_JQC = jnp.exp(s_JQC - norm_TJQ[tile.index][..., None])
    dw_JQC = _product("jqk,jck->jqc", slope_JQK, v_JCK)
    ds_JQC = w_JQC * (dw_JQC - mean_TJQ[tile.index][..., None])
    if kind.cap:
      # Of an unseen key the weight is zero, whatever its score.
      ds_JQC = ds_JQC * (1 - jnp.square(jnp.maximum(s_JQC, -kind.cap) / kind.cap))
    ds_JQC = ds_JQC * _scale(kind, q_JQK)
    dq_JQK = _product("jqc,jck->jqk", ds_JQC, k_JCK)
    dq_TJQK = jax.lax.dynamic_update_index_in_dim(
      dq_TJQK, dq_JQK.astype(dq_TJQK.dtype), tile.index, 0
    )
    dk_NJCK = tile.add(dk_NJCK, _product("jqc,jqk->jck", ds_JQC, q_JQK))
    dv_NJCK = tile.add(dv_NJCK, _product("jqc,jqk->jck", w_JQC, slope_JQK))
    return dq_TJQK, dk_NJCK, dv_NJCK

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in keys]
  dq_TJQK, *dkv = _each(turn, tokens, plan, (jnp.zeros_like(q_TJQK), *zeros))
  dkeys = Keys(*(x.astype(key.dtype) for x, key in zip(dkv, keys, strict=True)))
  return dq_TJQK, dkeys, None, None, None


_attend.defvjp(_forward, _backward)


def _scale(kind: Kind, q_JQK: Array) -> float:
  return kind.scale or 1.0 / math.sqrt(q_JQK.shape[-1])


def _scores(q_JQK: Array, k_JCK: Array, seen_QC: Array, kind: Kind) -> Array:
  s_JQC = _product("jqk,jck->jqc", q_JQK, k_JCK) * _scale(kind, q_JQK)
  s_JQC = kind.cap * jnp.tanh(s_JQC / kind.cap) if kind.cap else s_JQC
  shape = s_JQC.shape
  s = s_JQC.reshape(shape[0], -1, *seen_QC.shape)
  return jnp.where(seen_QC, s, _UNSEEN).reshape(shape)


def _product(axes: str, a: Array, b: Array) -> Array:
  """In the type of what is narrower, accumulated in float32."""
  dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
  return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
  """One tile: its number, its row, its place among the tiles of that row, and its keys."""

  index: Array
  row: Array
  place: Array
  first: Array
  width: int

  def of(self, x_NJCK: Array) -> Array:
    """The keys or values it looks at: [J, C, K]."""
    _, heads, _, size = x_NJCK.shape
    start = (self.row, 0, self.first * TILE, 0)
    return jax.lax.dynamic_slice(x_NJCK, start, (1, heads, self.width * TILE, size))[0]

  def add(self, x_NJCK: Array, more_JCK: Array) -> Array:
    start = (self.row, 0, self.first * TILE, 0)
    return jax.lax.dynamic_update_slice(x_NJCK, (self.of(x_NJCK) + more_JCK)[None], start)

  def seen(self, tokens: Tokens, window: Array | None) -> Array:
    """Which of its queries sees which of its keys: [Q, C]."""
    cut = lambda first, width: Tokens(
      *(jax.lax.dynamic_slice(x, (self.row, first * TILE), (1, width * TILE)) for x in tokens)
    )
    return visible(cut(self.place, 1), cut(self.first, self.width), window)[0]


def _each(
  turn: Callable[[_Tile, Any], Any], tokens: Tokens, plan: Plan, carry: Sequence[Array]
) -> Any:
  """Every tile that holds a token in turn, those of one width after another."""
  count = tokens.pair_NL.shape[1] // TILE
  for number, width in enumerate(widths(count)):

    def one(at, carry, width=width):
      index = plan.order_T[at]
      place = index % count
      first = jnp.maximum(place + 1 - width, 0)
      return turn(_Tile(index, index // count, place, first, width), carry)

    carry = jax.lax.fori_loop(plan.bounds_X[number], plan.bounds_X[number + 1], one, carry)
  return carry
