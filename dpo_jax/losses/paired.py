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

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, Array]:
  """Computes the log-ratios c and r, in nats: [B] each."""
  if reference is None:
    return jnp.asarray(policy.chosen_B), jnp.asarray(policy.rejected_B)
  return policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B


def margins(policy: PairLogps, reference: PairLogps | None) -> Array:
  """Computes the margin m = c - r, in nats: [B]."""
  # The order is important: 1. policy minus reference, 2. chosen minus rejected. Policy and
  # reference are close, so the first difference is exact in floating point. Chosen minus rejected
  # may be hundreds of nats; computed first, it would round away digits that the margin needs.
  c_B, r_B = log_ratios(policy, reference)
  return c_B - r_B


def mean_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, Array]:
  """Computes c/|y_w| and r/|y_l|, in nats per token: [B] each.

  Raises:
    ValueError: `policy` has no token counts.
  """
  if policy.chosen_tokens_B is None or policy.rejected_tokens_B is None:
    raise ValueError("this loss averages over tokens; give PairLogps both token counts")
  c_B, r_B = log_ratios(policy, reference)
  return c_B / policy.chosen_tokens_B, r_B / policy.rejected_tokens_B


# --- losses of the margin alone -------------------------------------------------------------------


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


def smoothed_sigmoid(z_B: Array, epsilon: float) -> Array:
  """Computes the cross-entropy of σ(z) against labels that are wrong with probability ε: [B]."""
  return -(1 - epsilon) * jax.nn.log_sigmoid(z_B) - epsilon * jax.nn.log_sigmoid(-z_B)


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


def ipo(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """IPO: the squared distance of the margin, in nats, from 1/(2β).

    loss = (m - 1/(2β))²

  β is the paper's τ. Log-probs are summed over tokens, not averaged (`ipo_mean` averages).
  1/(4β²) where policy equals reference. Azar et al. 2023, eq. 17.
  """
  return jnp.square(margins(policy, reference) - 1 / (2 * beta))


def hinge(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """The hinge loss of SLiC, applied to DPO's margin.

    loss = max(0, 1 - z)

  1 where policy equals reference. Zhao et al. 2023, eq. 1, in the form of Liu et al. 2023, eq. 9.
  """
  # jax's relu has gradient 0 at the kink itself.
  return jax.nn.relu(1 - beta * margins(policy, reference))


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


# --- losses of both log-ratios --------------------------------------------------------------------


def nca_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """NCA for pairs: it raises the likelihood of the chosen completion, not only the margin.

    loss = -log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)

  2 log 2 where policy equals reference. Chen et al. 2024 (NCA), with two completions.
  """
  c_B, r_B = log_ratios(policy, reference)
  # These terms lower both log-ratios, with half the weight of the term that raises c.
  pushed_B = jax.nn.log_sigmoid(-beta * c_B) + jax.nn.log_sigmoid(-beta * r_B)
  return -jax.nn.log_sigmoid(beta * c_B) - 0.5 * pushed_B


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


def sppo_hard(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """SPPO with hard labels: the squared distances of c and r, in nats, from 1/(2β) and -1/(2β).

    loss = (c - 1/(2β))² + (r + 1/(2β))²

  1/(2β²) where policy equals reference. Wu et al. 2024, with win rates 1 and 0.
  """
  c_B, r_B = log_ratios(policy, reference)
  return jnp.square(c_B - 0.5 / beta) + jnp.square(r_B + 0.5 / beta)


def apo_zero(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """APO-zero: it raises chosen completions and lowers rejected ones.

    loss = 1 - σ(βc) + σ(βr)

  It suits data whose chosen completions are better than the policy's own.
  1 where policy equals reference. D'Oosterlinck et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return 1 - jax.nn.sigmoid(beta * c_B) + jax.nn.sigmoid(beta * r_B)


def apo_down(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """APO-down: it lowers both completions, the rejected one further.

    loss = σ(βc) + 1 - σ(z)

  It suits data whose chosen completions are worse than the policy's own.
  1 where policy equals reference. D'Oosterlinck et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return jax.nn.sigmoid(beta * c_B) + 1 - jax.nn.sigmoid(beta * (c_B - r_B))


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


# Nats above which `tangent_exp` is linear. exp(20) is 5e8, so that its products stay well within
# float32.
EXP_CAP = 20.0


def tangent_exp(u: Array) -> Array:
  """Computes exp(u), continued by its tangent above `EXP_CAP`.

  It is finite and increasing everywhere, and its gradient is never 0 in that region, unlike that of
  a clipped exponential.
  """
  # The minimum keeps inf out of both value and gradient: exp sees at most the cap. Above it, the
  # factor 1 + u - low is the tangent.
  low = jnp.minimum(u, EXP_CAP)
  return jnp.exp(low) * (1 + u - low)


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


# --- losses of averages over tokens ---------------------------------------------------------------


def ipo_mean(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """IPO with log-probs averaged over tokens, the form that TRL and others call ipo.

    loss = (c/|y_w| - r/|y_l| - 1/(2β))²

  β is in reward units per (nat per token) here. 1/(4β²) where policy equals reference.
  Azar et al. 2023, eq. 17, with log-probs averaged.
  """
  c_B, r_B = mean_ratios(policy, reference)
  return jnp.square(c_B - r_B - 1 / (2 * beta))


def sigmoid_norm(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """Length-normalized DPO: DPO with log-probs averaged over tokens.

    loss = -log σ(β (c/|y_w| - r/|y_l|))

  β is in reward units per (nat per token) here; 5 or more is usual. log 2 where policy equals
  reference.
  Lambert et al. 2024 (Tülu 3).
  """
  c_B, r_B = mean_ratios(policy, reference)
  return -jax.nn.log_sigmoid(beta * (c_B - r_B))


# --- losses without a reference -------------------------------------------------------------------


def simpo(
  policy: PairLogps,
  reference: PairLogps | None = None,
  *,
  beta: float = 2.0,
  gamma: float = 1.0,
) -> Array:
  """SimPO: DPO whose reward is the average log-prob of a completion; it needs no reference.

    loss = -log σ(β (log π(y_w)/|y_w| - log π(y_l)/|y_l|) - γ)

  `gamma` is the target margin γ, in reward units; β is in reward units per (nat per token).
  Meng et al. 2024, eq. 6.
  """
  # `reference` is accepted and ignored, here and below, so that all losses have one signature.
  del reference
  c_B, r_B = mean_ratios(policy, None)
  return -jax.nn.log_sigmoid(beta * (c_B - r_B) - gamma)


def cpo(
  policy: PairLogps,
  reference: PairLogps | None = None,
  *,
  beta: float = 0.1,
  sft_weight: float = 1.0,
) -> Array:
  """CPO: DPO with a uniform reference, plus the negative log-likelihood of the chosen completion.

    loss = -log σ(β (log π(y_w) - log π(y_l))) - λ log π(y_w)

  `sft_weight` is λ; it multiplies the log-prob summed over tokens. Xu et al. 2024 (λ = 1).
  """
  del reference
  # A sum over tokens, unlike `sft_mean`: the paper's likelihood term is not averaged.
  return -jax.nn.log_sigmoid(beta * margins(policy, None)) - sft_weight * policy.chosen_B


def orpo(
  policy: PairLogps, reference: PairLogps | None = None, *, odds_weight: float = 0.1
) -> Array:
  """ORPO: the supervised loss plus a loss of the log odds ratio; it needs no reference.

    loss = -log p_w - λ log σ(log p_w/(1-p_w) - log p_l/(1-p_l)),   p = π(y)^(1/|y|)

  `odds_weight` is λ. Hong et al. 2024, eq. 6 and 7.
  """
  del reference
  won_B, lost_B = mean_ratios(policy, None)
  return -won_B - odds_weight * jax.nn.log_sigmoid(_log_odds(won_B) - _log_odds(lost_B))


def _log_odds(log_p: Array) -> Array:
  """Computes log p/(1-p) from log p, with p limited to exp(-1e-6): the odds of 1 are infinite."""
  # The limit also cuts the gradient of a completion that is certain, which would be infinite.
  log_p = jnp.minimum(log_p, -1e-6)
  # expm1 keeps the digits of 1 - p where p is close to 1.
  return log_p - jnp.log(-jnp.expm1(log_p))


def sft(policy: PairLogps, reference: PairLogps | None = None) -> Array:
  """The negative log-likelihood of the chosen completion, for supervised fine-tuning.

    loss = -log π(y_w|x)

  The unit is nats per completion. The training step divides the sum over completions by the tokens
  of the global batch, so that every token counts the same. `reference` is ignored.
  """
  del reference
  return -policy.chosen_B


def sft_mean(policy: PairLogps, reference: PairLogps | None = None) -> Array:
  """The supervised term that is added to a paired loss.

    loss = -log π(y_w|x)/|y_w|

  The unit is nats per token. `reference` is ignored.
  Pang et al. 2024 (RPO); Wang et al. 2024 (MPO).
  """
  del reference
  return -mean_ratios(policy, None)[0]
