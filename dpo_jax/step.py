"""One training step as one pure function; `distributed.executor` compiles it, by jit or by pmap.

The reference is an argument, read and never written. A loss is a function of log-probs, so the
chain rule splits its gradient in two:

  1. of the loss with respect to the log-probs, where a loss may depend on the whole batch;
  2. of the log-probs with respect to the parameters, one micro-batch at a time.

The summed loss is divided by a count of the global batch, so the result does not depend on how the
batch is divided into micro-batches and shards.
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
from dpo_jax.utils import following, rounding
from dpo_jax.utils.following import Sync


class TrainState(NamedTuple):
  """Everything that changes during training; a checkpoint stores exactly this.

  Attributes:
    step: number of updates so far.
    params: the trained parameters: those of the policy, or under LoRA those of the adapters alone.
    opt_state: state of the optimizer.
    running_stats: running statistics that the loss reads (bco_pair's δ, kto's KL); empty for most.
    reference: the reference's parameters if it follows the policy (TR-DPO), with the average that
      they come from if they are one (`Averaged`), otherwise None: a frozen reference is the
      argument `reference_params` of the step, not part of its state.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  running_stats: dict[str, Array]
  reference: PyTree | None = None


class Forward(Protocol):
  """A forward pass of a language model: (params, batch, key) -> log-probs of every slot.

  It returns logps_NS in nats, or a `Scored` where a loss needs more results of the pass. The key
  is for dropout, and is passed only if the objective has a `dropout_seed`.
  """

  def __call__(self, params: PyTree, batch: TokenBatch, *key: jax.Array) -> Array | Scored: ...


class LiveReference(NamedTuple):
  """A reference whose log-probs every step computes, from the reference's parameters.

  Attributes:
    sync: how the reference follows the policy; its parameters are then part of the state. None for
      a frozen reference.
  """

  sync: Sync | None = None


class StoredReference(NamedTuple):
  """A reference whose log-probs are stored in every batch; its parameters are not needed.

  Attributes:
    logps_fn: batch -> logps_NS, in nats, such as the result of `logprobs.make_stored_fn`.
  """

  logps_fn: Callable[[TokenBatch], Array]


class NoReference(NamedTuple):
  """No reference, for losses that read none."""


Reference = LiveReference | StoredReference | NoReference


def _trained_is_policy(trained: PyTree, reference_params: PyTree | None) -> PyTree:
  del reference_params
  return trained


class Objective(NamedTuple):
  """An objective to minimize: what the compiled step treats as constant.

  Attributes:
    logps_fn: the forward pass, used for both policy and live reference.
    loss: the loss, from `losses.resolve`.
    completions: K, the number of slots per example: 1 for text, 2 for pairs; 1 for unpaired
      examples, or 2 where the loss reads mismatched completions.
    reference: where the reference's log-probs come from; None means `LiveReference` if the loss
      reads them, and otherwise `NoReference`.
    policy: (trained, reference_params) -> the policy's parameters, such as base and adapters
      together. The default returns `trained`.
    dropout_seed: seed of dropout; the key of a step is made from it and the step number. None for
      no dropout.
    balance: weight of the load-balancing loss of a mixture of experts.
    rounding_seed: seed of the stochastic rounding of bfloat16 parameters after an update; None
      rounds to nearest, which loses updates that are small next to their weight.
    sources: names of the sources of the examples, for metrics of each; () for none.
    row_starts: first row (`TokenBatch.row_NS`) of every source, in rising order.
  """

  logps_fn: Forward
  loss: Loss
  completions: int = 2
  reference: Reference | None = None
  policy: Callable[[PyTree, PyTree | None], PyTree] = _trained_is_policy
  dropout_seed: int | None = None
  balance: float = 0.0
  rounding_seed: int | None = 0
  # Names and numbers, so that the program is the same for all batches of a run.
  sources: tuple[str, ...] = ()
  row_starts: tuple[int, ...] = ()

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
    """Runs the forward pass; returns log-probs and its other results."""
    found = self.logps_fn(params, batch, *key)
    return found if isinstance(found, Scored) else Scored(found)

  def logps(self, params: PyTree, batch: TokenBatch) -> Array:
    """Runs the forward pass without dropout; returns only logps_NS, in nats."""
    return self.scored(params, batch).logps_NS

  def reference_logps(self, reference_params: PyTree | None, batch: TokenBatch) -> Array | None:
    """Returns the reference's logps_NS in nats, stored or computed; None if there is none."""
    kind = self.reference_kind
    if isinstance(kind, NoReference):
      return None
    if isinstance(kind, StoredReference):
      return kind.logps_fn(batch)
    return self.logps(reference_params, batch)


def init_state(
  params: PyTree, tx: optax.GradientTransformation, loss: Loss | None = None
) -> TrainState:
  """Returns the state at step 0; the caller adds a reference that follows the policy."""
  # Typed arrays: a Python number would have another type after the first step, and the step would
  # be compiled again.
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

  The loss of an empty slot is finite and its weight zero. Rows of several micro-batches may be
  passed together; every row must consist of runs of K slots, one run per example.

  Args:
    objective: its `loss` and `completions` are read.
    logps_NS, reference_NS: log-probs under policy and reference, in nats; None for no reference.
    slots: token counts, weights and scores of the same slots; with sources, the sums of every
      source are computed too: see `metrics.by_source`.
    running_stats: the running statistics of the state.
    alignment_NS: mean alignment of the tokens of every slot, for WPO; None for no WPO.

  Returns:
    The sums, and bad_NS: True for slots of weight above 0 whose example's loss is not finite.
  """
  sums, loss_B = sums_and_losses(
    objective, logps_NS, reference_NS, slots, running_stats, alignment_NS
  )
  # From each loss, not from their mean: the mean does not show which one is not finite.
  bad_NS = jnp.repeat(~jnp.isfinite(loss_B), objective.completions).reshape(logps_NS.shape)
  return sums, bad_NS & (slots.weight_NS > 0)


def sums_and_losses(
  objective: Objective,
  logps_NS: Array,
  reference_NS: Array | None,
  slots: Slots,
  running_stats: Mapping[str, Array | float] | None = None,
  alignment_NS: Array | None = None,
) -> tuple[metrics.Sums, Array]:
  """Computes the sums of `batch_sums`, and loss_B, the loss of every example."""
  loss, completions = objective.loss, objective.completions

  def by(x_NS: Array) -> Array:
    """Reshapes to one line per example, with its K slots: [B, K]."""
    return x_NS.reshape(-1, completions)

  weight_BK, score_BK = by(slots.weight_NS), by(slots.score_NS)
  # The first slot has the weight of its example; later ones have 0 where a completion is absent.
  weight_B = weight_BK[:, 0]
  # Passed to every loss; each reads those that are parameters of its function.
  supplied = {**(running_stats or {}), "weight_B": weight_B}
  if loss.kind == "text":
    # A text has no second completion: its loss reads `chosen_B` alone.
    policy = logprobs.PairLogps(logps_NS.reshape(-1), jnp.zeros(()))
    loss_B = loss(policy)
    sums_fn = functools.partial(
      metrics.text_sums, policy.chosen_B, slots.tokens_NS.reshape(-1), loss_B
    )
  elif loss.kind == "pairs":
    policy = logprobs.to_pairs(logps_NS, slots)
    reference = None if reference_NS is None else logprobs.to_pairs(reference_NS, slots)
    loss_B = loss(policy, reference, margin_B=score_BK[:, 0] - score_BK[:, 1], **supplied)
    if alignment_NS is not None:
      # WPO: pairs that the policy is unlikely to generate count less. Zhou et al. 2024.
      loss_B = loss_B * jnp.exp(jnp.minimum(by(alignment_NS).sum(axis=1), 0.0))
    sums_fn = functools.partial(metrics.pair_sums, policy, reference, loss_B, beta=loss.beta)
  elif loss.kind == "unpaired":
    policy = logprobs.to_unpaired(logps_NS, slots, completions)
    reference = (
      None if reference_NS is None else logprobs.to_unpaired(reference_NS, slots, completions)
    )
    label_B = score_BK[:, 0]  # the first slot is labeled; a second one is mismatched
    loss_B = loss(policy, reference, label_B=label_B, **supplied)
    sums_fn = functools.partial(
      metrics.unpaired_sums, policy, reference, loss_B, label_B=label_B, beta=loss.beta
    )
  else:
    policy = logprobs.to_ranked(logps_NS, slots, completions)
    reference = (
      None if reference_NS is None else logprobs.to_ranked(reference_NS, slots, completions)
    )
    present_BK = weight_BK > 0
    loss_B = loss(policy, reference, present_BK=present_BK, reward_BK=score_BK, **supplied)
    # Scores of ranked data only order completions; those of samples are rewards, and reported.
    reward_BK = score_BK if loss.is_on_policy else None
    sums_fn = functools.partial(
      metrics.ranked_sums,
      policy,
      reference,
      loss_B,
      present_BK=present_BK,
      beta=loss.beta,
      reward_BK=reward_BK,
    )
  sums = sums_fn(weight_B)
  if slots.source_NS is not None:
    source_B = by(slots.source_NS)[:, 0]
    sums |= metrics.by_source(sums_fn, weight_B, source_B, objective.sources)
  return sums, loss_B


def loss_count(objective: Objective, slots: Slots) -> Array:
  """Sums the weights that the loss is averaged over: of tokens for text, else of examples."""
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
    state: what the last step returned; see `TrainState`.
    reference_params: the frozen reference, under LoRA also the base of the policy; None if the loss
      reads no reference, or the state contains it, or its log-probs are stored. Where the reference
      is an average of the policy, the policy at step 0.
    batch: token batches of A micro-batches, stacked: every array has a leading axis A. Their
      gradients are summed.
    objective: the objective to minimize.
    tx: the optimizer.
    axis_name: name of the device axis under pmap; None under jit, which sums over devices itself.

  Returns:
    The next state, and metrics: means over the global batch; `grad_norm` before clipping; for
    bfloat16 parameters those of `rounding.apply_updates`; `rows` and `tokens`, the numbers of
    examples and of their tokens; with sources, `by_source/NAME/pairs`, the number of examples of
    each; `nonfinite_row_ANS`, for every slot of the global batch its row of the data file if its
    loss is not finite, and -1 otherwise.
  """
  # Of a reference that follows the policy, the argument is at most where it began.
  current = following.current(state.reference, reference_params)
  grads, sums, bad_ANS = _gradient(objective, state, current, batch, axis_name)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  key = _rounding_key(objective, state.step)
  params, rounded = rounding.apply_updates(state.params, updates, key)
  # The only division: here, sums and counts are already those of the global batch.
  means = metrics.divide(sums)
  next_state = state._replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    # From means over the global batch, so that every device keeps the same statistics.
    running_stats=objective.loss.update_running_stats(state.running_stats, means),
    reference=following.follow(
      state.reference, params, reference_params, state.step + 1, objective.sync
    ),
  )
  facts = _facts(objective, batch, bad_ANS, axis_name)
  # The norm before clipping: `tx` clips, and after it a sudden large gradient would not show.
  norm = optax.tree.norm(rounding.widen(grads))
  return next_state, means | {"grad_norm": norm} | rounded | facts


def _rounding_key(objective: Objective, index: Array) -> jax.Array | None:
  """Returns the key by which parameters are rounded after a step; None rounds to nearest."""
  if objective.rounding_seed is None:
    return None
  # A function of the seed and the step: a resumed run, and every device under pmap, rounds alike.
  # The 1 keeps these numbers apart from those of dropout.
  seeded = jax.random.fold_in(jax.random.key(objective.rounding_seed), 1)
  return jax.random.fold_in(seeded, index)


def source_of(objective: Objective, row_x: Array) -> Array:
  """Returns the number of the source of every row; 0 for empty slots, which have weight 0."""
  starts = jnp.asarray(objective.row_starts[1:], jnp.int32)
  return (row_x[..., None] >= starts).sum(axis=-1)


def _facts(
  objective: Objective, batch: TokenBatch, bad_ANS: Array, axis_name: str | None
) -> dict[str, Array]:
  """Counts examples and tokens of a global batch, and lists the data rows of its bad slots."""
  # Rows of the data file, which a user can look up, rather than positions in the batch.
  bad_row_ANS = jnp.where(bad_ANS, batch.row_NS, -1)
  counts = {
    # Every completion of an example is a slot with the example's row.
    "rows": (batch.row_NS >= 0).sum() // objective.completions,
    "tokens": (batch.pair_NL >= 0).sum(),
  }
  if objective.sources:
    # The first slot of an example is never absent.
    first_AB = batch.row_NS.reshape(-1, objective.completions)[:, 0]
    source_AB = jnp.where(first_AB >= 0, source_of(objective, first_AB), -1)
    for number, name in enumerate(objective.sources):
      counts[f"by_source/{name}/pairs"] = (source_AB == number).sum()
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
  """Computes the gradient of a global batch, one micro-batch at a time.

  The order is important:
    1. The reference's log-probs, without a gradient.
    2. Only for a loss that depends on the whole batch (`batch_wide`): the policy's log-probs of all
       micro-batches, and the *slope*, the gradient of the loss with respect to the log-probs.
    3. For every micro-batch: the policy's log-probs; their slope, unless it is known from 2; and
       the vector-Jacobian product of that slope, which is the gradient of the parameters.

  Returns:
    The gradient; sums and counts of the metrics; and which slots have a loss that is not finite.
  """

  # psum stays outside the differentiated function: inside, pmap's gradients are device-count times
  # too large.
  def total(x: PyTree) -> PyTree:
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  slots_A = logprobs.slots_of(batch)
  if objective.sources:
    slots_A = slots_A._replace(source_NS=source_of(objective, batch.row_NS))
  # The count of the global batch, computed before any loss: a mean of the means of micro-batches of
  # different sizes would be wrong.
  count = total(loss_count(objective, slots_A))
  # d loss / d logps of some slots, their sums, and which are not finite.
  slope_fn = _globally(_slope, axis_name) if objective.loss.batch_wide else _slope
  slope = functools.partial(slope_fn, objective, count, state.running_stats)
  policy_fn = _policy_fn(objective, state.step, reference_params)

  reference_ANS = None
  if not isinstance(objective.reference_kind, NoReference):
    # One micro-batch at a time, as for the policy, so that only its activations are in memory.
    reference_fn = functools.partial(objective.reference_logps, reference_params)
    reference_ANS = jax.lax.stop_gradient(_map_micro_batches(reference_fn, batch))
  ready_A = None
  if objective.loss.batch_wide and len(batch.ids_NL) > 1:
    # The slope needs the log-probs of all micro-batches first, hence one more forward pass.
    logps_ANS = jax.lax.map(lambda micro: policy_fn(state.params, micro).logps_NS, batch)
    ready_A = _joined(slope)(logps_ANS, reference_ANS, slots_A)

  def differentiate(parts):
    micro, reference_NS, slots, ready = parts

    def scored_fn(trained):
      scored = policy_fn(trained, micro)
      return (scored.logps_NS, scored.routing and scored.routing.probs_E), scored

    # Not `grad`: the slope of a batch-wide loss comes from all micro-batches, not from this pass.
    (logps_NS, _), pull, scored = jax.vjp(scored_fn, state.params, has_aux=True)
    found = slope(logps_NS, reference_NS, slots, scored.alignment_NS) if ready is None else ready
    slope_NS, sums, bad_NS = found
    # The load-balancing loss has its own slope, with respect to the router's probabilities.
    slope_E, more_sums = None, {}
    if scored.routing is not None:
      # This loss is not a sum over micro-batches, so the mean of their losses is minimized.
      weight = objective.balance / len(batch.ids_NL)
      slope_E, more_sums = _balance(total(scored.routing), weight)
    (grads,) = pull((slope_NS, slope_E))
    return grads, (sums | more_sums, bad_NS)

  parts = (batch, reference_ANS, slots_A, ready_A)
  grads, (sums_A, bad_ANS) = _add_up(differentiate, state.params, parts)
  # One reduction over the devices for the whole step, not one per micro-batch.
  return *total((grads, jax.tree.map(lambda x_A: x_A.sum(0), sums_A))), bad_ANS


def _map_micro_batches(fn: Callable[[PyTree], PyTree], parts_A: PyTree) -> PyTree:
  """Calls `fn` for one micro-batch after another, and stacks the results."""
  if len(jax.tree.leaves(parts_A)[0]) > 1:
    return jax.lax.map(fn, parts_A)
  # A loop of one turn would hide its body from the compiler's simplifications.
  only = jax.tree.map(lambda x_A: x_A[0], parts_A)
  return jax.tree.map(lambda x: x[None], fn(only))


def _add_up(
  fn: Callable[[PyTree], tuple[PyTree, PyTree]], like: PyTree, parts_A: PyTree
) -> tuple[PyTree, PyTree]:
  """Adds up the first results of `fn` over micro-batches, and stacks the second ones."""
  if len(jax.tree.leaves(parts_A)[0]) == 1:
    # Without zeros to add to, which would take the memory of the parameters.
    only = jax.tree.map(lambda x_A: x_A[0], parts_A)
    first, second = fn(only)
    return first, jax.tree.map(lambda x: x[None], second)

  def accumulate(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
    more, second = fn(part)
    return jax.tree.map(jnp.add, total, more), second

  # A scan keeps the activations of one micro-batch alive.
  return jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, like), parts_A)


def _policy_fn(
  objective: Objective, index: Array, reference_params: PyTree | None
) -> Callable[[PyTree, TokenBatch], Scored]:
  """Returns the policy's forward pass at a step: (trained, micro-batch) -> `Scored`."""
  keys: tuple[jax.Array, ...] = ()
  if objective.dropout_seed is not None:
    # The same key on every device: which inputs are dropped depends on a token's data row alone, so
    # that it does not depend on how rows are divided among devices.
    keys = (jax.random.fold_in(jax.random.key(objective.dropout_seed), index),)

  def policy_fn(trained: PyTree, micro: TokenBatch) -> Scored:
    return objective.scored(objective.policy(trained, reference_params), micro, *keys)

  return policy_fn


def _balance(routing: Routing, weight: float) -> tuple[Array, metrics.Sums]:
  """Computes d(weight · balance) / d probs_E of one micro-batch over all devices, and the balance.

    balance = E Σ_e f_e P_e,   f_e = chosen_e / tokens,   P_e = probs_e / tokens

  It equals the number of experts per token where all are used equally, and is larger where a few
  get most tokens. It is a product of two means over a micro-batch, so it cannot be summed over
  micro-batches. Fedus et al. 2021, eq. 4 to 6.
  """
  experts = len(routing.chosen_E)
  # In float32, since the square of a number of tokens does not fit int32.
  slope_E = experts * routing.chosen_E / jnp.square(routing.tokens.astype(jnp.float32))
  balance = (slope_E * routing.probs_E).sum()
  return weight * slope_E, {"router/balance": (balance, jnp.ones(()))}


def _slope(objective, count, running_stats, logps_NS, reference_NS, slots, alignment_NS=None):
  """Computes d (mean loss) / d logps_NS, the metrics' sums, and which slots are not finite."""

  def mean_loss(logps_NS):
    sums, bad_NS = batch_sums(objective, logps_NS, reference_NS, slots, running_stats, alignment_NS)
    # Only the sum of (sum, count) is used; `count` is that of the global batch.
    return sums["loss"][0] / count, (sums, bad_NS)

  slope_NS, (sums, bad_NS) = jax.grad(mean_loss, has_aux=True)(logps_NS)
  return slope_NS, sums, bad_NS


def _globally(fn, axis_name):
  """Gathers the slots of all devices for `_slope`; each device keeps the slopes of its own.

  The metrics' sums are then those of all slots, on every device. Adding them over devices
  multiplies sums and counts by the same number, which leaves their ratios unchanged.
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
  """Passes all micro-batches to `_slope` at once, and gives each an equal share of the sums."""

  def over_micro_batches(*parts):
    leading = parts[0].shape[:2]
    joined = jax.tree.map(lambda x_ANS: x_ANS.reshape(-1, *x_ANS.shape[2:]), parts)
    slope_NS, sums, bad_NS = fn(*joined)

    def split(x_NS: Array) -> Array:
      return x_NS.reshape(*leading, *x_NS.shape[1:])

    # The caller adds the sums of A micro-batches, so each gets 1/A of the total.
    shares = jax.tree.map(lambda x: jnp.broadcast_to(x / leading[0], leading[:1]), sums)
    return split(slope_NS), shares, split(bad_NS)

  return over_micro_batches
