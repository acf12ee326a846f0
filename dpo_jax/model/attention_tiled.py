"""Attention for CPUs: each tile of queries reads only the keys that its own pairs can have.

A row contains several pairs, and a query sees its own pair alone, so most of the keys before it in
the row are hidden. Where the pairs of a tile begin is known from the batch. Tiles are sorted by how
many keys they must read, rounded up to one of a few widths, and each width has a loop with as many
turns as it has tiles. The backward pass keeps one log-sum-exp per query and computes the weights
again from it: five products per tile, and no length x length array (Dao et al. 2022,
"FlashAttention", alg. 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.distributed import sharding
from dpo_jax.model.attention import UNSEEN, Keys, Tokens, visible
from dpo_jax.model.head_shares import attend_by_heads
from dpo_jax.structs import Array
from dpo_jax.utils.matmul import exact

# Queries of a tile, and the unit in which keys are read.
TILE = 64
# Remat "dots" keeps the arrays of this name: the result and the log-sum-exps.
REMAT_NAME = "attention"


class ScoreOptions(NamedTuple):
  """Options of the scores, the same for all layers.

  Attributes:
    scale: factor of query times key; 0 means 1 / sqrt(Hd).
    cap: c of c tanh(score / c); 0 for no cap.
  """

  scale: float = 0.0
  cap: float = 0.0


class TilePlan(NamedTuple):
  """The order of a batch's tiles, so that tiles of one width share a loop.

  Attributes:
    order_Ti: numbers of the tiles, those that read the fewest keys first. Tiles of padding alone
      come first of all.
    bounds_Gx: for every width, the index in `order_Ti` of its first tile; then the end.

  Every group of rows has a plan of its own, with numbers of its own tiles. Groups follow one
  another in `order_Ti`. A device has one group, and there is one where one device has all rows.
  """

  order_Ti: Array
  bounds_Gx: Array


def key_widths(tiles: int) -> tuple[int, ...]:
  """Returns the numbers of key tiles that a loop may read: 1, 2, 3, 4, 6, 8, 12, … and `tiles`.

  Neighbours differ by at most a factor of 1.5 (of 2 at the start), so few keys are read in vain,
  and there are few loops to compile.
  """
  powers = [2**i for i in range(tiles.bit_length())]
  steps = sorted({*powers, *(3 * power // 2 for power in powers)})
  return (*(step for step in steps if step < tiles), tiles)


def plan_tiles(tokens: Tokens) -> TilePlan:
  """Sorts the tiles of every group by the number of key tiles that each must read."""
  return sharding.map_over_groups(_plan_group)(tokens)


def _plan_group(tokens: Tokens) -> TilePlan:
  tokens = _pad_tokens(tokens)
  rows, length = tokens.pair_NL.shape
  count = length // TILE
  at_L = jnp.arange(length)
  # The first token of every token's pair. -2 is no pair, so the first column always begins one.
  begins_NL = jnp.diff(tokens.pair_NL, axis=1, prepend=-2) != 0
  start_NL = jax.lax.cummax(jnp.where(begins_NL, at_L, 0), axis=1)
  start_NL = jnp.where(tokens.pair_NL < 0, length, start_NL)  # padding needs no keys
  first_NTi = start_NL.reshape(rows, count, TILE).min(axis=2) // TILE
  need_NTi = jnp.maximum(jnp.arange(1, count + 1) - first_NTi, 0)  # 0 where all is padding
  need_Ti = need_NTi.reshape(-1)
  kind_Ti = jnp.searchsorted(jnp.array((0, *key_widths(count))), need_Ti)
  order_Ti = jnp.argsort(kind_Ti)
  # Kind 0 needs no keys; counting from 1 leaves its tiles out of every loop.
  bounds_x = jnp.searchsorted(kind_Ti[order_Ti], jnp.arange(1, len(key_widths(count)) + 2))
  return TilePlan(order_Ti, bounds_x[None])


def attend_tiles(
  q_NLHHd: Array,
  keys: Keys,
  tokens: Tokens,
  plan: TilePlan,
  window: Array | None,
  options: ScoreOptions,
) -> Array:
  """Computes `attention.attend_blocks` by tiles, up to rounding: [N, L, H, Hd].

  The result is 0 in tiles of padding alone. Every device computes its own rows and heads.
  """

  def attend_rows(
    qkv: tuple[Array, Array, Array], rows: tuple[Tokens, TilePlan], window: Array | None
  ) -> Array:
    q_NLHHd, *kv = qkv
    return _attend_rows(q_NLHHd, Keys.from_columns(*kv), *rows, window, options)

  return attend_by_heads(attend_rows, (q_NLHHd, *keys.to_columns()), (tokens, plan), window)


def _attend_rows(
  q_NLHHd: Array,
  keys: Keys,
  tokens: Tokens,
  plan: TilePlan,
  window: Array | None,
  options: ScoreOptions,
) -> Array:
  """Computes the attention of the rows of one device."""
  rows, length, heads, size = q_NLHHd.shape
  q_NLHHd, tokens = _pad(q_NLHHd, 1), _pad_tokens(tokens)
  keys = Keys(*(_pad(x_NJLHd, 2) for x_NJLHd in keys))
  groups = heads // keys.k_NJCHd.shape[1]
  count = q_NLHHd.shape[1] // TILE
  # The query heads of one key/value head are joined with the queries of a tile: one product.
  q = q_NLHHd.reshape(rows, count, TILE, heads // groups, groups, size)
  q_TiJQhHd = q.transpose(0, 1, 3, 4, 2, 5).reshape(rows * count, heads // groups, -1, size)
  # JAX types the result of a custom_vjp with nondiff_argnums as an unknown object.
  out_TiJQhHd = cast(Array, _attend(q_TiJQhHd, keys, tokens, window, plan, options))
  out = out_TiJQhHd.reshape(rows, count, heads // groups, groups, TILE, size)
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
def _attend(q_TiJQhHd, keys, tokens, window, plan, options):
  return _forward(q_TiJQhHd, keys, tokens, window, plan, options)[0]


def _forward(q_TiJQhHd, keys, tokens, window, plan, options):
  """Computes the attention of every tile, and what the backward pass needs."""

  def attend_tile(tile, carry):
    out_TiJQhHd, norm_TiJQh = carry
    k_JCHd, v_JCHd = tile.read(keys.k_NJCHd), tile.read(keys.v_NJCHd)
    s_JQhC = _scores(q_TiJQhHd[tile.index], k_JCHd, tile.visible(tokens, window), options)
    top_JQh1 = s_JQhC.max(axis=-1, keepdims=True)
    w_JQhC = jnp.exp(s_JQhC - top_JQh1)
    total_JQh1 = w_JQhC.sum(axis=-1, keepdims=True)
    out_JQhHd = _product("jqc,jck->jqk", w_JQhC, v_JCHd) / total_JQh1
    norm_JQh = (top_JQh1 + jnp.log(total_JQh1))[..., 0]
    put = jax.lax.dynamic_update_index_in_dim
    out_TiJQhHd = put(out_TiJQhHd, out_JQhHd.astype(out_TiJQhHd.dtype), tile.index, 0)
    return out_TiJQhHd, put(norm_TiJQh, norm_JQh, tile.index, 0)

  start = jnp.zeros_like(q_TiJQhHd), jnp.zeros(q_TiJQhHd.shape[:-1], jnp.float32)
  out_TiJQhHd, norm_TiJQh = _for_each_tile(attend_tile, tokens, plan, start)
  out_TiJQhHd, norm_TiJQh = checkpoint_name((out_TiJQhHd, norm_TiJQh), REMAT_NAME)
  return out_TiJQhHd, (q_TiJQhHd, keys, tokens, window, plan, out_TiJQhHd, norm_TiJQh)


def _backward(options, saved, slope_TiJQhHd):
  """Computes the gradients of queries, keys and values."""
  q_TiJQhHd, keys, tokens, window, plan, out_TiJQhHd, norm_TiJQh = saved
  # The gradient of a softmax subtracts the mean of dw over a query's keys, Σ_c w dw. It equals
  # slope · out, which needs no array over keys.
  slope_f32, out_f32 = slope_TiJQhHd.astype(jnp.float32), out_TiJQhHd.astype(jnp.float32)
  mean_TiJQh = (slope_f32 * out_f32).sum(axis=-1)

  def differentiate_tile(tile, carry):
    dq_TiJQhHd, dk_NJCHd, dv_NJCHd = carry
    q_JQhHd, slope_JQhHd = q_TiJQhHd[tile.index], slope_TiJQhHd[tile.index]
    k_JCHd, v_JCHd = tile.read(keys.k_NJCHd), tile.read(keys.v_NJCHd)
    s_JQhC = _scores(q_JQhHd, k_JCHd, tile.visible(tokens, window), options)
    w_JQhC = jnp.exp(s_JQhC - norm_TiJQh[tile.index][..., None])
    dw_JQhC = _product("jqk,jck->jqc", slope_JQhHd, v_JCHd)
    ds_JQhC = w_JQhC * (dw_JQhC - mean_TiJQh[tile.index][..., None])
    if options.cap:
      # d/dz c tanh(z / c) = 1 - (s / c)². The square of an unseen score would overflow, and zero
      # times infinity is NaN. Its weight is zero, so any finite score will do.
      ds_JQhC = ds_JQhC * (1 - jnp.square(jnp.maximum(s_JQhC, -options.cap) / options.cap))
    ds_JQhC = ds_JQhC * _scale(options, q_JQhHd)
    dq_JQhHd = _product("jqc,jck->jqk", ds_JQhC, k_JCHd)
    dq_TiJQhHd = jax.lax.dynamic_update_index_in_dim(
      dq_TiJQhHd, dq_JQhHd.astype(dq_TiJQhHd.dtype), tile.index, 0
    )
    # Several tiles read the same keys, so gradients of keys are added up; those of a tile's
    # queries are written once.
    dk_NJCHd = tile.add(dk_NJCHd, _product("jqc,jqk->jck", ds_JQhC, q_JQhHd))
    dv_NJCHd = tile.add(dv_NJCHd, _product("jqc,jqk->jck", w_JQhC, slope_JQhHd))
    return dq_TiJQhHd, dk_NJCHd, dv_NJCHd

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in keys]
  start = (jnp.zeros_like(q_TiJQhHd), *zeros)
  dq_TiJQhHd, *dkv = _for_each_tile(differentiate_tile, tokens, plan, start)
  dkeys = Keys(*(x.astype(key.dtype) for x, key in zip(dkv, keys, strict=True)))
  return dq_TiJQhHd, dkeys, None, None, None


_attend.defvjp(_forward, _backward)


def _scale(options: ScoreOptions, q_JQhHd: Array) -> float:
  """Returns the factor of query times key."""
  return options.scale or 1.0 / math.sqrt(q_JQhHd.shape[-1])


def _scores(q_JQhHd: Array, k_JCHd: Array, visible_QC: Array, options: ScoreOptions) -> Array:
  """Computes scaled, capped and masked scores, in float32: [J, Q, C]."""
  s_JQhC = _product("jqk,jck->jqc", q_JQhHd, k_JCHd) * _scale(options, q_JQhHd)
  s_JQhC = options.cap * jnp.tanh(s_JQhC / options.cap) if options.cap else s_JQhC
  shape = s_JQhC.shape
  # The mask is the same for the query heads that are joined with the queries.
  s = s_JQhC.reshape(shape[0], -1, *visible_QC.shape)
  return jnp.where(visible_QC, s, UNSEEN).reshape(shape)


def _product(axes: str, a: Array, b: Array) -> Array:
  """Computes a product in the narrower of two types, with sums in float32."""
  dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
  return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), **exact(dtype))


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

  def read(self, x_NJCHd: Array) -> Array:
    """Returns the keys or values that the tile reads: [J, C, Hd]."""
    _, heads, _, size = x_NJCHd.shape
    start = (self.row, 0, self.first * TILE, 0)
    return jax.lax.dynamic_slice(x_NJCHd, start, (1, heads, self.width * TILE, size))[0]

  def add(self, x_NJCHd: Array, more_JCHd: Array) -> Array:
    """Adds to the part of x that `read` returns."""
    start = (self.row, 0, self.first * TILE, 0)
    return jax.lax.dynamic_update_slice(x_NJCHd, (self.read(x_NJCHd) + more_JCHd)[None], start)

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
  count, (bounds_x,) = tokens.pair_NL.shape[1] // TILE, plan.bounds_Gx
  for number, width in enumerate(key_widths(count)):

    def one(at, carry, width=width):
      index = plan.order_Ti[at]
      place = index % count
      # A tile near the start of its row reads as many keys as others of its width; the mask hides
      # those that come after it.
      first = jnp.maximum(place + 1 - width, 0)
      return turn(_Tile(index, index // count, place, first, width), carry)

    carry = jax.lax.fori_loop(bounds_x[number], bounds_x[number + 1], one, carry)
  return carry
