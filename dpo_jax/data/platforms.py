"""Brings rows in the notations of training services and tools into the fields that we know.

OpenAI      input.messages, preferred_output, non_preferred_output
ms-swift    messages, whose last reply is the chosen one, with rejected_response
Amazon      messages that end in two candidates, each with a preferenceLabel
Google      contents, with completions of a score each
Arena       prompt and answers as lists of one text per turn

LLaMA-Factory's `kto_tag` is a label. `functions`, and tools in the first message, are `tools`.
"""

from __future__ import annotations

import json
from typing import Any

from dpo_jax.data.fields import BadRow, Row, RowError, shorten
from dpo_jax.data.messages import is_message, role_of


def translate(row: Row) -> Row:
  """Returns a row in our own fields; a row of no such notation is returned as it is."""
  for notation in (_openai, _google, _amazon, _swift, _arena, _tools):
    row = notation(row)
  if row.get("kto_tag") is not None and row.get("label") is None:
    row = _without(row, "kto_tag") | {"label": row["kto_tag"]}
  return row


def _openai(row: Row) -> Row:
  given, sides = row.get("input"), ("preferred_output", "non_preferred_output")
  if not isinstance(given, dict) or not all(side in row for side in sides):
    return row
  chosen, rejected = (row[side] for side in sides)
  row = _without(row, "input", *sides)
  row |= {"prompt": given.get("messages"), "tools": given.get("tools")}
  return row | {"chosen": chosen, "rejected": rejected}


def _google(row: Row) -> Row:
  turns = row.get("contents")
  if not isinstance(turns, list) or not turns or not all(map(is_message, turns)):
    return row
  ranked = isinstance(row.get("completions"), list)
  found = _without(row, "contents", *(["completions"] if ranked else []))
  if ranked:
    return found | {"prompt": turns, "answers": row["completions"]}
  return found | {"messages": turns}


def _amazon(row: Row) -> Row:
  turns = row.get("messages")
  if not isinstance(turns, list) or not turns:
    return row
  last = turns[-1]
  if not isinstance(last, dict) or not isinstance(last.get("candidates"), list):
    return row
  by_label = {
    one.get("preferenceLabel"): {"role": last.get("role"), "content": one.get("content")}
    for one in last["candidates"]
    if isinstance(one, dict) and isinstance(one.get("preferenceLabel"), str)
  }
  if len(last["candidates"]) != 2 or set(by_label) != {"preferred", "non-preferred"}:
    raise BadRow(
      "messages",
      f"field messages has the candidates {shorten(last['candidates'])}; they must be two, with"
      " the preferenceLabel preferred and non-preferred",
    )
  pair = {"chosen": by_label["preferred"], "rejected": by_label["non-preferred"]}
  return _without(row, "messages") | {"prompt": turns[:-1]} | pair


def _swift(row: Row) -> Row:
  """A text replaces the last message, messages replace what follows the last question."""
  turns, other = row.get("messages"), row.get("rejected_response")
  whole = row.get("rejected_messages")
  if not isinstance(turns, list) or not (other or whole) or "chosen" in row or "rejected" in row:
    return row
  found = _without(row, "messages", "rejected_response", "rejected_messages")
  if whole:
    return found | {"chosen": turns, "rejected": whole}
  if isinstance(other, str):
    other = [{"role": "assistant", "content": other}]
    before = turns[:-1]
  else:
    other = other if isinstance(other, list) else [other]
    asked = [i for i, turn in enumerate(turns) if role_of(turn) == "user"]
    before = turns[: asked[-1] + 1] if asked else turns[:-1]
  return found | {"chosen": turns, "rejected": [*before, *other]}


def _arena(row: Row) -> Row:
  names = ("prompt", "answer_a", "answer_b")
  asked, *replies = [texts for name in names if (texts := _texts(row.get(name)))] or [[]]
  if len(replies) != 2 or any(len(one) != len(asked) for one in replies):
    return row
  if any(None in texts for texts in (asked, *replies)):
    raise RowError("a turn without text")
  conversations = {
    name: [
      {"role": role, "content": text}
      for turn in zip(asked, texts, strict=True)
      for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    for name, texts in zip(names[1:], replies, strict=True)
  }
  return _without(row, *names) | conversations


def _tools(row: Row) -> Row:
  """Returns a row whose tools are in its own field `tools`."""
  given = [row]
  for name in ("messages", "conversations", "prompt", "chosen"):
    turns = row.get(name)
    given += [
      one for one in (turns if isinstance(turns, list) else [])[:1] if isinstance(one, dict)
    ]
  found = [one[name] for one in given for name in ("tools", "functions") if one.get(name)]
  return row | {"tools": found[0]} if found else row


def _texts(value: Any) -> list[str | None]:
  """Returns a list of texts and nulls, perhaps written as JSON; [] for any other value."""
  found: Any = value
  if isinstance(value, str) and value.lstrip()[:1] == "[":
    try:
      found = json.loads(value)
    except (ValueError, RecursionError):
      return []
  return found if isinstance(found, list) and all(isinstance(x, str | None) for x in found) else []


def _without(row: Row, *names: str) -> Row:
  return {name: value for name, value in row.items() if name not in names}
