"""One training step as one pure function; `distributed.executor` decides what compiles it.

The reference is an argument, read and never written. A loss is a function of log-probs, so its
gradient is taken in two parts: first with respect to the log-probs, where the loss may see the
whole batch, then of the log-probs with respect to the parameters, a micro-batch at a time. Losses
are divided by counts of the global batch, so micro-batches, shards and ragged rows add up exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax import logprobs, metrics
from dpo_jax.logprobs import Scored, Slots
from dpo_jax.losses import Loss
from dpo_jax.structs import Array, PyTree, Routing, TokenBatch


class TrainState(NamedTuple):
  """All that evolves, and all that a checkpoint holds of the training state.

  Attributes:
    step: updates made.
    params: what is trained: the policy, or the adapters of one whose base is frozen.
    opt_state: of the optimiser.
    running_stats: running statistics that the loss reads (bco_pair's δ, kto's KL); empty for most.
    reference: the reference, if it follows the policy (TR-DPO); otherwise None, and never here.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  running_stats: dict[str, Array]
  reference: PyTree | None = None


class Sync(NamedTuple):
  """TR-DPO: every so many steps the reference becomes α π + (1-α) π_ref, in parameters.

  α = 1 is the hard update, below 1 the soft one. Gorbatovski et al. 2024, eq. 4 and 5.
  """

  every: int
  alpha: float


class Objective(NamedTuple):
  """What is minimised, as static arguments of the step.

  Attributes:
    logps_fn: (params, batch, key=None) -> logps_NS, nats; the key is for dropout.
    loss: from `losses.resolve`.
    completions: K, slots of a row of data: 1 for text, 2 for pairs and unpaired rows.
    scored_fn: as logps_fn -> `Scored`, with all that the policy's pass is asked for beside its
      log-probs; None where they are all.
    sync: how the reference follows the policy; None if it does not.
    policy: (trained, reference_params) -> the policy's parameters; what is trained, unless given.
    dropout_seed: of the keys of dropout, which go by it and the step; None for no dropout.
    balance: weight of the term that spreads tokens over the experts of a mixture.
    stored_fn: batch -> logps_NS of a reference whose log-probs the batches bring along; None where
      they are computed.
  """

  logps_fn: logprobs.LogpsFn
  loss: Loss
  completions: int = 2
  scored_fn: Callable[..., Scored] | None = None
  sync: Sync | None = None
  policy: Callable[[PyTree, PyTree | None], PyTree] = lambda trained, reference_params: trained
  dropout_seed: int | None = None
  balance: float = 0.0
  stored_fn: Callable[[TokenBatch], Array] | None = None


def init_state(
  params: PyTree, tx: optax.GradientTransformation, loss: Loss | None = None
) -> TrainState:
  """Step 0 of a run from its initial parameters; a reference that follows is put in afterwards."""
  start = {key: jnp.float32(value) for key, value in (loss.running_stats if loss else {}).items()}
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), start)


# --- from log-probs to losses and metrics ---------------------------------------------------------


def batch_sums(
  objective: Objective,
  logps_NS: Array,
  reference_NS: Array | None,
  slots: Slots,
  running_stats: dict[str, Array] | None = None,
  alignment_NS: Array | None = None,
) -> tuple[metrics.Sums, Array]:
  """Loss and metrics of some slots as sums with counts, and which slots have a loss not finite.

  The loss of an empty slot is finite and its weight zero. Leading axes of slots may be joined:
  any [N, S] whose rows hold runs of K slots will do.
  """
  loss, completions = objective.loss, objective.completions
  by = lambda x_NS: x_NS.reshape(-1, completions)
  weight_BK, score_BK = by(slots.weight_NS), by(slots.score_NS)
  weight_B = weight_BK[:, 0]
  supplied = (running_stats or {}) | {"weight_B": weight_B}
  if loss.kind == "text":
    policy = logprobs.PairLogps(logps_NS.reshape(-1), jnp.zeros(()))
    loss_B = loss(policy)
    sums = metrics.text_sums(policy.chosen_B, slots.tokens_NS.reshape(-1), loss_B, weight_B)
  elif loss.kind == "pairs":
    policy = logprobs.to_pairs(logps_NS, slots)
    reference = None if reference_NS is None else logprobs.to_pairs(reference_NS, slots)
    loss_B = loss(policy, reference, margin_B=score_BK[:, 0] - score_BK[:, 1], **supplied)
    if alignment_NS is not None:
      # WPO: pairs the policy would hardly give itself count less. Zhou et al. 2024.
      loss_B = loss_B * jnp.exp(jnp.minimum(by(alignment_NS).sum(axis=1), 0.0))
    sums = metrics.pair_sums(policy, reference, loss_B, weight_B, loss.beta)
  elif loss.kind == "unpaired":
    policy, reference = logprobs.to_unpaired(logps_NS), logprobs.to_unpaired(reference_NS)
    label_B = score_BK[:, 0]
    loss_B = loss(policy, reference, label_B=label_B, **supplied)
    sums = metrics.unpaired_sums(policy, reference, loss_B, weight_B, label_B, loss.beta)
  else:
    policy = logprobs.to_ranked(logps_NS, slots, completions)
    reference = logprobs.to_ranked(reference_NS, slots, completions)
    present_BK = weight_BK > 0
    loss_B = loss(policy, reference, present_BK=present_BK, reward_BK=score_BK, **supplied)
    reward_BK = score_BK if loss.samples else None
    sums = metrics.ranked_sums(
      policy, reference, loss_B, weight_B, present_BK, loss.beta, reward_BK
    )
  bad_NS = jnp.repeat(~jnp.isfinite(loss_B), completions).reshape(logps_NS.shape)
  return sums, bad_NS & (slots.weight_NS > 0)


def loss_count(objective: Objective, slots: Slots) -> Array:
  """What the loss is averaged over: weighted tokens of text, weighted rows otherwise."""
  if objective.loss.kind == "text":
    return jnp.sum(slots.tokens_NS * slots.weight_NS)
  return slots.weight_NS.reshape(-1, objective.completions)[:, 0].sum()


# --- the step -------------------------------------------------------------------------------------


def train_step(
  state: TrainState,
  reference_params: PyTree | None,
  batch: TokenBatch,
  *,
  objective: Objective,
  tx: optax.GradientTransformation,
  axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of the policy; `reference_params` is read and never written.

  Args:
    state: the policy, its optimiser, the step number and what else evolves.
    reference_params: the frozen reference, which adapters also take their base from; None where the
      loss reads none, the state holds it or its log-probs are stored.
    batch: every array with a leading axis of micro-batches, whose gradients are added exactly.
    objective: what is minimised.
    tx: the optimiser.
    axis_name: the device axis under pmap; None under jit, which reduces over its mesh by itself.

  Returns:
    The next state and its metrics: means over the global batch; `grad_norm` before clipping;
    `rows` and `tokens`, of data, that the batch held; `nonfinite_row_ANS`, of all slots of the
    global batch, the data row of one whose loss is not finite, and -1 for the others.
  """
  if state.reference is not None:
    reference_params = state.reference
  grads, sums, bad_ANS = _gradient(objective, state, reference_params, batch, axis_name)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  means = metrics.divide(sums)
  following = state._replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    running_stats=objective.loss.update_running_stats(state.running_stats, means),
    reference=_followed(state, params, objective.sync),
  )
  facts = _facts(objective, batch, bad_ANS, axis_name)
  return following, means | {"grad_norm": optax.tree.norm(grads)} | facts


def _facts(
  objective: Objective, batch: TokenBatch, bad_ANS: Array, axis_name: str | None
) -> dict[str, Array]:
  """What is told of a global batch beside its metrics."""
  bad_row_ANS = jnp.where(bad_ANS, batch.row_NS, -1)
  counts = {
    "rows": (batch.row_NS >= 0).sum() // objective.completions,
    "tokens": (batch.pair_NL >= 0).sum(),
  }
  if axis_name is not None:
    bad_row_ANS = jax.lax.all_gather(bad_row_ANS, axis_name, axis=1, tiled=True)
    counts = jax.lax.psum(counts, axis_name)
  return counts | {"nonfinite_row_ANS": bad_row_ANS}


def _gradient(
  objective: Objective,
  state: TrainState,
  reference_params: PyTree | None,
  batch: TokenBatch,
  axis_name: str | None,
) -> tuple[PyTree, metrics.Sums, Array]:
  """Gradient and metric sums of a global batch, and which slots have a loss not finite."""
  # psum stays outside the differentiated function: inside, pmap's gradients are device-count times
  # too large.
  total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
  slots_A = logprobs.slots_of(batch)
  count = total(loss_count(objective, slots_A))
  # d loss / d logps of some slots, their sums, and which are not finite.
  slope_fn = _globally(_slope, axis_name) if objective.loss.batch_wide else _slope
  slope = functools.partial(slope_fn, objective, count, state.running_stats)
  policy_fn = _policy_fn(objective, state.step, reference_params)

  reference_ANS = None
  if objective.loss.needs_reference:
    forward = objective.stored_fn or (lambda micro: objective.logps_fn(reference_params, micro))
    reference_ANS = jax.lax.stop_gradient(jax.lax.map(forward, batch))
  ready_A = None
  if objective.loss.batch_wide and len(batch.ids_NL) > 1:
    # Every micro-batch is seen before any of them is differentiated: one more forward pass.
    logps_ANS = jax.lax.map(lambda micro: policy_fn(state.params, micro).logps_NS, batch)
    ready_A = _joined(slope)(logps_ANS, reference_ANS, slots_A)

  def accumulate(grads, parts):
    micro, reference_NS, slots, ready = parts

    def scored_fn(trained):
      scored = policy_fn(trained, micro)
      return (scored.logps_NS, scored.routing and scored.routing.probs_E), scored

    (logps_NS, _), pull, scored = jax.vjp(scored_fn, state.params, has_aux=True)
    found = slope(logps_NS, reference_NS, slots, scored.alignment_NS) if ready is None else ready
    slope_NS, sums, bad_NS = found
    slope_E, more_sums = None, {}
    if scored.routing is not None:
      weight = objective.balance / len(batch.ids_NL)
      slope_E, more_sums = _balance(total(scored.routing), weight)
    (more,) = pull((slope_NS, slope_E))
    return jax.tree.map(jnp.add, grads, more), (sums | more_sums, bad_NS)

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  parts = (batch, reference_ANS, slots_A, ready_A)
  grads, (sums_A, bad_ANS) = jax.lax.scan(accumulate, zeros, parts)
  return *total((grads, jax.tree.map(lambda x_A: x_A.sum(0), sums_A))), bad_ANS


def _policy_fn(
  objective: Objective, index: Array, reference_params: PyTree | None
) -> Callable[[PyTree, TokenBatch], Scored]:
  """(trained, micro-batch) -> `Scored` of the policy at a step."""
  keys: tuple[jax.Array, ...] = ()
  if objective.dropout_seed is not None:
    # The same key on every device: what is dropped goes by the data row of a token.
    keys = (jax.random.fold_in(jax.random.key(objective.dropout_seed), index),)

  def policy_fn(trained: PyTree, micro: TokenBatch) -> Scored:
    params = objective.policy(trained, reference_params)
    if objective.scored_fn is None:
      return Scored(objective.logps_fn(params, micro, *keys))
    return objective.scored_fn(params, micro, *keys)

  return policy_fn


def _balance(routing: Routing, weight: float) -> tuple[Array, metrics.Sums]:
  """d(weight · balance) / d probs_E of one micro-batch over all devices, and the balance.

    balance = E Σ_e f_e P_e,   f_e = chosen_e / tokens,   P_e = probs_e / tokens

  The number of chosen experts where all are alike, more where a few are favoured. It is of a whole
  micro-batch, so it is no sum over micro-batches. Fedus et al. 2021, eq. 4 to 6.
  """
  experts = len(routing.chosen_E)
  slope_E = experts * routing.chosen_E / jnp.square(routing.tokens.astype(jnp.float32))
  balance = (slope_E * routing.probs_E).sum()
  return weight * slope_E, {"router/balance": (balance, jnp.ones(()))}


def _slope(objective, count, running_stats, logps_NS, reference_NS, slots, alignment_NS=None):
  def mean_loss(logps_NS):
    sums, bad_NS = batch_sums(objective, logps_NS, reference_NS, slots, running_stats, alignment_NS)
    return sums["loss"][0] / count, (sums, bad_NS)

  slope_NS, (sums, bad_NS) = jax.grad(mean_loss, has_aux=True)(logps_NS)
  return slope_NS, sums, bad_NS


def _globally(fn, axis_name):
  """`fn` of the slots of all devices, of which this one keeps its own; sums are those of all.

  Every device then adds the same sums and the same counts, which leaves their ratios as they are.
  """
  if axis_name is None:
    return fn

  def over_devices(objective, count, running_stats, *parts):
    rows = len(parts[0])
    gather = lambda x: jax.lax.all_gather(x, axis_name, tiled=True)
    slope_NS, sums, bad_NS = fn(objective, count, running_stats, *jax.tree.map(gather, parts))
    start = jax.lax.axis_index(axis_name) * rows
    own = lambda x_NS: jax.lax.dynamic_slice_in_dim(x_NS, start, rows)
    return own(slope_NS), sums, own(bad_NS)

  return over_devices


def _joined(fn):
  """`fn` of all micro-batches at once; its sums are shared out so that they add up again."""

  def over_micro_batches(*parts):
    leading = parts[0].shape[:2]
    join = lambda x_ANS: x_ANS.reshape(-1, *x_ANS.shape[2:])
    slope_NS, sums, bad_NS = fn(*jax.tree.map(join, parts))
    part = lambda x_NS: x_NS.reshape(*leading, *x_NS.shape[1:])
    share = lambda x: jnp.broadcast_to(x / leading[0], leading[:1])
    return part(slope_NS), jax.tree.map(share, sums), part(bad_NS)

  return over_micro_batches


def _followed(state: TrainState, params: PyTree, sync: Sync | None) -> PyTree | None:
  """The reference after a step: as it was, or on a step that is due, nearer to the policy."""
  if sync is None:
    return state.reference
  share = jnp.where((state.step + 1) % sync.every == 0, sync.alpha, 0.0)
  mix = lambda new, old: (share * new + (1 - share) * old).astype(old.dtype)
  return jax.tree.map(mix, params, state.reference)
