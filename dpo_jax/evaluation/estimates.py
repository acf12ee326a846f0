"""Estimates with 95% intervals: preference metrics, rewards of samples, and the reward-KL frontier.

All estimates treat pairs, or prompts, as the independent units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax import metrics
from dpo_jax.structs import PairLogps, UserError

NORMAL_QUANTILE = 1.959964  # of 97.5%: the half-width of a 95% interval in standard errors
# With fewer effective samples per prompt, importance weights rest on a few samples, and the
# frontier is not trusted.
MIN_EFFECTIVE = 10.0


# --- Means and their intervals --------------------------------------------------------------------


class Estimate(NamedTuple):
  """A mean and the bounds of its 95% interval, which may be nan."""

  mean: float
  low: float
  high: float


def standard_error(value_B: np.ndarray, weight_B: np.ndarray | None = None) -> float:
  """Computes the standard error of a weighted mean; nan if fewer than two values have a weight."""
  estimate = mean_estimate(value_B, weight_B)
  return (estimate.high - estimate.mean) / NORMAL_QUANTILE


def mean_estimate(value_B: np.ndarray, weight_B: np.ndarray | None = None) -> Estimate:
  """Computes the weighted mean of independent values, with a normal interval.

  The interval is nan if fewer than two values have a weight.
  """
  value_B = np.asarray(value_B, np.float64)
  share_B = _shares(value_B, weight_B)
  mean = float(share_B @ value_B)
  count = np.count_nonzero(share_B)
  if count < 2:
    return Estimate(mean, np.nan, np.nan)
  # count / (count - 1) is Bessel's correction: the mean is estimated from the same values.
  half = NORMAL_QUANTILE * math.sqrt(share_B**2 @ (value_B - mean) ** 2 * count / (count - 1))
  return Estimate(mean, mean - half, mean + half)


def share_estimate(value_B: np.ndarray, weight_B: np.ndarray | None = None) -> Estimate:
  """Computes the share of successes among independent trials, with Wilson's interval.

  Values are 1 for a success, 0 for a failure, and one half for a tie. Unlike a normal interval,
  Wilson's has a width above 0 at shares of 0 and 1. Wilson 1927.
  """
  value_B = np.asarray(value_B, np.float64)
  share_B = _shares(value_B, weight_B)
  z = NORMAL_QUANTILE
  # 1. Rounding may carry a sum of shares a little past 1, hence the clip. 2. With unequal weights,
  # 1 / Σ share² is the effective number of trials (Kish).
  share, count = float(np.clip(share_B @ value_B, 0, 1)), 1 / float(share_B @ share_B)
  centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
  half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
  return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def _shares(value_B: np.ndarray, weight_B: np.ndarray | None) -> np.ndarray:
  """Returns weights that sum to 1; None means equal weights."""
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
  """Computes how well a policy's rewards β log π/π_ref separate chosen from rejected completions.

  Args:
    policy, reference: summed log-probs, in nats.
    beta: β, in reward units per nat.
    loss_B: loss of each pair.
    weight_B: weight of each pair; None means 1 for all.

  Returns:
    Estimates of `accuracy` (see `metrics.in_order`), `margin`, `chosen_reward`,
    `rejected_reward`, in reward units, and `loss`.
  """
  # The order is important, as in `losses.paired.margins`: policy minus reference comes first.
  chosen_B = beta * (np.asarray(policy.chosen_B) - np.asarray(reference.chosen_B))
  rejected_B = beta * (np.asarray(policy.rejected_B) - np.asarray(reference.rejected_B))
  margin_B = chosen_B - rejected_B
  return {
    "accuracy": share_estimate(np.asarray(metrics.pairs_in_order(policy, reference)), weight_B),
    "margin": mean_estimate(margin_B, weight_B),
    "chosen_reward": mean_estimate(chosen_B, weight_B),
    "rejected_reward": mean_estimate(rejected_B, weight_B),
    "loss": mean_estimate(loss_B, weight_B),
  }


# --- Samples --------------------------------------------------------------------------------------


def wins(policy_XK: np.ndarray, reference_XK: np.ndarray) -> np.ndarray:
  """Computes the share of pairs (policy sample, reference sample) that the policy wins: [X].

  A tie counts one half.
  """
  # All pairs of samples of a prompt, not only those of equal index: less variance from the same
  # samples.
  difference_XKK = policy_XK[:, :, None] - reference_XK[:, None, :]
  return ((np.sign(difference_XKK) + 1) / 2).mean((1, 2))


def sampled_metrics(
  policy_XK: np.ndarray, reference_XK: np.ndarray, log_ratio_XK: np.ndarray
) -> dict[str, Estimate]:
  """Computes reward, win rate and KL of a policy from samples of it and of its reference.

  Args:
    policy_XK: true rewards of the policy's samples for each prompt.
    reference_XK: true rewards of the reference's samples for the same prompts.
    log_ratio_XK: log π(y|x) - log π_ref(y|x) of the policy's samples, in nats. Its mean estimates
      KL(π ‖ π_ref) over whole completions.
  """
  # Samples of one prompt are averaged first: prompts are independent, samples of a prompt are not.
  return {
    "reward_policy": mean_estimate(policy_XK.mean(1)),
    "reward_reference": mean_estimate(reference_XK.mean(1)),
    # A normal interval of a share may reach beyond 0 and 1. Wilson's does not apply: per-prompt win
    # rates are not trials of 0 or 1.
    "win_rate": _clipped(mean_estimate(wins(policy_XK, reference_XK)), 0.0, 1.0),
    "kl": mean_estimate(log_ratio_XK.mean(1)),
  }


def _clipped(estimate: Estimate, low: float, high: float) -> Estimate:
  """Limits the mean and the interval to [low, high]."""
  return Estimate(*(float(np.clip(x, low, high)) for x in estimate))


# --- The frontier ---------------------------------------------------------------------------------


class Frontier(NamedTuple):
  """The best possible reward at each KL, per prompt; β falls along F, from infinity.

  Attributes:
    beta_F: values of β, in reward units per nat.
    reward_XF: E[r] under π* of this β, in reward units.
    kl_XF: KL(π* ‖ π_ref), in nats.
    effective_XF: effective number of samples that the two are estimated from.
  """

  beta_F: np.ndarray
  reward_XF: np.ndarray
  kl_XF: np.ndarray
  effective_XF: np.ndarray

  def reward_at(self, kl: float) -> float:
    """Interpolates the highest mean reward of any policy at a KL of `kl` nats.

    Beyond the KL of the last β it returns that β's reward, which is a lower bound; compare `kl`
    with `reach`.
    """
    return float(np.interp(kl, self.kl_XF.mean(0), self.reward_XF.mean(0)))

  def effective_at(self, kl: float) -> float:
    """Interpolates the effective samples per prompt that `reward_at(kl)` is estimated from."""
    return float(np.interp(kl, self.kl_XF.mean(0), self.effective_XF.mean(0)))

  @property
  def reach(self) -> float:
    """The largest KL, in nats, with at least `MIN_EFFECTIVE` effective samples per prompt."""
    enough_F = self.effective_XF.mean(0) >= MIN_EFFECTIVE
    return float(self.kl_XF.mean(0)[enough_F].max(initial=0.0))


# From nearly the reference, β = 50, to nearly the best completion alone, β = 0.1, at equal ratios.
BETAS = tuple(np.geomspace(50.0, 0.1, 64).tolist())


def exact_frontier(reward_XK: np.ndarray, betas: Sequence[float] = BETAS) -> Frontier:
  """Estimates E[r] and KL of π* ∝ π_ref exp(r/β) by self-normalized importance sampling.

    w_k ∝ exp(r_k/β),  E[r] = Σ w_k r_k,  KL = Σ w_k log(K w_k),  effective samples 1/Σ w_k²

  With one β for all prompts, it is the frontier of mean reward against mean KL over prompts. Few
  effective samples bias both down together, along the frontier, so E[r] at a given KL changes
  little.

  Args:
    reward_XK: true rewards of K samples of the reference for each of X prompts.
    betas: values of β > 0, in any order. Infinity, the reference itself, is added before them.

  Raises:
    UserError: a β is not above 0.
  """
  # Falling β, so that KL rises along F: np.interp needs rising points.
  beta_F = np.concatenate([[np.inf], np.sort(np.asarray(betas, np.float64))[::-1]])
  if not beta_F[-1] > 0:
    raise UserError(f"β is {beta_F[-1]}; a frontier needs β above 0")
  curves = []
  for beta in beta_F:
    # At β = inf all weights are equal, as r/β is 0: the reference itself.
    log_w_XK = reward_XK / beta
    # The largest is subtracted before exp: r/β may be in the thousands.
    log_w_XK = log_w_XK - log_w_XK.max(1, keepdims=True)
    log_w_XK -= np.log(np.exp(log_w_XK).sum(1, keepdims=True))
    w_XK = np.exp(log_w_XK)
    kl_X = (w_XK * (log_w_XK + np.log(reward_XK.shape[1]))).sum(1)
    curves.append(((w_XK * reward_XK).sum(1), kl_X, 1 / (w_XK**2).sum(1)))
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
  """Computes the policy's gain in reward, divided by the frontier's gain at the policy's KL.

  Args:
    policy_X: mean true reward of the policy on each prompt.
    reference_X: mean true reward of the reference on each prompt.
    kl_X: mean log-ratio of the policy's samples, in nats.
    frontier: estimated from samples of the reference, on these prompts or some of them.
    resamples: number of bootstrap samples of the prompts, for the interval.
    seed: random seed of the bootstrap.

  Returns:
    The fraction, 1 for an optimal policy; nan if the policy's KL is not above 0.
  """
  rng = np.random.default_rng(seed)

  def fraction(x: np.ndarray, on: np.ndarray) -> float:
    return _fraction_at(
      policy_X[x].mean(), reference_X[x].mean(), kl_X[x].mean(), _select_prompts(frontier, on)
    )

  # Prompts are resampled, not completions: they are the independent units. The frontier's prompts
  # are resampled separately, because they may be fewer.
  prompts, measured = np.arange(len(policy_X)), np.arange(len(frontier.kl_XF))
  resampled = [
    fraction(rng.choice(prompts, len(prompts)), rng.choice(measured, len(measured)))
    for _ in range(resamples)
  ]
  # A resample whose KL or best gain is not above 0 gives nan and is left out of the interval.
  low, high = np.nan, np.nan
  if np.isfinite(resampled).any():
    low, high = np.nanquantile(resampled, [0.025, 0.975])
  return Estimate(fraction(prompts, measured), float(low), float(high))


def _select_prompts(frontier: Frontier, x: np.ndarray) -> Frontier:
  """Returns the frontier of the prompts with these indices."""
  return Frontier(
    frontier.beta_F, frontier.reward_XF[x], frontier.kl_XF[x], frontier.effective_XF[x]
  )


def _fraction_at(policy: float, reference: float, kl: float, frontier: Frontier) -> float:
  """Divides the gain in reward by the best gain at this KL; nan unless KL and best gain are > 0."""
  # The gain is measured from the policy's own reference samples, not from the frontier's first
  # point, whose samples and prompts are others.
  best = frontier.reward_at(kl) - reference
  return float((policy - reference) / best) if kl > 0 and best > 0 else float("nan")
