"""Data files to batches: the ledger of what became of every row, order, batching and resume."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import packing, sources
from dpo_jax.data.chat import Tokenizer
from dpo_jax.data.layout import (
  Example,
  check_fits,
  collate,
  collate_many,
  fill_up,
  fit_row_length,
  fit_sizes,
  lengths,
  truncate,
)
from dpo_jax.data.packing import Sizes
from dpo_jax.structs import TokenBatch, UserError


@dataclasses.dataclass
class Ledger:
  """What became of the rows of a data set.

  Attributes:
    format: the form of the rows.
    rows: rows read.
    pairs: rows kept, be they pairs, texts, judged or ranked answers.
    dropped: reason to number of rows.
    truncated: "prompt" and "answer" to the number of kept rows so cut.
    tokens: of the kept rows: "prompt" (counted once an example), "answer", "shared" (copies of
      prompt tokens that the shared layout saves) and "padding" (of the rows that hold them), all
      without the mismatched answers that unpaired examples get later.
    labels: "desirable" and "undesirable" to the number of answers judged so.
  """

  format: str = ""
  rows: int = 0
  pairs: int = 0
  dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  truncated: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  tokens: dict[str, int] = dataclasses.field(
    default_factory=lambda: {"prompt": 0, "answer": 0, "padding": 0, "shared": 0}
  )
  labels: dict[str, int] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """One object of plain values; labels only where there are any."""
    found = dataclasses.asdict(self) | {
      "dropped": dict(self.dropped),
      "truncated": dict(self.truncated),
    }
    return {name: value for name, value in found.items() if name != "labels" or value}


def load_examples(
  paths: str | pathlib.Path | Sequence[str | pathlib.Path],
  tokenizer: Tokenizer,
  *,
  kind: str = "pairs",
  max_length: int | None = None,
  prompt_floor: int = 64,
  truncation: str = "drop",
  fields: dict[str, str] | None = None,
  limit: int | None = None,
) -> tuple[list[Example], Ledger, str]:
  """Reads, recognises, tokenises and cuts the rows of some files.

  Args:
    paths: one file or several, as `sources.files` has them, each of one form.
    tokenizer: of the model.
    kind: what is learned from them, "pairs", "text", "unpaired" or "ranked": see `sources.detect`.
    max_length: tokens of a prompt and one answer together, or None for no limit.
    prompt_floor, truncation: see `layout.truncate`.
    fields: field map of `sources.detect`.
    limit: rows to read at most.

  Returns:
    The examples, whose `row` counts the rows read from 0; the ledger; the forms of the rows,
    joined by commas. Unpaired examples have one answer, to which `with_mismatched` adds another;
    ranked ones are filled up to the most answers that any has.
  """
  paths = sources.files(paths)
  ledger = Ledger()
  cut = {
    "max_length": max_length,
    "prompt_floor": prompt_floor,
    "mode": truncation,
    "bos_id": tokenizer.bos_id if tokenizer.adds_bos else None,
  }
  examples: list[Example] = []
  shortest = None  # tokens of the longest answer, least over the pairs that are too long
  graded = None
  forms: list[str] = []
  for form, chunk in _chunks(paths, fields, kind, limit):
    forms.append(form.name)
    for where, row, prompt, texts, grades in _encode(chunk, form, tokenizer, ledger):
      graded = bool(grades) if graded is None else graded
      if bool(grades) != graded:
        had, has = ("a", "none") if graded else ("no", "one")
        raise UserError(
          f"{where}: the rows before have {had} score or margin and this one has {has}; give one to"
          " every row or to none"
        )
      longest = max(map(len, texts))
      kept = truncate(prompt, texts, **cut)
      if kept is None:
        shortest = min(longest, shortest or longest)
        ledger.dropped["too long"] += 1
        continue
      prompt, texts, cuts = kept
      if any(np.array_equal(one, other) for one, other in itertools.combinations(texts, 2)):
        ledger.dropped["equal answers after cutting"] += 1
        continue
      ledger.truncated.update(cuts)
      ledger.pairs += 1
      if kind == "unpaired":  # of a pair, either answer is judged by itself
        each = zip(texts, grades, strict=True)
        examples += [Example(prompt, (text,), row=row, grades=(grade,)) for text, grade in each]
      else:
        examples.append(Example(prompt, texts, row=row, grades=grades))
  ledger.format = ", ".join(dict.fromkeys(forms))
  if not examples:
    raise UserError(_nothing_left(ledger, paths, max_length, shortest))
  if kind == "ranked":
    examples = fill_up(examples)
  if kind == "unpaired":
    desirable = sum(example.grades[0] == 1 for example in examples)
    ledger.labels = {"desirable": desirable, "undesirable": len(examples) - desirable}
  ledger.tokens = _count_tokens(examples)
  return examples, ledger, ledger.format


def check_vocabulary(tokenizer: Tokenizer, vocab: int) -> None:
  """Every id of the tokenizer is one the model can score."""
  if tokenizer.vocab_size > vocab:
    raise UserError(
      f"the tokenizer's ids go to {tokenizer.vocab_size - 1} and the model's vocabulary is {vocab};"
      " name the tokenizer that belongs to the model"
    )


def _chunks(
  paths: Sequence, fields: dict[str, str] | None, kind: str, limit: int | None
) -> Iterator[tuple[sources.Form, list[tuple[str, sources.Row]]]]:
  """At most `limit` rows of some files, many at a time, with the form of the file they are of."""
  left = limit
  for path in paths:
    rows = itertools.islice(sources.read_rows(path), left)
    form = None
    while chunk := list(itertools.islice(rows, 1024)):
      if form is None:
        with _at(chunk[0]) as row:
          form = sources.detect(row, fields, kind=kind)
      left = None if left is None else left - len(chunk)
      yield form, chunk


def detect_kind(paths: str | Sequence[str], fields: dict[str, str] | None = None) -> str:
  """What the rows of some files are, from the first: see `sources.detect_kind`."""
  with _at(next(sources.read_rows(sources.files(paths)[0]))) as row:
    return sources.detect_kind(row, fields)


@contextlib.contextmanager
def _at(row: tuple[str, sources.Row]) -> Iterator[sources.Row]:
  """Says where a row stands in what is raised about it."""
  try:
    yield row[1]
  except UserError as error:
    raise UserError(f"{row[0]}: {error}") from None


class _Encoded(NamedTuple):
  """A row as token ids: where it stands, its number, prompt, answers and grades."""

  where: str
  row: int
  prompt: np.ndarray
  answers: tuple[np.ndarray, ...]
  grades: tuple[float, ...]


def _encode(
  chunk: Sequence[tuple[str, sources.Row]],
  form: sources.Form,
  tokenizer: Tokenizer,
  ledger: Ledger,
) -> Iterator[_Encoded]:
  """The rows of a chunk that hold something; counts the rest."""
  found = []
  for where, row in chunk:
    number = ledger.rows
    ledger.rows += 1
    try:
      with _at((where, row)):
        found.append((number, where, form.convert(row)))
    except sources.RowError as error:
      ledger.dropped[str(error)] += 1
  encoded = tokenizer.encode_preferences([preference for _, _, preference in found])
  for (number, where, preference), result in zip(found, encoded, strict=True):
    if isinstance(result, sources.RowError):
      ledger.dropped[str(result)] += 1
      continue
    largest = max(int(ids.max()) for ids in (result[0], *result[1]))
    if largest >= tokenizer.vocab_size:
      raise UserError(
        f"{where}: token id {largest} is not in the tokenizer, whose ids go to"
        f" {tokenizer.vocab_size - 1}; the rows were made with another"
      )
    yield _Encoded(where, number, *result, preference.grades)


def _count_tokens(examples: Sequence[Example]) -> dict[str, int]:
  prompt_B, tokens_BK = lengths(examples)
  cost = lambda layout: int(packing.costs(prompt_B, tokens_BK, layout).sum())
  return {
    "prompt": int(prompt_B.sum()),
    "answer": int(tokens_BK.sum()),
    "padding": count_padding(examples, batch_size=32),
    "shared": cost("packed") - cost("shared"),
  }


def _nothing_left(ledger: Ledger, paths, max_length: int | None, shortest: int | None) -> str:
  why = ", ".join(f"{reason}: {count}" for reason, count in ledger.dropped.most_common())
  line = f"no row is of use in {', '.join(map(str, paths))}: {ledger.rows} rows, dropped {why}"
  if shortest is not None:
    line += (
      f"; max_length is {max_length} and the shortest answers take {shortest} tokens, raise"
      " max_length or let answers be cut"
    )
  return line


def count_padding(
  examples: Sequence[Example],
  *,
  batch_size: int,
  layout: str = "shared",
  row_length: int | None = None,
) -> int:
  """Tokens of padding in the rows taken by one pass over the examples, in order."""
  length = _rows(examples, layout, row_length, 1)["row_length"]
  rows = sum(
    packing.place(*lengths(examples[i : i + batch_size]), layout, length).rows
    for i in range(0, len(examples), batch_size)
  )
  real = packing.costs(*lengths(examples), "shared" if layout == "shared" else "packed").sum()
  return rows * length - int(real)


def order(count: int, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> Any:
  """Which of `count` rows are in batch k, without end: a Grain data set of lists of indices.

  Every epoch is shuffled anew; batch k is a pure function of the arguments and k.
  """
  import grain  # loads jax, which only training needs

  rows = grain.MapDataset.source(range(count)).seed(seed)
  if shuffle:
    rows = rows.shuffle()
  return rows.repeat().batch(batch_size, drop_remainder=True, batch_fn=list)


def batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  accumulate: int = 1,
  seed: int = 0,
  layout: str = "shared",
  row_length: int | None = None,
  groups: int = 1,
  shuffle: bool = True,
  start: int = 0,
) -> Iterator[TokenBatch]:
  """Batches without end, reshuffled every epoch; batch k is a pure function of (data, seed, k).

  Args:
    examples: the pairs.
    batch_size: pairs a step, over all its micro-batches; the order of pairs knows nothing else.
    accumulate: A, micro-batches of a step.
    seed: of the shuffle.
    layout: "shared", "packed" or "padded".
    row_length: L of packed and shared rows; None or 0 for one that suits the examples. Padded rows
      are as long as the longest text.
    groups: runs of rows that devices hold.
    shuffle: False keeps the order of the data.
    start: the step of the first batch; steps before it are skipped, not replayed.

  Returns:
    An iterator of `TokenBatch` of numpy arrays with A as the leading axis of every one.
  """
  import grain  # loads jax, which only training needs

  if batch_size % accumulate:
    raise UserError(
      f"batch size {batch_size} is not divisible by {accumulate} micro-batches;"
      f" try {batch_size // accumulate * accumulate or accumulate}"
    )
  micro = batch_size // accumulate
  rows = _rows(examples, layout, row_length, groups)
  sizes = _usual_sizes(examples, micro, accumulate, rows)

  def lay_out(picked: Sequence[int]) -> TokenBatch:
    chosen = [examples[i] for i in picked]
    return collate_many(
      [chosen[i : i + micro] for i in range(0, batch_size, micro)], sizes=sizes, **rows
    )

  steps = order(len(examples), batch_size, seed=seed, shuffle=shuffle).map(lay_out)
  # One thread keeps ahead of a training step; more only contend with it for cores.
  return iter(
    steps[start:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )


def eval_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  layout: str = "shared",
  row_length: int | None = None,
  groups: int = 1,
) -> Iterator[TokenBatch]:
  """Every example once, in order, all batches of one shape and without a micro-batch axis.

  What the last batch lacks has weight 0; `row_NS` says which data row each slot came from.
  """
  if not examples:
    return
  rows = _rows(examples, layout, row_length, groups)
  parts = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
  sizes = fit_sizes(parts, **rows)
  for part in parts:
    yield collate(part, sizes=sizes, **rows)


def _rows(examples: Sequence[Example], layout: str, row_length: int | None, groups: int) -> dict:
  """Keyword arguments of `collate`, every example known to fit."""
  if layout == "padded" or not row_length:
    row_length = fit_row_length(examples, layout)
  check_fits(examples, layout, row_length)
  return {"layout": layout, "row_length": row_length, "groups": groups}


def _usual_sizes(examples: Sequence[Example], size: int, accumulate: int, rows: dict) -> Sizes:
  """Sizes that suffice for the rows of three steps in four, from packing 64 random batches.

  A pure function of its arguments, so that every host and every resumed run finds the same.
  """
  rng = np.random.default_rng(0)
  few = len(examples) < size
  drawn = [[examples[i] for i in rng.choice(len(examples), size, replace=few)] for _ in range(64)]
  # A step has the rows of the largest of its micro-batches.
  sizes = fit_sizes(drawn, quantile=0.75 ** (1 / accumulate), **rows)
  # A batch that needs more scored tokens than any of these is rare, and rarer still with this.
  return sizes._replace(scored=sizes.scored + sizes.scored // 32)


def split(
  examples: Sequence[Example],
  eval_fraction: float,
  seed: int = 0,
  dropped: Mapping[str, int] | None = None,
) -> tuple[list[Example], list[Example]]:
  """Training and held-out examples; all examples of one prompt fall on the same side.

  Where all have the same prompt (texts that follow BOS alone) they are split one by one. Of rows
  `dropped` before, by reason, an error tells.
  """
  keys: list[bytes | int] = [example.prompt.tobytes() for example in examples]
  what = "distinct prompts"
  if len(set(keys)) < 2:
    keys, what = [*range(len(examples))], "rows"
  units = list(dict.fromkeys(keys))
  held = round(eval_fraction * len(units))
  if eval_fraction > 0 and not 0 < held < len(units):
    lost = ", ".join(f"{rows} dropped: {reason}" for reason, rows in (dropped or {}).items())
    raise UserError(
      f"eval fraction {eval_fraction} of {len(units)} {what}{lost and f' ({lost})'} leaves one side"
      " empty; set data.eval_fraction=0 to hold nothing out, or name other rows by data.eval_path"
    )
  order = np.random.default_rng(seed).permutation(len(units))
  away = {units[i] for i in order[:held]}
  pairs = list(zip(keys, examples, strict=True))
  train = [example for key, example in pairs if key not in away]
  return train, [example for key, example in pairs if key in away]


def with_mismatched(
  examples: Sequence[Example], *, max_length: int | None = None, seed: int = 0
) -> list[Example]:
  """Judged answers, each with an answer to another prompt behind its own prompt.

  What `kto` estimates the distance between policy and reference from. The other answer is that of
  the next example, in an order drawn once, whose prompt is another. It depends on nothing but the
  examples and the seed, so its log-probability under the reference is the same in every epoch; and
  where no two examples share a prompt every answer serves once. Held-out examples are to be split
  off before, so that no answer gets from one side to the other.

  Args:
    examples: each with one answer and its label.
    max_length: the window; an answer that goes beyond it is cut at its end.
    seed: of the order.

  Returns:
    The examples in their order, with answers (judged, mismatched) and the label as both grades.
  """
  if not examples:
    return []
  size = len(examples)
  order = np.random.default_rng(seed).permutation(size).tolist()
  keys = [examples[i].prompt.tobytes() for i in order]
  if len(set(keys)) < 2:
    raise UserError(
      f"all {size} judged answers are to one prompt, and kto needs answers to others; give rows of"
      " two prompts or more, both to train on and to hold out (data.eval_fraction=0 holds none out)"
    )
  # Backwards round the circle, from an example whose next one has another prompt.
  start = next(at for at in range(size) if keys[at] != keys[(at + 1) % size])
  partner = list(range(size))
  for at in range(start, start - size, -1):
    at, after = at % size, (at + 1) % size
    partner[at] = after if keys[at] != keys[after] else partner[after]
  found = list(examples)
  for at, other in enumerate(partner):
    example, (answer, *_) = examples[order[at]], examples[order[other]].answers
    if max_length is not None:
      answer = answer[: max_length - len(example.prompt)]
    found[order[at]] = example._replace(
      answers=(example.answers[0], answer), grades=example.grades[:1] * 2
    )
  return found
