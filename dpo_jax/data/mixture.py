"""Mixes: training examples from several sources, in the numbers and shares that a user wants.

`count` and `fraction` choose which rows of a source are used, once for the whole run. `weight` says
how often: the share of all sampled examples that come from the source. An epoch has as many
examples as all sources have together. A source with a small share is then used in part, and the
next epoch goes on where this one ended; one with a large share is used several times.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import formats, verdicts
from dpo_jax.data.examples import Example
from dpo_jax.structs import UserError

# Metrics with these names would be mixed up with those of a source or an evaluation set.
RESERVED = ("by_source", "drift", "logps", "margins", "rewards", "router", "sampled")


class Source(NamedTuple):
  """One source of a mix, or one evaluation set.

  Attributes:
    name: the name that metrics and the ledger have it under; "" for the only one.
    path: files or a data set, as `readers.files` takes them.
    fields, verdict: how its rows are read; None for the values that all rows have.
    count: number of rows to draw without replacement; 0 for all.
    fraction: share of its rows to draw without replacement; 0 for all.
    weight: share of the examples of an epoch, in proportion to other weights; 0 where no source of
      the mix has one: every example is then used once in an epoch.
  """

  name: str
  path: str
  fields: dict[str, str] | None = None
  verdict: str | None = None
  count: int = 0
  fraction: float = 0.0
  weight: float = 0.0


_OPTIONS = Source._fields[1:]
_OF_EVALUATION = ("path", "fields", "verdict")


def read_sources(
  given: Mapping[str, Any], field: str, *, options: Collection[str] = _OPTIONS
) -> tuple[Source, ...]:
  """Reads the description of a mix: name -> path, or name -> options.

  Args:
    given: such as `{"a": "a.jsonl", "b": {"path": "b.jsonl", "weight": 2.0}}`.
    field: name of the field of the configuration, for errors.
    options: the options that a source may have.

  Raises:
    UserError: a name, an option or a value that cannot be used.
  """
  sources = tuple(_read_source(name, one, field, options) for name, one in given.items())
  unweighted = [source.name for source in sources if not source.weight]
  if 0 < len(unweighted) < len(sources):
    raise UserError(
      f"{field}.{unweighted[0]} has no weight and others have; a weight is a share of all examples,"
      " so give one to every source or to none"
    )
  return sources


def read_evaluation_sets(given: Mapping[str, Any], field: str) -> tuple[Source, ...]:
  """Reads the description of evaluation sets, of which all rows are used: see `read_sources`."""
  return read_sources(given, field, options=_OF_EVALUATION)


def _read_source(name: str, given: Any, field: str, options: Collection[str]) -> Source:
  if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
    raise UserError(
      f"{field} has the name {name!r}, which metrics are named by; use letters, digits, - and _,"
      f" and none of {', '.join(RESERVED)}"
    )
  where = f"{field}.{name}"
  if isinstance(given, str):
    given = {"path": given}
  if not isinstance(given, Mapping):
    raise UserError(f'{where} is {given!r}; give a path, or options as {{"path": "FILE"}}')
  for option in given:
    if option not in options:
      near = difflib.get_close_matches(option, options, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(options)}"
      raise UserError(f"{where} has no option {option!r}; {hint}")
  values: dict[str, Any] = {"path": ""} | dict(given)
  source = Source(name, **values)
  if not isinstance(source.path, str) or not source.path:
    raise UserError(f"{where}.path is {source.path!r}; name a file of rows")
  if source.fields is not None:
    if not isinstance(source.fields, Mapping):
      raise UserError(f'{where}.fields is {source.fields!r}; give {{"prompt": "COLUMN"}}')
    formats.check_field_names(source.fields, f"{where}.fields.")
    # An empty name stands for the usual field, as in data.fields.
    source = source._replace(
      fields={key: column for key, column in source.fields.items() if column}
    )
  if source.verdict and source.verdict not in verdicts.ENCODINGS:
    raise UserError(
      f"{where}.verdict is {source.verdict!r}; choose {', '.join(verdicts.ENCODINGS)}"
    )
  _check_numbers(given, where)
  return source


def _check_numbers(given: Mapping[str, Any], where: str) -> None:
  """Checks the options that say how much of a source is used."""
  if "count" in given and "fraction" in given:
    raise UserError(f"{where} has a count and a fraction; keep one")
  rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a number of rows, 1 or more", _is_count),
    "fraction": ("a share of the rows, above 0 and at most 1", _is_fraction),
    "weight": ("a number above 0", _is_weight),
  }
  for option, (rule, holds) in rules.items():
    # Not with a default: 0 rows, which is the default for all of them, must not be asked for.
    if option in given and not holds(given[option]):
      raise UserError(f"{where}.{option} is {given[option]!r}; it must be {rule}")


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
  return _is_number(value) and value >= 1 and value == int(value)


def _is_fraction(value: Any) -> bool:
  return _is_number(value) and 0 < value <= 1


def _is_weight(value: Any) -> bool:
  return _is_number(value) and 0 < value < math.inf


# --- the examples of a source ---------------------------------------------------------------------


def draw(examples: Sequence[Example], source: Source, seed: int) -> list[Example]:
  """Returns the examples of the rows that `count` or `fraction` ask for, in the order of the data.

  The seed and the name of the source decide which, so other sources do not matter. An unpaired row
  may give several examples, which stay together.

  Raises:
    UserError: there are fewer rows than `count`.
  """
  rows = list(dict.fromkeys(example.row for example in examples))
  if source.count > len(rows):
    raise UserError(
      f"data.mix.{source.name}.count is {source.count} and {source.path} has {len(rows)} rows to"
      " use; lower it, or leave it out and give the sources a weight, which repeats rows"
    )
  number = int(source.count) or max(1, round(source.fraction * len(rows)))
  if not (source.count or source.fraction) or number == len(rows):
    return list(examples)
  drawn = set(rng_of(source.name, seed).choice(rows, number, replace=False).tolist())
  return [example for example in examples if example.row in drawn]


def rng_of(name: str, seed: int) -> np.random.Generator:
  """Returns random numbers of one source: other sources do not change them."""
  return np.random.default_rng([seed, *name.encode()])


def row_digests(examples: Sequence[Example]) -> dict[int, bytes]:
  """Returns row -> a digest of all that its examples say: token ids, scores and weights."""
  found: dict[int, bytes] = {}
  for example in examples:
    parts = (example.prompt, *example.completions)
    about = (tuple(map(len, parts)), example.scores, example.weight)
    text = hashlib.blake2b(found.get(example.row, b"") + repr(about).encode(), digest_size=16)
    for ids in parts:
      text.update(np.asarray(ids, np.int32).tobytes())
    for weights in example.token_weights:
      text.update(np.asarray(weights, np.float32).tobytes())
    found[example.row] = text.digest()
  return found


def drop_duplicates(examples: Sequence[Example], seen: set[bytes]) -> list[Example]:
  """Returns the examples without rows that occurred before.

  Args:
    examples: in the order of the data.
    seen: digests of rows that occurred before; those of these examples are added.
  """
  kept = set()
  for row, digest in row_digests(examples).items():
    if digest not in seen:
      seen.add(digest)
      kept.add(row)
  return [example for example in examples if example.row in kept]


def prompt_digests(examples: Sequence[Example]) -> set[bytes]:
  """Returns a digest of every prompt; of texts that follow BOS alone, of the text."""
  return {_prompt_digest(example) for example in examples}


def _prompt_digest(example: Example) -> bytes:
  ids = example.prompt
  # One token is the same before every text, and says nothing of which text it is.
  if len(ids) < 2:
    ids = np.concatenate([ids, *example.completions])
  return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


# --- the mix --------------------------------------------------------------------------------------


class Mixture(NamedTuple):
  """The source of every example, and how often each source is used.

  Attributes:
    names: of the sources, in the order of their examples.
    row_starts: first number of the rows of every source, as `Example.row` counts them over all
      sources.
    sizes: number of examples of every source.
    per_epoch: how many examples of every source an epoch has; their sum is that of the sizes.
  """

  names: tuple[str, ...]
  row_starts: tuple[int, ...]
  sizes: tuple[int, ...]
  per_epoch: tuple[int, ...]

  @classmethod
  def make(
    cls, sources: Sequence[Source], row_starts: Sequence[int], examples: Sequence[Example]
  ) -> Mixture:
    """Makes the mixture of the examples that are left to train on.

    Raises:
      UserError: a source has no example, or a weight too small for one in an epoch.
    """
    names = tuple(source.name for source in sources)
    rows = [example.row for example in examples]
    index = np.searchsorted(row_starts, rows, "right") - 1
    sizes = np.bincount(index, minlength=len(names)).tolist()
    per_epoch = sizes
    if sources[0].weight:
      per_epoch = apportion(sum(sizes), [source.weight for source in sources])
    for name, size, number in zip(names, sizes, per_epoch, strict=True):
      if not size:
        raise UserError(
          f"data.mix.{name} has no row left to train on; lower data.eval_fraction, or leave it out"
        )
      if not number:
        raise UserError(
          f"the weight of data.mix.{name} gives it none of the {sum(sizes)} examples of an epoch;"
          " raise it, or leave the source out"
        )
    return cls(names, tuple(row_starts), tuple(sizes), tuple(per_epoch))

  @property
  def is_weighted(self) -> bool:
    """True if an epoch is something else than every example once."""
    return self.sizes != self.per_epoch

  def rates(self) -> np.ndarray:
    """Returns how often an epoch has each example, on average: [B]."""
    return np.repeat(np.divide(self.per_epoch, self.sizes), self.sizes)

  def name_rows(self, rows: Sequence[int]) -> str:
    """Returns the names of rows for a message, each counted within its source."""
    places = []
    for row in rows:
      at = int(np.searchsorted(self.row_starts, row, "right")) - 1
      places.append(f"{row - self.row_starts[at]} of {self.names[at]}")
    return ", ".join(places)

  def where_rows_start(self) -> str:
    """Returns a remark for messages that name rows by their numbers over all sources."""
    starts = [f"{n} from {row}" for n, row in zip(self.names, self.row_starts, strict=True)]
    return f"rows are counted over all sources of data.mix: {', '.join(starts)}"

  def describe(self) -> str:
    """Returns a line on what an epoch consists of."""
    parts = [
      f"{name} {number:,} ({number / size:.3g} passes over {size:,})"
      for name, size, number in zip(self.names, self.sizes, self.per_epoch, strict=True)
    ]
    return f"an epoch has {sum(self.per_epoch):,} examples: {', '.join(parts)}"


def apportion(total: int, weights: Sequence[float]) -> list[int]:
  """Divides a number into whole parts in proportion to weights, by the largest remainders."""
  exact = total * np.divide(weights, math.fsum(weights))
  parts = np.floor(exact).astype(int)
  # Stable, so that of equal remainders the first source comes first.
  order = np.argsort(parts - exact, kind="stable")
  parts[order[: total - int(parts.sum())]] += 1
  return parts.tolist()


class Passes:
  """The endless order of examples of a mixture: element k is an example's number.

  Element k is a pure function of the arguments and k. The places of an epoch are in random order.
  Each belongs to a source, and takes one of the examples that come next in the endless passes over
  it. So at the end of an epoch, all examples of a source were used equally often, or once more.
  """

  def __init__(self, mixture: Mixture, places: Sequence[int], passes: Sequence[Sequence[int]]):
    """Takes the orders that it is made of.

    Args:
      mixture: the sources.
      places: endless; of every epoch a permutation of the numbers below the sum of `per_epoch`.
      passes: per source, endless; the numbers of its examples, counted from 0, pass after pass.
    """
    self._places, self._passes = places, passes
    self._per_epoch = mixture.per_epoch
    self._first = np.concatenate([[0], np.cumsum(mixture.per_epoch)])  # place, by source
    self._offset = np.concatenate([[0], np.cumsum(mixture.sizes)])  # example, by source

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, k: int) -> int:
    epoch, place = int(k) // int(self._first[-1]), int(self._places[int(k)])
    source = int(np.searchsorted(self._first, place, "right")) - 1
    used_before = epoch * self._per_epoch[source]
    nth = used_before + place - int(self._first[source])
    return int(self._offset[source]) + int(self._passes[source][nth])
