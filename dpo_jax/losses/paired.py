"""Losses of one pair; most compare chosen with rejected completion, and policy with reference.

The docstrings use these symbols:

  y_w, y_l   the chosen and the rejected completion of prompt x; |y| is the number of scored tokens
             of y, or the sum of their weights
  c          log π(y_w|x)/π_ref(y_w|x), the log-ratio of the chosen completion, in nats
  r          log π(y_l|x)/π_ref(y_l|x), the log-ratio of the rejected completion, in nats
  m = c - r  the margin, in nats
  z = βm     the margin of implicit rewards, in reward units
  β          reward units per nat; a larger β keeps the policy nearer the reference

Here r is a log-ratio; in `derivation` and the README r(x,y) is the reward.

Log-probabilities are summed over completion tokens. Every function takes the `PairLogps` of policy
and reference, arrays [B], and returns loss_B, one loss per pair; the caller takes the mean. A
reference of None counts as log-probs of zero, so that c and r are log-probs of the policy alone.
All losses and their gradients are finite in float32 at log-probs of ±1e4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_jax.losses.declaration import Running, declare
from dpo_jax.losses.ratios import (
  log_ratios,
  margins,
  mean_ratios,
  smoothed_sigmoid,
  tangent_exp,
)
from dpo_jax.structs import Array, PairLogps

# --- losses of the margin alone -------------------------------------------------------------------


@declare(reference=True, at_reference=math.log(2), margin=True, aliases=("dpo",))
def sigmoid(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """DPO: minus the log-likelihood of the label under Bradley-Terry.

    loss = -log σ(β m),   m = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)

  Args:
    policy: completion log-probs under the policy being trained, summed, in nats.
    reference: completion log-probs under the frozen reference, summed, in nats.
    beta: β, in reward units per nat; a larger β keeps the policy nearer the reference.

  Returns:
    loss_B: one loss per pair; the caller takes the mean. It is log 2 where policy equals reference.

  Rafailov et al. 2023, eq. 7.
  """
  # log_sigmoid, not log(sigmoid): finite, with a gradient, at margins of -1000.
  return -jax.nn.log_sigmoid(beta * margins(policy, reference))


@declare(
  reference=True,
  at_reference=math.log(2),
  margin=True,
  ranges={"label_smoothing": "[0, 0.5)"},
)
def cdpo(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.1,
) -> Array:
  """Conservative DPO: cross-entropy against labels that are wrong with probability ε.

    loss = -(1-ε) log σ(z) - ε log σ(-z)

  The minimum is at the finite margin m = log((1-ε)/ε)/β. `label_smoothing` is ε, in [0, 1/2).
  log 2 where policy equals reference.
  Mitchell 2023, "A note on DPO with noisy preferences", eq. 4.
  """
  return smoothed_sigmoid(beta * margins(policy, reference), label_smoothing)


@declare(
  reference=True,
  at_reference=math.log(2),
  margin=True,
  ranges={"label_smoothing": "[0, 0.5)"},
)
def robust(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.1,
) -> Array:
  """Robust DPO: an unbiased estimate of DPO's loss on correct labels when a share ε is flipped.

    loss = (-(1-ε) log σ(z) + ε log σ(-z)) / (1-2ε)

  `label_smoothing` is ε, in [0, 1/2). The loss of a single pair has no lower bound: it falls
  without end as z grows. log 2 where policy equals reference. Chowdhury et al. 2024, eq. 12.
  """
  # The expectation of this difference, over whether the label was flipped, is 1-2ε times the loss
  # on the correct label.
  z_B = beta * margins(policy, reference)
  clean_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(z_B)
  return (clean_B + label_smoothing * jax.nn.log_sigmoid(-z_B)) / (1 - 2 * label_smoothing)


@declare(
  reference=True,
  at_reference=lambda policy, beta: 1 / (4 * beta**2),
  uniform_reference=True,
)
def ipo(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """IPO: the squared distance of the margin, in nats, from 1/(2β).

    loss = (m - 1/(2β))²

  β is the paper's τ. Log-probs are summed over tokens, not averaged (`ipo_mean` averages).
  1/(4β²) where policy equals reference. Azar et al. 2023, eq. 17.
  """
  return jnp.square(margins(policy, reference) - 1 / (2 * beta))


@declare(reference=True, at_reference=1.0, margin=True)
def hinge(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """The hinge loss of SLiC, applied to DPO's margin.

    loss = max(0, 1 - z)

  1 where policy equals reference. Zhao et al. 2023, eq. 1, in the form of Liu et al. 2023, eq. 9.
  """
  # jax's relu has gradient 0 at the kink itself.
  return jax.nn.relu(1 - beta * margins(policy, reference))


@declare(
  reference=True,
  at_reference=lambda policy, label_smoothing: (
    -math.log(2) - jnp.log(label_smoothing * (1 - label_smoothing)) / 2
  ),
  margin=True,
  ranges={"label_smoothing": "(0, 0.5)"},  # the loss takes its logarithm
)
def exo_pair(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 1e-3,
) -> Array:
  """EXO for pairs: the reverse KL divergence, from the policy's preference to the smoothed label.

    loss = σ(z) (log σ(z) - log(1-ε)) + σ(-z) (log σ(-z) - log ε)

  `label_smoothing` is ε, in (0, 1/2); at 0 the loss would be infinite.
  -log 2 - (log ε + log(1-ε))/2 where policy equals reference. Ji et al. 2024 (EXO).
  """
  z_B = beta * margins(policy, reference)
  # log1p keeps the digits of log(1-ε) at small ε, such as the default 1e-3.
  log_1_e, log_e = jnp.log1p(-label_smoothing), jnp.log(label_smoothing)
  won_B = jax.nn.sigmoid(z_B) * (jax.nn.log_sigmoid(z_B) - log_1_e)
  return won_B + jax.nn.sigmoid(-z_B) * (jax.nn.log_sigmoid(-z_B) - log_e)


@declare(
  reference=True,
  at_reference=(math.log(2) + 1) / 2,
  margin=True,
  # With τ > 1, e^-z g grows without bound below z = 0.
  ranges={"tau": "(0, 1]"},
)
def discopop(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, tau: float = 0.05
) -> Array:
  """DiscoPOP: a mixture of the logistic and the exponential loss, weighted by the log-ratio.

    loss = -log σ(z) (1-g) + exp(-z) g,   g = σ(z/τ)

  `tau` is τ, in (0, 1]. (log 2 + 1)/2 where policy equals reference. Lu et al. 2024.
  """
  z_B = beta * margins(policy, reference)
  logistic_B = -jax.nn.log_sigmoid(z_B) * jax.nn.sigmoid(-z_B / tau)
  # exp(-z) alone overflows at large negative z; its product with g, formed in logarithms, does not.
  return logistic_B + jnp.exp(jax.nn.log_sigmoid(z_B / tau) - z_B)


@declare(
  reference=True,
  at_reference=lambda policy, margin_scale, margin_B: jax.nn.softplus(margin_scale * margin_B),
  margin=True,
  ranges={"margin_scale": "[0, inf)"},
)
def odpo(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  margin_scale: float = 1.0,
  margin_B: Array | float = 0.0,
) -> Array:
  """ODPO: DPO that requires a larger margin where the chosen completion is better by more.

    loss = -log σ(z - αΔ)

  `margin_B` is Δ >= 0, the score of the chosen completion minus that of the rejected one, in the
  scorer's units. `margin_scale` is α, reward units per unit of score.
  log(1 + exp(αΔ)) where policy equals reference. Amini et al. 2024.
  """
  # Δ is in units of score, so β must not scale it: it is subtracted after β m is formed.
  return -jax.nn.log_sigmoid(beta * margins(policy, reference) - margin_scale * margin_B)


def _rpo_at_reference(policy: PairLogps, margin_scale: float, distance: str, margin_B: Array):
  """Computes the distance of a margin of 0 from ηΔ."""
  del policy
  target_B = margin_scale * jnp.asarray(margin_B)
  if distance == "squared":
    return jnp.square(target_B)
  # softplus(x) + softplus(-x) is -log σ(x) - log σ(-x), twice the cross-entropy of ½ against σ(x).
  both_B = jax.nn.softplus(target_B) + jax.nn.softplus(-target_B)
  if distance == "forward_kl":
    return both_B / 2 - math.log(2)
  # log 2 - H(σ(x)), with the entropy H(σ(x)) = softplus(x) - x σ(x).
  return math.log(2) - jax.nn.softplus(target_B) + target_B * jax.nn.sigmoid(target_B)


@declare(
  reference=True,
  at_reference=_rpo_at_reference,
  margin=True,
  ranges={
    "margin_scale": "[0, inf)",
    "distance": ("squared", "backward_kl", "forward_kl"),
  },
)
def rpo(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  margin_scale: float = 1.0,
  distance: str = "backward_kl",
  margin_B: Array | float = 0.0,
) -> Array:
  """Reward-aware preference optimization: the margin of rewards should equal the gap of scores.

    squared        loss = (z - ηΔ)²
    backward_kl    loss = KL(σ(ηΔ) ‖ σ(z))
    forward_kl     loss = KL(σ(z) ‖ σ(ηΔ)),   KL(p ‖ q) = p log p/q + (1-p) log (1-p)/(1-q)

  All are 0 at z = ηΔ. `margin_B` is Δ, the score of the chosen completion minus that of the
  rejected one, in the scorer's units; it may be negative. `margin_scale` is η, reward units per
  unit of score. Sun et al. 2025 (RPO, arXiv 2502.00203), as in the authors' NeMo-Aligner.
  """
  z_B = jnp.asarray(beta * margins(policy, reference))
  target_B = margin_scale * jnp.asarray(margin_B, z_B.dtype)
  if distance == "squared":
    return jnp.square(z_B - target_B)
  first_B, second_B = (target_B, z_B) if distance == "backward_kl" else (z_B, target_B)
  return _bernoulli_kl(first_B, second_B)


def _bernoulli_kl(a_B: Array, b_B: Array) -> Array:
  """Computes KL(p ‖ q) = p log p/q + (1-p) log (1-p)/(1-q) with p = σ(a) and q = σ(b): [B]."""
  # Both signs may be changed. With a <= 0 no large numbers are subtracted where the KL is small.
  sign_B = jnp.where(a_B > 0, -1, 1)
  a_B, b_B = sign_B * a_B, sign_B * b_B
  return jax.nn.sigmoid(a_B) * (a_B - b_B) + jax.nn.softplus(b_B) - jax.nn.softplus(a_B)


# --- losses of both log-ratios --------------------------------------------------------------------


@declare(reference=True, at_reference=2 * math.log(2))
def nca_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """NCA for pairs: it raises the likelihood of the chosen completion, not only the margin.

    loss = -log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)

  2 log 2 where policy equals reference. Chen et al. 2024 (NCA), with two completions.
  """
  c_B, r_B = log_ratios(policy, reference)
  # These terms lower both log-ratios, with half the weight of the term that raises c.
  pushed_B = jax.nn.log_sigmoid(-beta * c_B) + jax.nn.log_sigmoid(-beta * r_B)
  return -jax.nn.log_sigmoid(beta * c_B) - 0.5 * pushed_B


def _mean_reward(means: Mapping[str, Array]) -> Array:
  """Returns the mean reward of both completions of a batch."""
  return (means["rewards/chosen"] + means["rewards/rejected"]) / 2


@declare(
  reference=True,
  at_reference=lambda policy, delta: jax.nn.softplus(delta) + jax.nn.softplus(-delta),
  running=Running("delta", _mean_reward, decay=0.9),
)
def bco_pair(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  delta: Array | float = 0.0,
) -> Array:
  """BCO on pairs: a binary classifier whose logit is the reward minus its running mean.

    loss = -log σ(βc - δ) - log σ(-(βr - δ))

  `delta` is δ, in reward units: during training, the running mean of the rewards of earlier
  batches. It gets no gradient. 2 log 2 where policy equals reference and δ is 0. Jung et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  # A gradient through δ would move the threshold instead of the rewards.
  delta = jax.lax.stop_gradient(delta)
  return -jax.nn.log_sigmoid(beta * c_B - delta) - jax.nn.log_sigmoid(delta - beta * r_B)


@declare(reference=True, at_reference=lambda policy, beta: 1 / (2 * beta**2))
def sppo_hard(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """SPPO with hard labels: the squared distances of c and r, in nats, from 1/(2β) and -1/(2β).

    loss = (c - 1/(2β))² + (r + 1/(2β))²

  1/(2β²) where policy equals reference. Wu et al. 2024, with win rates 1 and 0.
  """
  c_B, r_B = log_ratios(policy, reference)
  return jnp.square(c_B - 0.5 / beta) + jnp.square(r_B + 0.5 / beta)


@declare(reference=True, at_reference=1.0)
def apo_zero(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """APO-zero: it raises chosen completions and lowers rejected ones.

    loss = 1 - σ(βc) + σ(βr)

  It suits data whose chosen completions are better than the policy's own.
  1 where policy equals reference. D'Oosterlinck et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return 1 - jax.nn.sigmoid(beta * c_B) + jax.nn.sigmoid(beta * r_B)


@declare(reference=True, at_reference=1.0)
def apo_down(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """APO-down: it lowers both completions, the rejected one further.

    loss = σ(βc) + 1 - σ(z)

  It suits data whose chosen completions are worse than the policy's own.
  1 where policy equals reference. D'Oosterlinck et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return jax.nn.sigmoid(beta * c_B) + 1 - jax.nn.sigmoid(beta * (c_B - r_B))


@declare(reference=True, at_reference=math.log(2), ranges={"penalty": "[0, inf)"})
def dpop(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, penalty: float = 50.0
) -> Array:
  """DPO-Positive: DPO with a penalty where the chosen completion falls below the reference.

    loss = -log σ(β (m - λ max(0, -c)))

  `penalty` is λ >= 0. log 2 where policy equals reference. Pal et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  # relu has gradient 0 at 0: where policy equals reference, c = 0 and the penalty has no effect.
  return -jax.nn.log_sigmoid(beta * (c_B - r_B - penalty * jax.nn.relu(-c_B)))


@declare(reference=True, at_reference=math.log(2), ranges={"clip": "(0, inf)"})
def chi_po(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, clip: float = 10.0
) -> Array:
  """χPO: DPO with the sum of the KL and the χ² divergence.

    loss = -log σ(clip(β (φ(c) - φ(r)))),   φ(u) = e^u + u

  The χ² divergence penalizes completions that the policy generates far more often than π_ref.
  `clip` > 0 bounds the difference of rewards on both sides (the paper's 2 R_max), in reward units;
  beyond it the gradient is 0. log 2 where policy equals reference.
  Huang et al. 2024, algorithm 1.
  """
  c_B, r_B = log_ratios(policy, reference)
  # The log-ratios and the exponentials are subtracted separately: where e^c is large, the sum
  # e^c + c would round c away.
  gap_B = (c_B - r_B) + (tangent_exp(c_B) - tangent_exp(r_B))
  return -jax.nn.log_sigmoid(jnp.clip(beta * gap_B, -clip, clip))


@declare(reference=True, at_reference=math.log(2), ranges={"mix": "(0, 1]"})
def bdpo(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, mix: float = 0.5
) -> Array:
  """Bounded DPO: the rejected completion is compared under a mixture of policy and reference.

    loss = -log σ(β (c - log(λ e^r + 1 - λ)))

  λ e^r + 1 - λ is π_mix(y_l)/π_ref(y_l) with π_mix = λ π + (1-λ) π_ref. It is never below 1 - λ, so
  that lowering the rejected completion gains less and less, and the chosen one must rise. `mix` is
  λ, in (0, 1]; 1 is DPO. log 2 where policy equals reference.
  Cho et al. 2025 (BDPO, arXiv 2506.12725), which finds λ = ½ best.
  """
  c_B, r_B = log_ratios(policy, reference)
  # logaddexp, since e^r alone overflows.
  bounded_B = jnp.logaddexp(jnp.log(mix) + r_B, jnp.log1p(-mix))
  return -jax.nn.log_sigmoid(beta * (c_B - bounded_B))


# --- losses of averages over tokens ---------------------------------------------------------------


@declare(
  reference=True,
  at_reference=lambda policy, beta: 1 / (4 * beta**2),
  averages=True,
  uniform_reference=True,
)
def ipo_mean(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """IPO with log-probs averaged over tokens, the form that TRL and others call ipo.

    loss = (c/|y_w| - r/|y_l| - 1/(2β))²

  β is in reward units per (nat per token) here. 1/(4β²) where policy equals reference.
  Azar et al. 2023, eq. 17, with log-probs averaged.
  """
  c_B, r_B = mean_ratios(policy, reference)
  return jnp.square(c_B - r_B - 1 / (2 * beta))


@declare(reference=True, at_reference=math.log(2), averages=True, uniform_reference=True)
def sigmoid_norm(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """Length-normalized DPO: DPO with log-probs averaged over tokens.

    loss = -log σ(β (c/|y_w| - r/|y_l|))

  β is in reward units per (nat per token) here; 5 or more is usual. log 2 where policy equals
  reference.
  Lambert et al. 2024 (Tülu 3).
  """
  c_B, r_B = mean_ratios(policy, reference)
  return -jax.nn.log_sigmoid(beta * (c_B - r_B))
