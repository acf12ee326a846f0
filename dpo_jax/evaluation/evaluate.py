"""What a trained model is worth: scored on held-out pairs, sampled on unseen prompts.

X lists prompts, S samples of a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import logprobs, losses
from dpo_jax.data import batches, encode
from dpo_jax.data.examples import Example, lengths
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
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Model, PairLogps, PyTree, UserError

Json = dict[str, Any]

# --- Log-probs ------------------------------------------------------------------------------------


class Scores(NamedTuple):
  """Log-probs of K answers to each of B prompts, in nats, and how many tokens they sum."""

  logp_BK: np.ndarray
  tokens_BK: np.ndarray

  def pairs(self) -> PairLogps:
    """The first answer as chosen, the second as rejected."""
    return PairLogps(*self.logp_BK.T, *self.tokens_BK.T)


@functools.cache
def scorer(config: ModelConfig) -> Callable[..., Scores]:
  """The score function of all models of one shape: policy and reference share its compilation."""
  return make_scorer(transformer.build(config))


def make_scorer(model: Model, *, batch_size: int = 64) -> Callable[..., Scores]:
  """The production log-probs as score(params, examples) -> Scores.

  Args:
    model: the language model.
    batch_size: examples at a time; all of a call share one number K of answers.
  """
  logps_fn = jax.jit(logprobs.make_logps_fn(model))

  def score(params: PyTree, examples: Sequence[Example]) -> Scores:
    numbered = [example._replace(row=i) for i, example in enumerate(examples)]
    completions = len(examples[0].completions)
    logp_BK = np.full((len(examples), completions), np.nan)
    for batch in batches.eval_batches(numbered, batch_size=batch_size):
      row_XK = batch.row_NS.reshape(-1, completions)
      logp_XK = np.asarray(logps_fn(params, batch), np.float64).reshape(-1, completions)
      filled_X = row_XK[:, 0] >= 0
      logp_BK[row_XK[filled_X, 0]] = logp_XK[filled_X]
    tokens = [[len(answer) for answer in example.completions] for example in examples]
    return Scores(logp_BK, np.array(tokens))

  return score


def check_positions(examples: Sequence[Example], config: ModelConfig) -> None:
  """Every text has positions in the model; rotary ones have no end."""
  if config.positions != "learned":
    return
  prompt_B, tokens_BK = lengths(examples)
  tokens_B = prompt_B + tokens_BK.max(axis=1)
  longest = int(tokens_B.argmax())
  if tokens_B[longest] > config.max_positions:
    raise UserError(
      f"data row {examples[longest].row} has {tokens_B[longest]} tokens and the model"
      f" {config.max_positions} positions; lower max_length to {config.max_positions}"
    )


# --- Pairs ----------------------------------------------------------------------------------------


def objective(name: str, beta: float | None = None) -> Loss:
  """A loss of pairs by name; rewards are told in β, which is the loss's own unless given."""
  names = [part.rpartition("*")[2].strip() for part in name.split("+")]
  takes = beta is not None and any(
    "beta" in losses.arguments(part) for part in names if part in losses.LOSSES
  )
  loss = losses.resolve(name, **({"beta": beta} if takes else {}))
  if loss.kind != "pairs":
    raise UserError(f"loss {name!r} is not computed from pairs; name a loss of pairs")
  return loss if beta is None else dataclasses.replace(loss, beta=beta)


def read_pairs(
  path: str | pathlib.Path,
  policy: LanguageModel,
  reference: LanguageModel | None,
  *,
  max_length: int | None = None,
) -> list[Example]:
  """The pairs of a file in the policy's tokens, known to fit both; says what was left out."""
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
  examples, ledger, _ = encode.load_examples(path, policy.tokenizer, max_length=max_length)
  for model in models:
    check_positions(examples, model.config)
  if ledger.dropped or ledger.truncated:
    print(encode.tell(path, ledger.to_json()), file=sys.stderr)
  return examples


def losses_of(
  ask: Loss, policy: PairLogps, reference: PairLogps, examples: Sequence[Example]
) -> np.ndarray:
  """The loss of every pair, with what the rows say of it.

  Raises:
    UserError: the loss reads by how much the chosen answer is better, and the rows do not say.
  """
  if ask.reads("margin_B") and not examples[0].scores:
    raise UserError(
      f"loss {ask.name!r} reads by how much the chosen answer is better, and the rows do not say;"
      " give them a field margin, or chosen_score and rejected_score"
    )
  scores = [example.scores or (0.0, 0.0) for example in examples]
  margin_B = np.array([chosen - rejected for chosen, rejected in scores])
  weight_B = np.array([example.weight for example in examples])
  return np.asarray(ask(policy, reference, margin_B=margin_B, weight_B=weight_B))


def score_rows(
  policy: LanguageModel,
  reference: LanguageModel | None,
  examples: Sequence[Example],
  ask: Loss,
) -> list[Json]:
  """One object a pair: its data row, log-probs in nats, token counts.

  With a reference also implicit rewards and the loss.
  """
  ours = scorer(policy.config)(policy.params, examples).pairs()
  columns = {
    "row": np.array([example.row for example in examples]),
    "chosen_logp": ours.chosen_B,
    "rejected_logp": ours.rejected_B,
    "chosen_tokens": ours.chosen_tokens_B,
    "rejected_tokens": ours.rejected_tokens_B,
  }
  if reference is not None:
    theirs = scorer(reference.config)(reference.params, examples).pairs()
    columns |= {
      "ref_chosen_logp": theirs.chosen_B,
      "ref_rejected_logp": theirs.rejected_B,
      "chosen_reward": ask.beta * (ours.chosen_B - theirs.chosen_B),
      "rejected_reward": ask.beta * (ours.rejected_B - theirs.rejected_B),
      "loss": losses_of(ask, ours, theirs, examples),
    }
  values = zip(*(column.tolist() for column in columns.values()), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in values]


def on_pairs(
  policy: LanguageModel, reference: LanguageModel, examples: Sequence[Example], ask: Loss
) -> Json:
  """Accuracy, margins and loss of held-out pairs, with intervals, as `eval_…`."""
  scores = [scorer(model.config)(model.params, examples).pairs() for model in (policy, reference)]
  estimates = preference_metrics(
    *scores,
    beta=ask.beta,
    loss_B=losses_of(ask, *scores, examples),
    weight_B=np.array([example.weight for example in examples]),
  )
  return {"pairs": len(examples)} | _plain(
    {f"eval_{name}": estimate for name, estimate in estimates.items()}
  )


# --- Samples --------------------------------------------------------------------------------------


def on_samples(
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
  """Reward, win rate and KL of a policy, and its share of what was possible at that KL.

  Args:
    policy, reference: models of one vocabulary.
    prompts: texts or lists of messages.
    reward: the true reward.
    num: answers of either to every prompt.
    frontier_prompts, frontier_samples: how many answers of the reference the frontier rests on.
    max_tokens: of an answer.
    seed: of the samples.
    shown: prompts whose first answers are kept side by side.
  """
  # Three seeds, so that nothing sampled for one purpose is sampled again for another.
  take = functools.partial(rollouts.sample, reward=reward, max_tokens=max_tokens)
  ours = take(policy, prompts, num=num, seed=3 * seed)
  theirs = take(reference, prompts, num=num, seed=3 * seed + 1)
  many = take(reference, prompts[:frontier_prompts], num=frontier_samples, seed=3 * seed + 2)
  examples = ours.examples()
  logps = [scorer(x.config)(x.params, examples).logp_BK for x in (policy, reference)]
  log_ratio_XS = logps[0] - logps[1]

  estimates = sampled_metrics(ours.reward_XS, theirs.reward_XS, log_ratio_XS)
  frontier = exact_frontier(many.reward_XS)
  estimates["fraction_of_frontier_gain"] = fraction_of_gain(
    ours.reward_XS.mean(1), theirs.reward_XS.mean(1), log_ratio_XS.mean(1), frontier
  )
  kl = estimates["kl"].mean
  return {
    "prompts": len(prompts),
    "samples_per_prompt": num,
    **_plain(estimates),
    "frontier_reward_at_kl": frontier.reward_at(kl),
    "frontier_effective_samples_at_kl": frontier.effective_at(kl),
    "frontier_reach": frontier.reach,
    "frontier": _curve(frontier),
    "samples": _side_by_side(ours, theirs, shown),
  }


def _curve(frontier: Frontier) -> list[Json]:
  """The frontier as far as its samples reach; β is null where it is infinite."""
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
    if kl <= frontier.reach
  ]


def _side_by_side(ours: Rollout, theirs: Rollout, count: int) -> list[Json]:
  return [
    {
      "prompt": prompt,
      "reference": theirs.completions[x][0],
      "policy": ours.completions[x][0],
      "reference_reward": float(theirs.reward_XS[x, 0]),
      "policy_reward": float(ours.reward_XS[x, 0]),
    }
    for x, prompt in enumerate(ours.prompts[:count])
  ]


# --- Plain values, and their table ----------------------------------------------------------------


def _number(value: float) -> float | None:
  """A float for JSON, which has none that is not finite."""
  return float(value) if math.isfinite(value) else None


def _plain(estimates: dict[str, Estimate]) -> Json:
  """name: mean, and name_interval: [low, high] or null."""
  out: Json = {}
  for name, (mean, low, high) in estimates.items():
    out[name] = _number(mean)
    out[f"{name}_interval"] = [low, high] if math.isfinite(low) and math.isfinite(high) else None
  return out


_ROWS = (  # key, what it is called, how it is written
  ("reward_reference", "mean true reward, reference", "{:.3f}"),
  ("reward_policy", "mean true reward, policy", "{:.3f}"),
  ("win_rate", "win rate against the reference", "{:.1%}"),
  ("kl", "KL(π ‖ π_ref), nats an answer", "{:.3f}"),
  ("frontier_reward_at_kl", "best possible reward at this KL", "{:.3f}"),
  ("fraction_of_frontier_gain", "share of the best possible gain", "{:.1%}"),
  ("eval_accuracy", "accuracy on held-out pairs", "{:.1%}"),
  ("eval_margin", "margin of implicit rewards", "{:.3f}"),
  ("eval_loss", "loss on held-out pairs", "{:.4f}"),
)


def show(summary: Json, shown: int) -> None:
  """Prints one table of a summary, and some samples of both models side by side."""
  from rich.console import Console
  from rich.table import Table

  console = Console()
  table = Table("", "value", "95% interval", title="On unseen data", title_justify="left")
  for key, label, form in _ROWS:
    if summary.get(key) is not None:
      interval = summary.get(f"{key}_interval")
      within = " to ".join(form.format(x) for x in interval) if interval else ""
      table.add_row(label, form.format(summary[key]), within)
  console.print(table)
  if summary.get("kl", 0) > summary.get("frontier_reach", math.inf):
    console.print(
      f"The frontier is known to {summary['frontier_reach']:.2f} nats only; its reward at the"
      " policy's KL is a lower bound. Take more --frontier_samples."
    )
  for sample in summary.get("samples", [])[:shown]:
    console.print(f"\n[bold]{sample['prompt']}[/bold]")
    for who in ("reference", "policy"):
      console.print(f"  {who:<9} {sample[who + '_reward']:+.2f} {sample[who]}", highlight=False)
