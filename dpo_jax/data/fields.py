"""What the fields of a row say: texts, messages, token ids, numbers, verdicts.

Rows that hold no preference (equal or empty answers, prompts that differ, a tie) raise `RowError`,
are dropped and counted. Rows that are broken (a missing field, a number where text should be) raise
`UserError`: a file that is wrong in one place is wrong in others too.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from dpo_jax.structs import UserError

Row = dict[str, Any]
Messages = list[dict[str, Any]]  # of {"role": "system" | "user" | "assistant" | …, "content": …}


class Conversation(NamedTuple):
  """Messages, and the JSON schemas of the tools that may be called in them."""

  messages: Messages
  tools: tuple[dict[str, Any], ...] = ()


Content = str | Messages | Conversation | list[int]  # plain text, a conversation, or token ids


class Preference(NamedTuple):
  """A prompt and its answers, best first; all of one type.

  Text goes on where the prompt ends; an answer to messages, with tools or without, is a list of one
  message; token ids stand as they are.

  Attributes:
    prompt, completions: see above.
    scores: a number for each answer: its score, or its label as 1 or 0; or nothing.
    weight: how much the row counts.
  """

  prompt: Content
  completions: tuple[Content, ...]
  scores: tuple[float, ...] = ()
  weight: float = 1.0


class RowError(Exception):
  """A row without a preference in it; the message is the reason under which it is counted."""


# --- fields ---------------------------------------------------------------------------------------


def text(row: Row, field: str) -> str:
  """A field that is text, and Unicode."""
  value = field_of(row, field)
  if isinstance(value, bool):  # "yes" and "True" do not survive every conversion
    raise RowError("true or false where text should be")
  if not isinstance(value, str):
    raise UserError(f"field {field} is {show(value)}, not text")
  return valid(value)


def valid(text: str) -> str:
  """The text, which is Unicode."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:  # half a surrogate pair: JSON can say it, no tokenizer can read it
    raise RowError("text is not valid Unicode") from None
  return text


def field_of(row: Row, field: str) -> Any:
  if field not in row:
    raise UserError(f"field {field} is missing; the row has {', '.join(sorted(row)) or 'none'}")
  return row[field]


def ids_of(row: Row, field: str) -> list[int]:
  return check_ids(field_of(row, field), field)


def check_ids(value: Any, field: str) -> list[int]:
  if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
    raise UserError(f"field {field} is {show(value)}, not a list of token ids")
  return value


def answers_of(row: Row, field: str) -> list[Any]:
  """The answers of a ranked row, of whatever type they are."""
  value = field_of(row, field)
  if not isinstance(value, list):
    raise UserError(f"field {field} is {show(value)}, not a list of answers, best first")
  if len(value) < 2:
    raise RowError("fewer than two answers")
  return value


def number(value: Any, field: str) -> float:
  # Scores are float32 on the device; NaN fails every comparison.
  if type(value) not in (int, float) or not abs(value) < 3e38:
    raise UserError(f"field {field} is {show(value)}, not a finite number")
  return float(value)


def label_of(row: Row) -> float:
  """1 if the answer is desirable, 0 if not."""
  value = field_of(row, "label")
  if not is_label(value):
    raise UserError(
      f"field label is {show(value)}; it must be true or 1 for a desirable answer, false or 0 for"
      " one that is not"
    )
  return float(value)


def is_label(value: Any) -> bool:
  return type(value) in (bool, int) and value in (0, 1)


def pair_scores(row: Row) -> tuple[float, ...]:
  """Scores of chosen and rejected, from the first of these that the row has; nothing without.

    margin                             by how much chosen is better, 0 or more: scores margin and 0
    chosen_score and rejected_score    a score each
    chosen_reward and rejected_reward  a reward each, as `scripts/make_pairs.py` writes them

  A null is a field that is not there. A chosen answer may score below the rejected one: labels are
  drawn, or people's.
  """
  if row.get("margin") is not None:
    margin = number(row["margin"], "margin")
    if margin < 0:
      raise UserError(f"field margin is {show(margin)}; chosen is the better by 0 or more")
    return (margin, 0.0)
  for fields in (("chosen_score", "rejected_score"), ("chosen_reward", "rejected_reward")):
    if any(row.get(field) is not None for field in fields):
      return tuple(number(field_of(row, field), field) for field in fields)
  return ()


def weight_of(row: Row) -> float:
  """How much a row counts: its `weight`, or 1."""
  if row.get("weight") is None:
    return 1.0
  weight = number(row["weight"], "weight")
  if weight <= 0:
    raise UserError(f"field weight is {show(weight)}; it must be above 0: leave the row out")
  return weight


TIES = ("0", "tie", "tied", "equal", "same", "both", "neither", "none")
_BETTER = re.compile(
  r"(?:(?:model|answer|response|output|completion)[ _-]?)?(?P<side>[ab12])"
  r"(?:[ _-]is)?(?:[ _-](?P<how>slightly|clearly|much))?(?:[ _-]better)?"
)


def verdict_of(value: Any) -> float:
  """Which of two answers is better, by one judge: 1 for the first, -1 for the second, 0 for a tie.

  Written as 1, 2 or 0; a, b or tie; model_a and the like; a-is-better. `a-is-slightly-better` is
  half a verdict.
  """
  text = str(value).strip().lower()
  text = text.removesuffix(".0") if type(value) is float else text
  if type(value) is not bool and text in TIES:
    return 0.0
  found = _BETTER.fullmatch(text) if isinstance(value, (str, int, float)) else None
  if found is None:
    raise UserError(
      f"field preference is {show(value)}; it must be 1, 2 or 0, or a, b or tie, or"
      " a-is-better, a-is-slightly-better and the like"
    )
  strength = 0.5 if found["how"] == "slightly" else 1.0
  return strength if found["side"] in "a1" else -strength


# Under which names a message may hold what was thought before it was said.
REASONING = ("reasoning_content", "reasoning", "thinking")
# What templates read of a message besides its role and content.
_MORE = ("tool_calls", "tool_call_id", "name", *REASONING)
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "bot": "assistant"}


def messages(value: Any, field: str, *, role: str) -> Messages:
  """A conversation from any way of writing one: a list, a single message, or the text of one."""
  if isinstance(value, str):
    return [{"role": role, "content": valid(value)}]
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise UserError(f"field {field} is {show(value)}, not text or a list of messages")
  return [_message(message, field) for message in value]


def _message(message: dict[str, Any], field: str) -> dict[str, Any]:
  role = message.get("role", message.get("from"))
  content = message.get("content", message.get("value"))
  more = {name: message[name] for name in _MORE if message.get(name) is not None}
  if content is None and more.get("tool_calls"):
    content = ""
  if isinstance(content, list):  # parts: {"type": "text", "text": …}
    parts = [part.get("text", part.get("value")) for part in content if isinstance(part, dict)]
    whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
    content = "".join(parts) if whole else content
  if not isinstance(role, str) or not isinstance(content, str):
    raise UserError(
      f"field {field} has the message {show(message)}; a message is a role and a text, as in"
      ' {"role": "user", "content": "…"}'
    )
  _check_more(more, field)
  return {"role": ROLES.get(role, role), "content": valid(content), **more}


def _check_more(more: dict[str, Any], field: str) -> None:
  calls = more.get("tool_calls", [])
  if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
    raise UserError(f"field {field} has tool_calls {show(calls)}, not a list of calls")
  for name, value in more.items():
    if name != "tool_calls" and not isinstance(value, str):
      raise UserError(f"field {field} has a message whose {name} is {show(value)}, not text")
    valid(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def conversation(prompt: Messages | Conversation) -> Conversation:
  """Messages as a conversation, with tools or without."""
  return prompt if isinstance(prompt, Conversation) else Conversation(prompt)


def with_tools(prompt: Content, row: Row) -> Content:
  """The prompt with the row's `tools`, a list of JSON schemas or the text of one, if it has any."""
  tools = row.get("tools")
  if isinstance(tools, str) and tools.strip():
    try:
      tools = json.loads(tools)
    except ValueError:
      raise UserError(f"field tools is {show(tools)}, not JSON") from None
  if not tools:
    return prompt
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise UserError(f"field tools is {show(tools)}, not a list of JSON schemas")
  if isinstance(prompt, str):
    raise UserError(
      "field tools is given and the prompt is text; a chat template writes tools: give the prompt"
      " as messages, or leave the field out"
    )
  talks = prompt and isinstance(prompt[0], dict)  # token ids hold their tools already
  return Conversation(prompt, tuple(tools)) if talks else prompt


def show(value: Any) -> str:
  """A value for an error message, cut to 60 characters."""
  text = json.dumps(value, ensure_ascii=True, default=str)
  return text if len(text) <= 60 else text[:57] + "..."


def without_nulls(value: Any) -> Any:
  """Tables give all messages of a column the same fields, null where one has none."""
  if isinstance(value, dict):
    return {name: without_nulls(one) for name, one in value.items() if one is not None}
  return [without_nulls(one) for one in value] if isinstance(value, list) else value
