"""Turns rows into examples: tokenizes them, truncates them, and counts every row in a ledger.

The result for a row depends only on the row and the encoder, so the examples and their order do not
depend on the number of worker processes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import canonical, detection, formats, left_out, readers, verdicts
from dpo_jax.data.detection import Reading
from dpo_jax.data.examples import Example, fill_up, truncate
from dpo_jax.data.fields import BadRow, Preference, Row, RowError
from dpo_jax.data.ledger import Ledger, count_tokens
from dpo_jax.data.readers import Source
from dpo_jax.data.tokenizer import Tokenizer, Tokens
from dpo_jax.structs import UserError
from dpo_jax.utils import interrupts, messages, progress

# Version of the rules by which this package turns rows into ids. Increase it with every change that
# gives other ids for the same row: prepared sets of another version are then refused.
RULES = 3
CHUNK = 1024  # rows that are tokenized at a time


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Turns rows into token ids. Worker processes receive a pickled copy of it.

  Attributes:
    tokenizer: of the model.
    kind: the kind of training, "pairs", "text", "unpaired" or "ranked": see `detection.detect`.
    max_length: most tokens of a prompt and one completion together, or None for no limit.
    prompt_floor, truncation: see `examples.truncate`.
    fields, verdict, train_on, scores: as in `detection.detect`.
    on_bad_row: "stop" at a malformed row, or "drop" and count it.
  """

  tokenizer: Tokenizer
  kind: str = "pairs"
  max_length: int | None = None
  prompt_floor: int = 64
  truncation: str = "drop"
  fields: dict[str, str] | None = None
  verdict: str = ""
  train_on: str = "assistant"
  scores: bool | None = None
  on_bad_row: str = "stop"

  def __post_init__(self) -> None:
    known = {
      "train_on": detection.TRAIN_ON,
      "on_bad_row": ("stop", "drop"),
      "verdict": ("", *verdicts.ENCODINGS),
    }
    for name, options in known.items():
      if (value := getattr(self, name)) not in options:
        raise UserError(f"data.{name} is {value!r}; choose {', '.join(filter(None, options))}")

  def __call__(self, chunk: _Chunk) -> list[Encoded | Dropped]:
    """Encodes a chunk: returns the ids of each row, or why it is dropped, in the order of the rows.

    Raises:
      UserError: a row is malformed; the message names its place in the file.
    """
    out: list[Encoded | Dropped] = []
    preferences, places = [], []
    for where, row in chunk.rows:
      try:
        with _naming_place(where):
          preferences.append(chunk.reading.convert(row))
        places.append(len(out))
        out.append(Encoded(where))  # replaced below
      except RowError as error:
        out.append(Dropped(where, str(error)))
      except BadRow as error:
        if self.on_bad_row == "stop":
          raise
        out.append(Dropped(where, error.reason, error=str(error)))
    # The whole chunk in one call: the tokenizer library spreads a batch over its threads.
    encoded = self.tokenizer.encode_preferences(preferences)
    for at, preference, result in zip(places, preferences, encoded, strict=True):
      if isinstance(result, RowError):
        out[at] = Dropped(out[at].where, str(result))
      else:
        out[at] = self._truncate(out[at].where, result, preference)
    return out

  def read(self, path: Source) -> Reading:
    """Returns how the rows of a file are read, from its first rows and all its verdicts."""
    rows = list(itertools.islice(_expanded(path), detection.SAMPLE))
    with _naming_place(rows[0][0]):
      return detection.detect(
        [row for _, row in rows],
        self.fields,
        kind=self.kind,
        verdict=self.verdict,
        train_on=self.train_on,
        scores=self.scores,
        every_row=lambda: (row for _, row in _expanded(path)),
      )

  def _truncate(self, where: str, tokens: Tokens, preference: Preference) -> Encoded | Dropped:
    prompt, completions, _ = tokens
    # Rows of token ids may come from another tokenizer. On the device an id out of range does not
    # fail: JAX clamps indices.
    largest = max(int(ids.max()) for ids in (prompt, *completions))
    if largest >= self.tokenizer.vocab_size:
      raise UserError(
        f"{where}: token id {largest} is not in the tokenizer, whose ids go to"
        f" {self.tokenizer.vocab_size - 1}; name the tokenizer that the rows were made with"
      )
    before = (prompt, *completions)
    kept = truncate(
      *tokens,
      max_length=self.max_length,
      prompt_floor=self.prompt_floor,
      mode=self.truncation,
      # Only a BOS that the tokenizer adds is kept; one that a template wrote is cut as text is.
      bos_id=self.tokenizer.bos_id if self.tokenizer.adds_bos else None,
    )
    length = len(prompt) + max(map(len, completions))
    if kept is None:
      return Dropped(where, "too long", max(map(len, completions)), length=length)
    prompt, completions, token_weights, cuts = kept
    # They were different before: what differed was cut off.
    if any(np.array_equal(one, other) for one, other in itertools.combinations(completions, 2)):
      return Dropped(where, "equal completions after cutting", length=length)
    # What the assistant wrote was cut off, and only context was before it.
    if not all(weights.any() for weights in token_weights):
      return Dropped(where, "no scored token after cutting", length=length)
    lost = tuple(len(a) - len(b) for a, b in zip(before, (prompt, *completions), strict=True))
    about = preference.scores, preference.weight, cuts, lost
    return Encoded(where, prompt, completions, *about, token_weights, length)


class _Chunk(NamedTuple):
  """Some rows of a file with their places, and how the rows of that file are read."""

  reading: Reading
  rows: list[tuple[str, Row]]


class Encoded(NamedTuple):
  """A row as token ids.

  Attributes:
    where: its place, "file:LINE".
    prompt, completions, scores, weight, token_weights: as in `Example`.
    cuts: what was truncated, a subset of ("prompt", "answer").
    lost: number of tokens cut from the prompt and from each completion.
    length: tokens of prompt and longest completion before they were cut.
  """

  where: str
  prompt: Any = None
  completions: tuple[np.ndarray, ...] = ()
  scores: tuple[float, ...] = ()
  weight: float = 1.0
  cuts: tuple[str, ...] = ()
  lost: tuple[int, ...] = ()
  token_weights: tuple[np.ndarray, ...] = ()
  length: int = 0

  def examples(self, row: int, kind: str) -> list[Example]:
    """Returns the examples of the row: one, or one per completion if they are unpaired."""
    whole = Example(
      self.prompt,
      self.completions,
      self.weight,
      row,
      self.scores,
      token_weights=self.token_weights,
    )
    if kind != "unpaired":
      return [whole]
    return [
      whole._replace(
        completions=(ids,), scores=(score,), token_weights=self.token_weights[k : k + 1]
      )
      for k, (ids, score) in enumerate(zip(self.completions, self.scores, strict=True))
    ]


class Dropped(NamedTuple):
  """A row that is left out.

  Attributes:
    where: its place, "file:LINE".
    reason: key of `Ledger.dropped`.
    tokens: tokens of its longest completion if it is too long, otherwise 0.
    error: what is wrong with it if it is malformed, otherwise "".
    length: tokens of prompt and longest completion if it was tokenized, otherwise 0.
  """

  where: str
  reason: str
  tokens: int = 0
  error: str = ""
  length: int = 0


# --- reading --------------------------------------------------------------------------------------


def load_examples(
  paths: Source | Sequence[Source],
  tokenizer: Tokenizer,
  *,
  limit: int | None = None,
  **options: Any,
) -> tuple[list[Example], Ledger, str]:
  """Reads, recognizes, tokenizes and truncates the rows of some files, all in memory.

  Args:
    paths: one file or several, as `readers.files` takes them; each has one format.
    tokenizer: of the model.
    limit: most rows to read.
    options: the other arguments of `Encoder`.

  Returns:
    The examples, whose `row` counts the rows read from 0; the ledger; the row formats, joined by
    commas. Unpaired examples have one completion, to which `with_mismatched` adds another; ranked
    ones are filled up to the largest number of completions.
  """
  encoder, ledger = Encoder(tokenizer, **options), Ledger()
  examples = []
  with progress.Progress("reading data", 0, "rows") as shown:
    for example in stream_examples(paths, encoder, ledger, limit=limit):
      examples.append(example)
      shown.reach(ledger.rows)
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
  """Yields examples in the order of their rows, with a few chunks of them in memory at a time.

  Args:
    paths, limit: as in `load_examples`.
    encoder: turns rows into ids.
    ledger: filled in while the examples are read, except `tokens`.
    workers: number of processes that tokenize; 0 for this process.

  Raises:
    UserError: no row is kept, or only some rows have scores.
  """
  files = readers.files(paths)
  if encoder.kind == "unpaired":
    ledger.labels = {"desirable": 0, "undesirable": 0}
  # Over the rows that are too long: the least tokens of a longest completion. The error below names
  # it, so that the user knows how far to raise max_length.
  shortest = None
  has_scores = None
  ledger.max_length = encoder.max_length
  for reading, outcomes in _outcomes(files, encoder, limit, workers):
    known = ledger.format.split(", ") if ledger.format else []
    ledger.format = ", ".join(dict.fromkeys([*known, *reading.name.split(", ")]))
    ledger.notes += [note for note in reading.notes if note not in ledger.notes]
    for found in outcomes:
      row, ledger.rows = ledger.rows, ledger.rows + 1
      if found.length:
        ledger.lengths[found.length] += 1
      if isinstance(found, Dropped):
        ledger.dropped[found.reason] += 1
        if found.error:
          ledger.bad.setdefault(found.reason, found.error)
        if found.tokens:
          shortest = min(found.tokens, shortest or found.tokens)
        continue
      # Without this check, a row without scores would count as one whose scores are 0.
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
    raise UserError(_no_rows_left(ledger, files, encoder.max_length, shortest))


def first_rows(
  paths: Source | Sequence[Source], encoder: Encoder, count: int
) -> Iterator[Encoded | Dropped]:
  """Yields the ids of each of the first `count` rows, or why it is dropped."""
  for _, outcomes in _outcomes(readers.files(paths), encoder, count, workers=0):
    yield from outcomes


def _outcomes(
  files: Sequence[Source], encoder: Encoder, limit: int | None, workers: int
) -> Iterator[tuple[Reading, list[Encoded | Dropped]]]:
  """Yields the reading and the encoded rows of every chunk, in order."""
  chunks = _chunks(files, encoder, limit)
  if not workers:
    yield from ((chunk.reading, encoder(chunk)) for chunk in chunks)
    return
  # spawn and not fork: the tokenizer library and pyarrow have threads, and a fork would copy their
  # locks as they are, perhaps taken.
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(workers, context, _init_worker, (encoder,)) as pool:
    # Results are taken in the order of submission, so the order of examples does not depend on
    # which worker is faster. Only a few chunks wait at a time: they are in memory.
    waiting: collections.deque = collections.deque()
    for chunk in chunks:
      with interrupts.blocked():  # workers are started here, and would each print a traceback
        waiting.append((chunk.reading, pool.submit(_encode_in_worker, chunk)))
      if len(waiting) > 2 * workers:
        reading, outcome = waiting.popleft()
        yield reading, outcome.result()
    yield from ((reading, outcome.result()) for reading, outcome in waiting)


_encoder: Encoder  # of a worker process; sent once and not with every chunk


def _init_worker(encoder: Encoder) -> None:
  global _encoder
  _encoder = encoder


def _encode_in_worker(chunk: _Chunk) -> list[Encoded | Dropped]:
  return _encoder(chunk)


def _chunks(files: Sequence[Source], encoder: Encoder, limit: int | None) -> Iterator[_Chunk]:
  """Yields at most `limit` rows of some files, in chunks that never span two files."""
  left = limit
  for path in files:
    if left == 0:
      return
    reading = encoder.read(path)
    rows = itertools.islice(_expanded(path), left)
    while chunk := list(itertools.islice(rows, CHUNK)):
      left = None if left is None else left - len(chunk)
      yield _Chunk(reading, chunk)


def _expanded(path: Source) -> Iterator[tuple[str, Row]]:
  """Yields the rows of a file with their places; a tree of messages gives several."""
  for where, row in readers.read_rows(path):
    yield from ((where, one) for one in canonical.expand(row))


def read_fields(given: Sequence[str]) -> dict[str, str]:
  """Parses the field map of a command line: `prompt=question`, ….

  Raises:
    UserError: an argument has no "=", or no row format has the field.
  """
  wrong = [pair for pair in given if "=" not in pair]
  if wrong:
    raise UserError(f"--fields {wrong[0]} is not name=name; as in --fields prompt=question")
  fields = dict(pair.split("=", 1) for pair in given)
  for ours, theirs in fields.items():
    if ours not in formats.FIELD_NAMES and theirs in formats.FIELD_NAMES:
      raise UserError(
        f"--fields {ours}={theirs}: our name of a field comes first, then that in the rows:"
        f" --fields {theirs}={ours}"
      )
  formats.check_field_names(fields, "--fields ")
  return fields


def detect_kind(paths: str | Sequence[str], fields: dict[str, str] | None = None) -> str:
  """Recognizes the kind of rows in some files, from the first one: see `detection.detect_kind`."""
  rows = list(itertools.islice(_expanded(readers.files(paths)[0]), detection.SAMPLE))
  with _naming_place(rows[0][0]):
    return detection.detect_kind([row for _, row in rows], fields)


@contextlib.contextmanager
def _naming_place(where: str) -> Iterator[None]:
  """Puts the place of a row before the message of any `UserError` raised about it."""
  try:
    yield
  except BadRow as error:
    raise error.at(where) from None
  except UserError as error:
    raise UserError(f"{where}: {error}") from None


def _no_rows_left(ledger: Ledger, paths, max_length: int | None, shortest: int | None) -> str:
  why = ", ".join(f"{reason}: {count}" for reason, count in ledger.dropped.most_common())
  count = "1 row" if ledger.rows == 1 else f"{ledger.rows} rows"
  line = f"no usable row in {', '.join(map(str, paths))}: {count}, dropped {why}"
  commonest = next((reason for reason, _ in ledger.dropped.most_common(1)), "")
  if shortest is not None:
    longer = ledger.longer(max_length)
    line += (
      f"; data.max_length is {max_length} and the shortest completions take {shortest} tokens:"
      f" --max_length={longer['percentiles'][str(left_out.KEPT)]} keeps {left_out.KEPT}%"
    )
  elif way := left_out.way_out(commonest):
    line += f"; {way}"
  return line


def report_end(tokenizer: Tokenizer) -> None:
  """Reports on stderr that completions of plain text, or all of them, have no end token."""
  if tokenizer.eos_id is not None:
    return
  names = " or ".join(map(tokenizer.token_text, tokenizer.end_ids))
  what = "completions have no end, and a model does not learn to stop"
  if names:
    what = f"turns of its chat template end with {names}, and plain texts have no end"
  messages.warn(
    f"the tokenizer names no eos_token: {what}; name the token in tokenizer_config.json"
  )


def check_vocabulary(tokenizer: Tokenizer, vocab: int) -> None:
  """Checks that the tokens of ordinary text have a row in the model's embedding.

  Added tokens may lie beyond it: Gemma 3's tokenizer has one for images, which models of text alone
  have no row for. Whether a row of the data uses one is checked by `model.config.check_ids`.

  Raises:
    UserError: the tokenizer belongs to another model.
  """
  if tokenizer.text_vocab_size > vocab:
    raise UserError(
      f"the tokenizer's ids go to {tokenizer.text_vocab_size - 1} and the model's vocabulary is"
      f" {vocab}; name the tokenizer that belongs to the model"
    )
