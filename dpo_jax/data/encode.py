"""Rows to examples: tokenised, cut to the window, and every row of them accounted for.

What a row becomes is a function of the row and the encoder alone, so that any number of processes
gives the same examples in the same order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import collate, formats, packing, readers
from dpo_jax.data.examples import Example, Measured, fill_up, lengths, truncate
from dpo_jax.data.fields import Preference
from dpo_jax.data.readers import Source
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.structs import UserError

# Of what is done here and below to make ids of a row; another number is another set.
RULES = 2
CHUNK = 1024  # rows tokenised at a time


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


def tell(name: object, ledger: Mapping[str, Any]) -> str:
  """One line on what became of the rows, from `Ledger.to_json`."""
  parts = [f"{ledger['rows']:,} rows ({ledger['format']}), {ledger['pairs']:,} kept"]
  parts += [f"{count:,} dropped: {reason}" for reason, count in ledger["dropped"].items()]
  parts += [f"{count:,} cut: {what}" for what, count in ledger["truncated"].items()]
  return f"{name}: " + ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """How rows become ids.

  Attributes:
    tokenizer: of the model.
    kind: what is learned from the rows, "pairs", "text", "unpaired" or "ranked": see
      `readers.detect`.
    max_length: tokens of a prompt and one answer together, or None for no limit.
    prompt_floor, truncation: see `examples.truncate`.
    fields: field map of `readers.detect`.
  """

  tokenizer: Tokenizer
  kind: str = "pairs"
  max_length: int | None = None
  prompt_floor: int = 64
  truncation: str = "drop"
  fields: dict[str, str] | None = None

  def __call__(self, chunk: _Chunk) -> list[Encoded | Dropped]:
    """What each row of a chunk becomes."""
    with _at(chunk.first) as row:
      form = readers.detect(row, self.fields, kind=self.kind)
    out: list[Encoded | Dropped] = []
    preferences, places = [], []
    for where, row in chunk.rows:
      try:
        with _at((where, row)):
          preferences.append(form.convert(row))
        places.append(len(out))
        out.append(Encoded(where))
      except readers.RowError as error:
        out.append(Dropped(where, str(error)))
    encoded = self.tokenizer.encode_preferences(preferences)
    for at, preference, result in zip(places, preferences, encoded, strict=True):
      if isinstance(result, readers.RowError):
        out[at] = Dropped(out[at].where, str(result))
      else:
        out[at] = self._cut(out[at].where, *result, preference)
    return out

  def form_of(self, first: tuple[str, readers.Row]) -> str:
    """The name of the form that a file's first row has."""
    with _at(first) as row:
      return readers.detect(row, self.fields, kind=self.kind).name

  def _cut(self, where, prompt, completions, preference: Preference) -> Encoded | Dropped:
    largest = max(int(ids.max()) for ids in (prompt, *completions))
    if largest >= self.tokenizer.vocab_size:
      raise UserError(
        f"{where}: token id {largest} is not in the tokenizer, whose ids go to"
        f" {self.tokenizer.vocab_size - 1}; the rows were made with another"
      )
    before = (prompt, *completions)
    kept = truncate(
      prompt,
      completions,
      max_length=self.max_length,
      prompt_floor=self.prompt_floor,
      mode=self.truncation,
      bos_id=self.tokenizer.bos_id if self.tokenizer.adds_bos else None,
    )
    if kept is None:
      return Dropped(where, "too long", max(map(len, completions)))
    prompt, completions, cuts = kept
    if any(np.array_equal(one, other) for one, other in itertools.combinations(completions, 2)):
      return Dropped(where, "equal answers after cutting")
    lost = tuple(len(a) - len(b) for a, b in zip(before, (prompt, *completions), strict=True))
    return Encoded(where, prompt, completions, preference.scores, preference.weight, cuts, lost)


class _Chunk(NamedTuple):
  """Rows with where they stand, and the first of their file, which says what form they have."""

  first: tuple[str, readers.Row]
  rows: list[tuple[str, readers.Row]]


class Encoded(NamedTuple):
  """A row as token ids, what was cut, and how many tokens the prompt and every answer lost."""

  where: str
  prompt: Any = None
  completions: tuple[np.ndarray, ...] = ()
  scores: tuple[float, ...] = ()
  weight: float = 1.0
  cuts: tuple[str, ...] = ()
  lost: tuple[int, ...] = ()

  def examples(self, row: int, kind: str) -> list[Example]:
    """What the row gives: of unpaired rows, every answer by itself."""
    if kind != "unpaired":
      return [Example(self.prompt, self.completions, self.weight, row, self.scores)]
    return [
      Example(self.prompt, (ids,), self.weight, row, (score,))
      for ids, score in zip(self.completions, self.scores, strict=True)
    ]


class Dropped(NamedTuple):
  """Why a row is left out, and the tokens of its longest answer if that is for length."""

  where: str
  reason: str
  tokens: int = 0


# --- reading --------------------------------------------------------------------------------------


def load_examples(
  paths: Source | Sequence[Source],
  tokenizer: Tokenizer,
  *,
  limit: int | None = None,
  **how: Any,
) -> tuple[list[Example], Ledger, str]:
  """Reads, recognises, tokenises and cuts the rows of some files.

  Args:
    paths: one file or several, as `readers.files` has them, each of one form.
    tokenizer: of the model.
    limit: rows to read at most.
    how: the rest of `Encoder`.

  Returns:
    The examples, whose `row` counts the rows read from 0; the ledger; the forms of the rows,
    joined by commas. Unpaired examples have one answer, to which `with_mismatched` adds another;
    ranked ones are filled up to the most answers that any has.
  """
  encoder, ledger = Encoder(tokenizer, **how), Ledger()
  examples = list(stream_examples(paths, encoder, ledger, limit=limit))
  if encoder.kind == "ranked":
    examples = fill_up(examples)
  ledger.tokens = count_tokens(examples)
  return examples, ledger, ledger.format


def stream_examples(
  paths: Source | Sequence[Source],
  encoder: Encoder,
  ledger: Ledger,
  *,
  limit: int | None = None,
  workers: int = 0,
) -> Iterator[Example]:
  """Examples as they are read, in order, few of them in memory at a time.

  Args:
    paths, limit: as in `load_examples`.
    encoder: how rows become ids.
    ledger: is filled on the way, all but its tokens.
    workers: processes that tokenise; 0 for this one.
  """
  files = readers.files(paths)
  if encoder.kind == "unpaired":
    ledger.labels = {"desirable": 0, "undesirable": 0}
  shortest = None  # tokens of the longest answer, least over the pairs that are too long
  has_scores = None
  for form, outcomes in _outcomes(files, encoder, limit, workers):
    known = ledger.format.split(", ") if ledger.format else []
    ledger.format = ", ".join(dict.fromkeys([*known, form]))
    for found in outcomes:
      row, ledger.rows = ledger.rows, ledger.rows + 1
      if isinstance(found, Dropped):
        ledger.dropped[found.reason] += 1
        if found.tokens:
          shortest = min(found.tokens, shortest or found.tokens)
        continue
      has_scores = bool(found.scores) if has_scores is None else has_scores
      if bool(found.scores) != has_scores:
        had, has = ("a", "none") if has_scores else ("no", "one")
        raise UserError(
          f"{found.where}: the rows before have {had} score or margin and this one has {has}; give"
          " one to every row or to none"
        )
      ledger.truncated.update(found.cuts)
      ledger.pairs += 1
      for example in found.examples(row, encoder.kind):
        if encoder.kind == "unpaired":
          ledger.labels["desirable" if example.scores[0] == 1 else "undesirable"] += 1
        yield example
  if not ledger.pairs:
    raise UserError(_nothing_left(ledger, files, encoder.max_length, shortest))


def first_rows(
  paths: Source | Sequence[Source], encoder: Encoder, count: int
) -> Iterator[Encoded | Dropped]:
  """What becomes of each of the first rows."""
  for _, outcomes in _outcomes(readers.files(paths), encoder, count, workers=0):
    yield from outcomes


def _outcomes(
  files: Sequence[Source], encoder: Encoder, limit: int | None, workers: int
) -> Iterator[tuple[str, list[Encoded | Dropped]]]:
  """The form and the outcomes of every chunk, in order."""
  chunks = _chunks(files, limit)
  if not workers:
    yield from ((encoder.form_of(chunk.first), encoder(chunk)) for chunk in chunks)
    return
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(workers, context, _start, (encoder,)) as pool:
    # A few more than are being worked at: what is read ahead is held in memory.
    waiting: collections.deque = collections.deque()
    for chunk in chunks:
      waiting.append((encoder.form_of(chunk.first), pool.submit(_encode, chunk)))
      if len(waiting) > 2 * workers:
        form, outcome = waiting.popleft()
        yield form, outcome.result()
    yield from ((form, outcome.result()) for form, outcome in waiting)


_encoder: Encoder  # of a worker


def _start(encoder: Encoder) -> None:
  global _encoder
  _encoder = encoder


def _encode(chunk: _Chunk) -> list[Encoded | Dropped]:
  return _encoder(chunk)


def _chunks(files: Sequence[Source], limit: int | None) -> Iterator[_Chunk]:
  """At most `limit` rows of some files, many at a time."""
  left = limit
  for path in files:
    rows = itertools.islice(readers.read_rows(path), left)
    first = None
    while chunk := list(itertools.islice(rows, CHUNK)):
      first = first or chunk[0]
      left = None if left is None else left - len(chunk)
      yield _Chunk(first, chunk)


def read_fields(given: Sequence[str]) -> dict[str, str]:
  """A field map from `prompt=question` and the like."""
  wrong = [pair for pair in given if "=" not in pair]
  if wrong:
    raise UserError(f"--fields {wrong[0]} is no name=name; as in --fields prompt=question")
  fields = dict(pair.split("=", 1) for pair in given)
  for name in fields:
    if name not in formats.KNOWN:
      near = difflib.get_close_matches(name, formats.KNOWN, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(formats.KNOWN)}"
      raise UserError(f"--fields {name}=…: no form of row has a field {name!r}; {hint}")
  return fields


def detect_kind(paths: str | Sequence[str], fields: dict[str, str] | None = None) -> str:
  """What the rows of some files are, from the first: see `readers.detect_kind`."""
  with _at(next(readers.read_rows(readers.files(paths)[0]))) as row:
    return readers.detect_kind(row, fields)


@contextlib.contextmanager
def _at(row: tuple[str, readers.Row]) -> Iterator[readers.Row]:
  """Says where a row stands in what is raised about it."""
  try:
    yield row[1]
  except UserError as error:
    raise UserError(f"{row[0]}: {error}") from None


def count_tokens(examples: Sequence[Example] | Measured) -> dict[str, int]:
  """`Ledger.tokens` of some examples, of which their lengths suffice."""
  prompt_B, tokens_BK = lengths(examples)
  cost = lambda layout: int(packing.costs(prompt_B, tokens_BK, layout).sum())
  return {
    "prompt": int(prompt_B.sum()),
    "answer": int(tokens_BK.sum()),
    "padding": collate.count_padding(examples, batch_size=32),
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


def check_vocabulary(tokenizer: Tokenizer, vocab: int) -> None:
  """Every id of the tokenizer is one the model can score."""
  if tokenizer.vocab_size > vocab:
    raise UserError(
      f"the tokenizer's ids go to {tokenizer.vocab_size - 1} and the model's vocabulary is {vocab};"
      " name the tokenizer that belongs to the model"
    )
