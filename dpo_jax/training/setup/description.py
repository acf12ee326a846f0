"""The second part of set-up: files are read, headers first, and nothing is on the devices."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.data import chat_template, encode, mixture
from dpo_jax.data.batches import Batching
from dpo_jax.data.examples import Example, Measured
from dpo_jax.data.tokenizer import Tokenizer, load_tokenizer
from dpo_jax.distributed.executor import Executor
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import attention_kernels, families, lora
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import PyTree, UserError
from dpo_jax.training import datasets, reading, reference_cache, splits
from dpo_jax.training.setup import automatic, footprint
from dpo_jax.training.setup.checks import Checked
from dpo_jax.utils import messages, model_folder


class Described(NamedTuple):
  """The parts of a run that its files decide.

  Attributes:
    model_config, tokenizer: of the policy, no weights loaded.
    adapters: how adapters are made; None where the model itself is trained.
    start: the adapters that training starts from, on host; None without any.
    attention: name of the implementation that runs.
    data: examples or prompts.
    ledger: counts of what became of every row of the data.
    steps: updates of the whole run.
  """

  model_config: ModelConfig
  tokenizer: Tokenizer
  adapters: LoRA | None
  start: PyTree | None
  attention: str
  data: datasets.TrainingData
  ledger: dict[str, Any]
  steps: int


def describe(
  config: ConfigDict,
  checked: Checked,
  began: datetime.datetime | None = None,
  held_out: Sequence[splits.Row] | None = None,
) -> Described:
  """Reads headers, tokenizer and data.

  The order is important: what fails in a moment comes before the data, which may take minutes.

  Args:
    config: of the run; micro-batches and remat that it leaves open are chosen and put into it.
    checked: as `check` returns it.
    began: the moment whose date a chat template writes; None for the present.
    held_out: the rows that the run held out, to evaluate it again; None for a run that trains.
  """
  # 1. Folders, by their headers.
  adapters = describe_adapters(config)
  model_config, tokenizer = describe_model(config.model, config.data.template)
  if began and tokenizer.template.pin_date(began):
    messages.show(
      f"the chat template writes a date: that of the run's first day, {began:%Y-%m-%d}, in every"
      " prompt"
    )
  if held_out is None:  # an evaluation of a run needs less
    _warn_of_positions(config.data.max_length, model_config)
    # What certainly does not fit would end minutes later without a line.
    footprint.check(config, checked, model_config, adapters)
    if config.reference.path and not checked.loss.needs_reference:
      messages.warn(
        f"loss {config.loss.name} reads no reference, so reference.path={config.reference.path} is"
        " not loaded; leave it out"
      )
  # By name and shape of every tensor, before the data: weights are read last of all.
  reference = pathlib.Path(config.reference.path)
  if config.reference.path and (peft.is_adapter(reference) or not _has_config(reference)):
    raise UserError(f"reference.path: {model_folder.instead(config.reference.path)}")
  for path in filter(None, (config.model.path, config.reference.path)):
    hf_checkpoint.check(path)
  _check_tokenizer(config.reference.path, tokenizer)
  if config.reference.path and checked.loss.needs_reference:
    _check_shape(hf_checkpoint.read_config(config.reference.path), model_config, config)
  # 2. Adapters: a target may match no map of this model.
  start = None
  if config.lora.path:
    start = peft.load(config.lora.path, model_config)[1]
  elif adapters:
    start = lora.init(model_config, adapters, config.seed)
  attention = choose_attention(config, model_config, checked.executor)
  check_balance(config, model_config)
  # 3. The data, which may take minutes, and how many steps it makes.
  settle = functools.partial(automatic.settle, config, checked, model_config, adapters, attention)
  if held_out is not None:  # nothing is trained
    automatic.apply(config, automatic.Choice(1, automatic.USUAL_REMAT))

  def choose(examples: Sequence[Example] | Measured) -> int:
    settle(examples)
    return config.train.accumulate

  data, ledger = datasets.load(
    data_settings(config)._replace(held_out=None if held_out is None else tuple(held_out)),
    datasets.BatchSettings(
      config.train.batch_size, config.train.accumulate, config.seed, config.data.balance
    ),
    Batching(
      layout=config.data.layout,
      row_length=config.data.row_length,
      groups=checked.executor.groups,
      per_line=attention_kernels.sequences_per_line(
        attention, model_config, checked.executor.devices[0]
      ),
    ),
    checked.loss,
    tokenizer,
    model_config,
    sampling=dict(config.on_policy) if config.on_policy.reward else None,
    choose=choose,
  )
  _check_best(config, data)
  steps = steps_of(config.train.steps, config.train.epochs, data)
  if held_out is None:
    messages.show(summarize(steps, data))
  return Described(
    model_config=model_config,
    tokenizer=tokenizer,
    adapters=adapters,
    start=start,
    attention=attention,
    data=data,
    ledger=ledger,
    steps=steps,
  )


def _check_best(config: ConfigDict, data: datasets.TrainingData) -> None:
  """Checks that there are held-out rows to tell the best checkpoint by, if it is to be exported."""
  if not config.export.best:
    return
  if data.sampler:
    raise UserError(
      "export.best=True tells the best checkpoint by held-out completions, which on-policy training"
      " does not have; leave it False"
    )
  # Evaluation sets with names of their own have metrics of their own, and none decides.
  if not data.held_out or (data.groups and "" not in data.groups):
    raise UserError(
      "export.best=True needs held-out rows to tell the best checkpoint by; hold some out by"
      " --config.data.eval_fraction=0.1 or --eval_data=FILE, or leave it False"
    )


def steps_of(steps: int, epochs: float, data: datasets.TrainingData) -> int:
  """Returns the updates of a run: `steps`, or if that is 0 as many as `epochs` passes take."""
  passes = epochs * len(data.examples) / data.settings.batch_size
  # At least one step: a fraction of an epoch of a small file must not round to no training.
  return steps or max(1, round(passes))


def summarize(steps: int, data: datasets.TrainingData) -> str:
  """Returns one line on how often a run uses its data."""
  count, size = len(data.examples), data.settings.batch_size
  what = "prompts" if data.sampler else "examples"
  passes = f"{steps * size / count:.3g}"
  line = (
    f"{count:,} {what} to train on, {size} per update: {steps:,} update{'s' * (steps != 1)},"
    f" {passes} epoch{'s' * (passes != '1')}"
  )
  # Every epoch is in an order of its own, so what was last in one may be first in the next.
  ends = count * np.arange(1, steps * size // count + 1)
  spanning = int(np.sum((ends % size != 0) & (ends < steps * size)))
  if spanning:
    crosses = "update crosses" if spanning == 1 else "updates cross"
    line += f"; {spanning:,} {crosses} the end of an epoch and may use an example twice"
  return line


def data_settings(config: ConfigDict) -> reading.DataSettings:
  """Returns which rows are read, as plain values."""
  data = config.data
  return reading.DataSettings(
    path=data.path,
    eval_path=data.eval_path,
    eval_fraction=data.eval_fraction,
    eval_limit=data.eval_limit,
    eval_samples=config.eval.samples,
    # An empty name stands for the usual field.
    fields={k: v for k, v in data.fields.items() if v},
    max_length=data.max_length,
    prompt_floor=data.prompt_floor,
    truncation=data.truncation,
    verdict=data.verdict,
    train_on=data.train_on,
    on_bad_row=data.on_bad_row,
    mix=mixture.read_sources(data.mix.to_dict(), "data.mix"),
    eval_sets=mixture.read_evaluation_sets(data.eval_sets.to_dict(), "data.eval_sets"),
    drop_duplicates=data.drop_duplicates,
  )


def describe_adapters(config: ConfigDict) -> LoRA | None:
  """Returns how adapters are made, None where the model itself is trained.

  The folder of a reference store is looked at as well: like an adapter's, it is named by a section
  that no other description reads.
  """
  if config.reference.store:
    reference_cache.check(pathlib.Path(config.reference.store))
  section = config.lora
  if section.path:
    # Rank, scale and targets are the adapter's own; dropout is a choice of this training.
    adapters = peft.read_settings(section.path)[0]._replace(dropout=section.dropout)
    lora.check(adapters)
    return adapters
  return LoRA(**{k: v for k, v in section.items() if k != "path"}) if section.rank else None


def describe_model(section: ConfigDict, template: str = "") -> tuple[ModelConfig, Tokenizer]:
  """Returns the shape of the model and its tokenizer, no weights loaded.

  Args:
    section: `model` of a configuration.
    template: `data.template`, values that the chat template reads.
  """
  # Before the tokenizer is looked for in it, whose error would name another file.
  path = pathlib.Path(section.path)
  if section.path and not _has_config(path) and not peft.is_adapter(path):
    raise UserError(f"model.path: {model_folder.instead(section.path)}")
  tokenizer = load_tokenizer(
    section.tokenizer or section.path,
    template_arguments=chat_template.read_arguments(template, "data.template"),
  )
  if section.path and peft.is_adapter(section.path):
    raise UserError(
      f"model.path={section.path} is an adapter; name the model that it was trained on by --model,"
      f" and the adapter by --config.lora.path={section.path}"
    )
  if section.path:
    model_config = hf_checkpoint.read_config(section.path)
  else:
    # Of a model from random init, the tokenizer decides vocabulary and special ids, unless
    # `scratch` does.
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    fields = {"vocab_size": tokenizer.vocab_size} | special | section.scratch.to_dict()
    model_config = families.from_scratch(fields)
  # Ids beyond the embedding would be clipped in silence by a gather.
  encode.check_vocabulary(tokenizer, model_config.vocab)
  encode.report_end(tokenizer)
  return model_config, tokenizer


def _has_config(path: pathlib.Path) -> bool:
  """Returns True for a folder with the config.json of a model."""
  return (path / "config.json").is_file() and not model_folder.is_run(path)


def choose_attention(config: ConfigDict, model_config: ModelConfig, executor: Executor) -> str:
  """Returns the attention that a run uses; reports why where it is not the one requested."""
  name = config.model.attention
  taken, why = attention_kernels.choose(
    name,
    model_config,
    dtype=config.model.compute_dtype,
    device=executor.devices[0],
  )
  # Reported: a slower implementation, taken in silence, would look like a slow machine.
  if why:
    messages.warn(f"model.attention is {name}, but {why}: {taken} is taken")
  return taken


def _warn_of_positions(max_length: int, model_config: ModelConfig) -> None:
  """Reports a limit of rows that is beyond the model's positions, before the data is read."""
  positions = model_config.max_positions
  if max_length > positions:
    why = "rows that need more are refused"
    if model_config.positions != "learned":
      why = "it was not trained beyond them"
    messages.warn(
      f"data.max_length={max_length} exceeds the model's {positions:,} positions"
      f" (max_position_embeddings): {why}; set --max_length={positions}"
    )


def _check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
  """Checks that the reference reads ids as the policy does, as far as its folder says."""
  # A folder may have weights and no tokenizer; then there is nothing to compare.
  if not path or not (pathlib.Path(path) / "tokenizer.json").is_file():
    return
  if not tokenizer.same_ids(load_tokenizer(path)):
    raise UserError(
      f"the reference {path} has another tokenizer than the policy; the two must share one"
    )


def _check_shape(reference: ModelConfig, policy: ModelConfig, config: ConfigDict) -> None:
  """Checks that one compiled forward pass can serve both: all that shapes a log-prob agrees."""
  # Initial weights and special ids may differ: no log-prob depends on them.
  for field in dataclasses.fields(policy):
    ours, theirs = getattr(policy, field.name), getattr(reference, field.name)
    if field.name not in ("init_std", "bos_id", "eos_ids", "pad_id") and ours != theirs:
      raise UserError(
        f"the reference {config.reference.path} has {field.name} {theirs!r}, the policy {ours!r};"
        " they must be of one shape and share one tokenizer"
      )


def check_balance(config: ConfigDict, model_config: ModelConfig) -> None:
  """Checks that a weight for spreading tokens over experts is for a model that has some."""
  weight = config.train.router_balance
  if weight is None:
    return
  if not model_config.experts:
    raise UserError(
      f"train.router_balance is {weight}, but {model_config.family} has no experts; leave it None"
    )
  if not 0 <= weight < float("inf"):
    raise UserError(f"train.router_balance is {weight}; it must be 0 or above")
