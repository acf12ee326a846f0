"""Log-probability of every completion, computed from hidden states.

The head (the unembedding) is the largest matrix product of a small model, and its logits are the
largest array of any model. So training runs the head only at scored tokens, one chunk of them at a
time (`head.target_logps`); no array [N, L, V] exists, forward or backward. For the backward pass it
stores the gradients with respect to logits if they fit a budget, and otherwise recomputes each
chunk.
`naive_slot_logps` computes every logit; the tests compare with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.distributed.sharding import (
  by_rows,
  by_vocabulary,
  chunk_by_group,
  chunks_by_group,
  copy_per_group,
  join_groups,
  sequence_parts,
  vocabulary_parts,
)
from dpo_jax.head import logits, logits_of_groups, target_logps
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


class LogitBudget(NamedTuple):
  """Limits on the number of float32 logits in memory, on one device.

  Attributes:
    chunk: the most logits that are computed at once.
    kept: the most that may be stored for the backward pass, as gradients, over all scored tokens of
      a group; of those in two bytes twice as many. If there are more, none is stored, and the
      backward pass recomputes each chunk.
  """

  chunk: int
  kept: int


# A chunk takes 32 MiB on CPU. Elsewhere it takes 512 MiB, because matrix products with few rows are
# slow there. What is stored takes up to 256 MiB on CPU and 512 MiB elsewhere.
LOGIT_BUDGET = {"cpu": LogitBudget(2**23, 2**26)}
LOGIT_BUDGET_ELSEWHERE = LogitBudget(2**27, 2**27)
_PAST_END = 2**31 - 1  # an index beyond any batch: reads give the fill value


def logit_budget(platform: str, memory: int | None = None) -> LogitBudget:
  """Returns the usual limits on logits.

  Args:
    platform: of the devices, such as "cpu" or "tpu".
    memory: bytes of a device, where they are known.
  """
  usual = LOGIT_BUDGET.get(platform, LOGIT_BUDGET_ELSEWHERE)
  if platform == "cpu" or memory is None:
    return usual
  # A 32nd of the memory may store what the backward pass would compute again.
  return usual._replace(kept=max(usual.kept, memory // 32 // 4))


def token_logps(logits_xV: Array, target_x: Array) -> Array:
  """Computes the log-probability of each target token, in nats, float32 or wider: [...]."""
  logits_xV = _at_least_float32(logits_xV)
  picked_x = jnp.take_along_axis(logits_xV, target_x[..., None], axis=-1)[..., 0]
  return picked_x - jax.nn.logsumexp(logits_xV, axis=-1)


def token_alignment(logits_xV: Array, target_x: Array) -> Array:
  """Computes log π(y_t) - log Σ_v π(v)², in nats: [...].

  It compares a token's log-probability with the expected probability of a token sampled from the
  policy. Zhou et al. 2024 (WPO).
  """
  logits_xV = _at_least_float32(logits_xV)
  norm_x = jax.nn.logsumexp(logits_xV, axis=-1)
  picked_x = jnp.take_along_axis(logits_xV, target_x[..., None], axis=-1)[..., 0]
  # With z the logits and n their log-sum-exp: (z_t - n) - (logsumexp(2z) - 2n) = z_t + n - ...
  return picked_x + norm_x - jax.nn.logsumexp(2 * logits_xV, axis=-1)


def _at_least_float32(x: Array) -> Array:
  """Returns x as float32, or as it is if its type is wider."""
  # In bfloat16, sums of log-probs over 400 tokens were 0.5 to 6 nats off.
  return jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32))


TokenFn = Callable[[Array, Array], Array]


def naive_slot_logps(hidden_NLD: Array, head: Head, batch: TokenBatch) -> Array:
  """Computes the summed log-prob of every slot from all [N, L, V] logits: [N, S], in nats."""
  logps_NL = token_logps(logits(hidden_NLD, head), batch.target_NL)
  return _reduce_by_slot(jax.ops.segment_sum, logps_NL * batch.weight_NL, batch)


def slot_logps(
  hidden_NLD: Array,
  head: Head,
  batch: TokenBatch,
  *,
  budget: LogitBudget | None = None,
  token_fn: TokenFn = token_logps,
) -> Array:
  """Computes the summed log-prob of every slot, running the head at scored tokens only.

  Value and gradient equal those of `naive_slot_logps`. The memory for logits is bounded by `budget`
  whatever the size of the vocabulary.

  Args:
    hidden_NLD: input of the head.
    head: the unembedding.
    batch: rows of tokens; `scored_GM` lists the tokens where the head runs.
    budget: limits on logits in memory; None means the default of the platform.
    token_fn: (logits_xV, target_x) -> values that are summed over the tokens of a slot.

  Returns:
    logps_NS: in nats, float32 or wider; 0 in empty slots.
  """
  logps_GM = scored_logps(hidden_NLD, head, batch, budget=budget, token_fn=token_fn)
  groups = len(batch.scored_GM)
  rows, slots = batch.weight_NS.shape
  at_scored = _scored_values(batch)
  # Rows are numbered within their group: a group's sums stay on the device that has its rows.
  row_NL = jnp.broadcast_to(jnp.arange(rows)[:, None] % (rows // groups), batch.slot_NL.shape)
  owner_GM = at_scored(row_NL * slots + batch.slot_NL)

  def sum_by_owner(x_M: Array, owner_M: Array) -> Array:
    return jax.ops.segment_sum(x_M, owner_M, (rows // groups) * slots)

  # At padding of scored_GM both owner and weight are read as 0, so slot 0 gets nothing from it.
  weighted_GM = logps_GM * at_scored(batch.weight_NL)
  return jax.vmap(sum_by_owner)(weighted_GM, owner_GM).reshape(rows, slots)


def scored_logps(
  hidden_NLD: Array,
  head: Head,
  batch: TokenBatch,
  *,
  budget: LogitBudget | None = None,
  token_fn: TokenFn = token_logps,
) -> Array:
  """Computes the log-prob of every scored token: [G, M], in nats, in the order of `scored_GM`.

  The arguments are those of `slot_logps`.
  """
  parts = sequence_parts(batch.ids_NL.shape[1])
  groups, scored = batch.scored_GM.shape
  at_GM = jnp.pad(batch.scored_GM, ((0, 0), (0, -scored % parts)), constant_values=_PAST_END)
  at_scored = _scored_values(batch._replace(scored_GM=at_GM))
  head = head._replace(kernel_VD=by_vocabulary(head.kernel_VD))
  # Where a device has a part of the vocabulary, tokens travel and not the head: they are joined
  # with those of the devices that have the other parts.
  vocab = head.kernel_VD.shape[0]
  shared = vocabulary_parts(vocab, ["fsdp"])

  def divide(x_GM: Array) -> Array:
    # Devices that share the positions of a row also share its scored tokens: each computes a part,
    # as a group of its own.
    x_GM = join_groups(x_GM, shared) if shared > 1 else x_GM
    return x_GM.reshape(groups // shared * parts, -1, *x_GM.shape[2:])

  hidden_GMD, target_GM = divide(by_rows(at_scored(hidden_NLD))), divide(at_scored(batch.target_NL))
  budget = budget or logit_budget(jax.default_backend())
  per_group, own = target_GM.shape[1], vocab // vocabulary_parts(vocab)  # of one device
  chunks, size = _chunking(per_group, budget.chunk // own)

  def cut(x_GM: Array) -> Array:
    x_cGm = _into_chunks(x_GM, chunks, size)
    return chunks_by_group(x_cGm) if shared > 1 else x_cGm

  def place(x_Gm: Array, *, logits: bool = False) -> Array:
    return chunk_by_group(x_Gm, logits=logits) if shared > 1 else x_Gm

  count: Array | int = chunks
  if chunks > 1 and groups * parts == 1:
    # Skips the chunks that are all padding. With several groups it does not: devices that work
    # together must run the same number of chunks.
    at_end = batch.ids_NL.size
    count = -(-(at_GM < at_end).sum() // size)
  elif chunks > 1 and len(target_GM) > 1:
    # A copy of the head's kernel per group: the loop then adds up gradients locally, and they are
    # summed over devices once at the end instead of once per chunk.
    head = head._replace(kernel_VD=copy_per_group(head.kernel_VD, len(target_GM)))
  if token_fn is token_logps:
    narrow = hidden_GMD.dtype.itemsize / 4  # of the memory of float32
    kept = narrow * per_group * own <= budget.kept
    # JAX types the result of a custom_vjp with nondiff_argnums as an unknown object.
    logps_cGm = cast(Array, target_logps(kept, place, cut(hidden_GMD), head, cut(target_GM), count))
  else:

    @jax.checkpoint  # recomputes each chunk's logits in the backward pass: they are not stored
    def chunk_values(x_GmD: Array, target_Gm: Array, head: Head) -> Array:
      return token_fn(logits_of_groups(x_GmD, head), target_Gm)

    chunked = cut(hidden_GMD), cut(target_GM)
    logps_cGm = jax.lax.map(lambda chunk: chunk_values(*chunk, head), chunked)
  logps_GM = jnp.moveaxis(logps_cGm, 0, 1).reshape(len(target_GM), -1)[:, :per_group]
  return logps_GM.reshape(groups, -1)[:, :scored]


def _chunking(tokens: int, budget: int) -> tuple[int, int]:
  """Returns the number of chunks and the tokens per chunk, evenly divided.

  Args:
    tokens: scored tokens of a group.
    budget: the most tokens per chunk; rounding up may exceed it by up to 31.
  """
  chunks = max(1, -(-tokens // max(1, min(budget, tokens))))
  size = -(-tokens // chunks)
  # In bfloat16, matrix products with an odd number of rows run at half the speed.
  return chunks, size + (-size % 32 if size > 128 else 0)


def chunks_run(
  scored_GM: np.ndarray,
  end: int,
  vocab: int,
  budget: LogitBudget,
  divided: Mapping[str, int] | None = None,
) -> int:
  """Returns how many chunks a pass through the head computes for one micro-batch.

  Args:
    scored_GM: of the micro-batch, on host.
    end: number of tokens of a group; indices from there on are padding.
    vocab, budget: as in training.
    divided: number of devices along each axis that divides the vocabulary.
  """
  divided = divided or {}
  groups, scored = scored_GM.shape
  own = vocab // math.prod(divided.values())
  chunks, size = _chunking(scored * divided.get("fsdp", 1), budget.chunk // own)
  # As in `scored_logps`: one group alone skips the chunks that are all padding.
  return -(-int((scored_GM < end).sum()) // size) if chunks > 1 and groups == 1 else chunks


def _into_chunks(x_GM: Array, chunks: int, size: int) -> Array:
  """Splits [G, M, …] into chunks, [c, G, m, …], with zeros at the end of the last one."""
  short = [(0, 0), (0, size * chunks - x_GM.shape[1])] + [(0, 0)] * (x_GM.ndim - 2)
  x_GM = jnp.pad(x_GM, short).reshape(len(x_GM), chunks, size, *x_GM.shape[2:])
  return jnp.moveaxis(x_GM, 1, 0)


def _scored_values(batch: TokenBatch) -> Callable[[Array], Array]:
  """Returns a function from [N, L, …] to [G, M, …] that reads the values at the scored tokens.

  It gives 0 where `scored_GM` is padding.
  """

  def at_scored(x_NL: Array) -> Array:
    x_GNl = x_NL.reshape(len(batch.scored_GM), -1, *x_NL.shape[2:])
    # Padding points past the end of the group, where "fill" reads 0.
    read = jax.vmap(lambda x_Nl, at_M: x_Nl.at[at_M].get(mode="fill", fill_value=0))
    return read(x_GNl, batch.scored_GM)

  return at_scored


def slot_tokens(batch: TokenBatch) -> Array:
  """Sums the weights of the tokens of every slot: [N, S]; the number of scored ones if these are 1.

  This is what losses and metrics call the number of a completion's tokens. A token that adds half
  of its log-prob to a sum also counts half where the sum is divided by a length: the quotient is a
  weighted mean, and does not change if all weights are multiplied by one factor.
  """
  return _reduce_by_slot(jax.ops.segment_sum, batch.weight_NL, batch)


def _reduce_by_slot(fn: Callable[..., Array], x_NL: Array, batch: TokenBatch) -> Array:
  """Reduces the values of every slot's tokens by a segment function, such as a sum: [N, S]."""
  slots = batch.weight_NS.shape[1]
  return jax.vmap(lambda x, slot: fn(x, slot, slots))(x_NL, batch.slot_NL)


def shorter_completion_weights(batch: TokenBatch, beyond: float) -> TokenBatch:
  """Multiplies by `beyond` the weight of tokens beyond the length of the shorter completion.

  The k-th scored token of a completion keeps its weight if both completions of the pair have k
  scored tokens: a long result of a tool makes no completion longer. Liu et al. 2024 (LD-DPO).
  """
  rows, slots = batch.weight_NS.shape
  scored_NL = batch.weight_NL > 0
  tokens_NS = _reduce_by_slot(jax.ops.segment_sum, scored_NL.astype(jnp.int32), batch)
  # Scored tokens are counted from the start of the row. Those of a completion are neighbours in it,
  # so the difference from the first one is the token's index within its completion.
  count_NL = jnp.cumsum(scored_NL, axis=1, dtype=jnp.int32)
  largest = jnp.iinfo(jnp.int32).max
  first_NS = _reduce_by_slot(jax.ops.segment_min, jnp.where(scored_NL, count_NL, largest), batch)
  shorter_NS = jnp.repeat(tokens_NS.reshape(-1, 2).min(axis=1), 2).reshape(rows, slots)

  def of_slot(x_NS: Array) -> Array:
    return jnp.take_along_axis(x_NS, batch.slot_NL, axis=1)

  inside_NL = count_NL - of_slot(first_NS) < of_slot(shorter_NS)
  return batch._replace(weight_NL=batch.weight_NL * jnp.where(inside_NL, 1.0, beyond))


LogpsFn = Callable[..., Array]


def make_logps_fn(
  model: Model, *, budget: LogitBudget | None = None, beyond_shorter: float = 1.0
) -> LogpsFn:
  """Makes the function for training: (params, batch, key=None) -> logps_NS, in nats.

  The key is for dropout; None means no dropout.

  Args:
    model: the language model.
    budget: limits on logits in memory; None means the default of the platform.
    beyond_shorter: weight of the tokens of a completion beyond the length of the pair's shorter
      completion (LD-DPO); 1 changes nothing.
  """
  scored_fn = make_scored_fn(model, budget=budget, beyond_shorter=beyond_shorter)

  def logps_fn(params: PyTree, batch: TokenBatch, key: jax.Array | None = None) -> Array:
    return scored_fn(params, batch, key).logps_NS

  return logps_fn


def make_stored_fn(*, beyond_shorter: float = 1.0) -> Callable[[TokenBatch], Array]:
  """Makes a function batch -> logps_NS, in nats, that sums the stored `batch.reference_NL`."""

  def stored_fn(batch: TokenBatch) -> Array:
    if beyond_shorter != 1:
      batch = shorter_completion_weights(batch, beyond_shorter)
    assert batch.reference_NL is not None
    return _reduce_by_slot(jax.ops.segment_sum, batch.reference_NL * batch.weight_NL, batch)

  return stored_fn


def make_token_fn(model: Model, *, budget: LogitBudget | None = None) -> LogpsFn:
  """Makes a function (params, batch) -> log-probs of the scored tokens: [G, M], in nats."""

  def token_fn(params: PyTree, batch: TokenBatch) -> Array:
    hidden_NLD = model.hidden(params, batch)
    return scored_logps(hidden_NLD, model.head(params), batch, budget=budget)

  return token_fn


class Scored(NamedTuple):
  """The results of one forward pass over a batch.

  Attributes:
    logps_NS: summed log-prob of every slot, in nats.
    alignment_NS: weighted mean of `token_alignment` over the tokens of every slot, in nats, without
      a gradient; None unless requested.
    routing: load of the experts; None unless the model is a mixture of experts.
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
  """Makes a function (params, batch, key=None) -> `Scored`.

  Args:
    model, budget, beyond_shorter: as in `make_logps_fn`.
    aligned: whether to compute alignments, which takes another pass through the head.
  """

  def scored_fn(params: PyTree, batch: TokenBatch, key: jax.Array | None = None) -> Scored:
    # Passes a key only if there is one: a model without dropout need not accept it.
    keys = () if key is None else (key,)
    hidden_NLD, routing = (
      (model.hidden(params, batch, *keys), None)
      if model.routed is None
      else model.routed(params, batch, *keys)
    )
    slot_sums = functools.partial(slot_logps, head=model.head(params), budget=budget)
    # The order is important: 1. alignments, with the batch's own weights, 2. the weights of LD-DPO,
    # 3. the log-probs, with those weights.
    alignment_NS = None
    if aligned:
      constant_NLD = jax.lax.stop_gradient(hidden_NLD)
      sum_NS = slot_sums(constant_NLD, batch=batch, token_fn=token_alignment)
      alignment_NS = jax.lax.stop_gradient(sum_NS / _divisor(slot_tokens(batch)))
    if beyond_shorter != 1:
      batch = shorter_completion_weights(batch, beyond_shorter)
    return Scored(slot_sums(hidden_NLD, batch=batch), alignment_NS, routing)

  return scored_fn


# --- from slots to the inputs of a loss -----------------------------------------------------------


class Slots(NamedTuple):
  """Facts of every slot that losses and metrics read besides its log-prob: arrays [..., N, S].

  Attributes:
    tokens_NS: sum of the scored tokens' weights; their number if all weights are 1.
    weight_NS: weight of the slot's pair; 0 for an empty slot.
    score_NS: score of the slot's completion, as in `TokenBatch`.
    source_NS: int32 number of the source that the slot's example comes from; None where metrics are
      not wanted by source.
  """

  tokens_NS: Array
  weight_NS: Array
  score_NS: Array
  source_NS: Array | None = None


def slots_of(batch: TokenBatch) -> Slots:
  """Returns the slots of a batch, arrays [N, S], or [A, N, S] for a batch of micro-batches."""
  tokens = jax.vmap(slot_tokens) if batch.ids_NL.ndim == 3 else slot_tokens
  return Slots(tokens(batch), batch.weight_NS, batch.score_NS)


def to_pairs(logps_NS: Array, slots: Slots) -> PairLogps:
  """Lists neighbouring slots as N * S / 2 pairs, including empty ones, which have weight 0."""
  logps_B2 = logps_NS.reshape(-1, 2)
  tokens_B2 = _divisor(slots.tokens_NS).reshape(-1, 2)
  return PairLogps(logps_B2[:, 0], logps_B2[:, 1], tokens_B2[:, 0], tokens_B2[:, 1])


def to_unpaired(logps_NS: Array, slots: Slots, completions: int) -> UnpairedLogps:
  """Lists slots as labeled completions, each with a mismatched one if `completions` is 2."""
  logps_BK = logps_NS.reshape(-1, completions)
  mismatched_B = logps_BK[:, 1] if completions > 1 else None
  tokens_BK = _divisor(slots.tokens_NS).reshape(-1, completions)
  return UnpairedLogps(logps_BK[:, 0], mismatched_B, tokens_BK[:, 0])


def to_ranked(logps_NS: Array, slots: Slots, completions: int) -> RankedLogps:
  """Lists runs of `completions` slots as rankings, including absent ones, which have weight 0."""
  tokens_BK = _divisor(slots.tokens_NS).reshape(-1, completions)
  return RankedLogps(logps_NS.reshape(-1, completions), tokens_BK)


def _divisor(tokens_NS: Array) -> Array:
  """Returns the tokens that averages divide by: 1 in an empty slot, which has none."""
  # Its weight of 0 would not remove a nan. Not the maximum with 1: weights may sum to less.
  return jnp.where(tokens_NS > 0, tokens_NS, 1.0)
