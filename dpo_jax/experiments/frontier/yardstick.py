"""Policies against the reference: reward, KL and share of the frontier's gain; best-of-n, exactly.

X lists prompts, S samples of a prompt, R distinct rewards among them.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evaluation import evaluate
from dpo_jax.evaluation.estimates import Frontier, exact_frontier, fraction_of_gain, mean_estimate
from dpo_jax.experiments.frontier.settings import BEST_OF_N, MAX_TOKENS, Settings
from dpo_jax.generation import rewards, rollouts
from dpo_jax.utils import workdir

Json = dict[str, Any]

EVERYDAY = 2  # answers a prompt that a policy is measured by


class Yardstick(NamedTuple):
  """What policies are measured against, drawn once from the reference.

  Attributes:
    reference: the model.
    prompts: that policies answer.
    reference_X: mean reward of the reference on each of them.
    many_XS: rewards of many samples of the reference to the first of them.
    frontier: the exact frontier by those samples.
  """

  reference: rollouts.LanguageModel
  prompts: list[Any]
  reference_X: np.ndarray
  many_XS: np.ndarray
  frontier: Frontier

  def measure(self, export: pathlib.Path, *, seed: int) -> Json:
    """Reward, KL and share of the frontier's gain of the model in a folder."""
    policy = rollouts.load(export)
    # The reference's own samples take seeds 0 and 1.
    rollout = rollouts.sample(
      policy,
      self.prompts,
      rewards.resolve("controlled"),
      num=EVERYDAY,
      max_tokens=MAX_TOKENS,
      seed=2 + seed,
    )
    examples = rollout.examples()
    policy_XS, reference_XS = (
      evaluate.scorer(model.config)(model.params, examples).logp_BK
      for model in (policy, self.reference)
    )
    return describe(
      rollout.reward_XS.mean(1),
      self.reference_X,
      (policy_XS - reference_XS).mean(1),
      self.frontier,
    )


def describe(
  reward_X: np.ndarray, reference_X: np.ndarray, kl_X: np.ndarray, frontier: Frontier
) -> Json:
  """Means over prompts with 95% intervals; the KL is in nats an answer."""
  estimates = {
    "reward": mean_estimate(reward_X),
    "kl": mean_estimate(kl_X),
    "fraction": fraction_of_gain(reward_X, reference_X, kl_X, frontier),
  }
  known = bool(estimates["kl"].mean <= frontier.reach)
  out: Json = {"within_reach": known}
  for name, (mean, *interval) in estimates.items():
    out[name] = mean if math.isfinite(mean) else None
    out[f"{name}_interval"] = interval if np.isfinite(interval).all() else None
  return out


def make_yardstick(study: pathlib.Path, settings: Settings, say=print) -> Yardstick:
  """Samples of the reference, drawn once and kept in reference.json."""
  reference = rollouts.load(study / "sft" / "export")
  prompts = rollouts.read_prompts(study / "task" / "eval_prompts.jsonl")
  kept = study / "reference.json"
  if not kept.is_file():
    say(
      f"the exact frontier: {settings.frontier_samples} samples of the reference to each of"
      f" {settings.frontier_prompts} prompts"
    )
    take = functools.partial(
      rollouts.sample, reference, reward=rewards.resolve("controlled"), max_tokens=MAX_TOKENS
    )
    everyday = take(prompts, num=EVERYDAY, seed=0)
    many = take(prompts[: settings.frontier_prompts], num=settings.frontier_samples, seed=1)
    found = {"everyday": everyday.reward_XS.tolist(), "many": many.reward_XS.tolist()}
    workdir.write(kept, json.dumps(found) + "\n")
  found = json.loads(kept.read_text(encoding="utf-8"))
  many_XS = np.array(found["many"])
  return Yardstick(
    reference,
    prompts,
    np.array(found["everyday"]).mean(1),
    many_XS,
    exact_frontier(many_XS),
  )


# --- Best of n ------------------------------------------------------------------------------------


def best_of_n(reward_S: np.ndarray, n: int) -> tuple[float, float]:
  """Expected reward and KL of taking the best of n samples, for one prompt.

    P(r) = [C(#{r_s <= r}, n) - C(#{r_s < r}, n)] / C(S, n)
    E[r] = Σ_r P(r) r,    KL(π_n ‖ π_ref) = Σ_r P(r) log(P(r) / p(r)),    p(r) = #{r_s = r} / S

  P is the distribution of the largest of n of the S samples, over all ways to take them. Samples of
  one reward are told apart by nothing, so within a reward π_n is π_ref, and the KL of the answers
  is that of the rewards. Where no two answers have one reward it is log n - (n - 1)/n, which is
  otherwise a bound from above (Beirami et al. 2024).

  Args:
    reward_S: rewards of samples of the reference.
    n: answers to choose from, at most S.

  Returns:
    The mean reward and the KL, nats.
  """
  level_R, count_R = np.unique(np.asarray(reward_S, np.float64), return_counts=True)
  log_R = _log_choose(np.cumsum(count_R), n) - _log_choose(np.array([len(reward_S)]), n)
  chance_R = np.diff(np.exp(log_R), prepend=0.0)
  some_R = chance_R > 0
  ratio_R = chance_R[some_R] / (count_R[some_R] / len(reward_S))
  kl = float(chance_R[some_R] @ np.log(ratio_R))
  # The reference itself is at no distance, whatever rounding says.
  return float(chance_R @ level_R), kl if n > 1 else 0.0


def _log_choose(total_R: np.ndarray, n: int) -> np.ndarray:
  """log C(total, n), minus infinity where total < n."""
  steps = np.arange(n)
  with np.errstate(divide="ignore"):
    terms_Rn = np.log(np.maximum(total_R[:, None] - steps, 0)) - np.log(n - steps)
  return terms_Rn.sum(1)


def best_of_n_points(yardstick: Yardstick) -> list[Json]:
  """Points for n = 1, 2, 4, … while sixteen samples or more stand behind each of the n."""
  many_XS = yardstick.many_XS
  points = []
  for n in (2**k for k in range(int(math.log2(many_XS.shape[1])) - 3)):
    both = np.array([best_of_n(reward_S, n) for reward_S in many_XS])
    found = describe(both[:, 0], many_XS.mean(1), both[:, 1], yardstick.frontier)
    point = {"method": BEST_OF_N, "beta": None, "seed": None, "n": n}
    points.append(point | found | {"kl_bound": math.log(n) - (n - 1) / n, "seconds": None})
  return points
