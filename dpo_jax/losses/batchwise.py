"""Losses of a whole batch, of unpaired completions, and of several completions to a prompt.

Where a loss depends on the batch, that is the global batch: the caller passes the log-probs of all
micro-batches and devices in one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_jax.losses.declaration import Running, declare
from dpo_jax.losses.ratios import log_ratios, smoothed_sigmoid
from dpo_jax.structs import Array, PairLogps, RankedLogps, UnpairedLogps

# --- losses of the whole batch --------------------------------------------------------------------


def _sorted_differences(first_B: Array, second_B: Array, weight_B: Array | None) -> Array:
  """Computes sort(first) - sort(second), each entry placed at the pair with that rank in `first`.

  Pairs of weight 0 are sorted behind all others in both arrays, so they are subtracted only from
  each other.

  Returns:
    difference_B, in the units of the inputs.
  """
  first_B, second_B = jnp.asarray(first_B), jnp.asarray(second_B)
  absent_B = jnp.zeros(first_B.shape, bool) if weight_B is None else jnp.asarray(weight_B) <= 0
  # lexsort: the last key decides first, so `absent` comes before the value.
  order_B = jnp.lexsort((first_B, absent_B))
  partner_B = jnp.lexsort((second_B, absent_B))
  difference_B = first_B[order_B] - second_B[partner_B]
  # Undoes the sort of `first`, so that the loss of rank i is weighted with its own pair.
  return jnp.zeros_like(difference_B).at[order_B].set(difference_B)


@declare(
  reference=True,
  at_reference=math.log(2),
  batch_wide=True,
  ranges={"label_smoothing": "[0, 0.5)"},
)
def aot(
  policy: PairLogps,
  reference: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  weight_B: Array | None = None,
) -> Array:
  """AOT for pairs: the distribution of the policy's margins should dominate the reference's.

    loss = -(1-ε) log σ(βd) - ε log σ(-βd)
    d = sort(log π(y_w)/π(y_l)) - sort(log π_ref(y_w)/π_ref(y_l))

  Both are sorted over the global batch; an entry of `loss_B` belongs to the pair whose policy
  margin has that rank. `label_smoothing` is ε, in [0, 1/2). Pairs of weight 0 in `weight_B` are
  left out. log 2 where policy equals reference, as for `cdpo`. Melnyk et al. 2024.
  """
  difference_B = _sorted_differences(
    policy.chosen_B - policy.rejected_B, reference.chosen_B - reference.rejected_B, weight_B
  )
  return smoothed_sigmoid(beta * difference_B, label_smoothing)


@declare(
  reference=True,
  at_reference=math.log(2),
  batch_wide=True,
  ranges={"label_smoothing": "[0, 0.5)"},
)
def aot_unpaired(
  policy: PairLogps,
  reference: PairLogps,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  weight_B: Array | None = None,
) -> Array:
  """AOT for unpaired data: rewards of chosen completions should dominate those of rejected ones.

    loss = -(1-ε) log σ(βd) - ε log σ(-βd),   d = sort(c) - sort(r)

  c and r, the log-ratios of the chosen and rejected completions, are sorted over the global batch;
  an entry of `loss_B` belongs to the pair whose c has that rank. `label_smoothing` is ε, in
  [0, 1/2). Pairs of weight 0 in `weight_B` are left out. log 2 where policy equals reference.
  Melnyk et al. 2024.
  """
  return smoothed_sigmoid(
    beta * _sorted_differences(*log_ratios(policy, reference), weight_B), label_smoothing
  )


# --- losses of unpaired completions ---------------------------------------------------------------


def _kl_estimate(means: Mapping[str, Array]) -> Array:
  """Returns a batch's estimate of the KL divergence, which is never negative."""
  return jnp.maximum(means["kl"], 0.0)


def _by_label(label_B: Array, desirable: Array | float, undesirable: Array | float) -> Array:
  """Returns the first value for desirable completions and the second for undesirable ones: [B]."""
  return jnp.where(jnp.asarray(label_B) > 0.5, desirable, undesirable)


@declare(
  kind="unpaired",
  mismatched=True,
  reference=True,
  # While z0 is 0, as it is where policy and reference are equal.
  at_reference=lambda policy, label_B, desirable_weight, undesirable_weight: _by_label(
    label_B, desirable_weight / 2, undesirable_weight / 2
  ),
  batch_wide=True,
  ranges={"desirable_weight": "(0, inf)", "undesirable_weight": "(0, inf)"},
  # By default z0 is the batch's own estimate, and not a running mean.
  running=Running("kl", _kl_estimate, decay=0.0),
)
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
  """KTO: Kahneman and Tversky's value of a gain or a loss, relative to a reference point z0.

    loss = λ_D (1 - σ(β (a - z0))) if desirable, λ_U (1 - σ(β (z0 - a))) if not,
    a = log π(y)/π_ref(y),   z0 = max(0, mean of a over mismatched completions)

  Args:
    policy, reference: log-probs of the labelled and of the mismatched completions, in nats.
    beta: β, in reward units per nat.
    desirable_weight, undesirable_weight: λ_D and λ_U.
    label_B: 1 where the completion is desirable, 0 where it is not.
    weight_B: weights of the examples; they also weight the mean in z0. None means 1 for all.
    kl: z0 before the maximum with 0, in nats; None means the mean over the global batch.

  Returns:
    loss_B: one loss per completion; λ/2 where policy equals reference. z0 gets no gradient.

  Ethayarajh et al. 2024.
  """
  ratio_B = policy.completion_B - reference.completion_B
  if kl is None:
    assert policy.mismatched_B is not None and reference.mismatched_B is not None
    mismatched_ratio_B = policy.mismatched_B - reference.mismatched_B
    estimate = (
      mismatched_ratio_B.mean()
      if weight_B is None
      else (mismatched_ratio_B * weight_B).sum() / weight_B.sum()
    )
  else:
    estimate = kl
  # A KL divergence is never negative, but its estimate from few completions may be.
  z0 = jax.lax.stop_gradient(jnp.maximum(estimate, 0.0))
  # 1 - σ(v) is written σ(-v): exact where σ(v) is close to 1.
  desirable_B = desirable_weight * jax.nn.sigmoid(-beta * (ratio_B - z0))
  return _by_label(label_B, desirable_B, undesirable_weight * jax.nn.sigmoid(beta * (ratio_B - z0)))


def _retained(policy: UnpairedLogps) -> Array:
  """Computes -log π(y)/|y|, in nats per token: [B].

  Raises:
    ValueError: `policy` has no token counts.
  """
  if policy.tokens_B is None:
    raise ValueError("this loss averages over tokens; give UnpairedLogps the token counts")
  return -policy.completion_B / policy.tokens_B


@declare(
  kind="unpaired",
  reference=True,
  at_reference=lambda policy, label_B, beta, retain_weight: _by_label(
    label_B, retain_weight * _retained(policy), 2 * math.log(2) / beta
  ),
  averages=True,
  ranges={"retain_weight": "[0, inf)"},
)
def npo(
  policy: UnpairedLogps,
  reference: UnpairedLogps,
  *,
  beta: float = 0.1,
  retain_weight: float = 1.0,
  label_B: Array,
) -> Array:
  """NPO, for unlearning: DPO's loss of a rejected completion that has no chosen one.

    loss = -2/β log σ(-β log π(y)/π_ref(y)) if undesirable, -λ log π(y)/|y| if desirable

  Undesirable completions are to be forgotten: they lose probability, ever more slowly. As β goes to
  0 this is gradient ascent, which has no such brake. Desirable completions are to be kept: they are
  trained as in supervised training, with weight λ, `retain_weight`. The mean is over the
  completions of both kinds. 2 log 2/β for undesirable ones where policy equals reference.
  Zhang et al. 2024 (NPO, arXiv 2404.05868), eq. 3; with its term for retained data.
  """
  ratio_B = policy.completion_B - reference.completion_B
  forgotten_B = -2 / beta * jax.nn.log_sigmoid(-beta * ratio_B)
  return _by_label(label_B, retain_weight * _retained(policy), forgotten_B)


@declare(
  kind="unpaired",
  reference=False,
  averages=True,
  ranges={"gamma": "[0, inf)", "retain_weight": "[0, inf)"},
)
def simnpo(
  policy: UnpairedLogps,
  reference: UnpairedLogps | None = None,
  *,
  beta: float = 2.5,
  gamma: float = 0.0,
  retain_weight: float = 1.0,
  label_B: Array,
) -> Array:
  """SimNPO, for unlearning: NPO of average log-probs, without a reference.

    loss = -2/β log σ(-β log π(y)/|y| - γ) if undesirable, -λ log π(y)/|y| if desirable

  `gamma` is γ, in reward units; β is in reward units per (nat per token). Desirable completions are
  kept, as in `npo`. Fan et al. 2024 (SimNPO, arXiv 2410.07163).
  """
  del reference
  kept_B = _retained(policy)
  forgotten_B = -2 / beta * jax.nn.log_sigmoid(beta * kept_B - gamma)
  return _by_label(label_B, retain_weight * kept_B, forgotten_B)


# --- losses of several completions to a prompt ----------------------------------------------------


def _log_rankings(policy: RankedLogps, present_BK: Array | None) -> Array:
  """Computes log K! from the number K of completions that are present: [B]."""
  full = jnp.ones(jnp.shape(policy.completions_BK), bool)
  return jax.scipy.special.gammaln(1.0 + (full if present_BK is None else present_BK).sum(axis=1))


@declare(kind="ranked", reference=True, at_reference=_log_rankings)
def plackett_luce(
  policy: RankedLogps,
  reference: RankedLogps | None,
  *,
  beta: float = 0.1,
  present_BK: Array | None = None,
) -> Array:
  """DPO for rankings: minus the log-likelihood of the given order under Plackett-Luce.

    loss = -Σ_k [z_k - log Σ_{j>=k} exp z_j],   z = β log π(y)/π_ref(y), best first

  `beta` is β, in reward units per nat. `present_BK` is true for completions and false for the
  padding behind them; None means that all K are present. With two completions it equals `sigmoid`;
  log K! where policy equals reference. Rafailov et al. 2023, appendix A.3.
  """
  z_BK = beta * _ranked_ratios(policy, reference)
  if present_BK is None:
    present_BK = jnp.ones(z_BK.shape, bool)
  # -1e30, not -inf: exp of both is 0, but a log-sum-exp over padding alone would then be -inf, with
  # a nan gradient.
  z_BK = jnp.where(present_BK, z_BK, -1e30)
  # The k-th completion competes with those from k on, hence log-sum-exps from the end.
  remaining_BK = jax.lax.cumlogsumexp(z_BK, axis=1, reverse=True)
  return jnp.where(present_BK, remaining_BK - z_BK, 0.0).sum(axis=1)


@declare(
  kind="ranked",
  on_policy=True,
  reference=True,
  # It depends on rewards and log-probs, and nothing simpler than the loss gives it.
  at_reference=None,
)
def policy_gradient(
  policy: RankedLogps,
  reference: RankedLogps,
  *,
  beta: float = 0.1,
  reward_BK: Array,
  present_BK: Array | None = None,
) -> Array:
  """The assumed objective's policy gradient, with a leave-one-out baseline (RLOO).

    loss = -1/K Σ_k (R_k - mean_{j≠k} R_j) log π(y_k),   R = r - β log π(y)/π_ref(y)

  The completions must be samples of the current policy. The gradient of the loss is an unbiased
  estimate of the gradient of E[-r + β (log π - log π_ref)]; its value does not estimate the
  objective. R gets no gradient. `beta` is β, in reward units per nat; `reward_BK` is r, in reward
  units; `present_BK` is as in `plackett_luce`. Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
  """
  ratio_BK = _ranked_ratios(policy, reference)
  if present_BK is None:
    present_BK = jnp.ones(ratio_BK.shape, bool)
  return_BK = jnp.where(present_BK, reward_BK - beta * ratio_BK, 0.0)
  # Absent completions count neither in the sum nor in its divisor; 1 avoids 0 / 0 in empty rows.
  count_B1 = jnp.maximum(present_BK.sum(axis=1, keepdims=True), 1)
  # The mean of the others: at a single completion there is none, and its baseline is 0.
  baseline_BK = (return_BK.sum(axis=1, keepdims=True) - return_BK) / jnp.maximum(count_B1 - 1, 1)
  # Without stop_gradient, the log π inside R would add a second gradient.
  advantage_BK = jax.lax.stop_gradient(jnp.where(present_BK, return_BK - baseline_BK, 0.0))
  return -(advantage_BK * policy.completions_BK).sum(axis=1) / count_B1[:, 0]


@declare(
  kind="ranked",
  completions=3,
  reference=False,
  averages=True,
  likelihood=True,
  ranges={"gold_weight": "[0, inf)"},
)
def tpo(
  policy: RankedLogps,
  reference: RankedLogps | None = None,
  *,
  beta: float = 0.01,
  gold_weight: float = 1.0,
  present_BK: Array | None = None,
) -> Array:
  """TPO: a pair without a reference, and the likelihood of a third, better completion.

    loss = -log σ(β (log π(y_w) - log π(y_l))) - α log π(y_gold)/|y_gold|

  Of the ranked completions, the first is y_gold, the second y_w and the last that is present y_l; a
  prompt needs three. `gold_weight` is α; `present_BK` is as in `plackett_luce`.
  Saeidi et al. 2024 (TPO, arXiv 2405.16681), eq. 3, with the authors' mean over tokens.
  """
  del reference
  logps_BK = jnp.asarray(policy.completions_BK)
  if policy.tokens_BK is None:
    raise ValueError("this loss averages over tokens; give RankedLogps the token counts")
  if present_BK is None:
    present_BK = jnp.ones(logps_BK.shape, bool)
  # An empty row has none; any column will do for it, since its weight is 0.
  last_B1 = jnp.maximum(jnp.sum(present_BK, axis=1, keepdims=True) - 1, 0)
  rejected_B = jnp.take_along_axis(logps_BK, last_B1, axis=1)[:, 0]
  gold_B = logps_BK[:, 0] / policy.tokens_BK[:, 0]
  return -jax.nn.log_sigmoid(beta * (logps_BK[:, 1] - rejected_B)) - gold_weight * gold_B


def _ranked_ratios(policy: RankedLogps, reference: RankedLogps | None) -> Array:
  """Computes log π/π_ref of every completion, in nats: [B, K]."""
  if reference is None:
    return jnp.asarray(policy.completions_BK)
  return policy.completions_BK - reference.completions_BK
