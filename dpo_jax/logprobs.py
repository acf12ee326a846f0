"""From hidden states to the log-probability of every answer.

The head is the largest product of a small model and its logits the largest array of any model, so
the production path runs it only where a token is scored, a chunk at a time. For the backward pass
it keeps the logits where they are few, and forms each chunk's again where they are many. The naive
path forms every logit; it is the oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.distributed.sharding import by_rows, by_vocabulary, for_each_group, sequence_parts
from dpo_jax.structs import (
  Array,
  Head,
  Model,
  PairLogps,
  PyTree,
  RankedLogps,
  Routing,
  TokenBatch,
  UnpairedLogps,
)
from dpo_jax.utils.matmul import product_of_rows


class LogitBudget(NamedTuple):
  """float32 logits that one group of rows may hold.

  Attributes:
    chunk: at once, while they are formed.
    kept: of all scored tokens, for the backward pass; where they are more, each chunk's are formed
      again.
  """

  chunk: int
  kept: int


# 32 MiB on a CPU, 512 MiB elsewhere, where products of few rows are slow; kept 256 and 512 MiB.
LOGIT_BUDGET = {"cpu": LogitBudget(2**23, 2**26)}
LOGIT_BUDGET_ELSEWHERE = LogitBudget(2**27, 2**27)
_NOWHERE = 2**31 - 1  # no place in any batch


def logits(hidden_xD: Array, head: Head) -> Array:
  """Scores of every vocabulary entry, float32 or wider: [..., V]."""
  out_xV = product_of_rows(jnp.asarray(hidden_xD), jnp.asarray(head.kernel_VD))
  if head.bias_V is not None:
    out_xV = out_xV + head.bias_V.astype(out_xV.dtype)
  if head.soft_cap is not None:
    out_xV = head.soft_cap * jnp.tanh(out_xV / head.soft_cap)
  return out_xV


def token_logps(logits_xV: Array, target_x: Array) -> Array:
  """Log-probability of each target token, in nats, float32 or wider: [...]."""
  logits_xV = _at_least_float32(logits_xV)
  picked_x = jnp.take_along_axis(logits_xV, target_x[..., None], axis=-1)[..., 0]
  return picked_x - jax.nn.logsumexp(logits_xV, axis=-1)


def token_alignment(logits_xV: Array, target_x: Array) -> Array:
  """log π(y_t) - log Σ_v π(v)²: how likely a token is beside what the policy would draw, nats."""
  logits_xV = _at_least_float32(logits_xV)
  norm_x = jax.nn.logsumexp(logits_xV, axis=-1)
  picked_x = jnp.take_along_axis(logits_xV, target_x[..., None], axis=-1)[..., 0]
  return picked_x + norm_x - jax.nn.logsumexp(2 * logits_xV, axis=-1)


def _at_least_float32(x: Array) -> Array:
  return jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32))


TokenFn = Callable[[Array, Array], Array]


def naive_slot_logps(hidden_NLD: Array, head: Head, batch: TokenBatch) -> Array:
  """Summed log-prob of every slot through the full [N, L, V] logits: [N, S], nats."""
  logps_NL = token_logps(logits(hidden_NLD, head), batch.target_NL)
  return _by_slot(jax.ops.segment_sum, logps_NL * batch.weight_NL, batch)


def slot_logps(
  hidden_NLD: Array,
  head: Head,
  batch: TokenBatch,
  *,
  budget: LogitBudget | None = None,
  token_fn: TokenFn = token_logps,
) -> Array:
  """Summed log-prob of every slot, the head run at scored tokens only: [N, S], nats.

  Equal to `naive_slot_logps` in value and gradient. Memory holds the logits that there is room for,
  independent of the vocabulary.

  Args:
    hidden_NLD: input of the head.
    head: the unembedding.
    batch: rows; `scored_GM` says where the head runs.
    budget: of logits; what suits the platform unless given.
    token_fn: what is summed over the tokens of a slot; their log-prob unless given.

  Returns:
    logps_NS: float32 or wider, zero in empty slots.
  """
  logps_GM = scored_logps(hidden_NLD, head, batch, budget=budget, token_fn=token_fn)
  groups = len(batch.scored_GM)
  rows, slots = batch.weight_NS.shape
  pick = _picker(batch)
  row_NL = jnp.broadcast_to(jnp.arange(rows)[:, None] % (rows // groups), batch.slot_NL.shape)
  owner_GM = pick(row_NL * slots + batch.slot_NL)
  sums = lambda x, owner: jax.ops.segment_sum(x, owner, (rows // groups) * slots)
  return jax.vmap(sums)(logps_GM * pick(batch.weight_NL), owner_GM).reshape(rows, slots)


def scored_logps(
  hidden_NLD: Array,
  head: Head,
  batch: TokenBatch,
  *,
  budget: LogitBudget | None = None,
  token_fn: TokenFn = token_logps,
) -> Array:
  """Log-prob of every scored token, where `scored_GM` has it: [G, M], nats; arguments as above."""
  parts = sequence_parts(batch.ids_NL.shape[1])
  groups, scored = batch.scored_GM.shape
  at_GM = jnp.pad(batch.scored_GM, ((0, 0), (0, -scored % parts)), constant_values=_NOWHERE)
  pick = _picker(batch._replace(scored_GM=at_GM))
  # Devices that divide the tokens of a row divide those that are scored, too.
  divide = lambda x_GM: x_GM.reshape(groups * parts, -1, *x_GM.shape[2:])
  hidden_GMD, target_GM = divide(by_rows(pick(hidden_NLD))), divide(pick(batch.target_NL))
  head = head._replace(kernel_VD=by_vocabulary(head.kernel_VD))
  budget = budget or LOGIT_BUDGET.get(jax.default_backend(), LOGIT_BUDGET_ELSEWHERE)
  each_group, vocab = target_GM.shape[1], head.kernel_VD.shape[0]
  chunks, size = _chunking(each_group, budget.chunk // vocab)
  cut = functools.partial(_cut, chunks=chunks, size=size)
  count: Array | int = chunks
  if chunks > 1 and groups * parts == 1:
    # No need to run where nothing is scored. Devices that work together do the same turns.
    at_end = batch.ids_NL.size
    count = -(-(at_GM < at_end).sum() // size)
  elif chunks > 1:
    head = head._replace(kernel_VD=for_each_group(head.kernel_VD, groups * parts))
  if token_fn is token_logps:
    kept = each_group * vocab <= budget.kept
    logps_cGm = _head_logps(kept, cut(hidden_GMD), head, cut(target_GM), count)
  else:
    fn = jax.checkpoint(lambda x_GmD, at_Gm, head: token_fn(_group_logits(x_GmD, head), at_Gm))
    logps_cGm = jax.lax.map(lambda x: fn(*x, head), (cut(hidden_GMD), cut(target_GM)))
  logps_GM = jnp.moveaxis(logps_cGm, 0, 1).reshape(groups * parts, -1)[:, :each_group]
  return logps_GM.reshape(groups, -1)[:, :scored]


def _chunking(tokens: int, budget: int) -> tuple[int, int]:
  """How many chunks, and tokens of each: evenly, no more than there is room for."""
  chunks = max(1, -(-tokens // max(1, min(budget, tokens))))
  size = -(-tokens // chunks)
  # Products of an odd number of rows run at half the speed in bfloat16.
  return chunks, size + (-size % 32 if size > 128 else 0)


def _cut(x_GM: Array, chunks: int, size: int) -> Array:
  """[G, M, …] -> [c, G, m, …], zeros at the end."""
  short = [(0, 0), (0, size * chunks - x_GM.shape[1])] + [(0, 0)] * (x_GM.ndim - 2)
  x_GM = jnp.pad(x_GM, short).reshape(len(x_GM), chunks, size, *x_GM.shape[2:])
  return jnp.moveaxis(x_GM, 1, 0)


def _group_logits(hidden_GmD: Array, head: Head) -> Array:
  """`logits`, by one table for all groups or one for each."""
  if head.kernel_VD.ndim == 2:
    return logits(hidden_GmD, head)
  own = lambda x_mD, kernel_VD: logits(x_mD, head._replace(kernel_VD=kernel_VD))
  return jax.vmap(own)(hidden_GmD, head.kernel_VD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_logps(
  kept: bool, hidden_cGmD: Array, head: Head, target_cGm: Array, count: Array | int
) -> Array:
  """`token_logps` of `logits`, a chunk at a time; 0 in those from `count` on.

  The gradient takes one pass over the logits, kept or formed again.
  """
  return _head_forward(False, hidden_cGmD, head, target_cGm, count)[0]


def _head_forward(kept, hidden_cGmD, head, target_cGm, count):
  def one(i, done):
    logits_GmV = _group_logits(hidden_cGmD[i], head)
    norm_Gm = jax.nn.logsumexp(logits_GmV, axis=-1)
    picked_Gm = jnp.take_along_axis(logits_GmV, target_cGm[i][..., None], axis=-1)[..., 0]
    found = picked_Gm - norm_Gm, norm_Gm, logits_GmV if kept else None
    return jax.tree.map(lambda all_c, new: all_c.at[i].set(new), done, found)

  zeros = jnp.zeros(target_cGm.shape, jnp.promote_types(hidden_cGmD.dtype, jnp.float32))
  vocab = head.kernel_VD.shape[-2]
  logits_cGmV = jnp.zeros((*zeros.shape, vocab), zeros.dtype) if kept else None
  logps_cGm, *saved = jax.lax.fori_loop(0, count, one, (zeros, zeros, logits_cGmV))
  return logps_cGm, (hidden_cGmD, head, target_cGm, count, *saved)


def _head_backward(kept, saved, slope_cGm):
  hidden_cGmD, head, target_cGm, count, norm_cGm, logits_cGmV = saved

  def one(i, done):
    dhidden_cGmD, dhead = done
    logits_GmV, pull = jax.vjp(_group_logits, hidden_cGmD[i], head)
    logits_GmV = logits_cGmV[i] if kept else logits_GmV
    hit_GmV = target_cGm[i][..., None] == jnp.arange(logits_GmV.shape[-1])
    # d log π(target) / d logit_v = [v is the target] - π(v).
    prob_GmV = jnp.exp(logits_GmV - norm_cGm[i][..., None])
    dhidden_GmD, more = pull(slope_cGm[i][..., None] * (hit_GmV - prob_GmV))
    return dhidden_cGmD.at[i].set(dhidden_GmD), jax.tree.map(jnp.add, dhead, more)

  zeros = jax.tree.map(jnp.zeros_like, (hidden_cGmD, head))
  return *jax.lax.fori_loop(0, count, one, zeros), None, None


_head_logps.defvjp(_head_forward, _head_backward)


def _picker(batch: TokenBatch) -> Callable[[Array], Array]:
  """[N, L, …] -> [G, M, …], what stands at the scored tokens; 0 where there is none."""
  groups = len(batch.scored_GM)
  flat = lambda x_NL: x_NL.reshape(groups, -1, *x_NL.shape[2:])
  take = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))
  return lambda x_NL: take(flat(x_NL), batch.scored_GM)


def slot_tokens(batch: TokenBatch) -> Array:
  """Weight of the scored tokens of every slot (their number, unless reweighted): [N, S]."""
  return _by_slot(jax.ops.segment_sum, batch.weight_NL, batch)


def _by_slot(fn: Callable[..., Array], x_NL: Array, batch: TokenBatch) -> Array:
  """A sum (or the like) of the values of every slot: [N, S]."""
  slots = batch.weight_NS.shape[1]
  return jax.vmap(lambda x, slot: fn(x, slot, slots))(x_NL, batch.slot_NL)


def shorter_answer_weights(batch: TokenBatch, beyond: float) -> TokenBatch:
  """Pairs whose answer tokens count `beyond` where the other answer has already ended (LD-DPO).

  The k-th token of an answer keeps its weight if both answers have k tokens. Liu et al. 2024.
  """
  rows, slots = batch.weight_NS.shape
  scored_NL = batch.weight_NL > 0
  tokens_NS = _by_slot(jax.ops.segment_sum, scored_NL.astype(jnp.int32), batch)
  far = jnp.iinfo(jnp.int32).max
  first_NS = _by_slot(jax.ops.segment_min, jnp.where(scored_NL, batch.position_NL, far), batch)
  shorter_NS = jnp.repeat(tokens_NS.reshape(-1, 2).min(axis=1), 2).reshape(rows, slots)
  of_slot = lambda x_NS: jnp.take_along_axis(x_NS, batch.slot_NL, axis=1)
  inside_NL = batch.position_NL - of_slot(first_NS) < of_slot(shorter_NS)
  return batch._replace(weight_NL=batch.weight_NL * jnp.where(inside_NL, 1.0, beyond))


LogpsFn = Callable[..., Array]


def make_logps_fn(
  model: Model, *, budget: LogitBudget | None = None, beyond_shorter: float = 1.0
) -> LogpsFn:
  """The production path as one function: (params, batch, key=None) -> logps_NS, nats.

  The key is for dropout, of a model that has any.

  Args:
    model: the language model.
    budget: of logits; what suits the platform unless given.
    beyond_shorter: weight of answer tokens beyond the length of the pair's shorter answer.
  """
  scored_fn = make_scored_fn(model, budget=budget, beyond_shorter=beyond_shorter)
  return lambda params, batch, key=None: scored_fn(params, batch, key).logps_NS


def make_stored_fn(*, beyond_shorter: float = 1.0) -> Callable[[TokenBatch], Array]:
  """batch -> logps_NS, nats, of log-probs that the batch itself brings along."""

  def stored_fn(batch: TokenBatch) -> Array:
    if beyond_shorter != 1:
      batch = shorter_answer_weights(batch, beyond_shorter)
    return _by_slot(jax.ops.segment_sum, batch.reference_NL * batch.weight_NL, batch)

  return stored_fn


def make_token_fn(model: Model, *, budget: LogitBudget | None = None) -> LogpsFn:
  """(params, batch) -> log-probs of the scored tokens one by one, [G, M], nats: `scored_logps`."""

  def token_fn(params: PyTree, batch: TokenBatch) -> Array:
    hidden_NLD = model.hidden(params, batch)
    return scored_logps(hidden_NLD, model.head(params), batch, budget=budget)

  return token_fn


class Scored(NamedTuple):
  """What one forward pass says of a batch.

  Attributes:
    logps_NS: summed log-prob of every slot, nats.
    alignment_NS: mean alignment of the tokens of every slot, nats, without a gradient; None where
      nobody asks.
    routing: of a mixture of experts; None for other models.
  """

  logps_NS: Array
  alignment_NS: Array | None = None
  routing: Routing | None = None


def make_scored_fn(
  model: Model,
  *,
  budget: LogitBudget | None = None,
  beyond_shorter: float = 1.0,
  aligned: bool = False,
) -> Callable[..., Scored]:
  """(params, batch, key=None) -> `Scored`. Arguments as in `make_logps_fn`, and

  aligned: whether alignments are wanted, which takes another pass through the head.
  """

  def scored_fn(params: PyTree, batch: TokenBatch, key: jax.Array | None = None) -> Scored:
    # A model without dropout need not know of keys.
    keys = () if key is None else (key,)
    hidden_NLD, routing = (
      (model.hidden(params, batch, *keys), None)
      if model.routed is None
      else model.routed(params, batch, *keys)
    )
    sums = functools.partial(slot_logps, head=model.head(params), budget=budget)
    alignment_NS = None
    if aligned:
      fixed_NLD = jax.lax.stop_gradient(hidden_NLD)
      sum_NS = sums(fixed_NLD, batch=batch, token_fn=token_alignment)
      alignment_NS = jax.lax.stop_gradient(sum_NS / jnp.maximum(slot_tokens(batch), 1.0))
    if beyond_shorter != 1:
      batch = shorter_answer_weights(batch, beyond_shorter)
    return Scored(sums(hidden_NLD, batch=batch), alignment_NS, routing)

  return scored_fn


# --- slots to what a loss reads -------------------------------------------------------------------


class Slots(NamedTuple):
  """What is known of every slot beside its log-probs; arrays of one shape, [..., N, S].

  Attributes:
    tokens_NS: scored tokens.
    weight_NS: weight of the row; 0 is an empty slot.
    score_NS: see `TokenBatch`.
  """

  tokens_NS: Array
  weight_NS: Array
  score_NS: Array


def slots_of(batch: TokenBatch) -> Slots:
  """The slots of a batch; with micro-batches, [A, N, S]."""
  tokens = jax.vmap(slot_tokens) if batch.ids_NL.ndim == 3 else slot_tokens
  return Slots(tokens(batch), batch.weight_NS, batch.score_NS)


def to_pairs(logps_NS: Array, slots: Slots) -> PairLogps:
  """Lists neighbouring slots as pairs: N * S / 2 of them, empty ones included (weight 0)."""
  logps_B2 = logps_NS.reshape(-1, 2)
  # An empty slot has no token; one keeps length averages finite, and its weight is zero.
  tokens_B2 = jnp.maximum(slots.tokens_NS, 1.0).reshape(-1, 2)
  return PairLogps(logps_B2[:, 0], logps_B2[:, 1], tokens_B2[:, 0], tokens_B2[:, 1])


def to_unpaired(logps_NS: Array) -> UnpairedLogps:
  """Lists neighbouring slots as a judged answer and a mismatched one."""
  logps_B2 = logps_NS.reshape(-1, 2)
  return UnpairedLogps(logps_B2[:, 0], logps_B2[:, 1])


def to_ranked(logps_NS: Array, slots: Slots, completions: int) -> RankedLogps:
  """Lists runs of `completions` slots as rankings, absent answers included (weight 0)."""
  tokens_BK = jnp.maximum(slots.tokens_NS, 1.0).reshape(-1, completions)
  return RankedLogps(logps_NS.reshape(-1, completions), tokens_BK)
