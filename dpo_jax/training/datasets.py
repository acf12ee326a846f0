"""Training data: examples read once, or prompts whose completions are sampled at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import losses
from dpo_jax.data import batches, digest, packing
from dpo_jax.data import prepared as prepared_data
from dpo_jax.data.batches import Batching
from dpo_jax.data.examples import Example, Measured
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.generation import rewards, rollouts
from dpo_jax.model.config import ModelConfig, check_ids
from dpo_jax.structs import PyTree, TokenBatch, UserError
from dpo_jax.training import data_checks, on_policy, reading, sources, splits
from dpo_jax.training.reading import DataSettings
from dpo_jax.utils import messages


class BatchSettings(NamedTuple):
  """The examples of every step, whatever the layout of their rows.

  Attributes:
    batch_size: examples per step, over all devices and micro-batches.
    accumulate: micro-batches per step; 0 where they are chosen once the lengths are known.
    seed: of the order.
    balance: whether batches exchange examples until all have about as many tokens.
  """

  batch_size: int
  accumulate: int
  seed: int
  balance: bool


ChooseMicroBatches = Callable[[Sequence[Example] | Measured], int]


class TrainingData(NamedTuple):
  """Examples or prompts, and how batches are made of them.

  Attributes:
    examples: examples to train on, in memory or read as they are needed; on policy, prompts
      (strings or messages).
    held_out: examples to evaluate on, of all evaluation sets; on policy, prompts as examples
      without completions.
    completions: K, slots of an example.
    settings: which examples are in a batch.
    batching: the layout of its rows.
    sampler: makes batches of prompts; None where examples are trained on as they stand.
    digests: what is learned from, as a name for messages -> a digest of it.
    mixture: the sources of the examples; None for one source.
    groups: name -> rows (`Example.row`) of the held-out examples that are evaluated under it; ""
      for the metrics without a name. Empty if all of them are one group.
    set_sizes: how many held-out examples each evaluation set has, in their order.
    rows: which rows are held out, and which are trained on; None where prompts are sampled from.
  """

  examples: Sequence[Any]
  held_out: Sequence[Example]
  completions: int
  settings: BatchSettings
  batching: Batching
  sampler: on_policy.Sampler | None
  digests: dict[str, str]
  mixture: Mixture | None = None
  groups: Mapping[str, range] = MappingProxyType({})
  set_sizes: tuple[int, ...] = ()
  rows: splits.Rows | None = None


def load(
  rows: DataSettings,
  settings: BatchSettings,
  batching: Batching,
  loss: losses.Loss,
  tokenizer: Tokenizer,
  model_config: ModelConfig,
  *,
  sampling: dict[str, Any] | None = None,
  choose: ChooseMicroBatches | None = None,
) -> tuple[TrainingData, dict[str, Any]]:
  """Reads the data of a run.

  Args:
    rows: which rows are read.
    settings, batching: of batches; a row length of 0 is replaced by one that suits the data.
    loss: decides what a row must have.
    tokenizer, model_config: of the policy.
    sampling: reward and sampling settings of on-policy training, as `on_policy.check` takes them;
      None where examples are trained on as they stand.
    choose: returns the micro-batches of a step, given the examples or their lengths; None takes
      those of the settings.

  Returns:
    The data, and the ledger of what became of every row.

  Raises:
    UserError: a file that is not there, or rows that do not serve.
  """
  # Both before either is read: a typo in the second would else show after minutes.
  for name, path in (("path", rows.path), ("eval_path", rows.eval_path)):
    reading.check_named(f"data.{name}", path)
  sources.check_files(rows.mix, "data.mix", reading.check_named)
  sources.check_files(rows.eval_sets, "data.eval_sets", reading.check_named)
  if sampling is None:
    return _load_examples(rows, settings, batching, loss, tokenizer, model_config, choose)
  return _load_on_policy(rows, settings, batching, loss, tokenizer, model_config, sampling, choose)


def _load_examples(
  rows: DataSettings,
  settings: BatchSettings,
  batching: Batching,
  loss: losses.Loss,
  tokenizer: Tokenizer,
  model_config: ModelConfig,
  choose: ChooseMicroBatches | None,
) -> tuple[TrainingData, dict[str, Any]]:
  """Reads examples that are trained on as they stand."""
  data, ledger = _read_examples(
    rows, settings, batching, loss, tokenizer, model_config.max_positions
  )
  examples, held_out, mixture = data.examples, data.held_out, data.mixture
  what = "data.mix" if rows.mix else rows.path
  data_checks.check_batch(
    settings.batch_size, settings.accumulate or 1, batching.groups, len(examples), what
  )
  for some, purpose in ((examples, "to train on"), (held_out, "to evaluate on")):
    if not len(some):
      continue
    try:
      data_checks.check_tokens(some, batching, tokenizer.vocab_size, model_config, purpose)
    except UserError as error:
      remark = f" ({mixture.where_rows_start()})" if mixture and some is examples else ""
      raise UserError(f"{error}{remark}") from None
  if choose:
    settings = settings._replace(accumulate=choose(examples))
    data = data._replace(settings=settings)
  rate_B = None
  if mixture and mixture.is_weighted:
    rate_B = np.concatenate([mixture.rates(), np.ones(len(held_out))])
  row_length = batches.suit_row_length(
    # Both, so that one length serves training and evaluation.
    Measured.concatenate(examples, held_out),
    batching,
    settings.batch_size // settings.accumulate,
    balance=settings.balance,
    rate_B=rate_B,
  )
  return data._replace(batching=batching._replace(row_length=row_length)), ledger


def _load_on_policy(
  rows: DataSettings,
  settings: BatchSettings,
  batching: Batching,
  loss: losses.Loss,
  tokenizer: Tokenizer,
  model_config: ModelConfig,
  sampling: dict[str, Any],
  choose: ChooseMicroBatches | None,
) -> tuple[TrainingData, dict[str, Any]]:
  """Reads prompts, and makes the sampler of their completions."""
  max_tokens = sampling["max_tokens"]
  prompts, held_out, record, longest, ledger = _load_prompts(
    rows, settings, tokenizer, model_config, max_tokens
  )
  # Pairs are made of the samples, two by two; other losses take all of them at once.
  completions = 2 if loss.kind == "pairs" else sampling["num"]
  # A row fits the longest prompt with completions that take all the tokens they may.
  copies = 1 if batching.layout == "padded" else completions
  need = packing.round_up(longest + copies * max_tokens, 64)
  batching = batching._replace(row_length=batching.row_length or need)
  if choose:  # no completion is there yet: all are as long as they may be
    tokens_BK = np.full((settings.batch_size, completions), max_tokens)
    prompt_B = np.full(settings.batch_size, longest)
    settings = settings._replace(accumulate=choose(Measured(prompt_B, tokens_BK, tokens_BK)))
  # A copy, since the reward is taken out of it.
  sampling = dict(sampling)
  sampler = on_policy.Sampler(
    model_config=model_config,
    tokenizer=tokenizer,
    prompts=prompts,
    reward=rewards.resolve(sampling.pop("reward")),
    loss=loss,
    batch_size=settings.batch_size,
    accumulate=settings.accumulate,
    seed=settings.seed,
    # One width for the whole run: sampling is compiled once.
    width=packing.round_up(longest, 8),
    batching=batching,
    **sampling,
  )
  # Prompts, strings or messages, are few enough to take whole; the tokenizer renders them.
  digests = {
    f"the prompts to train on ({rows.path})": digest.of_values(prompts),
    f"the held-out prompts ({rows.eval_path or rows.path})": digest.of(held_out),
  }
  data = TrainingData(
    prompts, held_out, completions, settings, batching, sampler, digests, rows=record
  )
  return data, ledger


def _read_examples(
  data: DataSettings,
  settings: BatchSettings,
  batching: Batching,
  loss: losses.Loss,
  tokenizer: Tokenizer,
  positions: int,
) -> tuple[TrainingData, dict[str, Any]]:
  """Returns training and held-out examples, with what is known of them, and their ledger."""
  if data.held_out is None or prepared_data.is_prepared_set(data.path):
    read = reading.read_all(data, settings.seed, loss, tokenizer, positions)
  else:
    read = reading.read_held_out(data, data.held_out, loss, tokenizer, positions)
  examples, held_out, ledger, parts, evaluated = read
  mixture = None
  if data.mix and parts:
    mixture = Mixture.make(data.mix, [part.rows.start for part in parts], examples)
    messages.show(f"data.mix: {mixture.describe()}")
    for name, per_epoch in zip(mixture.names, mixture.per_epoch, strict=True):
      ledger["sources"][name]["per_epoch"] = per_epoch
  # Before what follows, which is a function of these rows, the seed and the configuration.
  digests = sources.digests_of(data.path, examples, held_out, parts, evaluated)
  # Of a run that is opened again, the held-out rows are those of `evaluated`: each once.
  split_off = held_out if parts or not evaluated else []
  rows = splits.describe(data.path, parts, examples, split_off, evaluated)
  # Each set by itself from here on: its metrics must not depend on the others.
  named = data.eval_path or data.eval_sets
  sets: list[Sequence[Example]] = [part.examples for part in evaluated] if named else [held_out]
  examples, sets = reading.fit_to_loss(examples, sets, data, settings.seed, loss)
  # After all of the above, so that the limit changes neither mismatched prompts nor K.
  limited = splits.limit(sets, data.eval_limit, eval_samples=data.eval_samples)
  ledger |= splits.count(evaluated, sets, limited, ledger)
  held_out = [example for some in limited for example in some]
  found = TrainingData(
    examples,
    held_out,
    len(examples[0].completions),
    settings,
    batching,
    None,
    digests,
    mixture,
    sources.groups_of(parts, evaluated, held_out),
    tuple(map(len, limited)),
    rows,
  )
  return found, ledger


def _load_prompts(
  data: DataSettings,
  settings: BatchSettings,
  tokenizer: Tokenizer,
  model_config: ModelConfig,
  max_tokens: int,
) -> tuple[list[Any], list[Example], splits.Rows, int, dict[str, Any]]:
  """Reads prompts whose completions have up to `max_tokens` tokens.

  Returns:
    Prompts to train on; held-out ones as examples without completions; their record; the tokens of
    the longest of all; the ledger.
  """
  field = data.fields.get("prompt", "")
  prompts, held_out = rollouts.read_prompts(data.path, field), []
  numbers: Sequence[int] = ()
  if data.eval_path:
    held_out = rollouts.read_prompts(data.eval_path, field)
    numbers = range(len(held_out))
  elif data.eval_fraction:
    # A function of the seed alone: a resumed run holds out the same prompts.
    order = np.random.default_rng(settings.seed).permutation(len(prompts))
    away = round(data.eval_fraction * len(prompts))
    numbers = order[:away].tolist()
    held_out = [prompts[i] for i in numbers]
    prompts = [prompts[i] for i in order[away:]]
  if len(prompts) < settings.batch_size:
    raise UserError(
      f"train.batch_size is {settings.batch_size} and {data.path} leaves {len(prompts)} prompts"
      f" to train on; set --batch_size={len(prompts)} or give more prompts"
    )
  record = splits.of_prompts(data.eval_path or data.path, prompts, held_out, numbers)
  held_out = [*splits.limit([held_out], data.eval_limit, eval_samples=data.eval_samples)[0]]
  ids = rollouts.encode_prompts(tokenizer, prompts + held_out)
  whole = [Example(np.asarray(prompt, np.int32), (), row=row) for row, prompt in enumerate(ids)]
  check_ids(whole, model_config)
  longest = max(map(len, ids))
  limit = data.max_length
  # A table of learned positions ends; rotary positions do not.
  if model_config.positions == "learned":
    limit = min(limit, model_config.max_positions)
  if longest + max_tokens > limit:
    raise UserError(
      f"the longest prompt has {longest} tokens; with on_policy.max_tokens {max_tokens} that"
      f" exceeds the window of {limit}; raise data.max_length or shorten one of them"
    )
  tokens = {"prompt": sum(map(len, ids)), "answer": 0, "scored": 0, "padding": 0, "shared": 0}
  counts = {"rows": len(ids), "pairs": len(ids), "dropped": {}, "truncated": {}}
  examples = [example._replace(row=row) for row, example in enumerate(whole[len(prompts) :])]
  return prompts, examples, record, longest, {"format": "prompts", **counts, "tokens": tokens}


Feed = Callable[[int, PyTree], tuple[TokenBatch, dict[str, float]]]


def make_feed(
  data: TrainingData,
  sizes: packing.Sizes | None,
  start: int,
  share: tuple[int, int] = (0, 1),
) -> Feed:
  """Returns a function that makes the batches of the steps after `start`, one after another.

  Args:
    data: the data.
    sizes: of the sampler for the initial parameters, so that a resumed run has the same shapes;
      None where nothing is sampled.
    start: steps that are made already.
    share: the part of every batch that this process makes, as `Executor.share` has it.

  Returns:
    feed(step, params) -> the batch of that step, and facts of it to report.
  """
  sampler = data.sampler
  if sampler is not None:

    def sample(step: int, params: PyTree) -> tuple[TokenBatch, dict[str, float]]:
      # Steps count from 1, batches from 0.
      return sampler.batch(step - 1, params, sizes, share)

    return sample
  # Opened at `start`: a resumed run seeks there, and makes no earlier batch again.
  stream = batches.batches(
    data.examples,
    batch_size=data.settings.batch_size,
    batching=data.batching,
    accumulate=data.settings.accumulate,
    seed=data.settings.seed,
    start=start,
    share=share,
    balance=data.settings.balance,
    mixture=data.mixture,
  )

  def read(step: int, params: PyTree) -> tuple[TokenBatch, dict[str, float]]:
    del step, params  # the stream is at that step already, and no policy is sampled
    return next(stream), {}

  return read
