"""Losses that see more than a pair: a ranking, an answer judged by itself, a whole batch.

Where a loss depends on the batch, that is the global batch: the caller hands over the log-probs of
all micro-batches and devices at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.paired import log_ratios, smoothed_sigmoid
from dpo_jax.structs import Array, PairLogps, RankedLogps, UnpairedLogps

# --- the whole batch ------------------------------------------------------------------------------


def _ranked_together(first_B: Array, second_B: Array, weight_B: Array | None) -> Array:
  """first - second, each sorted, as the pair that holds the rank in `first`: [B].

  Pairs of weight 0 rank behind all others on both sides, and so only meet each other.
  """
  first_B, second_B = jnp.asarray(first_B), jnp.asarray(second_B)
  absent_B = jnp.zeros(first_B.shape, bool) if weight_B is None else jnp.asarray(weight_B) <= 0
  order_B = jnp.lexsort((first_B, absent_B))
  partner_B = jnp.lexsort((second_B, absent_B))
  gap_B = first_B[order_B] - second_B[partner_B]
  return jnp.zeros_like(gap_B).at[order_B].set(gap_B)


def aot(
  policy: PairLogps,
  reference: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  weight_B: Array | None = None,
) -> Array:
  """AOT for pairs: the policy's margins as a distribution shall dominate the reference's.

    loss = -(1-ε) log σ(βd) - ε log σ(-βd),   d = sort(log π(y_w)/π(y_l)) - sort(the same of π_ref)

  Sorted over the global batch; `loss_B` is at the pair whose policy margin has the rank. Pairs of
  weight 0 are left out. Equal to cdpo's value where policy equals reference: log 2.
  Melnyk et al. 2024.
  """
  gap_B = _ranked_together(
    policy.chosen_B - policy.rejected_B, reference.chosen_B - reference.rejected_B, weight_B
  )
  return smoothed_sigmoid(beta * gap_B, label_smoothing)


def aot_unpaired(
  policy: PairLogps,
  reference: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  weight_B: Array | None = None,
) -> Array:
  """AOT for unpaired answers: the rewards of all chosen shall dominate those of all rejected.

    loss = -(1-ε) log σ(βd) - ε log σ(-βd),   d = sort(c) - sort(r)

  Sorted over the global batch; `loss_B` is at the pair whose c has the rank. Pairs of weight 0 are
  left out. log 2 where policy equals reference. Melnyk et al. 2024.
  """
  return smoothed_sigmoid(
    beta * _ranked_together(*log_ratios(policy, reference), weight_B), label_smoothing
  )


# --- answers judged by themselves -----------------------------------------------------------------


def kto(
  policy: UnpairedLogps,
  reference: UnpairedLogps,
  *,
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  label_B: Array,
  weight_B: Array | None = None,
  kl: Array | None = None,
) -> Array:
  """KTO: the value of a gain or a loss, as Kahneman and Tversky have it, against a reference point.

    loss = λ_D (1 - σ(β (a - z0))) if desirable, λ_U (1 - σ(β (z0 - a))) if not,
    a = log π(y)/π_ref(y),   z0 = max(0, mean of a over mismatched answers)

  Args:
    policy, reference: log-probs of the judged and of the mismatched answers, nats.
    beta: reward units per nat.
    desirable_weight, undesirable_weight: λ_D and λ_U.
    label_B: 1 where the answer is desirable, 0 where it is not.
    weight_B: weights of the rows, in the mean behind z0 too.
    kl: z0 before its maximum with 0, nats, in place of the global batch's mean.

  Returns:
    loss_B; λ/2 where policy equals reference. z0 gets no gradient.

  Ethayarajh et al. 2024.
  """
  gain_B = policy.completion_B - reference.completion_B
  if kl is None:
    apart_B = policy.mismatched_B - reference.mismatched_B
    kl = apart_B.mean() if weight_B is None else (apart_B * weight_B).sum() / weight_B.sum()
  z0 = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
  good_B = desirable_weight * jax.nn.sigmoid(-beta * (gain_B - z0))
  return jnp.where(label_B > 0.5, good_B, undesirable_weight * jax.nn.sigmoid(beta * (gain_B - z0)))


# --- several answers to a prompt ------------------------------------------------------------------


def plackett_luce(
  policy: RankedLogps,
  reference: RankedLogps | None,
  *,
  beta: float = 0.1,
  present_BK: Array | None = None,
) -> Array:
  """DPO for rankings: minus the log-likelihood that the answers come in this order.

    loss = -Σ_k [z_k - log Σ_{j>=k} exp z_j],   z = β log π(y)/π_ref(y), best first

  `present_BK` tells answers from the filling behind them. Equal to sigmoid for two answers; log K!
  where policy equals reference. Rafailov et al. 2023, appendix A.3.
  """
  z_BK = beta * _ranked_ratios(policy, reference)
  if present_BK is None:
    present_BK = jnp.ones(z_BK.shape, bool)
  z_BK = jnp.where(present_BK, z_BK, -1e30)
  left_BK = jax.lax.cumlogsumexp(z_BK, axis=1, reverse=True)
  return jnp.where(present_BK, left_BK - z_BK, 0.0).sum(axis=1)


def policy_gradient(
  policy: RankedLogps,
  reference: RankedLogps,
  *,
  beta: float = 0.1,
  reward_BK: Array,
  present_BK: Array | None = None,
) -> Array:
  """The assumed objective itself, by the score function with a leave-one-out baseline.

    loss = -1/K Σ_k (R_k - mean_{j≠k} R_j) log π(y_k),   R = r - β log π(y)/π_ref(y)

  The answers are samples of the policy; R gets no gradient. The gradient's expectation is that of
  E[-r + β (log π - log π_ref)], but its value is not the objective's. `reward_BK` is r, reward
  units. Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
  """
  ratio_BK = _ranked_ratios(policy, reference)
  if present_BK is None:
    present_BK = jnp.ones(ratio_BK.shape, bool)
  return_BK = jnp.where(present_BK, reward_BK - beta * ratio_BK, 0.0)
  count_B1 = jnp.maximum(present_BK.sum(axis=1, keepdims=True), 1)
  others_BK = (return_BK.sum(axis=1, keepdims=True) - return_BK) / jnp.maximum(count_B1 - 1, 1)
  lead_BK = jax.lax.stop_gradient(jnp.where(present_BK, return_BK - others_BK, 0.0))
  return -(lead_BK * policy.completions_BK).sum(axis=1) / count_B1[:, 0]


def _ranked_ratios(policy: RankedLogps, reference: RankedLogps | None) -> Array:
  """log π/π_ref of every answer, nats: [B, K]."""
  if reference is None:
    return jnp.asarray(policy.completions_BK)
  return policy.completions_BK - reference.completions_BK
