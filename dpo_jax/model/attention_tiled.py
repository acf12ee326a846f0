"""Attention for CPUs: each tile of queries reads only the keys that its own pairs can have.

A row contains several pairs, and a query sees its own pair alone, so most of the keys before it in
the row are hidden. Where the pairs of a tile begin is known from the batch. Tiles are sorted by how
many keys they must read, rounded up to one of a few widths, and each width has a loop with as many
turns as it has tiles. The backward pass keeps one log-sum-exp per query and computes the weights
again from it: five products per tile, and no length x length array (Dao et al. 2022,
"FlashAttention", alg. 4).

Axes beyond the key in `structs`: `T` tiles, `J` key/value heads, `Q` queries of a tile times the
query heads that share a key/value head, `C` keys of a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.model.attention import UNSEEN, Keys, Tokens, visible
from dpo_jax.structs import Array

# Queries of a tile, and the unit in which keys are read.
TILE = 64
# Remat "dots" keeps the arrays of this name: the result and the log-sum-exps.
REMAT_NAME = "attention"


class ScoreOptions(NamedTuple):
  """Options of the scores, the same for all layers.

  Attributes:
    scale: factor of query times key; 0 means 1 / sqrt(K).
    cap: c of c tanh(score / c); 0 for no cap.
  """

  scale: float = 0.0
  cap: float = 0.0


class TilePlan(NamedTuple):
  """The order of a batch's tiles, so that tiles of one width share a loop.

  Attributes:
    order_T: numbers of the tiles, those that read the fewest keys first. Tiles of padding alone
      come first of all.
    bounds_X: for every width, the index in `order_T` of its first tile; then the end.
  """

  order_T: Array
  bounds_X: Array


def key_widths(tiles: int) -> tuple[int, ...]:
  """Returns the numbers of key tiles that a loop may read: 1, 2, 3, 4, 6, 8, 12, … and `tiles`.

  Neighbours differ by at most a factor of 1.5 (of 2 at the start), so few keys are read in vain,
  and there are few loops to compile.
  """
  powers = [2**i for i in range(tiles.bit_length())]
  steps = sorted({*powers, *(3 * power // 2 for power in powers)})
  return (*(step for step in steps if step < tiles), tiles)


def plan_tiles(tokens: Tokens) -> TilePlan:
  """Sorts the tiles of a batch by the number of key tiles that each must read."""
  tokens = _pad_tokens(tokens)
  rows, length = tokens.pair_NL.shape
  count = length // TILE
  at_L = jnp.arange(length)
  # The first token of every token's pair. -2 is no pair, so the first column always begins one.
  begins_NL = jnp.diff(tokens.pair_NL, axis=1, prepend=-2) != 0
  start_NL = jax.lax.cummax(jnp.where(begins_NL, at_L, 0), axis=1)
  start_NL = jnp.where(tokens.pair_NL < 0, length, start_NL)  # padding needs no keys
  first_NT = start_NL.reshape(rows, count, TILE).min(axis=2) // TILE
  need_NT = jnp.maximum(jnp.arange(1, count + 1) - first_NT, 0)  # 0 where all is padding
  need_T = need_NT.reshape(-1)
  kind_T = jnp.searchsorted(jnp.array((0, *key_widths(count))), need_T)
  order_T = jnp.argsort(kind_T)
  # Kind 0 needs no keys; counting from 1 leaves its tiles out of every loop.
  bounds_X = jnp.searchsorted(kind_T[order_T], jnp.arange(1, len(key_widths(count)) + 2))
  return TilePlan(order_T, bounds_X)


def attend_tiles(
  q_NLHK: Array,
  keys: Keys,
  tokens: Tokens,
  plan: TilePlan,
  window: Array | None,
  options: ScoreOptions,
) -> Array:
  """Computes `attention.attend_blocks` by tiles, up to rounding: [N, L, H, K].

  The result is 0 in tiles of padding alone.
  """
  rows, length, heads, size = q_NLHK.shape
  q_NLHK, tokens = _pad(q_NLHK, 1), _pad_tokens(tokens)
  keys = Keys(*(_pad(x_NJLK, 2) for x_NJLK in keys))
  groups = heads // keys.k_NJCK.shape[1]
  count = q_NLHK.shape[1] // TILE
  # The query heads of one key/value head are joined with the queries of a tile: one product.
  q = q_NLHK.reshape(rows, count, TILE, heads // groups, groups, size)
  q_TJQK = q.transpose(0, 1, 3, 4, 2, 5).reshape(rows * count, heads // groups, -1, size)
  # JAX types the result of a custom_vjp with nondiff_argnums as an unknown object.
  out_TJQK = cast(Array, _attend(q_TJQK, keys, tokens, window, plan, options))
  out = out_TJQK.reshape(rows, count, heads // groups, groups, TILE, size)
  return out.transpose(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, size)[:, :length]


def _pad(x: Array, axis: int, value: int = 0) -> Array:
  """Pads an axis at its end to a multiple of `TILE`."""
  missing = [0] * x.ndim
  missing[axis] = -x.shape[axis] % TILE
  if not missing[axis]:
    return x
  return jnp.pad(x, [(0, count) for count in missing], constant_values=value)


def _pad_tokens(tokens: Tokens) -> Tokens:
  """Pads rows to whole tiles, with tokens of pair -1, which nobody sees."""
  return Tokens(_pad(tokens.position_NL, 1), _pad(tokens.pair_NL, 1, -1), _pad(tokens.branch_NL, 1))


# The gradient is written by hand: JAX cannot differentiate a loop whose number of turns is not
# known when it is compiled, and would keep the weights of every tile.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_TJQK, keys, tokens, window, plan, options):
  return _forward(q_TJQK, keys, tokens, window, plan, options)[0]


def _forward(q_TJQK, keys, tokens, window, plan, options):
  """Computes the attention of every tile, and what the backward pass needs."""

  def attend_tile(tile, carry):
    out_TJQK, norm_TJQ = carry
    k_JCK, v_JCK = tile.read(keys.k_NJCK), tile.read(keys.v_NJCK)
    s_JQC = _scores(q_TJQK[tile.index], k_JCK, tile.visible(tokens, window), options)
    top_JQ1 = s_JQC.max(axis=-1, keepdims=True)
    w_JQC = jnp.exp(s_JQC - top_JQ1)
    total_JQ1 = w_JQC.sum(axis=-1, keepdims=True)
    out_JQK = _product("jqc,jck->jqk", w_JQC, v_JCK) / total_JQ1
    norm_JQ = (top_JQ1 + jnp.log(total_JQ1))[..., 0]
    put = jax.lax.dynamic_update_index_in_dim
    out_TJQK = put(out_TJQK, out_JQK.astype(out_TJQK.dtype), tile.index, 0)
    return out_TJQK, put(norm_TJQ, norm_JQ, tile.index, 0)

  start = jnp.zeros_like(q_TJQK), jnp.zeros(q_TJQK.shape[:-1], jnp.float32)
  out_TJQK, norm_TJQ = _for_each_tile(attend_tile, tokens, plan, start)
  out_TJQK, norm_TJQ = checkpoint_name((out_TJQK, norm_TJQ), REMAT_NAME)
  return out_TJQK, (q_TJQK, keys, tokens, window, plan, out_TJQK, norm_TJQ)


def _backward(options, saved, slope_TJQK):
  """Computes the gradients of queries, keys and values."""
  q_TJQK, keys, tokens, window, plan, out_TJQK, norm_TJQ = saved
  # The gradient of a softmax subtracts the mean of dw over a query's keys, Σ_c w dw. It equals
  # slope · out, which needs no array over keys.
  slope_f32, out_f32 = slope_TJQK.astype(jnp.float32), out_TJQK.astype(jnp.float32)
  mean_TJQ = (slope_f32 * out_f32).sum(axis=-1)

  def differentiate_tile(tile, carry):
    dq_TJQK, dk_NJCK, dv_NJCK = carry
    q_JQK, slope_JQK = q_TJQK[tile.index], slope_TJQK[tile.index]
    k_JCK, v_JCK = tile.read(keys.k_NJCK), tile.read(keys.v_NJCK)
    s_JQC = _scores(q_JQK, k_JCK, tile.visible(tokens, window), options)
    w_JQC = jnp.exp(s_JQC - norm_TJQ[tile.index][..., None])
    dw_JQC = _product("jqk,jck->jqc", slope_JQK, v_JCK)
    ds_JQC = w_JQC * (dw_JQC - mean_TJQ[tile.index][..., None])
    if options.cap:
      # d/dz c tanh(z / c) = 1 - (s / c)². The square of an unseen score would overflow, and zero
      # times infinity is NaN. Its weight is zero, so any finite score will do.
      ds_JQC = ds_JQC * (1 - jnp.square(jnp.maximum(s_JQC, -options.cap) / options.cap))
    ds_JQC = ds_JQC * _scale(options, q_JQK)
    dq_JQK = _product("jqc,jck->jqk", ds_JQC, k_JCK)
    dq_TJQK = jax.lax.dynamic_update_index_in_dim(
      dq_TJQK, dq_JQK.astype(dq_TJQK.dtype), tile.index, 0
    )
    # Several tiles read the same keys, so gradients of keys are added up; those of a tile's
    # queries are written once.
    dk_NJCK = tile.add(dk_NJCK, _product("jqc,jqk->jck", ds_JQC, q_JQK))
    dv_NJCK = tile.add(dv_NJCK, _product("jqc,jqk->jck", w_JQC, slope_JQK))
    return dq_TJQK, dk_NJCK, dv_NJCK

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in keys]
  start = (jnp.zeros_like(q_TJQK), *zeros)
  dq_TJQK, *dkv = _for_each_tile(differentiate_tile, tokens, plan, start)
  dkeys = Keys(*(x.astype(key.dtype) for x, key in zip(dkv, keys, strict=True)))
  return dq_TJQK, dkeys, None, None, None


_attend.defvjp(_forward, _backward)


def _scale(options: ScoreOptions, q_JQK: Array) -> float:
  """Returns the factor of query times key."""
  return options.scale or 1.0 / math.sqrt(q_JQK.shape[-1])


def _scores(q_JQK: Array, k_JCK: Array, visible_QC: Array, options: ScoreOptions) -> Array:
  """Computes scaled, capped and masked scores, in float32: [J, Q, C]."""
  s_JQC = _product("jqk,jck->jqc", q_JQK, k_JCK) * _scale(options, q_JQK)
  s_JQC = options.cap * jnp.tanh(s_JQC / options.cap) if options.cap else s_JQC
  shape = s_JQC.shape
  # The mask is the same for the query heads that are joined with the queries.
  s = s_JQC.reshape(shape[0], -1, *visible_QC.shape)
  return jnp.where(visible_QC, s, UNSEEN).reshape(shape)


def _product(axes: str, a: Array, b: Array) -> Array:
  """Computes a product in the narrower of two types, with sums in float32."""
  dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
  return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
  """One tile of queries, and the key tiles that it reads.

  Attributes:
    index: number of the tile in the batch.
    row: row of the batch that it belongs to.
    place: number of the tile within its row.
    first: number of the first key tile that it reads, within the row.
    width: how many key tiles it reads.
  """

  index: Array
  row: Array
  place: Array
  first: Array
  width: int

  def read(self, x_NJCK: Array) -> Array:
    """Returns the keys or values that the tile reads: [J, C, K]."""
    _, heads, _, size = x_NJCK.shape
    start = (self.row, 0, self.first * TILE, 0)
    return jax.lax.dynamic_slice(x_NJCK, start, (1, heads, self.width * TILE, size))[0]

  def add(self, x_NJCK: Array, more_JCK: Array) -> Array:
    """Adds to the part of x that `read` returns."""
    start = (self.row, 0, self.first * TILE, 0)
    return jax.lax.dynamic_update_slice(x_NJCK, (self.read(x_NJCK) + more_JCK)[None], start)

  def visible(self, tokens: Tokens, window: Array | None) -> Array:
    """Computes which of its queries sees which of its keys: [Q, C]."""

    def cut(first: Array, width: int) -> Tokens:
      start, size = (self.row, first * TILE), (1, width * TILE)
      return Tokens(*(jax.lax.dynamic_slice(x_NL, start, size) for x_NL in tokens))

    return visible(cut(self.place, 1), cut(self.first, self.width), window)[0]


def _for_each_tile(
  turn: Callable[[_Tile, Any], Any], tokens: Tokens, plan: TilePlan, carry: Sequence[Array]
) -> Any:
  """Calls `turn` for every tile that contains a token, one width after another."""
  count = tokens.pair_NL.shape[1] // TILE
  for number, width in enumerate(key_widths(count)):

    def one(at, carry, width=width):
      index = plan.order_T[at]
      place = index % count
      # A tile near the start of its row reads as many keys as others of its width; the mask hides
      # those that come after it.
      first = jnp.maximum(place + 1 - width, 0)
      return turn(_Tile(index, index // count, place, first, width), carry)

    carry = jax.lax.fori_loop(plan.bounds_X[number], plan.bounds_X[number + 1], one, carry)
  return carry
