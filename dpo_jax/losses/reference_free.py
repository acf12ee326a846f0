"""Losses of pairs, and of texts, that read no reference: each takes one and ignores it.

The symbols are those of `paired`. Without a reference, c and r are the policy's own log-probs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.declaration import declare
from dpo_jax.losses.ratios import margins, mean_ratios, tangent_expm1
from dpo_jax.structs import Array, PairLogps


@declare(reference=False, averages=True, ranges={"gamma": "[0, inf)"})
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


@declare(
  reference=False,
  averages=True,
  ranges={"gamma": "[0, inf)", "reward_alpha": "(-inf, inf)"},
)
def alpha_po(
  policy: PairLogps,
  reference: PairLogps | None = None,
  *,
  beta: float = 2.5,
  gamma: float = 0.1,
  reward_alpha: float = 0.25,
) -> Array:
  """AlphaPO: SimPO with another shape of its reward.

    loss = -log σ(β (ρ(y_w) - ρ(y_l)) - γ),   ρ(y) = (1 - p^{-α})/α,   p = π(y)^(1/|y|)

  `reward_alpha` is α; α to 0 gives log p, which is SimPO. With α > 0 the reward falls steeply where
  p is small. `gamma` is the target margin γ, in reward units. Above α log 1/p = 20 the power is
  continued by its tangent. Gupta et al. 2025 (AlphaPO, arXiv 2501.03884).
  """
  del reference
  won_B, lost_B = mean_ratios(policy, None)
  # Exactly 0 would divide by 0; the condition is computed on α alone, so both branches are finite.
  safe_alpha = jnp.where(reward_alpha == 0, 1.0, reward_alpha)

  def reward(log_p: Array) -> Array:
    return jnp.where(reward_alpha == 0, log_p, -tangent_expm1(-safe_alpha * log_p) / safe_alpha)

  return -jax.nn.log_sigmoid(beta * (reward(won_B) - reward(lost_B)) - gamma)


@declare(reference=False, likelihood=True, ranges={"sft_weight": "[0, inf)"})
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


@declare(reference=False, averages=True, likelihood=True, ranges={"odds_weight": "[0, inf)"})
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


@declare(reference=False, kind="text", likelihood=True)
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
