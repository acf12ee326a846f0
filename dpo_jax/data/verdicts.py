"""Verdicts of comparisons: finds out how a column of verdicts is written, and reads it.

  encoding           for answer_a    for answer_b    tie
  index1             1               2               0; a number between 1 and 2 is a share
  index0             0               1               2; a number between 0 and 1 is a share
  first_is_better    1, true         0, false        0.5
  signed             below 0         above 0         0; the size is the strength (HelpSteer2)
  positive_is_first  above 0         below 0         0; the size is the strength
  words              a, model_a, …   b, model_b, …   tie, both, …
  words0             response_0, …   response_1, …   tie, both, …
  onehot             [1, 0, 0]       [0, 1, 0]       [0, 0, 1]

One value cannot say which encoding it is written in: 0 is a tie, the first, or the second. So all
values of a column are looked at, and if they leave it open the user must name the encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dpo_jax.data.fields import BadRow, shorten
from dpo_jax.structs import UserError

FIELD = "preference"
ENCODINGS = (
  *("index1", "index0", "first_is_better", "signed", "positive_is_first"),
  *("words", "words0", "onehot"),
)

_TIES = frozenset(
  (
    *("tie", "tied", "draw", "equal", "same", "similar", "both", "neither", "none", "unsure"),
    *("bothbad", "both_bad", "both bad", "tie (bothbad)", "tie (both bad)", "no preference"),
    *("a=b", "b=a", "[[c]]"),
  )
)
_OPTION = "model|answer|response|output|completion|option|assistant|chatbot|candidate|choice"
_BETTER = re.compile(
  rf"(?:(?:{_OPTION})[ _-]?)?(?P<side>[ab012]|left|right|first|second)"
  r"(?:[ _-]is)?(?:[ _-](?P<how>slightly|clearly|much))?(?:[ _-]better)?"
)
_JUDGED = re.compile(r"(?P<side>[ab])(?P<sign>>>?)[ab]")  # by judges: "A>>B" down to "B>>A"
# Columns of public data sets whose direction their data cards state: below 0 is the first response.
# HelpSteer2-Preference (Wang et al. 2024) and HelpSteer3 (Wang et al. 2025), -3 to 3.
_SIGNED_COLUMNS = ("preference_strength", "overall_preference")
_MOST_VALUES = 10_000  # distinct values of a column that are kept


class Encoding(NamedTuple):
  """A way of writing verdicts.

  Attributes:
    name: one of `ENCODINGS`.
    scale: strengths are divided by this: the largest of the column.
  """

  name: str
  scale: float = 1.0

  def read(self, verdict: Any) -> float | None:
    """Returns a verdict, or the mean of several annotators' verdicts, in [-1, 1].

    Returns:
      Above 0 if `answer_a` is better, below 0 if `answer_b` is, 0 for a tie; None if no annotator
      compared the two.
    """
    if self.name == "onehot":
      return (1.0, -1.0, 0.0)[_numbers(verdict).index(1)] if _is_onehot(verdict) else _bad(verdict)
    given = verdict if isinstance(verdict, list) else [verdict]
    # A null is an annotator who did not compare this row; he does not count as a tie.
    known = [self._read_one(value) for value in given if value is not None]
    return sum(known) / len(known) if known else None

  def describe(self) -> str:
    """Returns the encoding in words."""
    return f"{self.name} ({_MEANINGS[self.name]})"

  def _read_one(self, value: Any) -> float:
    text, number = _plain(value), _number(value)
    if text in _TIES or (self.name in ("words", "words0") and number == 0):
      found = 0.0
    elif self.name in ("words", "words0"):
      found = _read_word(text, zero_based=self.name == "words0")
    elif number is None:
      found = None
    elif self.name in ("signed", "positive_is_first"):
      sign = 1.0 if self.name == "positive_is_first" else -1.0
      found = sign * max(-1.0, min(1.0, number / self.scale))
    else:
      # The tie of the encodings that count; then a share of judges who prefer the second.
      tie, start = {"index1": (0, 1), "index0": (2, 0), "first_is_better": (None, 0)}[self.name]
      share = number - start
      if number == tie:
        found = 0.0
      elif 0 <= share <= 1:
        found = 2 * share - 1 if self.name == "first_is_better" else 1 - 2 * share
      else:
        found = None
    return _bad(value, self) if found is None else found


_MEANINGS = {
  "index1": "1 prefers answer_a, 2 answer_b, 0 is a tie",
  "index0": "0 prefers answer_a, 1 answer_b",
  "first_is_better": "1 prefers answer_a, 0 answer_b",
  "signed": "below 0 prefers answer_a, above 0 answer_b",
  "positive_is_first": "above 0 prefers answer_a, below 0 answer_b",
  "words": "the word names answer_a, answer_b or a tie",
  "words0": "the word names answer_a by 0, answer_b by 1, or a tie",
  "onehot": "the 1 stands for answer_a, answer_b or a tie",
}


def find_encoding(
  verdicts: Iterable[Any], requested: str = "", fields: Mapping[str, str] | None = None
) -> Encoding:
  """Finds the encoding of a column from all its verdicts.

  Args:
    verdicts: of every row.
    requested: name of the encoding; "" finds it out.
    fields: field map of the rows; the names of some public columns decide.

  Raises:
    UserError: the values fit no encoding, or more than one.
  """
  if requested and requested not in ENCODINGS:
    raise UserError(f"verdict {requested!r} is not one of {', '.join(ENCODINGS)}")
  values, onehot = _collect(verdicts)
  columns = (fields or {}).get(FIELD, "").lower().split("+")
  if onehot and any("tie" in column for column in columns[:2]):
    raise UserError(
      f"the field map's {FIELD} joins {' + '.join(columns)}; the column for ties must be the last,"
      " after those for answer_a and answer_b"
    )
  numbers = {n for value in values if (n := _number(value)) is not None}
  name = requested or ("onehot" if onehot else _name_of(values, numbers, fields or {}))
  scale = max(map(abs, numbers), default=1.0) or 1.0
  return Encoding(name, scale if name in ("signed", "positive_is_first") else 1.0)


def _collect(verdicts: Iterable[Any]) -> tuple[list[Any], bool]:
  """Returns the distinct values of a column, and whether every verdict is one 1 among zeros."""
  values: dict[tuple[type, str], Any] = {}
  onehot = None
  for verdict in verdicts:
    onehot = _is_onehot(verdict) and onehot is not False
    for value in verdict if isinstance(verdict, list) else [verdict]:
      if value is not None and len(values) < _MOST_VALUES:
        values.setdefault((type(value), str(value)), value)
  return list(values.values()), bool(onehot)


def _name_of(values: list[Any], numbers: set[float], fields: Mapping[str, str]) -> str:
  words = [value for value in values if _number(value) is None and _plain(value) not in _TIES]
  column = fields.get(FIELD, FIELD)
  if words and numbers <= {0.0}:
    return _name_of_words(words)
  if words:
    raise UserError(
      f"field {column} has numbers ({_list(numbers)}) and words ({_list(words)}); write all"
      f" verdicts in one way: {_rule()}"
    )
  if not numbers:
    return "words"  # ties and nulls alone
  if min(numbers) < 0:
    if column in _SIGNED_COLUMNS:
      return "signed"
    raise _open(column, values, "signed", "positive_is_first")
  if max(numbers) <= 1:
    # The columns say it themselves: better_response_id of response_0 and response_1 (PKU-SafeRLHF).
    options = fields.get("answer_a", "")[-1:] + fields.get("answer_b", "")[-1:]
    if options == "01" and column.endswith(("id", "idx", "index")):
      return "index0"
    other = "index1" if numbers == {1.0} and bool not in map(type, values) else "first_is_better"
    raise _open(column, values, "index0", other)
  if all(n == 0 or 1 <= n <= 2 for n in numbers):
    return "index1"
  raise BadRow(FIELD, f"field {column} has the verdicts {_list(numbers)}; {_rule()}")


def _name_of_words(words: list[Any]) -> str:
  found = [_BETTER.fullmatch(_plain(word)) for word in words]
  digits = {one["side"] for one in found if one} & {"0", "1", "2"}
  # response_1 alone is the first of 1 and 2, or the second of 0 and 1.
  if digits == {"1"}:
    raise _open(FIELD, words, "words", "words0")
  name = "words0" if "0" in digits else "words"
  if not any(map(_is_word, words)):
    Encoding(name).read(words[0])  # raises
  return name  # a single word that is no verdict is named with its row


def _is_word(word: Any) -> bool:
  return bool(_JUDGED.fullmatch(_plain(word)) or _BETTER.fullmatch(_plain(word)))


def _open(column: str, values: Iterable[Any], one: str, other: str) -> UserError:
  return UserError(
    f"the verdicts in {column} are {_list(values)}, which can be read in two ways: {one}"
    f" ({_MEANINGS[one]}) or {other} ({_MEANINGS[other]}); name the right one:"
    f" --config.data.verdict={one} (in other commands: --verdict={one})"
  )


def _read_word(text: str, *, zero_based: bool) -> float | None:
  """Returns the verdict that a word is, or None if it is none."""
  if judged := _JUDGED.fullmatch(text):
    strength = 0.5 if judged["sign"] == ">" else 1.0
    return strength if judged["side"] == "a" else -strength
  found = _BETTER.fullmatch(text)
  if found is None:
    return None
  strength = 0.5 if found["how"] == "slightly" else 1.0
  first, second = ("0", "1") if zero_based else ("1", "2")
  if found["side"] in ("a", "left", "first", first):
    return strength
  return -strength if found["side"] in ("b", "right", "second", second) else None


def _plain(value: Any) -> str:
  """Returns a verdict in small letters, without the brackets of "[[A]]"; "" if it is no text."""
  text = value.strip().lower() if isinstance(value, str) else ""
  return text[2:-2] if text.startswith("[[") and text != "[[c]]" else text


def _number(value: Any) -> float | None:
  """Returns a number, also one that is written as text; true is 1."""
  if isinstance(value, str) and value.strip().lower() in ("true", "false"):
    return float(value.strip().lower() == "true")
  if isinstance(value, (bool, int, float)):
    return float(value) if value == value else None
  try:
    return float(value) if isinstance(value, str) else None
  except ValueError:
    return None


def _numbers(verdict: list[Any]) -> list[float | None]:
  return [_number(value) for value in verdict]


def _is_onehot(verdict: Any) -> bool:
  """Returns True for a list of one 1 among one or two zeros: a column for each outcome."""
  return (
    isinstance(verdict, list)
    and len(verdict) in (2, 3)
    and sorted(map(str, _numbers(verdict))) == ["0.0"] * (len(verdict) - 1) + ["1.0"]
  )


def _rule() -> str:
  return (
    "a verdict is 1, 2 or 0, or a, b or tie, or a-is-better, a-is-slightly-better and similar; see"
    " data.verdict for others"
  )


def _bad(value: Any, encoding: Encoding | None = None) -> Any:
  """Raises `BadRow`: the value is no verdict of this encoding."""
  rule = f"verdicts are read as {encoding.describe()}" if encoding else _rule()
  raise BadRow(FIELD, f"field {FIELD} is {shorten(value)}; {rule}")


def _list(values: Iterable[Any]) -> str:
  shown = sorted({shorten(value) for value in values})
  return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")
