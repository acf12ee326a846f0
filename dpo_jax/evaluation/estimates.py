"""Held-out measures: of preferences, of samples under a known reward, and the best there can be.

Everything is estimated from independent units (pairs, prompts), and comes with a 95% interval.
X lists prompts, S samples of a prompt, F values of β.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.structs import PairLogps, UserError

Z = 1.959964  # 97.5% quantile of the normal distribution
# Fewer effective samples a prompt than this, and the frontier there is a guess.
MIN_EFFECTIVE = 10.0


# --- Means and their intervals --------------------------------------------------------------------


class Estimate(NamedTuple):
  """A mean and its 95% interval."""

  mean: float
  low: float
  high: float


def mean_estimate(value_B: np.ndarray, weight_B: np.ndarray | None = None) -> Estimate:
  """Weighted mean of independent values, with a normal interval; not a number for a single one."""
  value_B = np.asarray(value_B, np.float64)
  share_B = _shares(value_B, weight_B)
  mean = float(share_B @ value_B)
  count = np.count_nonzero(share_B)
  if count < 2:
    return Estimate(mean, np.nan, np.nan)
  half = Z * math.sqrt(share_B**2 @ (value_B - mean) ** 2 * count / (count - 1))
  return Estimate(mean, mean - half, mean + half)


def share_estimate(value_B: np.ndarray, weight_B: np.ndarray | None = None) -> Estimate:
  """Share of successes among independent trials, ties as one half, with Wilson's interval."""
  value_B = np.asarray(value_B, np.float64)
  share_B = _shares(value_B, weight_B)
  # Rounding may carry a sum of shares a little past 1.
  share, count = float(np.clip(share_B @ value_B, 0, 1)), 1 / float(share_B @ share_B)
  centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
  half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
  return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def _shares(value_B: np.ndarray, weight_B: np.ndarray | None) -> np.ndarray:
  weight_B = np.ones(len(value_B)) if weight_B is None else np.asarray(weight_B, np.float64)
  if not weight_B.sum() > 0:
    raise UserError("nothing to evaluate: no pair or prompt with a positive weight")
  return weight_B / weight_B.sum()


# --- Preferences ----------------------------------------------------------------------------------


def preference_metrics(
  policy: PairLogps,
  reference: PairLogps,
  *,
  beta: float,
  loss_B: np.ndarray,
  weight_B: np.ndarray | None = None,
) -> dict[str, Estimate]:
  """How a policy tells chosen from rejected answers; rewards are β log π/π_ref, a tie one half."""
  chosen_B = beta * (np.asarray(policy.chosen_B) - np.asarray(reference.chosen_B))
  rejected_B = beta * (np.asarray(policy.rejected_B) - np.asarray(reference.rejected_B))
  margin_B = chosen_B - rejected_B
  return {
    "accuracy": share_estimate((np.sign(margin_B) + 1) / 2, weight_B),
    "margin": mean_estimate(margin_B, weight_B),
    "chosen_reward": mean_estimate(chosen_B, weight_B),
    "rejected_reward": mean_estimate(rejected_B, weight_B),
    "loss": mean_estimate(loss_B, weight_B),
  }


# --- Samples --------------------------------------------------------------------------------------


def wins(policy_XS: np.ndarray, reference_XR: np.ndarray) -> np.ndarray:
  """Share of (policy sample, reference sample) that the policy wins, ties as one half: [X]."""
  difference_XSR = policy_XS[:, :, None] - reference_XR[:, None, :]
  return ((np.sign(difference_XSR) + 1) / 2).mean((1, 2))


def sampled_metrics(
  policy_XS: np.ndarray, reference_XR: np.ndarray, log_ratio_XS: np.ndarray
) -> dict[str, Estimate]:
  """Reward and distance of a policy from samples of it and of its reference on the same prompts.

  Samples of one prompt are averaged first: the prompts are what is independent.

  Args:
    policy_XS: true rewards of the policy's samples.
    reference_XR: those of the reference's.
    log_ratio_XS: log π(y|x) - log π_ref(y|x) of the policy's samples, in nats; its mean is
      KL(π ‖ π_ref) over whole answers.
  """
  return {
    "reward_policy": mean_estimate(policy_XS.mean(1)),
    "reward_reference": mean_estimate(reference_XR.mean(1)),
    "win_rate": _clipped(mean_estimate(wins(policy_XS, reference_XR)), 0.0, 1.0),
    "kl": mean_estimate(log_ratio_XS.mean(1)),
  }


def _clipped(estimate: Estimate, low: float, high: float) -> Estimate:
  return Estimate(*(float(np.clip(x, low, high)) for x in estimate))


# --- The frontier ---------------------------------------------------------------------------------


class Frontier(NamedTuple):
  """The best trade of reward for distance, prompt by prompt; β falls along F, from infinity.

  Attributes:
    beta_F: reward units per nat.
    reward_XF: E[r] under π* of this β.
    kl_XF: KL(π* ‖ π_ref), nats.
    effective_XF: effective number of samples behind them.
  """

  beta_F: np.ndarray
  reward_XF: np.ndarray
  kl_XF: np.ndarray
  effective_XF: np.ndarray

  def reward_at(self, kl: float) -> float:
    """The highest mean reward of any policy `kl` nats from the reference, by interpolation.

    Beyond the last β it stays at that β's reward: compare `kl` with `reach`.
    """
    return float(np.interp(kl, self.kl_XF.mean(0), self.reward_XF.mean(0)))

  def effective_at(self, kl: float) -> float:
    """Effective samples a prompt behind `reward_at(kl)`."""
    return float(np.interp(kl, self.kl_XF.mean(0), self.effective_XF.mean(0)))

  @property
  def reach(self) -> float:
    """The KL up to which at least `MIN_EFFECTIVE` effective samples a prompt stand behind it."""
    enough_F = self.effective_XF.mean(0) >= MIN_EFFECTIVE
    return float(self.kl_XF.mean(0)[enough_F].max(initial=0.0))


BETAS = tuple(np.geomspace(50.0, 0.1, 64).tolist())


def exact_frontier(reward_XS: np.ndarray, betas: Sequence[float] = BETAS) -> Frontier:
  """(E[r], KL) of π* ∝ π_ref exp(r/β) by self-normalised importance weights.

    w_s ∝ exp(r_s/β),  E[r] = Σ w_s r_s,  KL = Σ w_s log(S w_s),  effective samples 1/Σ w_s²

  With one β for all prompts this is the frontier of the two means over prompts. Few effective
  samples bias both down together, along the frontier, so that E[r] at a given KL suffers little.

  Args:
    reward_XS: true rewards of S samples of the reference for each of X prompts.
    betas: positive, any order; infinity, the reference itself, is put before them.
  """
  beta_F = np.concatenate([[np.inf], np.sort(np.asarray(betas, np.float64))[::-1]])
  if not beta_F[-1] > 0:
    raise UserError(f"β is {beta_F[-1]}; a frontier needs β above 0")
  curves = []
  for beta in beta_F:
    log_w_XS = reward_XS / beta
    log_w_XS = log_w_XS - log_w_XS.max(1, keepdims=True)
    log_w_XS -= np.log(np.exp(log_w_XS).sum(1, keepdims=True))
    w_XS = np.exp(log_w_XS)
    kl_X = (w_XS * (log_w_XS + np.log(reward_XS.shape[1]))).sum(1)
    curves.append(((w_XS * reward_XS).sum(1), kl_X, 1 / (w_XS**2).sum(1)))
  return Frontier(beta_F, *(np.stack(values, axis=1) for values in zip(*curves, strict=True)))


def fraction_of_gain(
  policy_X: np.ndarray,
  reference_X: np.ndarray,
  kl_X: np.ndarray,
  frontier: Frontier,
  *,
  resamples: int = 1000,
  seed: int = 0,
) -> Estimate:
  """The policy's gain in reward over the frontier's at the policy's KL; 1 is the best there is.

  Args:
    policy_X: mean true reward of the policy on each prompt.
    reference_X: that of the reference.
    kl_X: mean log-ratio of the policy's samples, nats.
    frontier: from samples of the reference, on these prompts or some of them.
    resamples: of prompts, for the bootstrap interval.
    seed: of the resampling.

  Returns:
    The fraction; not a number where the policy is no distance from the reference.
  """
  rng = np.random.default_rng(seed)
  fraction = lambda x, on: _fraction(
    policy_X[x].mean(), reference_X[x].mean(), kl_X[x].mean(), _of_prompts(frontier, on)
  )
  everyone, measured = np.arange(len(policy_X)), np.arange(len(frontier.kl_XF))
  draws = [
    fraction(rng.choice(everyone, len(everyone)), rng.choice(measured, len(measured)))
    for _ in range(resamples)
  ]
  low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else [np.nan] * 2
  return Estimate(fraction(everyone, measured), float(low), float(high))


def _of_prompts(frontier: Frontier, x: np.ndarray) -> Frontier:
  return Frontier(
    frontier.beta_F, frontier.reward_XF[x], frontier.kl_XF[x], frontier.effective_XF[x]
  )


def _fraction(policy: float, reference: float, kl: float, frontier: Frontier) -> float:
  best = frontier.reward_at(kl) - reference
  return float((policy - reference) / best) if kl > 0 and best > 0 else float("nan")
