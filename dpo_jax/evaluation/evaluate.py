"""Evaluation of a trained model: preference metrics on held-out pairs, and samples under a reward.

A model is compared with its reference. Samples are scored by a known reward, and the reward that
they gain is compared with the best possible gain at the same KL.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import logprobs, losses
from dpo_jax.data import batches, encode
from dpo_jax.data.examples import Example, lengths, weights_of
from dpo_jax.data.ledger import summarize
from dpo_jax.evaluation.estimates import (
  Estimate,
  Frontier,
  exact_frontier,
  fraction_of_gain,
  preference_metrics,
  sampled_metrics,
)
from dpo_jax.generation import rollouts
from dpo_jax.generation.rewards import Reward
from dpo_jax.generation.rollouts import LanguageModel, Rollout
from dpo_jax.losses import Loss
from dpo_jax.model import transformer
from dpo_jax.model.config import ModelConfig, check_ids, check_positions
from dpo_jax.structs import Model, PairLogps, PyTree, UserError
from dpo_jax.utils import messages, progress

Json = dict[str, Any]

# --- Log-probs ------------------------------------------------------------------------------------


class Scores(NamedTuple):
  """Scores of K completions to each of B prompts.

  Attributes:
    logp_BK: log π(y|x) of every completion, summed over its tokens, in nats.
    tokens_BK: sum of the weights of every completion's tokens; their number where all are scored.
  """

  logp_BK: np.ndarray
  tokens_BK: np.ndarray

  def pairs(self) -> PairLogps:
    """Returns the first completion as chosen and the second as rejected; K must be 2."""
    return PairLogps(*self.logp_BK.T, *self.tokens_BK.T)


# Cached by configuration, which is hashable: jit compiles once per function object.
@functools.cache
def scorer(config: ModelConfig) -> Callable[..., Scores]:
  """Returns the score function of a model shape, compiled once for policy and reference."""
  return make_scorer(transformer.build(config))


def make_scorer(model: Model, *, batch_size: int = 64) -> Callable[..., Scores]:
  """Makes a function score(params, examples) -> Scores from the production log-probs.

  Args:
    model: the language model.
    batch_size: examples per batch. All examples of a call must have the same number K of
      completions.
  """
  logps_fn = jax.jit(logprobs.make_logps_fn(model))

  def score(params: PyTree, examples: Sequence[Example]) -> Scores:
    # Rows of a file may have been dropped, so examples get their place in the list as their row.
    numbered = [example._replace(row=i) for i, example in enumerate(examples)]
    completions = len(examples[0].completions)
    # nan, so that an example that no batch contained cannot pass for a scored one.
    logp_BK = np.full((len(examples), completions), np.nan)
    with progress.Progress("computing log-probs", len(examples), "rows") as shown:
      for batch in batches.eval_batches(numbered, batch_size=batch_size):
        row_BK = batch.row_NS.reshape(-1, completions)
        batch_logp_BK = np.asarray(logps_fn(params, batch), np.float64).reshape(-1, completions)
        present_B = row_BK[:, 0] >= 0  # the others are padding of the batch
        logp_BK[row_BK[present_B, 0]] = batch_logp_BK[present_B]
        shown.advance(int(present_B.sum()))
    return Scores(logp_BK, count_tokens(examples))

  return score


def count_tokens(examples: Sequence[Example]) -> np.ndarray:
  """Sums the weights of the tokens of every completion: [B, K]; int unless there are fractions."""
  tokens_BK = np.array([[x.sum(dtype=float) for x in weights_of(one)] for one in examples])
  whole_BK = tokens_BK.astype(int)
  return whole_BK if (whole_BK == tokens_BK).all() else tokens_BK


# --- Pairs ----------------------------------------------------------------------------------------


def resolve_pair_loss(name: str, beta: float | None = None) -> Loss:
  """Resolves a loss of pairs by name.

  Args:
    name: a name or weighted sum, as in `losses.resolve`.
    beta: β of the loss, if it has one, and of the reported rewards; None takes the loss's default.
  """
  names = [part.rpartition("*")[2].strip() for part in name.split("+")]
  takes_beta = beta is not None and any("beta" in losses.arguments(part) for part in names)
  loss = losses.resolve(name, **({"beta": beta} if takes_beta else {}))
  if loss.kind != "pairs":
    raise UserError(f"loss {name!r} is not computed from pairs; name a loss of pairs")
  # A loss without β still reports rewards, in the β that was requested.
  return loss if beta is None else dataclasses.replace(loss, beta=beta)


def read_pairs(
  path: str | pathlib.Path,
  policy: LanguageModel,
  reference: LanguageModel | None,
  *,
  max_length: int | None = None,
  **rows: Any,
) -> list[Example]:
  """Reads the pairs of a file as tokens, and reports dropped and truncated rows on stderr.

  Args:
    path: file of rows.
    policy, reference: models that score them; reference may be None.
    max_length: most tokens of a prompt and one completion together, or None for no limit.
    rows: how rows are read, other options of `encode.Encoder`.

  Raises:
    UserError: policy and reference differ in tokenizer or vocabulary, or a pair is longer than the
      positions of a model or has a token id beyond its vocabulary.
  """
  # The order is important: 1. tokenizers, 2. vocabularies, 3. lengths. Lengths mean nothing in the
  # tokens of another tokenizer.
  models = [policy] if reference is None else [policy, reference]
  if reference is not None and not policy.tokenizer.same_ids(reference.tokenizer):
    raise UserError(
      "model and reference have different tokenizers; models that are compared must share one"
    )
  vocabs = [model.config.vocab for model in models]
  if len(set(vocabs)) > 1:
    raise UserError(
      f"model and reference score {vocabs[0]} and {vocabs[1]} tokens;"
      " models that are compared must share one tokenizer"
    )
  examples, ledger, _ = encode.load_examples(path, policy.tokenizer, max_length=max_length, **rows)
  for model in models:
    check_ids(examples, model.config)
    check_positions(examples, lengths(examples).longest(), model.config)
  if ledger.dropped or ledger.truncated or ledger.notes:
    # On stderr: stdout may carry the results of a command.
    messages.show(summarize(path, ledger.to_json()))
  return examples


def pair_losses(
  loss: Loss, policy: PairLogps, reference: PairLogps, examples: Sequence[Example]
) -> np.ndarray:
  """Computes the loss of every pair, with the scores and weights of its example: [B].

  Raises:
    UserError: the loss reads the difference of scores, and the examples have no scores.
  """
  if loss.reads("margin_B") and not examples[0].scores:
    raise UserError(
      f"loss {loss.name!r} reads by how much the chosen completion is better, and the rows have no"
      " scores; give them a field margin, or chosen_score and rejected_score"
    )
  # Without scores the differences are 0, and the loss reads none of them.
  scores = [example.scores or (0.0, 0.0) for example in examples]
  margin_B = np.array([chosen - rejected for chosen, rejected in scores])
  weight_B = np.array([example.weight for example in examples])
  return np.asarray(loss(policy, reference, margin_B=margin_B, weight_B=weight_B))


def score_pairs(
  policy: LanguageModel,
  reference: LanguageModel | None,
  examples: Sequence[Example],
  loss: Loss,
) -> list[Json]:
  """Returns one JSON object per pair: its row in the file, log-probs in nats, token counts.

  With a reference, it also contains the reference's log-probs, implicit rewards and the loss.
  """
  policy_logps = scorer(policy.config)(policy.params, examples).pairs()
  columns = {
    "row": np.array([example.row for example in examples]),
    "chosen_logp": policy_logps.chosen_B,
    "rejected_logp": policy_logps.rejected_B,
    "chosen_tokens": policy_logps.chosen_tokens_B,
    "rejected_tokens": policy_logps.rejected_tokens_B,
  }
  if reference is not None:
    reference_logps = scorer(reference.config)(reference.params, examples).pairs()
    columns |= {
      "ref_chosen_logp": reference_logps.chosen_B,
      "ref_rejected_logp": reference_logps.rejected_B,
      "chosen_reward": loss.beta * (policy_logps.chosen_B - reference_logps.chosen_B),
      "rejected_reward": loss.beta * (policy_logps.rejected_B - reference_logps.rejected_B),
      "loss": pair_losses(loss, policy_logps, reference_logps, examples),
    }
  # tolist: JSON takes Python numbers, not numpy scalars.
  values = zip(*(column.tolist() for column in columns.values()), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in values]


def evaluate_pairs(
  policy: LanguageModel,
  reference: LanguageModel,
  examples: Sequence[Example],
  loss: Loss,
  trained_on: Collection[int] = (),
) -> Json:
  """Computes accuracy, margins and loss of pairs, with 95% intervals, as `eval_…`.

  Args:
    policy, reference: models of one vocabulary.
    examples: the pairs.
    loss: whose β and values are reported.
    trained_on: rows of the examples that the policy was trained on. If some are and others are not,
      `not_trained_on` has the estimates of those that are not.
  """
  policy_logps, reference_logps = (
    scorer(model.config)(model.params, examples).pairs() for model in (policy, reference)
  )
  loss_B = pair_losses(loss, policy_logps, reference_logps, examples)
  weight_B = np.array([example.weight for example in examples])

  def measured(index_B: Any) -> Json:
    own, theirs = (
      PairLogps(logps.chosen_B[index_B], logps.rejected_B[index_B])
      for logps in (policy_logps, reference_logps)
    )
    estimates = preference_metrics(
      own, theirs, beta=loss.beta, loss_B=loss_B[index_B], weight_B=weight_B[index_B]
    )
    named = {f"eval_{name}": estimate for name, estimate in estimates.items()}
    return {"pairs": len(loss_B[index_B])} | plain(named)

  found = measured(slice(None))
  new_B = np.array([example.row not in trained_on for example in examples])
  # A loss of the whole batch is not that of some of its pairs.
  if (new_B * weight_B).sum() > 0 and not new_B.all() and not loss.batch_wide:
    found["not_trained_on"] = measured(new_B)
  return found


# --- Samples --------------------------------------------------------------------------------------


def evaluate_samples(
  policy: LanguageModel,
  reference: LanguageModel,
  prompts: Sequence[Any],
  reward: Reward,
  *,
  num: int,
  frontier_prompts: int,
  frontier_samples: int,
  max_tokens: int,
  seed: int,
  shown: int = 12,
) -> Json:
  """Computes reward, win rate and KL of a policy, and its share of the best possible gain.

  Args:
    policy, reference: models of one vocabulary.
    prompts: texts or lists of messages.
    reward: the true reward.
    num: completions per prompt, of policy and of reference.
    frontier_prompts, frontier_samples: prompts, and completions of the reference per prompt, from
      which the frontier is estimated.
    max_tokens: most tokens of a completion.
    seed: random seed of the samples.
    shown: prompts whose first completions are returned side by side.
  """
  # Three seeds, for three independent sets: with one seed, the frontier would be estimated from the
  # very samples of the reference that it is compared with.
  sample = functools.partial(rollouts.sample, reward=reward, max_tokens=max_tokens)
  ours = sample(policy, prompts, num=num, seed=3 * seed, label="sampling the policy")
  theirs = sample(reference, prompts, num=num, seed=3 * seed + 1, label="sampling the reference")
  many = sample(
    reference,
    prompts[:frontier_prompts],
    num=frontier_samples,
    seed=3 * seed + 2,
    label="sampling for the frontier",
  )
  # Both models score the policy's samples: KL(π ‖ π_ref) is an expectation under the policy.
  examples = ours.examples()
  logps = [scorer(x.config)(x.params, examples).logp_BK for x in (policy, reference)]
  log_ratio_XK = logps[0] - logps[1]

  estimates = sampled_metrics(ours.reward_XK, theirs.reward_XK, log_ratio_XK)
  # The frontier needs many samples per prompt, and so may rest on fewer prompts.
  frontier = exact_frontier(many.reward_XK)
  estimates["fraction_of_frontier_gain"] = fraction_of_gain(
    ours.reward_XK.mean(1), theirs.reward_XK.mean(1), log_ratio_XK.mean(1), frontier
  )
  kl = estimates["kl"].mean
  return {
    "prompts": len(prompts),
    "samples_per_prompt": num,
    **plain(estimates),
    "frontier_reward_at_kl": frontier.reward_at(kl),
    "frontier_effective_samples_at_kl": frontier.effective_at(kl),
    "frontier_reach": frontier.reach,
    "frontier": _curve(frontier),
    "samples": _side_by_side(ours, theirs, shown),
  }


def _curve(frontier: Frontier) -> list[Json]:
  """Returns the points of the frontier up to its reach; an infinite β becomes null."""
  points = zip(
    frontier.beta_F,
    frontier.kl_XF.mean(0),
    frontier.reward_XF.mean(0),
    frontier.effective_XF.mean(0),
    strict=True,
  )
  return [
    {"beta": _number(beta), "kl": float(kl), "reward": float(reward), "effective_samples": float(n)}
    for beta, kl, reward, n in points
    if kl <= frontier.reach  # beyond it, too few effective samples are left
  ]


def _side_by_side(ours: Rollout, theirs: Rollout, count: int) -> list[Json]:
  """Lists the first completion of policy and reference to each of the first prompts."""
  return [
    {
      "prompt": prompt,
      "reference": theirs.completions[x][0],
      "policy": ours.completions[x][0],
      "reference_reward": float(theirs.reward_XK[x, 0]),
      "policy_reward": float(ours.reward_XK[x, 0]),
    }
    for x, prompt in enumerate(ours.prompts[:count])
  ]


# --- Plain values, and their table ----------------------------------------------------------------


def _number(value: float) -> float | None:
  """Returns a float for JSON, or None if it is not finite: JSON has no nan and no infinity."""
  return float(value) if math.isfinite(value) else None


def plain(estimates: Mapping[str, Estimate]) -> Json:
  """Returns {name: mean, name_interval: [low, high] or None} of every estimate."""
  out: Json = {}
  for name, (mean, low, high) in estimates.items():
    out[name] = _number(mean)
    out[f"{name}_interval"] = [low, high] if math.isfinite(low) and math.isfinite(high) else None
  return out


_SUMMARY_ROWS = (  # key of the summary, label, format
  ("reward_reference", "mean true reward, reference", "{:.3f}"),
  ("reward_policy", "mean true reward, policy", "{:.3f}"),
  ("win_rate", "win rate against the reference", "{:.1%}"),
  ("kl", "KL(π ‖ π_ref), nats per completion", "{:.3f}"),
  ("frontier_reward_at_kl", "best possible reward at this KL", "{:.3f}"),
  ("fraction_of_frontier_gain", "share of the best possible gain", "{:.1%}"),
  ("eval_accuracy", "accuracy (pairs ranked right)", "{:.1%}"),
  ("eval_margin", "margin of implicit rewards", "{:.3f}"),
  ("eval_loss", "loss", "{:.4f}"),
)


def headline(summary: Json) -> str:
  """Returns the result in a sentence; "" for a summary without samples."""
  if summary.get("win_rate") is None or "prompts" not in summary:
    return ""
  line = (
    f"better than the reference on {summary['win_rate']:.0%} of {summary['prompts']:,} prompts;"
    f" mean reward {summary['reward_reference']:.2f} → {summary['reward_policy']:.2f}"
  )
  best = summary.get("frontier_reward_at_kl")
  return line if best is None else f"{line}, of at most {best:.2f} at the same KL"


def accuracy_of(summary: Json) -> str:
  """Returns a line on the accuracy of some pairs: `22 pairs, accuracy 90.9% (72.2% to 97.5%)`."""
  low, high = summary["eval_accuracy_interval"]
  accuracy = f"accuracy {summary['eval_accuracy']:.1%} (95%: {low:.1%} to {high:.1%})"
  return f"{summary['pairs']:,} pairs, {accuracy}"


def print_summary(summary: Json, shown: int, title: str, notes: Sequence[str] = ()) -> None:
  """Prints the table of a summary, and samples of both models side by side.

  Args:
    summary: as `evaluate_pairs`, `evaluate_samples` and `reevaluation.measure` return parts of it.
    shown: how many samples.
    title: which rows and models the numbers are of.
    notes: lines below the table.
  """
  # Imported here: rich is needed for the terminal only.
  from rich.console import Console
  from rich.table import Table

  console = Console()
  whole = not console.is_terminal  # there, lines wrap between words; a file gets them whole
  if line := headline(summary):
    console.print(f"\n[bold]{line}[/bold]\n", highlight=False, soft_wrap=whole)
  console.print(title, markup=False, highlight=False, soft_wrap=whole)
  has_before = any(key.endswith("_before") for key in summary)
  names = ["before", "after"] if has_before else ["value"]
  table = Table("", *names, "95% interval")
  for key, label, form in _SUMMARY_ROWS:
    if summary.get(key) is not None:
      interval = summary.get(f"{key}_interval")
      within = " to ".join(form.format(x) for x in interval) if interval else ""
      before = summary.get(f"{key}_before")
      first = [form.format(before) if before is not None else ""] if has_before else []
      table.add_row(label, *first, form.format(summary[key]), within)
  console.print(table)
  for note in notes:
    console.print(note, markup=False, highlight=False, soft_wrap=whole)
  if summary.get("kl", 0) > summary.get("frontier_reach", math.inf):
    console.print(
      f"The frontier is known to {summary['frontier_reach']:.2f} nats only; its reward at the"
      " policy's KL is a lower bound. Take more --frontier_samples."
    )
  for sample in summary.get("samples", [])[:shown]:
    console.print(f"\n[bold]{sample['prompt']}[/bold]")
    # highlight=False: rich would colour numbers and quotes inside the samples.
    for who in ("reference", "policy"):
      console.print(f"  {who:<9} {sample[who + '_reward']:+.2f} {sample[who]}", highlight=False)
