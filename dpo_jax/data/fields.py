"""Fields of a data row: reads and checks texts, messages, token ids, scores and verdicts.

Two errors, because they have different causes:

  RowError   the row contains no preference (equal or empty completions, different prompts, a tie).
             The row is dropped and counted; the next one may be good.
  UserError  the row is malformed (a missing field, a number where text should be). Reading stops: a
             file that is wrong in one place is usually wrong in others too.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, cast

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

  A text completion continues the text of the prompt. A completion of messages is a list of one
  message, with or without tools. Token ids are used unchanged.

  Attributes:
    prompt: text, messages, a conversation with tools, or token ids.
    completions: the completions, best first.
    scores: a number per completion: its score, or its label as 1 or 0. Empty if the row has none.
    weight: weight of the row in losses and metrics.
  """

  prompt: Content
  completions: tuple[Content, ...]
  scores: tuple[float, ...] = ()
  weight: float = 1.0


class RowError(Exception):
  """A row that contains no preference; the message is the reason under which it is counted."""


# --- fields ---------------------------------------------------------------------------------------


def read_text(row: Row, field: str) -> str:
  """Returns a field that must be text.

  Raises:
    RowError: it is true or false, or no valid Unicode.
    UserError: it is missing or of another type.
  """
  value = read_field(row, field)
  # Tables that infer types turn the texts "yes" and "True" into booleans. The text is lost, but
  # only in that row: drop it and read on.
  if isinstance(value, bool):
    raise RowError("true or false where text should be")
  if not isinstance(value, str):
    raise UserError(f"field {field} is {shorten(value)}, not text")
  return check_unicode(value)


def check_unicode(text: str) -> str:
  """Returns the text; raises `RowError` if it cannot be encoded as UTF-8."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    # Half a surrogate pair: JSON can express it ("\ud800"), but no tokenizer can read it.
    raise RowError("text is not valid Unicode") from None
  return text


def read_field(row: Row, field: str) -> Any:
  """Returns a field of any type; raises `UserError` if the row lacks it."""
  if field not in row:
    raise UserError(f"field {field} is missing; the row has {', '.join(sorted(row)) or 'none'}")
  return row[field]


def read_ids(row: Row, field: str) -> list[int]:
  """Returns a field that must be a list of token ids."""
  return check_ids(read_field(row, field), field)


def check_ids(value: Any, field: str) -> list[int]:
  """Returns the value; raises `UserError` unless it is a list of token ids."""
  # `type(x) is int` and not isinstance, since True is an int too. Ids are stored as int32.
  if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
    raise UserError(f"field {field} is {shorten(value)}, not a list of token ids")
  return value


def read_ranked(row: Row, field: str) -> list[Any]:
  """Returns the completions of a ranked row, two or more of any type."""
  value = read_field(row, field)
  if not isinstance(value, list):
    raise UserError(f"field {field} is {shorten(value)}, not a list of answers, best first")
  if len(value) < 2:
    raise RowError("fewer than two answers")
  return value


def check_number(value: Any, field: str) -> float:
  """Returns the value as a float; raises `UserError` unless it is a finite float32 number."""
  # Scores are float32 on the device, whose largest number is 3.4e38. "not <" instead of ">=": NaN
  # fails every comparison, so it is refused here too.
  if type(value) not in (int, float) or not abs(value) < 3e38:
    raise UserError(f"field {field} is {shorten(value)}, not a finite number")
  return float(value)


def read_label(row: Row) -> float:
  """Returns 1 if the completion is desirable and 0 if not, from the field `label`."""
  value = read_field(row, "label")
  if not is_label(value):
    raise UserError(
      f"field label is {shorten(value)}; it must be true or 1 for a desirable completion, false or"
      " 0 for an undesirable one"
    )
  return float(value)


def is_label(value: Any) -> bool:
  """Returns True for true, false, 1 and 0."""
  # 1.0 is not a label: it is more likely a score, and 0.5 may follow in the next row.
  return type(value) in (bool, int) and value in (0, 1)


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
      raise UserError(f"field margin is {shorten(margin)}; chosen must be better by 0 or more")
    return (margin, 0.0)
  for fields in (("chosen_score", "rejected_score"), ("chosen_reward", "rejected_reward")):
    # any and not all: with one score alone, `read_field` names the one that is missing.
    if any(row.get(field) is not None for field in fields):
      return tuple(check_number(read_field(row, field), field) for field in fields)
  return ()


def read_weight(row: Row) -> float:
  """Returns the weight of a row in losses and metrics: its field `weight`, or 1."""
  if row.get("weight") is None:
    return 1.0
  weight = check_number(row["weight"], "weight")
  if weight <= 0:
    raise UserError(f"field weight is {shorten(weight)}; it must be above 0: leave the row out")
  return weight


TIES = ("0", "tie", "tied", "equal", "same", "both", "neither", "none")
_BETTER = re.compile(
  r"(?:(?:model|answer|response|output|completion)[ _-]?)?(?P<side>[ab12])"
  r"(?:[ _-]is)?(?:[ _-](?P<how>slightly|clearly|much))?(?:[ _-]better)?"
)


def read_verdict(value: Any) -> float:
  """Returns one annotator's comparison of two completions as a number in [-1, 1].

  1 prefers the first, -1 the second, 0 is a tie. It may be written as 1, 2 or 0; a, b or tie;
  model_a and similar; a-is-better. `a-is-slightly-better` counts as 0.5.
  """
  text = str(value).strip().lower()
  # Parquet stores a whole column as floats if one value is null: 2.0 means 2.
  text = text.removesuffix(".0") if type(value) is float else text
  if type(value) is not bool and text in TIES:
    return 0.0
  found = _BETTER.fullmatch(text) if isinstance(value, (str, int, float)) else None
  if found is None:
    raise UserError(
      f"field preference is {shorten(value)}; it must be 1, 2 or 0, or a, b or tie, or"
      " a-is-better, a-is-slightly-better and similar"
    )
  strength = 0.5 if found["how"] == "slightly" else 1.0
  return strength if found["side"] in "a1" else -strength


# Names under which a message may contain the reasoning that precedes its content.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields of a message that chat templates read besides role and content.
_EXTRA_FIELDS = ("tool_calls", "tool_call_id", "name", *REASONING)
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "bot": "assistant"}


def read_messages(value: Any, field: str, *, role: str) -> Messages:
  """Returns a conversation from any usual way of writing one.

  Args:
    value: a list of messages, a single message, or the text of one.
    field: its name, for errors.
    role: role of the message if `value` is text.
  """
  if isinstance(value, str):
    return [{"role": role, "content": check_unicode(value)}]
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise UserError(f"field {field} is {shorten(value)}, not text or a list of messages")
  return [_read_message(message, field) for message in value]


def _read_message(message: dict[str, Any], field: str) -> dict[str, Any]:
  """Returns a message as {"role", "content", …}, from OpenAI's field names or sharegpt's."""
  role = message.get("role", message.get("from"))
  content = message.get("content", message.get("value"))
  extra = {name: message[name] for name in _EXTRA_FIELDS if message.get(name) is not None}
  # The content of a message that only calls tools is null in OpenAI's format.
  if content is None and extra.get("tool_calls"):
    content = ""
  if isinstance(content, list):  # parts: {"type": "text", "text": …}
    parts = [part.get("text", part.get("value")) for part in content if isinstance(part, dict)]
    texts = [part for part in parts if isinstance(part, str)]
    # Joined only if every part is text: an image must be an error, not a silent omission.
    content = "".join(texts) if len(texts) == len(content) else content
  if not isinstance(role, str) or not isinstance(content, str):
    raise UserError(
      f"field {field} has the message {shorten(message)}; a message is a role and a text, as in"
      ' {"role": "user", "content": "…"}'
    )
  _check_extra_fields(extra, field)
  return {"role": ROLES.get(role, role), "content": check_unicode(content), **extra}


def _check_extra_fields(extra: dict[str, Any], field: str) -> None:
  calls = extra.get("tool_calls", [])
  if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
    raise UserError(f"field {field} has tool_calls {shorten(calls)}, not a list of calls")
  for name, value in extra.items():
    if name != "tool_calls" and not isinstance(value, str):
      raise UserError(f"field {field} has a message whose {name} is {shorten(value)}, not text")
    # ensure_ascii=False keeps a lone surrogate as it is, so that the check can find it.
    check_unicode(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def as_conversation(prompt: Messages | Conversation) -> Conversation:
  """Returns messages as a conversation without tools; a conversation is returned unchanged."""
  return prompt if isinstance(prompt, Conversation) else Conversation(prompt)


def with_tools(prompt: Content, row: Row) -> Content:
  """Returns the prompt together with the row's `tools`, if it has any.

  `tools` is a list of JSON schemas, or the JSON text of such a list.

  Raises:
    UserError: the tools are malformed, or the prompt is text: only a chat template can write tools.
  """
  tools = row.get("tools")
  if isinstance(tools, str) and tools.strip():
    try:
      tools = json.loads(tools)
    except ValueError:
      raise UserError(f"field tools is {shorten(tools)}, not JSON") from None
  if not tools:
    return prompt
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise UserError(f"field tools is {shorten(tools)}, not a list of JSON schemas")
  if isinstance(prompt, str):
    raise UserError(
      "field tools is given and the prompt is text; a chat template writes tools: give the prompt"
      " as messages, or leave the field out"
    )
  # A prompt of token ids was rendered before: its tools are already among the ids.
  is_messages = prompt and isinstance(prompt[0], dict)
  return Conversation(cast(Messages, prompt), tuple(tools)) if is_messages else prompt


def shorten(value: Any) -> str:
  """Returns a value as JSON for an error message, cut to 60 characters."""
  # ensure_ascii: a lone surrogate in the value must not break the printing of the message.
  text = json.dumps(value, ensure_ascii=True, default=str)
  return text if len(text) <= 60 else text[:57] + "..."
