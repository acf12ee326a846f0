"""Measures policies against the reference: reward, KL, share of the frontier's gain; best-of-n."""

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
from dpo_jax.utils import files

Json = dict[str, Any]

EVERYDAY = 2  # samples per prompt that a policy is measured with


class Yardstick(NamedTuple):
  """Contains the samples of the reference that policies are measured against.

  Attributes:
    reference: the reference model.
    prompts: unseen prompts that policies complete.
    reference_X: mean reward of the reference per prompt.
    many_XK: rewards of many samples of the reference, for the first few prompts.
    frontier: the exact frontier, computed from `many_XK`.
  """

  reference: rollouts.LanguageModel
  prompts: list[Any]
  reference_X: np.ndarray
  many_XK: np.ndarray
  frontier: Frontier

  def measure(self, export: pathlib.Path, *, seed: int) -> Json:
    """Measures reward, KL and share of the frontier's gain of the model in a folder."""
    policy = rollouts.load(export)
    # The reference was sampled with seeds 0 and 1: a policy's samples must be independent of those.
    rollout = rollouts.sample(
      policy,
      self.prompts,
      rewards.resolve("controlled"),
      num=EVERYDAY,
      max_tokens=MAX_TOKENS,
      seed=2 + seed,
      label="sampling",
    )
    examples = rollout.examples()
    # KL(π ‖ π_ref) is estimated by the mean log-ratio of the policy's own samples.
    policy_XK, reference_XK = (
      evaluate.scorer(model.config)(model.params, examples).logp_BK
      for model in (policy, self.reference)
    )
    return describe(
      rollout.reward_XK.mean(1),
      self.reference_X,
      (policy_XK - reference_XK).mean(1),
      self.frontier,
    )


def describe(
  reward_X: np.ndarray, reference_X: np.ndarray, kl_X: np.ndarray, frontier: Frontier
) -> Json:
  """Returns means over prompts with 95% intervals; the KL is in nats per completion."""
  estimates = {
    "reward": mean_estimate(reward_X),
    "kl": mean_estimate(kl_X),
    "fraction": fraction_of_gain(reward_X, reference_X, kl_X, frontier),
  }
  known = bool(estimates["kl"].mean <= frontier.reach)
  out: Json = {"within_reach": known}
  for name, (mean, *interval) in estimates.items():
    # None for NaN and infinity, which JSON has no number for: at a KL of 0 there is no gain.
    out[name] = mean if math.isfinite(mean) else None
    out[f"{name}_interval"] = interval if np.isfinite(interval).all() else None
  return out


def make_yardstick(study: pathlib.Path, settings: Settings, say=print) -> Yardstick:
  """Samples the reference, or reads the rewards of its samples from reference.json."""
  reference = rollouts.load(study / "sft" / "export")
  prompts = rollouts.read_prompts(study / "task" / "eval_prompts.jsonl")
  kept = study / "reference.json"
  if not kept.is_file():
    say(
      f"the exact frontier: {settings.frontier_samples} samples of the reference to each of"
      f" {settings.frontier_prompts} prompts"
    )
    sample = functools.partial(
      rollouts.sample,
      reference,
      reward=rewards.resolve("controlled"),
      max_tokens=MAX_TOKENS,
      label="sampling",
    )
    # Two sets of samples: a reference measured on those that the frontier is made of would not be
    # independent of it.
    everyday = sample(prompts, num=EVERYDAY, seed=0)
    many = sample(prompts[: settings.frontier_prompts], num=settings.frontier_samples, seed=1)
    found = {"everyday": everyday.reward_XK.tolist(), "many": many.reward_XK.tolist()}
    files.write_text(kept, json.dumps(found) + "\n")
  # Read back even when just written, so that a repeated study computes with the same numbers.
  found = json.loads(kept.read_text(encoding="utf-8"))
  many_XK = np.array(found["many"])
  return Yardstick(
    reference,
    prompts,
    np.array(found["everyday"]).mean(1),
    many_XK,
    exact_frontier(many_XK),
  )


# --- Best of n ------------------------------------------------------------------------------------


def best_of_n(reward_K: np.ndarray, n: int) -> tuple[float, float]:
  """Computes the expected reward and the KL of taking the best of n samples, for one prompt.

    P(r) = [C(#{r_s <= r}, n) - C(#{r_s < r}, n)] / C(K, n)
    E[r] = Σ_r P(r) r,    KL(π_n ‖ π_ref) = Σ_r P(r) log(P(r) / p(r)),    p(r) = #{r_s = r} / K

  P is the distribution of the largest of n rewards, over all subsets of n of the K samples. Among
  completions of equal reward, best-of-n chooses as π_ref does, so the KL of the completions is the
  KL of their rewards. Without ties it is log n - (n - 1)/n, which with ties is an upper bound
  (Beirami et al. 2024).

  Args:
    reward_K: rewards of samples of the reference.
    n: number of completions to choose from, at most K.

  Returns:
    The mean reward and the KL in nats.
  """
  level_Lv, count_Lv = np.unique(np.asarray(reward_K, np.float64), return_counts=True)
  # Binomials in logs: those of 4,096 samples exceed float64. Their ratios lie between 0 and 1.
  log_Lv = _log_choose(np.cumsum(count_Lv), n) - _log_choose(np.array([len(reward_K)]), n)
  chance_Lv = np.diff(np.exp(log_Lv), prepend=0.0)
  some_Lv = chance_Lv > 0  # 0 log 0 = 0: rewards too low to be the best of n add nothing
  ratio_Lv = chance_Lv[some_Lv] / (count_Lv[some_Lv] / len(reward_K))
  kl = float(chance_Lv[some_Lv] @ np.log(ratio_Lv))
  # Best of one is the reference itself: exactly 0, not what rounding leaves.
  return float(chance_Lv @ level_Lv), kl if n > 1 else 0.0


def _log_choose(total_Lv: np.ndarray, n: int) -> np.ndarray:
  """Computes log C(total, n); minus infinity where total < n."""
  steps = np.arange(n)
  # Where total < n a factor of total (total - 1) ... is 0; its log is the minus infinity wanted.
  with np.errstate(divide="ignore"):
    terms_Lvn = np.log(np.maximum(total_Lv[:, None] - steps, 0)) - np.log(n - steps)
  return terms_Lvn.sum(1)


def best_of_n_points(yardstick: Yardstick) -> list[Json]:
  """Computes the points of best-of-n for n = 1, 2, 4, ..., up to S/16."""
  many_XK = yardstick.many_XK
  points = []
  for n in (2**k for k in range(int(math.log2(many_XK.shape[1])) - 3)):
    both = np.array([best_of_n(reward_K, n) for reward_K in many_XK])
    found = describe(both[:, 0], many_XK.mean(1), both[:, 1], yardstick.frontier)
    point = {"method": BEST_OF_N, "beta": None, "seed": None, "n": n}
    points.append(point | found | {"kl_bound": math.log(n) - (n - 1) / n, "seconds": None})
  return points
