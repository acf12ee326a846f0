"""On-policy training: completions are sampled from the policy at every step and scored by a reward.

With the loss `policy_gradient` this minimises the assumed objective E[-r + β (log π - log π_ref)]
directly; with a loss of pairs or rankings it is online preference optimisation, the preferences
made from the rewards. Either way a batch is an ordinary `TokenBatch` for the ordinary step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax.data import batches, collate, packing
from dpo_jax.data.examples import Example
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.generation import rewards, rollouts
from dpo_jax.losses import Loss
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, TokenBatch, UserError

# How pairs are made of the samples of a prompt.
PREFERENCES = ("rank", "bradley_terry")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Makes batches of samples; batch k is a pure function of (prompts, seed, k, parameters).

  Attributes:
    model_config, tokenizer: of the policy.
    prompts: strings or lists of messages.
    reward: scores a completion of a prompt.
    loss: decides whether samples become pairs, rankings or remain as they are.
    num: completions per prompt.
    max_tokens: most tokens of a completion; one that does not end by then is trained on as it is.
    temperature: of sampling. Only at 1 do completions come from the policy's own distribution.
    prefer: for a loss of pairs: "rank" pairs the completion of the highest reward with that of the
      lowest; "bradley_terry" prefers one of two neighbouring samples with probability
      σ(r(a) - r(b)).
    batch_size: prompts per step.
    accumulate: micro-batches per step.
    seed: of order, samples and preferences.
    width: tokens of the longest prompt, or more.
    batching: the layout of the rows.
  """

  model_config: ModelConfig
  tokenizer: Tokenizer
  prompts: Sequence[Any]
  reward: rewards.Reward
  loss: Loss
  num: int
  max_tokens: int
  temperature: float
  prefer: str
  batch_size: int
  accumulate: int
  seed: int
  width: int
  batching: batches.Batching

  def batch(
    self,
    index: int,
    params: PyTree,
    sizes: packing.Sizes | None = None,
    share: tuple[int, int] = (0, 1),
  ) -> tuple[TokenBatch, dict[str, float]]:
    """Samples batch `index`, from 0; arrays as those of `batches.batches`.

    Every host samples all of it, and lays out its `share`.

    Args:
      index: of the batch.
      params: the policy's parameters, which this process can use without the others.
      sizes: what shapes are rounded up to, from `sizes`.
      share: the part of the batch that this host lays out.

    Returns:
      The batch, and means over its samples: `reward`, in reward units, and `tokens` per completion.

    Raises:
      UserError: the reward failed; or the samples of every prompt are equal, which no loss of pairs
        can learn from.
    """
    examples, facts = self._examples(index, params)
    parts = self._parts(examples)
    return collate.collate_many(parts, sizes=sizes, share=share, **self.batching._asdict()), facts

  def sizes(self, params: PyTree) -> packing.Sizes:
    """Measures the first batch, and adds a margin: the same sizes for a run and its resumption."""
    examples, _ = self._examples(0, params)
    # Later completions may be longer: an eighth more scored tokens avoids most recompilations.
    sizes = collate.fit_sizes(self._parts(examples), **self.batching._asdict())
    return sizes._replace(rows=sizes.rows + sizes.rows_step, scored=sizes.scored * 9 // 8)

  def _parts(self, examples: list[Example]) -> list[list[Example]]:
    """Splits the examples of a step into its micro-batches."""
    size = len(examples) // self.accumulate
    return [examples[i : i + size] for i in range(0, len(examples), size)]

  def _examples(self, index: int, params: PyTree) -> tuple[list[Example], dict[str, float]]:
    """Samples the examples of batch `index`, their rewards as scores, or preferences of them."""
    # By index, not from a generator that remembers: a resumed run continues with the same prompts.
    picked = batches.order(len(self.prompts), self.batch_size, seed=self.seed)[index]
    rollout = rollouts.sample(
      rollouts.LanguageModel(self.model_config, params, self.tokenizer),
      [self.prompts[i] for i in picked],
      self.reward,
      num=self.num,
      max_tokens=self.max_tokens,
      temperature=self.temperature,
      # Seed and step in one number: no two steps of a run have the same random numbers.
      seed=(self.seed << 32) + index,
      # Two batches, since two are sampled at a time, and one shape for all steps.
      batch_size=min(256, self.num * -(-self.batch_size // 2)),
      width=self.width,
    )
    rows = [
      example._replace(row=row, scores=tuple(reward_K.tolist()))
      for example, row, reward_K in zip(rollout.examples(), picked, rollout.reward_XK, strict=True)
    ]
    # Of all samples, also of those that no pair takes.
    lengths = [len(ids) for example in rows for ids in example.completions]
    facts = {"reward": float(rollout.reward_XK.mean()), "tokens": float(np.mean(lengths))}
    if self.loss.kind == "pairs":
      # A generator per batch, so that the labels of a batch do not depend on those before it.
      rows = self._pairs(rows, np.random.default_rng([self.seed, index]))
    # policy_gradient reads the rewards themselves, in any order.
    elif not self.loss.is_on_policy:
      rows = [_ranked(row) for row in rows]
    # A mean over examples that all count nothing would be 0 / 0.
    if not any(row.weight for row in rows):
      raise UserError(
        "the policy gives every prompt of a batch the same completion, or completions of one"
        " reward: nothing is left to prefer; raise loss.beta or on_policy.temperature, or stop"
        " earlier"
      )
    return rows, facts

  def _pairs(self, rows: list[Example], rng: np.random.Generator) -> list[Example]:
    """Makes preference pairs of the samples of every prompt, as `prefer` says."""
    if self.prefer == "rank":
      return [_pick(row, _extremes(row.scores)) for row in rows]
    # Bradley-Terry: σ(d) is the probability that a standard logistic number lies below d.
    return [
      _pick(row, [a, a + 1] if row.scores[a] - row.scores[a + 1] > rng.logistic() else [a + 1, a])
      for row in rows
      for a in range(0, self.num - 1, 2)
    ]


def _ranked(row: Example) -> Example:
  """Sorts the completions by reward, best first; weight 0 where all rewards are equal."""
  # Stable: completions of equal reward keep the order in which they were sampled.
  ranked = _pick(row, np.argsort(-np.array(row.scores), kind="stable"))
  return ranked._replace(weight=0.0) if len(set(row.scores)) == 1 else ranked


def _extremes(scores: Sequence[float]) -> list[int]:
  """Returns the best and the worst index; the same one twice where all scores are equal."""
  return [int(np.argmax(scores)), int(np.argmin(scores))]


def _pick(row: Example, order: Sequence[int] | np.ndarray) -> Example:
  """Picks completions of an example in an order; a pair of equal ones gets weight 0."""
  completions = tuple(row.completions[i] for i in order)
  # Weight 0 rather than a row less: the number of examples, and so the shapes, stay.
  same = len(order) == 2 and np.array_equal(completions[0], completions[1])
  return row._replace(
    completions=completions,
    scores=tuple(row.scores[i] for i in order),
    weight=0.0 if same else row.weight,
  )


def check(
  loss: Loss, *, reward: str, num: int, max_tokens: int, temperature: float, prefer: str
) -> None:
  """Checks the settings before anything is loaded.

  Raises:
    UserError: a value out of range, or a loss that cannot learn from samples.
  """
  rewards.resolve(reward)
  if num < 2:
    raise UserError(f"on_policy.num is {num}; completions are compared with each other: 2 or more")
  if max_tokens < 1:
    raise UserError(f"on_policy.max_tokens is {max_tokens}; it must be 1 or above")
  if not 0 < temperature < float("inf"):
    raise UserError(f"on_policy.temperature is {temperature}; it must be above 0")
  if loss.kind not in ("pairs", "ranked"):
    raise UserError(
      f"loss {loss.name!r} is not computed from samples that a reward compares; name"
      " policy_gradient, plackett_luce or a loss of pairs"
    )
  if loss.is_on_policy and temperature != 1:
    raise UserError(
      f"on_policy.temperature is {temperature}; policy_gradient needs samples of the policy itself,"
      " at temperature 1"
    )
  if loss.kind == "pairs" and prefer not in PREFERENCES:
    raise UserError(f"on_policy.prefer is {prefer!r}; known: {', '.join(PREFERENCES)}")
  if loss.kind == "pairs" and prefer == "bradley_terry" and num % 2:
    raise UserError(f"on_policy.num is {num}; bradley_terry pairs neighbours: give an even number")
