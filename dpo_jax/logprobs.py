"""From hidden states to the log-probability of every answer.

The head is the largest product of a small model and its logits the largest array of any model, so
the production path runs it only where a token is scored, a chunk at a time, and recomputes each
chunk's logits in the backward pass. The naive path forms every logit; it is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, Head, Model, PairLogps, PyTree, TokenBatch

# float32 logits alive at once in the production path: 16 MiB, whatever the vocabulary.
HEAD_ELEMENTS = 2**22


def logits(hidden_xD: Array, head: Head) -> Array:
  """Scores of every vocabulary entry, float32: [..., V]."""
  kernel_VD = jnp.asarray(head.kernel_VD, hidden_xD.dtype)
  out_xV = jnp.einsum("...d,vd->...v", hidden_xD, kernel_VD, preferred_element_type=jnp.float32)
  if head.bias_V is not None:
    out_xV = out_xV + head.bias_V.astype(jnp.float32)
  if head.soft_cap is not None:
    out_xV = head.soft_cap * jnp.tanh(out_xV / head.soft_cap)
  return out_xV


def token_logps(logits_xV: Array, target_x: Array) -> Array:
  """Log-probability of each target token, in nats, float32: [...]."""
  logits_xV = jnp.asarray(logits_xV, jnp.float32)
  picked_x = jnp.take_along_axis(logits_xV, target_x[..., None], axis=-1)[..., 0]
  return picked_x - jax.nn.logsumexp(logits_xV, axis=-1)


def naive_slot_logps(hidden_NLD: Array, head: Head, batch: TokenBatch) -> Array:
  """Summed log-prob of every slot through the full [N, L, V] logits: [N, S], nats."""
  logps_NL = token_logps(logits(hidden_NLD, head), batch.target_NL) * batch.weight_NL
  slots = batch.weight_NS.shape[1]
  return jax.vmap(lambda x, slot: jax.ops.segment_sum(x, slot, slots))(logps_NL, batch.slot_NL)


def slot_logps(
  hidden_NLD: Array, head: Head, batch: TokenBatch, *, head_elements: int = HEAD_ELEMENTS
) -> Array:
  """Summed log-prob of every slot, the head run at scored tokens only: [N, S], nats.

  Equal to `naive_slot_logps` in value and gradient. Memory holds `head_elements` logits for each
  group of rows, independent of the vocabulary.

  Args:
    hidden_NLD: input of the head.
    head: the unembedding.
    batch: rows; `scored_GM` says where the head runs.
    head_elements: logits alive at once in one group.

  Returns:
    logps_NS: float32, zero in empty slots.
  """
  groups, scored = batch.scored_GM.shape
  rows, slots = batch.weight_NS.shape
  flat = lambda x_NL: x_NL.reshape(groups, -1, *x_NL.shape[2:])
  pick = lambda x_NL: jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(
    flat(x_NL), batch.scored_GM
  )
  hidden_GMD, target_GM, weight_GM = pick(hidden_NLD), pick(batch.target_NL), pick(batch.weight_NL)

  vocab = head.kernel_VD.shape[0]
  chunks = -(-scored * vocab // head_elements)
  if chunks <= 1:
    logps_GM = token_logps(logits(hidden_GMD, head), target_GM)
  else:
    logps_GM = _chunked(hidden_GMD, head, target_GM, min(chunks, scored))

  row_NL = jnp.broadcast_to(jnp.arange(rows)[:, None] % (rows // groups), batch.slot_NL.shape)
  owner_GM = pick(row_NL * slots + batch.slot_NL)
  sums = lambda x, owner: jax.ops.segment_sum(x, owner, (rows // groups) * slots)
  return jax.vmap(sums)(logps_GM * weight_GM, owner_GM).reshape(rows, slots)


def _chunked(hidden_GMD: Array, head: Head, target_GM: Array, chunks: int) -> Array:
  """Token log-probs [G, M], `chunks` pieces in turn, each recomputed in the backward pass."""
  groups, scored = target_GM.shape
  size = -(-scored // chunks)
  cut = lambda x: jnp.moveaxis(
    jnp.pad(x, [(0, 0), (0, size * chunks - scored)] + [(0, 0)] * (x.ndim - 2)).reshape(
      groups, chunks, size, *x.shape[2:]
    ),
    1,
    0,
  )

  @jax.checkpoint
  def one(hidden_GmD, target_Gm):
    return token_logps(logits(hidden_GmD, head), target_Gm)

  logps_cGm = jax.lax.map(lambda x: one(*x), (cut(hidden_GMD), cut(target_GM)))
  return jnp.moveaxis(logps_cGm, 0, 1).reshape(groups, -1)[:, :scored]


def slot_tokens(batch: TokenBatch) -> Array:
  """Weight of the scored tokens of every slot (their number, unless reweighted): [N, S]."""
  slots = batch.weight_NS.shape[1]
  return jax.vmap(lambda x, slot: jax.ops.segment_sum(x, slot, slots))(
    batch.weight_NL, batch.slot_NL
  )


LogpsFn = Callable[[PyTree, TokenBatch], Array]


def make_logps_fn(model: Model, *, head_elements: int = HEAD_ELEMENTS) -> LogpsFn:
  """The production path as one function: (params, batch) -> logps_NS, nats."""

  def logps_fn(params: PyTree, batch: TokenBatch) -> Array:
    return slot_logps(
      model.hidden(params, batch), model.head(params), batch, head_elements=head_elements
    )

  return logps_fn


def to_pairs(logps_NS: Array, batch: TokenBatch) -> PairLogps:
  """Lists neighbouring slots as pairs: N * S / 2 of them, empty ones included (weight 0)."""
  logps_B2 = logps_NS.reshape(-1, 2)
  # An empty slot has no token; one keeps length averages finite, and its weight is zero.
  tokens_B2 = jnp.maximum(slot_tokens(batch), 1.0).reshape(-1, 2)
  return PairLogps(logps_B2[:, 0], logps_B2[:, 1], tokens_B2[:, 0], tokens_B2[:, 1])
