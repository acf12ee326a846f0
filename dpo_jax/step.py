"""One training step as one pure function; `distributed.executor` decides what compiles it.

The reference is an argument, read and never written. A loss is a function of log-probs, so its
gradient is taken in two parts: first with respect to the log-probs, where the loss may see the
whole batch, then of the log-probs with respect to the parameters, a micro-batch at a time. Losses
are divided by counts of the global batch, so micro-batches, shards and ragged rows add up exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from dpo_jax import logprobs, metrics
from dpo_jax.logprobs import Scored, Slots
from dpo_jax.losses import Loss
from dpo_jax.structs import Array, PyTree, Routing, TokenBatch


class TrainState(NamedTuple):
  """Everything that evolves in training, and everything that a checkpoint keeps.

  Attributes:
    step: updates made.
    params: the trained parameters: the policy, or the adapters of one whose base is frozen.
    opt_state: state of the optimizer.
    running_stats: running statistics that the loss reads (bco_pair's δ, kto's KL); empty for most.
    reference: the reference's parameters if it follows the policy (TR-DPO), otherwise None: a
      frozen reference is an argument of the step, and no part of its state.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  running_stats: dict[str, Array]
  reference: PyTree | None = None


class Sync(NamedTuple):
  """The rule by which a reference follows the policy (TR-DPO).

  Every `every` steps the reference's parameters become α policy + (1-α) reference. α = 1 is the
  hard update, below 1 the soft one. Gorbatovski et al. 2024, eq. 4 and 5.
  """

  every: int
  alpha: float


class Forward(Protocol):
  """A forward pass of a language model: (params, batch, key) -> log-probs of every slot.

  It returns logps_NS in nats, or a `Scored` where a loss reads more of the pass than that. The key
  is for dropout, and only given where the objective has a `dropout_seed`.
  """

  def __call__(self, params: PyTree, batch: TokenBatch, *key: jax.Array) -> Array | Scored: ...


class LiveReference(NamedTuple):
  """A reference that every step computes, from parameters beside those of the policy.

  Attributes:
    sync: how it follows the policy; it is then part of the state. None for a frozen one.
  """

  sync: Sync | None = None


class StoredReference(NamedTuple):
  """A reference whose log-probs every batch brings along: no parameters are needed.

  Attributes:
    logps_fn: batch -> logps_NS, nats, such as `logprobs.make_stored_fn` makes.
  """

  logps_fn: Callable[[TokenBatch], Array]


class NoReference(NamedTuple):
  """The absence of a reference: the loss reads none."""


Reference = LiveReference | StoredReference | NoReference


def _trained_is_policy(trained: PyTree, reference_params: PyTree | None) -> PyTree:
  del reference_params
  return trained


class Objective(NamedTuple):
  """An objective to minimise, as static arguments of the step.

  Attributes:
    logps_fn: the forward pass, of the policy and of a live reference alike.
    loss: from `losses.resolve`.
    completions: K, slots of an example: 1 for text, 2 for pairs and unpaired examples.
    reference: how the reference's log-probs come about; None is live where the loss reads any.
    policy: (trained, reference_params) -> the policy's parameters; what is trained, unless given.
    dropout_seed: of the keys of dropout, which go by it and the step; None for no dropout.
    balance: weight of the term that spreads tokens over the experts of a mixture.
  """

  logps_fn: Forward
  loss: Loss
  completions: int = 2
  reference: Reference | None = None
  policy: Callable[[PyTree, PyTree | None], PyTree] = _trained_is_policy
  dropout_seed: int | None = None
  balance: float = 0.0

  @property
  def reference_kind(self) -> Reference:
    """The kind of reference: as given, or live where the loss reads one."""
    if self.reference is not None:
      return self.reference
    return LiveReference() if self.loss.needs_reference else NoReference()

  @property
  def sync(self) -> Sync | None:
    """The rule by which the reference follows the policy; None where it does not."""
    kind = self.reference_kind
    return kind.sync if isinstance(kind, LiveReference) else None

  def scored(self, params: PyTree, batch: TokenBatch, *key: jax.Array) -> Scored:
    """Runs the forward pass; returns log-probs and all else that it reports."""
    found = self.logps_fn(params, batch, *key)
    return found if isinstance(found, Scored) else Scored(found)

  def logps(self, params: PyTree, batch: TokenBatch) -> Array:
    """Runs the forward pass without dropout; returns logps_NS in nats, and nothing else of it."""
    return self.scored(params, batch).logps_NS

  def reference_logps(self, reference_params: PyTree | None, batch: TokenBatch) -> Array | None:
    """Returns the reference's logps_NS of a batch in nats, however they come about, or None."""
    kind = self.reference_kind
    if isinstance(kind, NoReference):
      return None
    if isinstance(kind, StoredReference):
      return kind.logps_fn(batch)
    return self.logps(reference_params, batch)


def init_state(
  params: PyTree, tx: optax.GradientTransformation, loss: Loss | None = None
) -> TrainState:
  """Returns the state at step 0; a reference that follows the policy is put in afterwards."""
  # Typed arrays: a Python number would have another type after the first step, which would be
  # compiled again.
  start = {key: jnp.float32(value) for key, value in (loss.running_stats if loss else {}).items()}
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), start)


# --- from log-probs to losses and metrics ---------------------------------------------------------


def batch_sums(
  objective: Objective,
  logps_NS: Array,
  reference_NS: Array | None,
  slots: Slots,
  running_stats: Mapping[str, Array | float] | None = None,
  alignment_NS: Array | None = None,
) -> tuple[metrics.Sums, Array]:
  """Computes loss and metrics as sums with counts, and flags slots whose loss is not finite.

  The loss of an empty slot is finite and its weight zero. Leading axes of slots may be joined:
  any [N, S] will do whose rows are runs of K slots.

  Args:
    objective: gives the loss, and K.
    logps_NS, reference_NS: log-probs under policy and reference, nats; None without a reference.
    slots: of the same shape.
    running_stats: those of the state.
    alignment_NS: mean alignment of the tokens of every slot, for WPO; None for no weights.

  Returns:
    The sums, and bad_NS.
  """
  loss, completions = objective.loss, objective.completions

  def by(x_NS: Array) -> Array:
    """Joins rows, and puts the K slots of an example side by side: [B, K]."""
    return x_NS.reshape(-1, completions)

  weight_BK, score_BK = by(slots.weight_NS), by(slots.score_NS)
  # The first slot speaks for its example; later ones have weight 0 where a completion is absent.
  weight_B = weight_BK[:, 0]
  # Offered to every loss: each reads those that its function names.
  supplied = {**(running_stats or {}), "weight_B": weight_B}
  if loss.kind == "text":
    # A text has no second completion: its loss reads `chosen_B` alone.
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
    assert reference_NS is not None
    policy, reference = logprobs.to_unpaired(logps_NS), logprobs.to_unpaired(reference_NS)
    label_B = score_BK[:, 0]  # of both slots: the second is the mismatched completion
    loss_B = loss(policy, reference, label_B=label_B, **supplied)
    sums = metrics.unpaired_sums(policy, reference, loss_B, weight_B, label_B, loss.beta)
  else:
    assert reference_NS is not None
    policy = logprobs.to_ranked(logps_NS, slots, completions)
    reference = logprobs.to_ranked(reference_NS, slots, completions)
    present_BK = weight_BK > 0
    loss_B = loss(policy, reference, present_BK=present_BK, reward_BK=score_BK, **supplied)
    # Scores of ranked data only order completions; those of samples are rewards, and reported.
    reward_BK = score_BK if loss.is_on_policy else None
    sums = metrics.ranked_sums(
      policy, reference, loss_B, weight_B, present_BK, loss.beta, reward_BK
    )
  # From the losses, not from their mean, in which one bad row hides all others.
  bad_NS = jnp.repeat(~jnp.isfinite(loss_B), completions).reshape(logps_NS.shape)
  return sums, bad_NS & (slots.weight_NS > 0)


def loss_count(objective: Objective, slots: Slots) -> Array:
  """Counts what the loss is averaged over: weighted tokens of text, weighted examples otherwise."""
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
  """Makes one update of the policy; `reference_params` is read and never written.

  Args:
    state: the policy, its optimizer, the step number and what else evolves.
    reference_params: the frozen reference, which adapters also take their base from; None where the
      loss reads none, the state has it or its log-probs are stored.
    batch: every array with a leading axis of micro-batches, whose gradients are added exactly.
    objective: the objective to minimise.
    tx: the optimizer.
    axis_name: the device axis under pmap; None under jit, which reduces over its mesh by itself.

  Returns:
    The next state and its metrics: means over the global batch; `grad_norm` before clipping;
    `rows` and `tokens`, examples and their tokens in the batch; `nonfinite_row_ANS`, for every slot
    of the global batch the data row if its loss is not finite, and -1 otherwise.
  """
  if state.reference is not None:  # it follows the policy, and so it is part of what evolves
    reference_params = state.reference
  grads, sums, bad_ANS = _gradient(objective, state, reference_params, batch, axis_name)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # The one division: sums and counts are those of the global batch by now.
  means = metrics.divide(sums)
  following = state._replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    # From means over the global batch, so that every device keeps the same statistics.
    running_stats=objective.loss.update_running_stats(state.running_stats, means),
    reference=_followed(state, params, objective.sync),
  )
  facts = _facts(objective, batch, bad_ANS, axis_name)
  # The gradient's norm before clipping, which is a part of `tx` and would hide a burst.
  return following, means | {"grad_norm": optax.tree.norm(grads)} | facts


def _facts(
  objective: Objective, batch: TokenBatch, bad_ANS: Array, axis_name: str | None
) -> dict[str, Array]:
  """Counts examples and tokens of a global batch, and names the rows of its bad slots."""
  # Rows of the data, which a user can look up, rather than places in a batch.
  bad_row_ANS = jnp.where(bad_ANS, batch.row_NS, -1)
  counts = {
    # Every completion of an example is a slot with its row.
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
  """Computes the gradient of a global batch, a micro-batch at a time.

  The order is important:
    1. The reference's log-probs, of which nothing is differentiated.
    2. For a loss that looks at the whole batch, the policy's log-probs of all micro-batches.
    3. For every micro-batch, the log-probs again; the loss's slope with respect to them; and that
       slope pulled back to the parameters.

  Returns:
    The gradient; sums and counts of the metrics; and which slots have a loss that is not finite.
  """

  # psum stays outside the differentiated function: inside, pmap's gradients are device-count times
  # too large.
  def total(x: PyTree) -> PyTree:
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  slots_A = logprobs.slots_of(batch)
  # The count of the global batch, known before any loss: a mean of the means of ragged
  # micro-batches would be wrong.
  count = total(loss_count(objective, slots_A))
  # d loss / d logps of some slots, their sums, and which are not finite.
  slope_fn = _globally(_slope, axis_name) if objective.loss.batch_wide else _slope
  slope = functools.partial(slope_fn, objective, count, state.running_stats)
  policy_fn = _policy_fn(objective, state.step, reference_params)

  reference_ANS = None
  if not isinstance(objective.reference_kind, NoReference):
    # One micro-batch at a time, as the policy's: no array of activations spans several.
    reference_fn = functools.partial(objective.reference_logps, reference_params)
    reference_ANS = jax.lax.stop_gradient(jax.lax.map(reference_fn, batch))
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

    # Not `grad`: the slope of a batch-wide loss comes from all micro-batches, not from this pass.
    (logps_NS, _), pull, scored = jax.vjp(scored_fn, state.params, has_aux=True)
    found = slope(logps_NS, reference_NS, slots, scored.alignment_NS) if ready is None else ready
    slope_NS, sums, bad_NS = found
    # The balance of experts has a slope of its own, with respect to the router's probabilities.
    slope_E, more_sums = None, {}
    if scored.routing is not None:
      # The balance is no sum over micro-batches, so the mean of theirs is minimised.
      weight = objective.balance / len(batch.ids_NL)
      slope_E, more_sums = _balance(total(scored.routing), weight)
    (more,) = pull((slope_NS, slope_E))
    return jax.tree.map(jnp.add, grads, more), (sums | more_sums, bad_NS)

  # Gradients are summed in the parameters' type; a scan keeps one micro-batch's activations alive.
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  parts = (batch, reference_ANS, slots_A, ready_A)
  grads, (sums_A, bad_ANS) = jax.lax.scan(accumulate, zeros, parts)
  # One reduction over the devices for the whole step, not one per micro-batch.
  return *total((grads, jax.tree.map(lambda x_A: x_A.sum(0), sums_A))), bad_ANS


def _policy_fn(
  objective: Objective, index: Array, reference_params: PyTree | None
) -> Callable[[PyTree, TokenBatch], Scored]:
  """Returns the policy's forward pass at a step: (trained, micro-batch) -> `Scored`."""
  keys: tuple[jax.Array, ...] = ()
  if objective.dropout_seed is not None:
    # The same key on every device: which inputs are dropped depends on a token's data row alone, so
    # that it does not depend on how rows are divided.
    keys = (jax.random.fold_in(jax.random.key(objective.dropout_seed), index),)

  def policy_fn(trained: PyTree, micro: TokenBatch) -> Scored:
    return objective.scored(objective.policy(trained, reference_params), micro, *keys)

  return policy_fn


def _balance(routing: Routing, weight: float) -> tuple[Array, metrics.Sums]:
  """Computes d(weight · balance) / d probs_E of one micro-batch over all devices, and the balance.

    balance = E Σ_e f_e P_e,   f_e = chosen_e / tokens,   P_e = probs_e / tokens

  It equals the number of chosen experts where all are used equally, and is larger where a few are
  favoured. A product of two means over a micro-batch, it is no sum over micro-batches. Fedus et al.
  2021, eq. 4 to 6.
  """
  experts = len(routing.chosen_E)
  # In float32, since the square of a number of tokens does not fit int32.
  slope_E = experts * routing.chosen_E / jnp.square(routing.tokens.astype(jnp.float32))
  balance = (slope_E * routing.probs_E).sum()
  return weight * slope_E, {"router/balance": (balance, jnp.ones(()))}


def _slope(objective, count, running_stats, logps_NS, reference_NS, slots, alignment_NS=None):
  """Computes d mean loss / d logps_NS of some slots, their sums, and which are not finite."""

  def mean_loss(logps_NS):
    sums, bad_NS = batch_sums(objective, logps_NS, reference_NS, slots, running_stats, alignment_NS)
    # Of (sum, count) only the sum has a gradient; the count is the global one, from outside.
    return sums["loss"][0] / count, (sums, bad_NS)

  slope_NS, (sums, bad_NS) = jax.grad(mean_loss, has_aux=True)(logps_NS)
  return slope_NS, sums, bad_NS


def _globally(fn, axis_name):
  """Makes `_slope` see the slots of all devices; each device keeps the slopes of its own slots.

  The sums are those of all slots. Every device then adds the same sums and the same counts, which
  leaves their ratios as they are.
  """
  if axis_name is None:
    return fn

  def over_devices(objective, count, running_stats, *parts):
    rows = len(parts[0])
    everywhere = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), parts)
    slope_NS, sums, bad_NS = fn(objective, count, running_stats, *everywhere)
    # Gathered in the order of the devices, so a device's own slots are one slice.
    start = jax.lax.axis_index(axis_name) * rows

    def own(x_NS: Array) -> Array:
      return jax.lax.dynamic_slice_in_dim(x_NS, start, rows)

    return own(slope_NS), sums, own(bad_NS)

  return over_devices


def _joined(fn):
  """Makes `_slope` see all micro-batches at once, its sums divided so that they add up again."""

  def over_micro_batches(*parts):
    leading = parts[0].shape[:2]
    joined = jax.tree.map(lambda x_ANS: x_ANS.reshape(-1, *x_ANS.shape[2:]), parts)
    slope_NS, sums, bad_NS = fn(*joined)

    def split(x_NS: Array) -> Array:
      return x_NS.reshape(*leading, *x_NS.shape[1:])

    # The caller adds the sums of A micro-batches: each is given an A-th.
    shares = jax.tree.map(lambda x: jnp.broadcast_to(x / leading[0], leading[:1]), sums)
    return split(slope_NS), shares, split(bad_NS)

  return over_micro_batches


def _followed(state: TrainState, params: PyTree, sync: Sync | None) -> PyTree | None:
  """Returns the reference after a step: unchanged, or nearer to the policy where a sync is due."""
  if sync is None:
    return state.reference
  # A share of 0 rather than a branch, so that one program serves all steps.
  share = jnp.where((state.step + 1) % sync.every == 0, sync.alpha, 0.0)

  def mix(new: Array, old: Array) -> Array:
    return (share * new + (1 - share) * old).astype(old.dtype)

  return jax.tree.map(mix, params, state.reference)
