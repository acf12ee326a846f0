"""What a trained model is worth: scored on held-out pairs, sampled on unseen prompts.

X lists prompts, S samples of a prompt.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import logprobs, measures, sampling
from dpo_jax.data import chat, pipeline, sources
from dpo_jax.data.layout import Example
from dpo_jax.measures import Estimate
from dpo_jax.model import hf, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.rewards import Reward, values
from dpo_jax.structs import Model, PairLogps, PyTree, UserError


class LanguageModel(NamedTuple):
  """A Hugging Face folder, loaded."""

  config: ModelConfig
  params: PyTree
  tokenizer: chat.Tokenizer


def load(path: str | pathlib.Path) -> LanguageModel:
  """Model and tokenizer of a folder, in float32."""
  tokenizer = chat.load_tokenizer(path)
  config, params = hf.load(path)
  pipeline.check_vocabulary(tokenizer, config.vocab)
  return LanguageModel(config, jax.device_put(params), tokenizer)


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
    answers = len(examples[0].answers)
    logp_BK = np.full((len(examples), answers), np.nan)
    for batch in pipeline.eval_batches(numbered, batch_size=batch_size):
      row_XK = batch.row_NS.reshape(-1, answers)
      logp_XK = np.asarray(logps_fn(params, batch), np.float64).reshape(-1, answers)
      filled_X = row_XK[:, 0] >= 0
      logp_BK[row_XK[filled_X, 0]] = logp_XK[filled_X]
    tokens = [[len(answer) for answer in example.answers] for example in examples]
    return Scores(logp_BK, np.array(tokens))

  return score


def check_positions(examples: Sequence[Example], config: ModelConfig) -> None:
  """Every text has positions in the model; rotary ones have no end."""
  if config.positions != "learned":
    return
  longest = max(examples, key=lambda e: len(e.prompt) + max(map(len, e.answers)))
  tokens = len(longest.prompt) + max(map(len, longest.answers))
  if tokens > config.max_positions:
    raise UserError(
      f"data row {longest.row} has {tokens} tokens and the model {config.max_positions} positions;"
      f" give --max_length={config.max_positions}"
    )


# --- Samples --------------------------------------------------------------------------------------


class Drawn(NamedTuple):
  """S answers to each of X prompts.

  Attributes:
    prompts: X texts.
    prompt_ids: X lists of token ids.
    answers: X lists of S texts.
    answer_ids: X lists of S lists of ids, the end token included where the model ended.
    reward_XS: the true rewards.
  """

  prompts: list[str]
  prompt_ids: list[list[int]]
  answers: list[list[str]]
  answer_ids: list[list[list[int]]]
  reward_XS: np.ndarray

  def examples(self) -> list[Example]:
    """One example a prompt, with all its answers."""
    array = functools.partial(np.asarray, dtype=np.int32)
    texts = zip(self.prompt_ids, self.answer_ids, strict=True)
    return [Example(array(prompt), tuple(map(array, ids))) for prompt, ids in texts]


def read_prompts(path: str | pathlib.Path) -> list[Any]:
  """The `prompt` of every row of a file: a text or a list of messages."""
  prompts = []
  for where, row in sources.read_rows(path):
    prompt = row.get("prompt")
    messages = isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt)
    if not prompt or not (isinstance(prompt, str) or messages):
      raise UserError(f"{where}: field 'prompt' must be a text or a list of messages")
    prompts.append(prompt)
  return prompts


def draw(
  model: LanguageModel,
  prompts: Sequence[Any],
  reward: Reward,
  *,
  num: int,
  max_tokens: int,
  temperature: float = 1.0,
  seed: int = 0,
) -> Drawn:
  """Samples `num` answers a prompt and scores them; a prompt of messages is scored as rendered."""
  prompt_ids = [model.tokenizer.encode_prompt(prompt) for prompt in prompts]
  if not all(prompt_ids):
    raise UserError("a prompt has no token; an answer's first token needs one to follow")
  answer_ids = sampling.generate(
    model.config,
    model.params,
    prompt_ids,
    max_tokens=max_tokens,
    temperature=temperature,
    seed=seed,
    eos_ids=eos_ids(model),
    num=num,
  )
  decode = model.tokenizer.decode
  texts = [x if isinstance(x, str) else decode(i) for x, i in zip(prompts, prompt_ids, strict=True)]
  answers = [[decode(ids) for ids in each] for each in answer_ids]
  flat = [(text, answer) for text, each in zip(texts, answers, strict=True) for answer in each]
  reward_XS = values(reward, *zip(*flat, strict=True)).reshape(len(texts), num)
  return Drawn(texts, prompt_ids, answers, answer_ids, reward_XS)


def eos_ids(model: LanguageModel) -> tuple[int, ...]:
  """Ids that end an answer: the tokenizer's and those the model's folder names."""
  own = () if model.tokenizer.eos_id is None else (model.tokenizer.eos_id,)
  return tuple(dict.fromkeys((*own, *model.config.eos_ids)))


# --- Evaluation -----------------------------------------------------------------------------------


def on_pairs(
  policy: LanguageModel, reference: LanguageModel, examples: Sequence[Example], loss_fn, beta: float
) -> dict[str, Estimate]:
  """`measures.preference_metrics` of held-out pairs."""
  scores = [scorer(model.config)(model.params, examples).pairs() for model in (policy, reference)]
  weight_B = np.array([example.weight for example in examples])
  return measures.preference_metrics(
    *scores, beta=beta, loss_B=np.asarray(loss_fn(*scores)), weight_B=weight_B
  )


class Sampled(NamedTuple):
  """A policy against its reference on the same prompts, under the true reward."""

  policy: Drawn
  reference: Drawn
  metrics: dict[str, Estimate]
  frontier: measures.Frontier
  frontier_reward: float  # the best mean reward at the policy's KL
  fraction: Estimate  # of the frontier's gain


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
) -> Sampled:
  """Samples both on every prompt, and the reference often on the first few for the frontier."""
  limits = {"max_tokens": max_tokens}
  # Three seeds, so that nothing drawn for one purpose is drawn again for another.
  ours = draw(policy, prompts, reward, num=num, seed=3 * seed, **limits)
  theirs = draw(reference, prompts, reward, num=num, seed=3 * seed + 1, **limits)
  often = draw(
    reference,
    prompts[:frontier_prompts],
    reward,
    num=frontier_samples,
    seed=3 * seed + 2,
    **limits,
  )
  examples = ours.examples()
  logps = [scorer(x.config)(x.params, examples).logp_BK for x in (policy, reference)]
  log_ratio_XS = logps[0] - logps[1]
  metrics = measures.sampled_metrics(ours.reward_XS, theirs.reward_XS, log_ratio_XS)
  frontier = measures.exact_frontier(often.reward_XS)
  fraction = measures.fraction_of_gain(
    ours.reward_XS.mean(1), theirs.reward_XS.mean(1), log_ratio_XS.mean(1), frontier
  )
  best = frontier.reward_at(metrics["kl"].mean)
  return Sampled(ours, theirs, metrics, frontier, best, fraction)


# --- Plain values ---------------------------------------------------------------------------------


def number(value: float) -> float | None:
  """A float for JSON, which has none that is not finite."""
  return float(value) if math.isfinite(value) else None


def flatten(estimates: dict[str, Estimate]) -> dict[str, Any]:
  """name: mean and name_interval: [low, high], as plain JSON values."""
  out: dict[str, Any] = {}
  for name, (mean, low, high) in estimates.items():
    bounded = math.isfinite(low) and math.isfinite(high)
    out[name] = number(mean)
    out[f"{name}_interval"] = [float(low), float(high)] if bounded else None
  return out


def curve(frontier: measures.Frontier) -> list[dict[str, float | None]]:
  """The frontier as far as its samples reach, one plain object for each β (null: infinite)."""
  means = (frontier.kl_XF.mean(0), frontier.reward_XF.mean(0), frontier.effective_XF.mean(0))
  return [
    {"beta": number(beta), "kl": float(kl), "reward": float(reward), "effective_samples": float(n)}
    for beta, kl, reward, n in zip(frontier.beta_F, *means, strict=True)
    if kl <= frontier.reach
  ]


def side_by_side(sampled: Sampled, count: int) -> Iterator[dict[str, Any]]:
  """The first sample of both models for the first few prompts, with rewards."""
  for x in range(min(count, len(sampled.policy.prompts))):
    yield {
      "prompt": sampled.policy.prompts[x],
      "reference": sampled.reference.answers[x][0],
      "policy": sampled.policy.answers[x][0],
      "reference_reward": float(sampled.reference.reward_XS[x, 0]),
      "policy_reward": float(sampled.policy.reward_XS[x, 0]),
    }
