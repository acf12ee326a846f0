"""The mask rule of a `TokenBatch`, and attention computed in blocks of queries.

A key never stands later in its row than the queries that see it. A block of queries therefore needs
only the keys up to its own end, and no length x length array is kept for the backward pass.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from dpo_jax.distributed import sharding
from dpo_jax.model.head_shares import attend_by_heads
from dpo_jax.structs import Array
from dpo_jax.utils import matmul

# Queries of one block. The scores of a block are the largest array of this attention.
QUERY_BLOCK = 128

# The score of a pair that the mask hides. It is finite: a padding query sees no key at all, and the
# softmax of a row of minus infinities is NaN, in the backward pass too.
UNSEEN = -1e30


class Tokens(NamedTuple):
  """The part of a `TokenBatch` that decides which query sees which key."""

  position_NL: Array
  pair_NL: Array
  branch_NL: Array

  def columns(self, start: int, stop: int) -> Tokens:
    """Returns the columns from `start` to `stop`."""
    return Tokens(*(x_NL[:, start:stop] for x_NL in self))


def visible(query: Tokens, key: Tokens, window: Array | None = None) -> Array:
  """Computes the mask rule: which query sees which key, as booleans [N, Q, C].

  A query sees a key if both belong to the same pair, the key's position is not later, and the key
  is part of the prompt or of the query's own branch.

  Args:
    query: the tokens that look.
    key: the tokens that are looked at.
    window: number of positions that a query sees back, its own included; None for all.
  """
  q = [x_NL[:, :, None] for x_NL in query]
  k = [x_NL[:, None, :] for x_NL in key]
  (position_q, pair_q, branch_q), (position_k, pair_k, branch_k) = q, k
  seen_NQC = (
    (pair_q == pair_k) & (position_q >= position_k) & ((branch_k == 0) | (branch_k == branch_q))
  )
  return seen_NQC if window is None else seen_NQC & (position_q - position_k < window)


class Keys(NamedTuple):
  """Keys and values of C columns.

  Heads come before columns, because products over a cache in this order are four times faster.
  """

  k_NJCHd: Array
  v_NJCHd: Array

  @classmethod
  def from_columns(cls, k_NCJHd: Array, v_NCJHd: Array) -> Keys:
    """Makes keys of arrays whose columns come before heads."""
    return cls(k_NCJHd.swapaxes(1, 2), v_NCJHd.swapaxes(1, 2))

  def to_columns(self) -> tuple[Array, Array]:
    """Returns keys and values with columns before heads."""
    return self.k_NJCHd.swapaxes(1, 2), self.v_NJCHd.swapaxes(1, 2)


def attend(
  q_NQHHd: Array, parts: list[tuple[Keys, Array]], *, scale: float = 0.0, cap: float = 0.0
) -> Array:
  """Computes softmax attention of grouped queries, scores and sums in float32: [N, Q, H, Hd].

  Args:
    q_NQHHd: queries.
    parts: keys, each with its visible_NQC; one softmax runs over all parts together.
    scale: factor of query times key; 0 means 1 / sqrt(Hd).
    cap: c of c tanh(score / c); 0 for no cap.
  """
  N, Q, H, Hd = q_NQHHd.shape
  J = parts[0][0].k_NJCHd.shape[1]
  # The H / J query heads that share a key/value head are joined with the queries (x = H/J * Q): so
  # the products are plain batched ones, the fastest form on a CPU, and no key is repeated.
  q_NJxHd = q_NQHHd.reshape(N, Q, J, H // J, Hd).transpose(0, 2, 3, 1, 4).reshape(N, J, -1, Hd)

  def scores(keys: Keys, visible_NQC: Array) -> Array:
    s = matmul.contract("njxk,njck->njxc", q_NJxHd, keys.k_NJCHd)
    s = s.reshape(N, J, H // J, Q, -1) * (scale or 1.0 / math.sqrt(Hd))
    # The cap comes before the mask, or hidden scores would be capped to values that count.
    s = cap * jnp.tanh(s / cap) if cap else s
    return jnp.where(visible_NQC[:, None, None], s, UNSEEN)

  def mix(weights_NJHjQC: Array, keys: Keys) -> Array:
    # Weights take the type of the values for the product; its sums stay float32.
    weights = weights_NJHjQC.astype(keys.v_NJCHd.dtype).reshape(N, J, H // J * Q, -1)
    return matmul.contract("njxc,njck->njxk", weights, keys.v_NJCHd)

  scored = [scores(*part) for part in parts]
  # Subtracting the maximum keeps exp in range. The result does not depend on it, so neither does
  # the gradient.
  top = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scored])
  weights = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scored]
  total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
  mixed = [mix(w, keys) for w, (keys, _) in zip(weights, parts, strict=True)]
  out = cast(Array, sum(mixed))  # of one part at least, so not the 0 that a sum starts from
  # The division comes last: over Hd numbers per query instead of over all its keys.
  out = (out.reshape(N, J, H // J, Q, Hd) / total).astype(q_NQHHd.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(N, Q, H, Hd)


def attend_blocks(
  q_NLHHd: Array, keys: Keys, tokens: Tokens, window: Array | None = None, **options: float
) -> Array:
  """Computes `attend` over whole rows, a block of queries at a time: [N, L, H, Hd].

  The backward pass computes the scores of a block again instead of keeping them.

  Args:
    q_NLHHd: queries.
    keys: keys and values of the same columns.
    tokens: of these columns.
    window: as in `visible`.
    **options: scale and cap of `attend`.
  """
  if sharding.sequence_parts(q_NLHHd.shape[1]) == 1:
    return _attend_blocks(q_NLHHd, keys, tokens, window, options)

  def attend_whole_rows(
    qkv: tuple[Array, Array, Array], tokens: Tokens, window: Array | None
  ) -> Array:
    q_NLHHd, *kv = qkv
    return _attend_blocks(q_NLHHd, Keys.from_columns(*kv), tokens, window, options)

  # The compiler could only divide the queries, and every device would need all keys.
  return attend_by_heads(attend_whole_rows, (q_NLHHd, *keys.to_columns()), tokens, window)


def _attend_blocks(
  q_NLHHd: Array, keys: Keys, tokens: Tokens, window: Array | None, options: dict[str, float]
) -> Array:
  """Computes `attend_blocks` over complete rows."""

  # The layers run in a scan, which separates forward and backward pass. The compiler cannot merge
  # the second computation of the scores with the first there, so barriers against it
  # (prevent_cse) would only cost time.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend_block(q_NQHHd: Array, keys: Keys, query: Tokens, key: Tokens) -> Array:
    return attend(q_NQHHd, [(keys, visible(query, key, window))], **options)

  length, out = q_NLHHd.shape[1], []
  for start in range(0, length, QUERY_BLOCK):
    stop = min(start + QUERY_BLOCK, length)
    earlier = Keys(*(x_NJLHd[:, :, :stop] for x_NJLHd in keys))
    query, key = tokens.columns(start, stop), tokens.columns(0, stop)
    out.append(attend_block(q_NLHHd[:, start:stop], earlier, query, key))
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)
