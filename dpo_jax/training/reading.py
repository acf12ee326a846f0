"""Rows of a run, as they are read: to train on and held out, before batches are made of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_jax import losses
from dpo_jax.data import encode, readers
from dpo_jax.data import prepared as prepared_data
from dpo_jax.data.examples import Example, Lazy, Measured, fill_up, split, with_mismatched
from dpo_jax.data.ledger import summarize
from dpo_jax.data.mixture import Source
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.structs import UserError
from dpo_jax.training import sources, splits
from dpo_jax.training.sources import Part
from dpo_jax.utils import messages


class DataSettings(NamedTuple):
  """Plain values of the sections data and eval: the rows that are read, and how they are cut.

  Attributes:
    path: file or prepared set to train on.
    eval_path: held-out rows; "" sets some of `path` aside.
    eval_fraction: share of the prompts of `path` that is then held out.
    eval_limit: at most so many held-out rows.
    eval_samples: completions sampled at every evaluation; above 0 some row must be held out.
    fields: names of the fields of rows of another form.
    max_length: tokens of a prompt and one completion together.
    prompt_floor: tokens of a prompt that are never cut.
    truncation: "drop" or "cut".
    verdict, train_on, on_bad_row: as in `encode.Encoder`.
    mix: the sources to train on in place of `path`.
    eval_sets: evaluation sets with names, besides `eval_path`.
    drop_duplicates: whether exact duplicates are dropped, within training rows over all sources
      and within every evaluation set.
    held_out: the rows that a run held out, as its workdir names them, to evaluate it again: only
      these are read, and stand for those to train on too. None for a run that is to train.
  """

  path: str
  eval_path: str
  eval_fraction: float
  eval_limit: int
  eval_samples: int
  fields: dict[str, str]
  max_length: int
  prompt_floor: int
  truncation: str
  verdict: str = ""
  train_on: str = "assistant"
  on_bad_row: str = "stop"
  mix: tuple[Source, ...] = ()
  eval_sets: tuple[Source, ...] = ()
  drop_duplicates: bool = False
  held_out: tuple[splits.Row, ...] | None = None


class Read(NamedTuple):
  """Rows as they are read, before anything depends on the seed or the limits of evaluation.

  Attributes:
    examples, held_out: to train on, and the part of the training data that is held out.
    ledger: counts of rows.
    parts: sources of the training data; none where it is a prepared set or is not trained on.
    evaluated: evaluation sets.
  """

  examples: Sequence[Example]
  held_out: list[Example]
  ledger: dict[str, Any]
  parts: list[Part]
  evaluated: list[Part]


def check_named(field: str, path: str) -> None:
  """Checks that a field names files that are there, if it names any."""
  try:
    if path and not prepared_data.is_prepared_set(path):
      readers.files(path)
  except UserError as error:
    raise UserError(f"{field}: {error}") from None


def _encoding(data: DataSettings, loss: losses.Loss) -> dict[str, Any]:
  """Returns how rows become examples, as keyword arguments of `encode.Encoder`."""
  return {
    "kind": loss.kind,
    "max_length": data.max_length,
    "prompt_floor": data.prompt_floor,
    "truncation": data.truncation,
    "fields": data.fields,
    "verdict": data.verdict,
    "train_on": data.train_on,
    "on_bad_row": data.on_bad_row,
    # A column that the loss does not read must not stop the run.
    "scores": loss.reads("margin_B"),
  }


def read_all(
  data: DataSettings, seed: int, loss: losses.Loss, tokenizer: Tokenizer, positions: int
) -> Read:
  """Reads all rows, and holds some out where no evaluation set is named."""
  encoding, unique = _encoding(data, loss), data.drop_duplicates
  how = encoding | {"positions": positions}
  examples: Sequence[Example]
  held_out: list[Example] = []
  parts: list[Part] = []
  if prepared_data.is_prepared_set(data.path):
    examples, held_out, ledger = _read_prepared(data, encode.Encoder(tokenizer, **encoding))
    messages.show(summarize(data.path, ledger, positions=positions, prepared=True))
  else:
    given = data.mix or (Source("", data.path),)
    parts = sources.read(given, "data.mix", tokenizer, loss, seed=seed, unique=unique, **how)
    examples, ledger = sources.join(parts)
  evaluated = sources.read_evaluation_sets(
    data.eval_path, data.eval_sets, tokenizer, loss, ledger, unique=unique, **how
  )
  if parts:
    if not (data.eval_path or data.eval_sets):
      # By prompt, and by the seed alone: a resumed run holds out the same rows, and no prompt is
      # on both sides.
      examples, held_out = split(examples, data.eval_fraction, seed, ledger["dropped"])
    sources.report_overlap(parts, examples, evaluated, ledger)
  return Read(examples, held_out, ledger, parts, evaluated)


def read_held_out(
  data: DataSettings,
  rows: Sequence[splits.Row],
  loss: losses.Loss,
  tokenizer: Tokenizer,
  positions: int,
) -> Read:
  """Reads the rows that a run held out, to evaluate it again; they stand for all examples."""
  how = _encoding(data, loss) | {"positions": positions, "unique": data.drop_duplicates}
  # Sources of the training data whole: which rows were drawn is said by the rows themselves.
  given = data.mix or (Source("", data.path),)
  if data.eval_path or data.eval_sets:
    given = ()
  whole = [one._replace(count=0, fraction=0.0) for one in given]
  evaluated = sources.read(whole, "data.mix", tokenizer, loss, **how)
  evaluated += sources.read_evaluation_sets(
    data.eval_path, data.eval_sets, tokenizer, loss, {}, **how
  )
  evaluated = [splits.select(rows, part) for part in evaluated]
  examples, ledger = sources.join(evaluated)
  return Read(examples, list(examples), ledger, [], evaluated)


def fit_to_loss(
  examples: Sequence[Example],
  sets: list[Sequence[Example]],
  data: DataSettings,
  seed: int,
  loss: losses.Loss,
) -> tuple[Sequence[Example], list[Sequence[Example]]]:
  """Adds what the loss reads beside the rows: mismatched completions, and places up to K.

  Raises:
    UserError: the loss reads something that the rows do not have.
  """
  if loss.mismatched:
    # After the split, so that no completion of one side is paired with a prompt of the other.
    mismatch = functools.partial(with_mismatched, max_length=data.max_length, seed=seed)
    examples, sets = mismatch(examples), [mismatch(some) for some in sets]
  if loss.kind == "ranked":
    sources.check_completions(loss, data.path, examples)
    # One number of completions for training and evaluation: K is an axis of both.
    most = Measured.concatenate(examples, *sets).tokens_BK.shape[1]
    sets = [fill_up(some, most) for some in sets]
    if isinstance(examples, prepared_data.PairSet):
      examples = examples.widened(most)  # its examples stay on disk
    else:
      examples = fill_up(examples, most)
  sources.check_scores(loss, data.path, examples)
  return examples, sets


def _read_prepared(
  data: DataSettings, encoder: encode.Encoder
) -> tuple[Lazy, list[Example], dict[str, Any]]:
  """Reads both splits of a prepared set and its ledger; examples to train on stay on disk."""
  if encoder.fields:
    raise UserError(
      f"data.fields names {', '.join(encoder.fields)}, but {data.path} is a prepared set, whose"
      " fields were read when it was made; leave it out"
    )
  if data.drop_duplicates:
    raise UserError(
      f"data.drop_duplicates is True, but {data.path} is a prepared set, whose rows were chosen"
      " when it was made; leave it False, or name the rows that it was made of"
    )
  fraction = None if data.eval_path or data.eval_sets else data.eval_fraction
  examples, held_out, ledger = prepared_data.read(data.path, encoder, eval_fraction=fraction)
  if held_out:  # those beyond the limit stay on disk
    ledger = ledger | {"held_out": {"examples": len(held_out)}}
  return examples, held_out[: data.eval_limit] if held_out else [], ledger
