"""One training step as one pure function; `parallel` decides what compiles it.

The reference is an argument, read and never written. Losses are normalised by counts of the whole
batch, taken before the gradient, so micro-batches, shards and ragged rows add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax import logprobs, metrics
from dpo_jax.structs import Array, PairLogps, PyTree, TokenBatch


class TrainState(NamedTuple):
  """All that evolves, and all that a checkpoint holds of the training state."""

  step: Array
  params: PyTree
  opt_state: PyTree


class Objective(NamedTuple):
  """What is minimised, as static arguments of the step.

  Attributes:
    logps_fn: (params, batch) -> logps_NS, nats.
    loss_fn: (policy, reference) -> loss_B.
    supervised: one answer a slot, no reference, averaged over tokens; otherwise pairs.
    beta: reward units per nat, for the reported rewards.
  """

  logps_fn: logprobs.LogpsFn
  loss_fn: Callable[[PairLogps, PairLogps | None], Array]
  supervised: bool
  beta: float


def init_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
  """Step 0 of a run from its initial parameters."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def batch_sums(
  objective: Objective, logps_NS: Array, reference_NS: Array | None, batch: TokenBatch
) -> tuple[metrics.Sums, Array]:
  """Loss and metrics of one batch as sums, and which slots have a loss that is not finite.

  The loss of an empty slot is finite and its weight zero.
  """
  if objective.supervised:
    weight_B = batch.weight_NS.reshape(-1)
    policy = PairLogps(logps_NS.reshape(-1), jnp.zeros(()))
    loss_B = objective.loss_fn(policy, None)
    sums = metrics.sequence_sums(policy.chosen_B, loss_B, weight_B)
    bad_NS = ~jnp.isfinite(loss_B).reshape(batch.weight_NS.shape)
  else:
    weight_B = batch.weight_NS.reshape(-1, 2)[:, 0]
    policy = logprobs.to_pairs(logps_NS, batch)
    reference = logprobs.to_pairs(reference_NS, batch)
    loss_B = objective.loss_fn(policy, reference)
    sums = metrics.pair_sums(policy, reference, loss_B, weight_B, objective.beta)
    bad_NS = jnp.repeat(~jnp.isfinite(loss_B), 2).reshape(batch.weight_NS.shape)
  return sums, bad_NS & (batch.weight_NS > 0)


def loss_count(objective: Objective, batch: TokenBatch) -> Array:
  """What the loss is averaged over: weighted tokens if supervised, weighted pairs otherwise.

  Leading axes (micro-batches) are summed over.
  """
  if not objective.supervised:
    return batch.weight_NS.sum() / 2
  tokens = jax.vmap(logprobs.slot_tokens) if batch.ids_NL.ndim == 3 else logprobs.slot_tokens
  return jnp.sum(tokens(batch) * batch.weight_NS)


def train_step(
  state: TrainState,
  ref_params: PyTree | None,
  batch: TokenBatch,
  *,
  objective: Objective,
  tx: optax.GradientTransformation,
  axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of the policy; `ref_params` is read and never written.

  Args:
    state: the policy, its optimiser and the step number.
    ref_params: the frozen reference; None when supervised.
    batch: every array with a leading axis of micro-batches, whose gradients are added exactly.
    objective: what is minimised.
    tx: the optimiser.
    axis_name: the device axis under pmap; None under jit, which reduces over its mesh by itself.

  Returns:
    The next state and its metrics: means over the global batch; `grad_norm` before clipping;
    `nonfinite_ANS`, the slots whose loss is not finite.
  """
  # psum stays outside the differentiated function: inside, pmap's gradients are device-count times
  # too large.
  total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
  count = total(loss_count(objective, batch))

  def micro_loss(params, micro, reference_NS):
    logps_NS = objective.logps_fn(params, micro)
    sums, bad_NS = batch_sums(objective, logps_NS, reference_NS, micro)
    return sums["loss"] / count, (sums, bad_NS)

  def accumulate(grads, micro):
    reference_NS = None
    if not objective.supervised:
      reference_NS = jax.lax.stop_gradient(objective.logps_fn(ref_params, micro))
    more, (sums, bad_NS) = jax.grad(micro_loss, has_aux=True)(state.params, micro, reference_NS)
    return jax.tree.map(jnp.add, grads, more), (sums, bad_NS)

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  grads, (sums_A, bad_ANS) = jax.lax.scan(accumulate, zeros, batch)
  grads, sums = total((grads, jax.tree.map(lambda x_A: x_A.sum(0), sums_A)))

  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  report = metrics.divide(sums, count) | {
    "grad_norm": optax.tree.norm(grads),
    "nonfinite_ANS": bad_ANS,
  }
  return TrainState(state.step + 1, params, opt_state), report
