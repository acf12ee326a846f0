"""What a run learns from: rows read once, or samples of the policy, a batch at every step.

Like `setup`, whose part it is, this reads a `ConfigDict`; what it calls does not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import losses
from dpo_jax.data import batches, collate, encode, packing, readers
from dpo_jax.data import prepared as prepared_data
from dpo_jax.data.examples import Example, Lazy, Measured, fill_up, lengths, split, with_mismatched
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.evaluation import evaluate
from dpo_jax.generation import rewards, rollouts
from dpo_jax.hf import peft, safetensors_files
from dpo_jax.model import attention_kernels
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, TokenBatch, UserError
from dpo_jax.training import on_policy, reference_cache


class TrainingData(NamedTuple):
  """Rows or prompts, and how batches are made of them.

  Attributes:
    examples: rows to train on, in memory or read as they are needed; on policy, prompts (texts or
      messages).
    held_out: rows to judge by; on policy, prompts as examples without answers.
    completions: K, slots of a row of data.
    batching: layout, row_length, groups and texts of `batches.batches`.
    sampler: makes batches of prompts; None where rows are trained on as they stand.
  """

  examples: Sequence[Any]
  held_out: Sequence[Example]
  completions: int
  batching: dict[str, Any]
  sampler: on_policy.Sampler | None


def check(config: ConfigDict, loss: losses.Loss) -> None:
  """Settings of on-policy training, or that the loss can do without it; and of the store."""
  if config.on_policy.reward:
    on_policy.check(loss, **config.on_policy)
  elif loss.samples:
    raise UserError(
      f"loss {loss.name!r} learns from samples of the policy itself; name a reward for them,"
      " --config.on_policy.reward=NAME, and prompts, --config.data.path=FILE"
    )
  _check_store(config, loss)


def _check_store(config: ConfigDict, loss: losses.Loss) -> None:
  """Whether log-probs of the reference could be stored; nothing is made yet."""
  path, sync_every = config.reference.store, config.reference.sync_every
  if not path:
    return
  why = None
  if not loss.needs_reference:
    why = f"loss {loss.name!r} reads no reference"
  elif sync_every:
    why = f"the reference follows the policy (reference.sync_every={sync_every})"
  elif config.on_policy.reward:
    why = "the answers are sampled anew at every step (on_policy.reward)"
  if why:
    raise UserError(f"reference.store is {path!r}, but {why}; leave it empty")
  reference_cache.check(pathlib.Path(path))


def load(
  config: ConfigDict,
  loss: losses.Loss,
  tokenizer: Tokenizer,
  model_config: ModelConfig,
  groups: int,
  *,
  texts: bool = False,
) -> tuple[TrainingData, dict]:
  """What the run learns from, and the ledger of what became of every row.

  With `texts`, batches list the texts of their rows.
  """
  for name in ("path", "eval_path"):
    _check_named(f"data.{name}", config.data[name])
  if not config.data.path:
    what = "prompts" if config.on_policy.reward else "rows"
    raise UserError(f"data.path is empty; name a file of {what}, --config.data.path=FILE")
  batching = {
    "layout": config.data.layout,
    "row_length": config.data.row_length,
    "groups": groups,
    "texts": texts,
  }
  if not config.on_policy.reward:
    examples, held_out, ledger = _load_rows(config, loss, tokenizer, model_config)
    batching["row_length"] = config.data.row_length or batches.suit_row_length(
      Measured.of(examples, held_out),
      config.data.layout,
      batch_size=config.train.batch_size,
      accumulate=config.train.accumulate,
      groups=groups,
      balance=config.data.balance,
    )
    return TrainingData(examples, held_out, len(examples[0].completions), batching, None), ledger

  prompts, held_out, longest, ledger = _load_prompts(config, tokenizer, model_config)
  completions = 2 if loss.kind == "pairs" else config.on_policy.num
  # Room for the longest prompt with answers that take all they may.
  copies = 1 if config.data.layout == "padded" else completions
  need = packing.round_up(longest + copies * config.on_policy.max_tokens, 64)
  batching["row_length"] = config.data.row_length or need
  settings = dict(config.on_policy)
  sampler = on_policy.Sampler(
    model_config=model_config,
    tokenizer=tokenizer,
    prompts=prompts,
    reward=rewards.resolve(settings.pop("reward")),
    loss=loss,
    batch_size=config.train.batch_size,
    accumulate=config.train.accumulate,
    seed=config.seed,
    width=packing.round_up(longest, 8),
    batching=batching,
    **settings,
  )
  return TrainingData(prompts, held_out, completions, batching, sampler), ledger


def _check_named(field: str, path: str) -> None:
  """A field names files that are there, if it names any."""
  try:
    if path and not prepared_data.holds_one(path):
      readers.files(path)
  except UserError as error:
    raise UserError(f"{field}: {error}") from None


def _load_rows(config, loss, tokenizer, model_config):
  """Training and held-out examples, and the ledger of both."""
  data = config.data
  how = {
    "kind": loss.kind,
    "max_length": data.max_length,
    "prompt_floor": data.prompt_floor,
    "truncation": data.truncation,
    "fields": {k: v for k, v in data.fields.items() if v},
  }
  prepared = prepared_data.holds_one(data.path)
  if prepared:
    examples, held_out, ledger = _read_prepared(config, encode.Encoder(tokenizer, **how))
  else:
    examples, ledger, form = encode.load_examples(data.path, tokenizer, **how)
    ledger = {"format": form, **ledger.to_json()}
  print(encode.tell(data.path, ledger), file=sys.stderr)
  if data.eval_path:
    held_out, more, form = encode.load_examples(data.eval_path, tokenizer, **how)
    ledger["eval"] = {"format": form, **more.to_json()}
    print(encode.tell(data.eval_path, ledger["eval"]), file=sys.stderr)
    if not prepared:
      _remark_overlap(data.path, data.eval_path)
  elif not prepared:
    examples, held_out = split(examples, data.eval_fraction, config.seed, ledger["dropped"])
  if loss.kind == "unpaired":
    mismatch = functools.partial(with_mismatched, max_length=data.max_length, seed=config.seed)
    examples, held_out = mismatch(examples), mismatch(held_out)
  if loss.kind == "ranked":
    most = Measured.of(examples, held_out).lengths[1].shape[1]
    held_out = fill_up(held_out, most)
    examples = examples.widened(most) if prepared else fill_up(examples, most)
  held_out = _limited(held_out, config)
  for path, some in ((data.path, examples), (data.eval_path, held_out)):
    if loss.reads("margin_B") and some and not some[0].scores:
      raise UserError(
        f"loss {loss.name!r} reads by how much the chosen answer is better, and the rows of {path}"
        " do not say; give them a field margin, or chosen_score and rejected_score"
      )
  for some in filter(len, (examples, held_out)):
    if data.row_length and data.layout != "padded":
      collate.check_fits(some, data.layout, data.row_length)
    evaluate.check_positions(some, model_config)
  return examples, held_out, ledger


def _remark_overlap(path: str, eval_path: str) -> None:
  """Says where rows that are held out are trained on too."""
  for file in sorted(map(str, set(readers.files(path)) & set(readers.files(eval_path)))):
    print(f"data.eval_path: {file} is trained on too; eval/* tells nothing new", file=sys.stderr)


def _read_prepared(config: ConfigDict, encoder: encode.Encoder):
  """Both splits of a prepared set and its ledger; the examples to train on stay on disk."""
  data = config.data
  if encoder.fields:
    raise UserError(
      f"data.fields names {', '.join(encoder.fields)}, but {data.path} is a prepared set, whose"
      " fields were read when it was made; leave it out"
    )
  fraction = None if data.eval_path else data.eval_fraction
  examples, held_out, ledger = prepared_data.read(data.path, encoder, eval_fraction=fraction)
  return examples, held_out[: data.eval_limit] if held_out else [], ledger


def _limited(held_out: list, config: ConfigDict) -> list:
  """At most `data.eval_limit` of them, and some where samples are asked for."""
  held_out = held_out[: config.data.eval_limit]
  if config.eval.samples and not held_out:
    raise UserError(
      f"eval.samples is {config.eval.samples}, and no row is held out to take prompts from; set"
      " data.eval_fraction above 0, name rows by data.eval_path, or leave eval.samples 0"
    )
  return held_out


def _load_prompts(config, tokenizer, model_config):
  """Prompts, held-out ones as examples without answers, the longest's tokens, the ledger."""
  data = config.data
  prompts, held_out = rollouts.read_prompts(data.path, data.fields.prompt), []
  if data.eval_path:
    held_out = rollouts.read_prompts(data.eval_path, data.fields.prompt)
  elif data.eval_fraction:
    order = np.random.default_rng(config.seed).permutation(len(prompts))
    away = round(data.eval_fraction * len(prompts))
    held_out = [prompts[i] for i in order[:away]]
    prompts = [prompts[i] for i in order[away:]]
  if len(prompts) < config.train.batch_size:
    raise UserError(
      f"train.batch_size is {config.train.batch_size} and {data.path} leaves {len(prompts)} prompts"
      " to train on; lower it or give more prompts"
    )
  held_out = _limited(held_out, config)
  ids = rollouts.encode_prompts(tokenizer, prompts + held_out)
  longest, room = max(map(len, ids)), config.on_policy.max_tokens
  limit = data.max_length
  if model_config.positions == "learned":
    limit = min(limit, model_config.max_positions)
  if longest + room > limit:
    raise UserError(
      f"the longest prompt has {longest} tokens; with on_policy.max_tokens {room} that exceeds the"
      f" window of {limit}; raise data.max_length or shorten one of them"
    )
  tokens = {"prompt": sum(map(len, ids)), "answer": 0, "padding": 0, "shared": 0}
  counts = {"rows": len(ids), "pairs": len(ids), "dropped": {}, "truncated": {}}
  examples = [
    Example(np.asarray(prompt, np.int32), (), row=row)
    for row, prompt in enumerate(ids[len(prompts) :])
  ]
  return prompts, examples, longest, {"format": "prompts", **counts, "tokens": tokens}


def stored(
  config: ConfigDict,
  model_config: ModelConfig,
  device: jax.Device,
  attention: str,
  training_data: TrainingData,
) -> tuple[reference_cache.Store | None, tuple[Lazy, ...], TrainingData]:
  """The store of the reference's log-probs, what it lacks, and the rows with what it has."""
  path = config.reference.store
  if not path:
    return None, (), training_data
  store = reference_cache.Store(path, _reference_key(config, model_config, device, attention))
  sides = (training_data.examples, training_data.held_out)
  lacking = tuple(filter(len, (reference_cache.lacking(side, store) for side in sides)))
  rows, missing = sum(map(len, sides)), sum(map(len, lacking))
  print(
    f"reference store {store.folder}: {rows - missing:,} of {rows:,} examples found",
    file=sys.stderr,
  )
  examples, held_out = (reference_cache.stored(side, store) for side in sides)
  return store, lacking, training_data._replace(examples=examples, held_out=held_out)


def _reference_key(
  config: ConfigDict, model_config: ModelConfig, device: jax.Device, attention: str
) -> dict[str, Any]:
  """All that the reference's log-probs depend on beside prompt and answer."""
  path, types = config.reference.path, [config.reference.param_dtype]
  if not path:  # it has the policy's numbers, as the policy holds them
    path, types = config.model.path, [config.model.param_dtype, *types]
  weights: Any = {"scratch": config.model.scratch.to_dict(), "seed": config.seed}
  # Attention over rows is one to rounding, as topologies are.
  kernel = {"attention": attention} if attention in attention_kernels.TEXTS else {}
  return kernel | {
    "weights": safetensors_files.digest(pathlib.Path(path)) if path else weights,
    "adapter": peft.digest(config.lora.path) if config.lora.path else None,
    "model": dataclasses.asdict(model_config),
    "param_dtypes": types,
    "compute_dtype": config.model.compute_dtype,
    "layout": config.data.layout,
    "device": device.device_kind,
    "jax": jax.__version__,
  }


def digest(training_data: TrainingData) -> str:
  """Of the length of every row, and of the text of a thousand."""
  found = hashlib.blake2b(digest_size=16)
  if training_data.sampler is not None:
    found.update(repr(training_data.examples).encode())
    return found.hexdigest()
  for side in (training_data.examples, training_data.held_out):
    if not len(side):
      continue
    for array in lengths(side):
      found.update(np.ascontiguousarray(array).tobytes())
    for i in np.linspace(0, len(side) - 1, min(len(side), 1000), dtype=np.int64):
      example = side[int(i)]
      found.update(repr((example.scores, example.weight)).encode())
      for ids in (example.prompt, *example.completions):
        found.update(np.asarray(ids, np.int32).tobytes())
  return found.hexdigest()


Feed = Callable[[int, PyTree], tuple[TokenBatch, dict[str, float]]]


def make_feed(
  config: ConfigDict,
  training_data: TrainingData,
  sizes: packing.Sizes | None,
  start: int,
  share: tuple[int, int] = (0, 1),
) -> Feed:
  """(step, parameters) -> batch and what else is known of it, for the steps after `start` in turn.

  `sizes` are those of the sampler for the initial parameters, also where a run goes on; None where
  nothing is sampled. `share` is that of `Executor`: the part of every batch that is made here.
  """
  if training_data.sampler is not None:
    return lambda step, params: training_data.sampler.batch(step - 1, params, sizes, share)
  stream = batches.batches(
    training_data.examples,
    batch_size=config.train.batch_size,
    accumulate=config.train.accumulate,
    seed=config.seed,
    start=start,
    share=share,
    balance=config.data.balance,
    **training_data.batching,
  )
  return lambda step, params: (next(stream), {})
