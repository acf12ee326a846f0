"""Losses of a pair: chosen against rejected, policy against reference, one number a pair.

With c = log π(y_w|x)/π_ref(y_w|x), r the same of y_l, m = c - r and z = βm, all in nats and summed
over answer tokens. Every function takes `PairLogps` of policy and reference, [B] arrays, and
returns loss_B; the caller takes the mean. β is reward units per nat; larger holds the policy nearer
the reference. A reference of None counts as log-probs of zero: the loss of the policy alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, Array]:
  """c and r, nats: [B] each."""
  if reference is None:
    return jnp.asarray(policy.chosen_B), jnp.asarray(policy.rejected_B)
  return policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B


def margins(policy: PairLogps, reference: PairLogps | None) -> Array:
  """m: how much more than the reference the policy prefers chosen to rejected, nats: [B].

  Policy is compared with reference within an answer first: the two are close, so their difference
  is exact where the difference between answers would have rounded it away.
  """
  c_B, r_B = log_ratios(policy, reference)
  return c_B - r_B


def mean_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, Array]:
  """c/|y_w| and r/|y_l|, nats a token: [B] each.

  Raises:
    ValueError: the policy's token counts are not given.
  """
  if policy.chosen_tokens_B is None or policy.rejected_tokens_B is None:
    raise ValueError("this loss averages over tokens; give PairLogps both token counts")
  c_B, r_B = log_ratios(policy, reference)
  return c_B / policy.chosen_tokens_B, r_B / policy.rejected_tokens_B


# --- of the margin alone --------------------------------------------------------------------------


def sigmoid(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """DPO: minus the log-likelihood of the label under Bradley-Terry.

    loss = -log σ(β m),   m = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)

  Args:
    policy: completion log-probs under the policy being trained, summed, in nats.
    reference: the same under the frozen reference.
    beta: reward units per nat; larger holds the policy nearer the reference.

  Returns:
    loss_B: one loss a pair; the caller takes the mean. log 2 where policy equals reference.

  Rafailov et al. 2023, eq. 7.
  """
  # log_sigmoid, not log(sigmoid): finite, with a gradient, at margins of -1000.
  return -jax.nn.log_sigmoid(beta * margins(policy, reference))


def smoothed_sigmoid(z_B: Array, epsilon: float) -> Array:
  """Cross-entropy of σ(z) against labels that are wrong with probability ε."""
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

  The margin is drawn to the finite log((1-ε)/ε)/β. `label_smoothing` is ε, in [0, 1/2). log 2 at
  the reference. Mitchell 2023, "A note on DPO with noisy preferences", eq. 4.
  """
  return smoothed_sigmoid(beta * margins(policy, reference), label_smoothing)


def robust(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.1,
) -> Array:
  """Robust DPO: unbiased for the loss on clean labels when a share ε of them was flipped.

    loss = (-(1-ε) log σ(z) + ε log σ(-z)) / (1-2ε)

  Unbounded below on a single pair; log 2 where policy equals reference. `label_smoothing` is ε, in
  [0, 1/2). Chowdhury et al. 2024, eq. 12.
  """
  z_B = beta * margins(policy, reference)
  clean_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(z_B)
  return (clean_B + label_smoothing * jax.nn.log_sigmoid(-z_B)) / (1 - 2 * label_smoothing)


def ipo(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """IPO: the margin itself, in nats, is regressed onto 1/(2β).

    loss = (m - 1/(2β))²

  β is the paper's τ; sums over tokens, not averages. 1/(4β²) where policy equals reference.
  Azar et al. 2023, eq. 17.
  """
  return jnp.square(margins(policy, reference) - 1 / (2 * beta))


def hinge(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """SLiC's hinge on DPO's margin.

    loss = max(0, 1 - z)

  One where policy equals reference. Zhao et al. 2023, eq. 1, in the form of Liu et al. 2023, eq. 9.
  """
  return jax.nn.relu(1 - beta * margins(policy, reference))


def exo_pair(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 1e-3,
) -> Array:
  """EXO for pairs: the reverse KL from the policy's preference to the smoothed label.

    loss = σ(z) (log σ(z) - log(1-ε)) + σ(-z) (log σ(-z) - log ε)

  `label_smoothing` is ε, in (0, 1/2): with 0 the loss would be infinite. -log 2 - (log ε +
  log(1-ε))/2 where policy equals reference. Ji et al. 2024 (EXO).
  """
  z_B = beta * margins(policy, reference)
  log_1_e, log_e = jnp.log1p(-label_smoothing), jnp.log(label_smoothing)
  won_B = jax.nn.sigmoid(z_B) * (jax.nn.log_sigmoid(z_B) - log_1_e)
  return won_B + jax.nn.sigmoid(-z_B) * (jax.nn.log_sigmoid(-z_B) - log_e)


def discopop(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, tau: float = 0.05
) -> Array:
  """DiscoPOP: the log-ratio modulated mixture of logistic and exponential loss.

    loss = -log σ(z) (1-g) + exp(-z) g,   g = σ(z/τ)

  `tau` is τ, in (0, 1]. (log 2 + 1)/2 where policy equals reference. Lu et al. 2024.
  """
  z_B = beta * margins(policy, reference)
  logistic_B = -jax.nn.log_sigmoid(z_B) * jax.nn.sigmoid(-z_B / tau)
  # exp(-z) alone overflows; its product with g does not.
  return logistic_B + jnp.exp(jax.nn.log_sigmoid(z_B / tau) - z_B)


def odpo(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  margin_scale: float = 1.0,
  margin_B: Array | float = 0.0,
) -> Array:
  """DPO with an offset: better by more must be told apart by more.

    loss = -log σ(z - αΔ)

  `margin_B` is Δ >= 0, how much better the chosen answer was scored, in the scorer's units;
  `margin_scale` is α. log(1 + exp(αΔ)) where policy equals reference. Amini et al. 2024.
  """
  return -jax.nn.log_sigmoid(beta * margins(policy, reference) - margin_scale * margin_B)


# --- of both log-ratios ---------------------------------------------------------------------------


def nca_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """NCA for pairs: raises the chosen answer's own likelihood, not its lead alone.

    loss = -log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)

  2 log 2 where policy equals reference. Chen et al. 2024 (NCA), with two answers.
  """
  c_B, r_B = log_ratios(policy, reference)
  pushed_B = jax.nn.log_sigmoid(-beta * c_B) + jax.nn.log_sigmoid(-beta * r_B)
  return -jax.nn.log_sigmoid(beta * c_B) - 0.5 * pushed_B


def bco_pair(
  policy: PairLogps,
  reference: PairLogps | None,
  *,
  beta: float = 0.1,
  delta: Array | float = 0.0,
) -> Array:
  """BCO on pairs: a binary classifier whose logit is the reward less its running mean.

    loss = -log σ(βc - δ) - log σ(-(βr - δ))

  `delta` is δ, reward units: in training the running mean of the rewards of earlier batches, which
  gets no gradient. 2 log 2 where policy equals reference and δ is 0. Jung et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  delta = jax.lax.stop_gradient(delta)
  return -jax.nn.log_sigmoid(beta * c_B - delta) - jax.nn.log_sigmoid(delta - beta * r_B)


def sppo_hard(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """SPPO with hard labels: both log-ratios, in nats, are regressed onto ±1/(2β).

    loss = (c - 1/(2β))² + (r + 1/(2β))²

  1/(2β²) where policy equals reference. Wu et al. 2024, with win rates 1 and 0.
  """
  c_B, r_B = log_ratios(policy, reference)
  return jnp.square(c_B - 0.5 / beta) + jnp.square(r_B + 0.5 / beta)


def apo_zero(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """APO-zero: chosen answers up, rejected ones down; for chosen better than the policy's own.

    loss = 1 - σ(βc) + σ(βr)

  One where policy equals reference. D'Oosterlinck et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return 1 - jax.nn.sigmoid(beta * c_B) + jax.nn.sigmoid(beta * r_B)


def apo_down(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """APO-down: both down, rejected ones further; for chosen worse than the policy's own.

    loss = σ(βc) + 1 - σ(z)

  One where policy equals reference. D'Oosterlinck et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return jax.nn.sigmoid(beta * c_B) + 1 - jax.nn.sigmoid(beta * (c_B - r_B))


def dpop(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, penalty: float = 50.0
) -> Array:
  """DPO-Positive: a chosen answer that falls below the reference costs extra.

    loss = -log σ(β (m - λ max(0, -c)))

  `penalty` is λ >= 0. log 2 where policy equals reference. Pal et al. 2024.
  """
  c_B, r_B = log_ratios(policy, reference)
  return -jax.nn.log_sigmoid(beta * (c_B - r_B - penalty * jax.nn.relu(-c_B)))


CAP = 20.0


def tangent_exp(u: Array) -> Array:
  """exp(u), continued by its tangent above `CAP`: finite, rising, with a gradient, everywhere."""
  low = jnp.minimum(u, CAP)
  return jnp.exp(low) * (1 + u - low)


def chi_po(
  policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, clip: float = 10.0
) -> Array:
  """χPO: DPO with the link of KL mixed with χ², which holds back from answers hardly covered.

    loss = -log σ(clip(β (φ(c) - φ(r)))),   φ(u) = e^u + u

  `clip` > 0 bounds the difference of rewards from either side (the paper's 2 R_max); beyond it
  there is no gradient. log 2 where policy equals reference. Huang et al. 2024, algorithm 1.
  """
  c_B, r_B = log_ratios(policy, reference)
  # m apart from the exponentials: exact where they are large and close.
  gap_B = (c_B - r_B) + (tangent_exp(c_B) - tangent_exp(r_B))
  return -jax.nn.log_sigmoid(jnp.clip(beta * gap_B, -clip, clip))


# --- averaged over tokens -------------------------------------------------------------------------


def ipo_mean(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """IPO on averages over tokens: the form that several systems call ipo.

    loss = (c/|y_w| - r/|y_l| - 1/(2β))²

  β is per nat a token here. 1/(4β²) where policy equals reference. Azar et al. 2023, eq. 17, with
  log-probs averaged.
  """
  c_B, r_B = mean_ratios(policy, reference)
  return jnp.square(c_B - r_B - 1 / (2 * beta))


def sigmoid_norm(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> Array:
  """Length-normalised DPO.

    loss = -log σ(β (c/|y_w| - r/|y_l|))

  β is per nat a token here: 5 and more are usual. log 2 where policy equals reference.
  Lambert et al. 2024 (Tülu 3).
  """
  c_B, r_B = mean_ratios(policy, reference)
  return -jax.nn.log_sigmoid(beta * (c_B - r_B))


# --- without a reference --------------------------------------------------------------------------


def simpo(
  policy: PairLogps,
  reference: PairLogps | None = None,
  *,
  beta: float = 2.0,
  gamma: float = 1.0,
) -> Array:
  """SimPO: average log-probs themselves are the reward; no reference is read.

    loss = -log σ(β (log π(y_w)/|y_w| - log π(y_l)/|y_l|) - γ)

  `gamma` is the target margin γ, reward units. Meng et al. 2024, eq. 6.
  """
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
  """CPO: DPO under a uniform reference, and the likelihood of the chosen answer.

    loss = -log σ(β (log π(y_w) - log π(y_l))) - λ log π(y_w)

  `sft_weight` is λ, of the log-prob summed over tokens. Xu et al. 2024 (λ = 1).
  """
  del reference
  return -jax.nn.log_sigmoid(beta * margins(policy, None)) - sft_weight * policy.chosen_B


def orpo(
  policy: PairLogps, reference: PairLogps | None = None, *, odds_weight: float = 0.1
) -> Array:
  """ORPO: supervised loss and the log of the odds ratio, one stage, no reference.

    loss = -log p_w - λ log σ(log p_w/(1-p_w) - log p_l/(1-p_l)),   p = π(y)^(1/|y|)

  `odds_weight` is λ. Hong et al. 2024, eq. 6 and 7.
  """
  del reference
  won_B, lost_B = mean_ratios(policy, None)
  return -won_B - odds_weight * jax.nn.log_sigmoid(_log_odds(won_B) - _log_odds(lost_B))


def _log_odds(log_p: Array) -> Array:
  """log p/(1-p); p is kept a little below 1, where the odds are infinite."""
  log_p = jnp.minimum(log_p, -1e-6)
  return log_p - jnp.log(-jnp.expm1(log_p))


def sft(policy: PairLogps, reference: PairLogps | None = None) -> Array:
  """Supervised training on the chosen answer; the reference is not read.

  loss = -log π(y_w|x), nats a sequence; the caller divides by the tokens of the whole batch.
  """
  del reference
  return -policy.chosen_B


def sft_mean(policy: PairLogps, reference: PairLogps | None = None) -> Array:
  """The supervised term beside a paired loss: -log π(y_w|x)/|y_w|, nats a token.

  Pang et al. 2024 (RPO); Wang et al. 2024 (MPO).
  """
  del reference
  return -mean_ratios(policy, None)[0]
