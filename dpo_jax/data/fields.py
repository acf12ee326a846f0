"""Fields of a data row: what a row becomes, and checks of its texts, token ids and numbers.

Two errors, because they have different causes:

  RowError   the row contains no preference (equal or empty completions, different prompts, a tie, a
             field that is null). The row is dropped and counted; the next one may be good.
  BadRow     the row is malformed (a number where text should be). Reading stops, since a file that
             is wrong in one place is usually wrong in others too; with on_bad_row="drop" the row is
             dropped and counted as well.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from dpo_jax.structs import UserError

Row = dict[str, Any]
Messages = list[dict[str, Any]]  # of {"role": "system" | "user" | "assistant" | …, "content": …}


class Conversation(NamedTuple):
  """Messages, and the JSON schemas of the tools that the assistant may call in them."""

  messages: Messages
  tools: tuple[dict[str, Any], ...] = ()


Content = str | Messages | Conversation | list[int]  # plain text, a conversation, or token ids


class Preference(NamedTuple):
  """A prompt and its completions, best first; all of one type.

  A text completion continues the text of the prompt. A completion of messages begins and ends with
  a message of the assistant; what tools and users say in between is context, which is not scored. A
  message may have a `weight`, which replaces the weight 1 of what the assistant writes. Token ids
  are used unchanged.

  Attributes:
    prompt: text, messages, a conversation with tools, or token ids.
    completions: the completions, best first.
    scores: a number per completion: its score, or its label as 1 or 0. Empty if the row has none.
    weight: weight of the row in losses and metrics.
    token_weights: for completions of token ids, the weight of every token, or None where all are 1;
      () for other completions.
  """

  prompt: Content
  completions: tuple[Content, ...]
  scores: tuple[float, ...] = ()
  weight: float = 1.0
  token_weights: tuple[list[float] | None, ...] = ()


class RowError(Exception):
  """A row that contains no preference; the message is the reason under which it is counted."""


class BadRow(UserError):
  """A malformed row: a field has a value that cannot be read.

  Attributes:
    reason: a few words under which such rows are counted where they are dropped.
  """

  def __init__(self, field: str, message: str) -> None:
    super().__init__(field, message)  # both, since pickling calls the class with `args` again
    self.reason = f"broken field {field}"

  def __str__(self) -> str:
    return self.args[1]

  def at(self, place: str) -> BadRow:
    """Returns the error with the place of the row before its message."""
    return BadRow(self.args[0], f"{place}: {self.args[1]}")


# --- texts and token ids --------------------------------------------------------------------------


def read_field(row: Row, field: str) -> Any:
  """Returns a field of any type; raises `RowError` if the row lacks it or has null there."""
  # Null and missing are one: a table has a null in every row that lacks the field.
  if row.get(field) is None:
    raise RowError(f"no {field}")
  return row[field]


def read_text(row: Row, field: str) -> str:
  """Returns a field that must be text.

  Raises:
    RowError: it is missing, true or false, or no valid Unicode.
    BadRow: it is of another type.
  """
  value = read_field(row, field)
  # Tables that infer types turn the texts "yes" and "True" into booleans. The text is lost, but
  # only in that row: drop it and read on.
  if isinstance(value, bool):
    raise RowError("true or false where text should be")
  if not isinstance(value, str):
    raise BadRow(field, f"field {field} is {shorten(value)}, not text")
  return check_unicode(value)


def check_unicode(text: str) -> str:
  """Returns the text; raises `RowError` if it cannot be encoded as UTF-8."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    # Half a surrogate pair: JSON can express it ("\ud800"), but no tokenizer can read it.
    raise RowError("text is not valid Unicode") from None
  return text


def read_ids(row: Row, field: str) -> list[int]:
  """Returns a field that must be a list of token ids."""
  return check_ids(read_field(row, field), field)


def check_ids(value: Any, field: str) -> list[int]:
  """Returns the value; raises `BadRow` unless it is a list of token ids."""
  # `type(x) is int` and not isinstance, since True is an int too. Ids are stored as int32.
  if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
    raise BadRow(field, f"field {field} is {shorten(value)}, not a list of token ids")
  return value


def check_mask(value: Any, ids: list[int], field: str) -> list[float] | None:
  """Returns the weights of the tokens of a completion, or None where `value` is null.

  Raises:
    RowError: all weights are 0, so no token would be scored.
    BadRow: not one number of 0 or above per token.
  """
  if value is None:
    return None
  if not isinstance(value, list) or len(value) != len(ids):
    raise BadRow(
      field, f"field {field} is {shorten(value)}, not a list of {len(ids)} weights, one per token"
    )
  weights = [float(x) if isinstance(x, bool) else check_number(x, field) for x in value]
  if min(weights, default=1.0) < 0:
    raise BadRow(field, f"field {field} has the weight {min(weights)}; weights are 0 or above")
  if not any(weights):
    raise RowError("no scored token")
  return weights


def read_ranked(row: Row, field: str) -> list[Any]:
  """Returns the completions of a ranked row, two or more of any type."""
  value = read_field(row, field)
  if not isinstance(value, list):
    raise BadRow(field, f"field {field} is {shorten(value)}, not a list of answers, best first")
  if len(value) < 2:
    raise RowError("fewer than two completions")
  if any(answer is None for answer in value):
    raise RowError("a completion is null")
  return value


# --- numbers --------------------------------------------------------------------------------------


def check_number(value: Any, field: str) -> float:
  """Returns the value as a float; raises `BadRow` unless it is a finite float32 number.

  A number may be written as text, as every number of a CSV file is.
  """
  number = value
  if isinstance(value, str):
    try:
      number = float(value)
    except ValueError:
      number = float("nan")
  # Scores are float32 on the device, whose largest number is 3.4e38. "not <" instead of ">=": NaN
  # fails every comparison, so it is refused here too.
  if type(number) not in (int, float) or not abs(number) < 3e38:
    raise BadRow(field, f"field {field} is {shorten(value)}, not a finite number")
  return float(number)


# Tables with a missing label write the others as numbers with a point.
LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}


def read_label(row: Row) -> float:
  """Returns 1 if the completion is desirable and 0 if not, from the field `label`."""
  value = read_field(row, "label")
  if not is_label(value) and (type(value) is not float or value not in (0, 1)):
    raise BadRow(
      "label",
      f"field label is {shorten(value)}; it must be true or 1 for a desirable completion, false or"
      " 0 for an undesirable one",
    )
  return LABELS[str(value).strip().lower()]


def is_label(value: Any) -> bool:
  """Returns True for true, false, 1 and 0, also where they are written as text."""
  # In SFT data 1.0 is more likely a score than a label, and 0.5 may follow in the next row.
  return type(value) in (bool, int, str) and str(value).strip().lower() in LABELS


def read_pair_scores(row: Row) -> tuple[float, ...]:
  """Returns the scores of chosen and rejected, from the first of these that the row has.

    margin                             how much better chosen is, 0 or more: scores (margin, 0)
    chosen_score and rejected_score    a score each
    chosen_reward and rejected_reward  a reward each, as `scripts/make_pairs.py` writes them

  A null counts as a missing field. Chosen may score below rejected: labels are sampled from a
  probability, or given by people.

  Returns:
    (chosen, rejected), or () if the row has none of these fields.
  """
  if row.get("margin") is not None:
    margin = check_number(row["margin"], "margin")
    if margin < 0:
      raise BadRow(
        "margin", f"field margin is {shorten(margin)}; chosen must be better by 0 or more"
      )
    return (margin, 0.0)
  for fields in (("chosen_score", "rejected_score"), ("chosen_reward", "rejected_reward")):
    missing = [field for field in fields if row.get(field) is None]
    if len(missing) == 1:
      has = ", ".join(sorted(row))
      raise BadRow(missing[0], f"field {missing[0]} is missing; the row has {has}")
    if not missing:
      return tuple(check_number(row[field], field) for field in fields)
  return ()


def read_weight(row: Row) -> float:
  """Returns the weight of a row in losses and metrics: its field `weight`, or 1."""
  if row.get("weight") is None:
    return 1.0
  weight = check_number(row["weight"], "weight")
  if weight <= 0:
    raise BadRow(
      "weight",
      f"field weight is {shorten(weight)}; it must be above 0: leave the row out",
    )
  return weight


def shorten(value: Any) -> str:
  """Returns a value as JSON for an error message, cut to 60 characters."""
  # ensure_ascii: a lone surrogate in the value must not break the printing of the message.
  text = json.dumps(value, ensure_ascii=True, default=str)
  return text if len(text) <= 60 else text[:57] + "..."
