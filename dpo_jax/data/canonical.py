"""Brings rows that are written in other ways into the fields that `formats` knows.

notations of other tools      see `platforms`
trees of messages (OASST)     one ranked row for every message with ranked replies
objects as completions        {"response": …, "overall_score": …} or {"answer": …, "rank": …}
lists and messages as text    as tables without lists contain them
`system`, `history`           become messages before the prompt
completions with the prompt   the prompt is taken away
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from dpo_jax.data import messages, platforms
from dpo_jax.data.fields import BadRow, Messages, Row, RowError, check_number, read_text, shorten

ASSISTANT_TURN = "\n\nAssistant:"  # precedes every completion in an HH transcript
HUMAN_TURN = "\n\nHuman:"
# Fields that contain texts or messages.
_CONVERSATIONS = (
  *("conversations", "messages", "history", "rejected_response", "rejected_messages"),
  *("preferred_output", "non_preferred_output", "contents"),
)
COMPLETIONS = ("chosen", "rejected", "completion", "answer_a", "answer_b")
TEXTS = ("prompt", *COMPLETIONS)
# Fields that contain lists.
_LISTS = (
  *("answers", "scores", "prompt_ids", "chosen_ids", "rejected_ids", "answers_ids"),
  *("chosen_mask", "rejected_mask", "answers_mask"),
)
# Names of what an object that is a completion may have.
_OBJECT_TEXTS = (
  *("answer", "response", "text", "content", "completion", "output"),
  *("generated_text", "value"),
)
_OBJECT_SCORES = ("overall_score", "score", "rating", "reward", "pm_score")
# A text model sees none of these.
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_SYSTEM = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")


def expand(row: Row) -> list[Row]:
  """Returns the rows in a tree of messages; any other row alone.

  Köpf et al. 2023, "OpenAssistant Conversations". A message with fewer than two ranked replies
  contains no preference; a tree of such messages gives one row, which is counted and dropped.
  """
  root = row.get("prompt")
  if not isinstance(root, dict) or not isinstance(root.get("replies"), list):
    return [row]
  return list(_ranked_replies(root, [])) or [{"prompt": [], "answers": []}]


def _ranked_replies(message: dict[str, Any], before: Messages) -> Iterator[Row]:
  here = [*before, {name: message.get(name) for name in ("role", "text")}]
  replies = [one for one in message.get("replies") or () if isinstance(one, dict)]
  ranked = [one for one in replies if one.get("rank") is not None and not one.get("deleted")]
  if len(ranked) > 1 and all(one.get("role") == "assistant" for one in ranked):
    yield {
      "prompt": here,
      "answers": [{name: one[name] for name in ("text", "rank")} for one in ranked],
    }
  for reply in replies:
    yield from _ranked_replies(reply, here)


def plain(row: Row) -> Row:
  """Returns a row in our own fields; what it says does not depend on other rows.

  Raises:
    BadRow: the row has images, or objects that nothing ranks.
  """
  row = dict(row)
  for name in _MEDIA:
    if row.get(name):
      raise BadRow(
        name, f"field {name} is given, and only text is trained on; leave out rows with {name}"
      )
  # Twice: the notations are told from messages, and their own fields may be text again.
  row = _parsed(platforms.translate(_parsed(row)))
  if isinstance(row.get("answers"), list):
    row["answers"] = [messages.parse_text(one, "answers") for one in row["answers"]]
    row = _with_ranked_objects(row)
  return row


def _parsed(row: Row) -> Row:
  """Returns a row without lists and messages that are written as text or as columns."""
  row = dict(row)
  for name in (*TEXTS, *_CONVERSATIONS):
    if name in row:
      row[name] = _from_columns(messages.parse_text(row[name], name))
  for name in _LISTS:
    if name in row:
      row[name] = _from_columns(parse_list(row[name]))
  return row


def _from_columns(value: Any) -> Any:
  """Returns the objects whose fields are lists, as `datasets` stores a sequence of objects."""
  lists = isinstance(value, dict) and list(value.values())
  if not lists or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
    return value
  return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]


def parse_list(value: Any) -> Any:
  """Returns a list that is written as JSON; any other value unchanged."""
  try:
    found = json.loads(value) if isinstance(value, str) else value
  except ValueError:
    return value
  return found if isinstance(found, list) else value


def _with_ranked_objects(row: Row) -> Row:
  """Returns a row whose completions are objects with a rank or a score, as a ranked row."""
  objects = row["answers"]
  if not objects or not all(isinstance(one, dict) for one in objects):
    return row
  # Messages without a rank or a score are completions by themselves, best first.
  known = ("rank", *_OBJECT_SCORES)
  if all(map(messages.is_message, objects)) and not any(n in one for n in known for one in objects):
    return row
  texts = [next((one[name] for name in _OBJECT_TEXTS if name in one), None) for one in objects]
  if not all(map(_is_completion, texts)):
    return row  # refused as a message, by name
  if all(one.get("rank") is not None for one in objects):
    ranks = [check_number(one["rank"], "answers") for one in objects]
    if len(set(ranks)) < min(2, len(ranks)):
      raise RowError("equal scores")
    order = sorted(range(len(ranks)), key=ranks.__getitem__)  # stable: equal ranks stay in order
    return row | {"answers": [texts[k] for k in order]}
  for name in _OBJECT_SCORES:
    if all(one.get(name) is not None for one in objects):
      return row | {"answers": texts, "scores": [one[name] for one in objects]}
  if row.get("scores") is not None:
    return row | {"answers": texts}
  raise BadRow(
    "answers",
    f"field answers has objects without a rank or a score ({', '.join(objects[0])}); give each a"
    " rank, 1 for the best, or a score",
  )


def _is_completion(value: Any) -> bool:
  """Returns True for a text, a message, or messages."""
  several = value if isinstance(value, list) and value else [value]
  return isinstance(value, str) or all(map(messages.is_message, several))


# --- system message and history ------------------------------------------------------------------


def has_context(row: Row) -> bool:
  """Returns True if a row has a system message or a history in fields of their own."""
  return any(row.get(name) for name in (*_SYSTEM, "history"))


def with_context(row: Row, *, chat: bool) -> Row:
  """Returns a row whose prompt is messages, after the row's `system` and `history`.

  Args:
    row: as `plain` returns it.
    chat: whether rows of this file have context. Then the prompts of all its rows are messages, so
      that a row without a system message is rendered as the others are.

  Raises:
    RowError: the prompt has another system message.
    BadRow: the row has context where it cannot be used.
  """
  if "prompt_ids" in row or not (chat or has_context(row)):
    return row  # token ids were rendered with their context
  context = _context(row)
  if not chat:
    raise BadRow(
      "system",
      "the row has a system message or a history, and the first rows of the file have none; give"
      " such rows a file of their own",
    )
  row = {k: v for k, v in row.items() if k not in (*_SYSTEM, "history")}
  # All of them, since the format decides later which one is read.
  names = ("conversations", "messages", "prompt")
  if fields := [name for name in names if row.get(name) is not None]:
    for field in fields:
      try:
        prompt = messages.read_messages(row[field], field, role="user") if row[field] else []
      except BadRow:
        continue  # no conversation; if it is to be read as one, that fails again
      row |= {field: _before(context, prompt)}
    return row
  if "instruction" in row:
    parts = [read_text(row, name) for name in ("instruction", "input") if row.get(name)]
    prompt = [{"role": "user", "content": "\n".join(parts)}]
    row = {k: v for k, v in row.items() if k not in ("instruction", "input")}
    row |= {"completion": row.pop("output")} if "output" in row and "chosen" not in row else {}
    return row | {"prompt": _before(context, prompt)}
  own_prompt = isinstance(row.get("text"), str) or ASSISTANT_TURN in str(row.get("chosen"))
  if context and own_prompt:
    raise BadRow(
      "system",
      "the row has a system message or a history beside a text that contains its own prompt; give"
      " prompt, chosen and rejected as messages",
    )
  # Whole conversations contain their prompt. Texts do not: their prompt has another name.
  whole = all(isinstance(row.get(name), list) for name in ("chosen", "rejected"))
  return row | ({"prompt": context} if whole else {})


def _context(row: Row) -> Messages:
  """Returns the messages that a row's `system` and `history` stand for."""
  found: Messages = []
  for name in _SYSTEM:
    if row.get(name):
      found = _before(found, messages.read_system(row[name], name))
  history = row.get("history") or []
  if not isinstance(history, list):
    raise BadRow(
      "history",
      f"field history is {shorten(history)}, not a list of turns; if it is the prompt:"
      " --config.data.fields.prompt=history",
    )
  for turn in history:
    if isinstance(turn, (list, tuple)) and len(turn) == 2:  # a question and its reply
      roles = ("user", "assistant")
      found += [{"role": r, "content": t} for r, t in zip(roles, turn, strict=True) if t]
    elif isinstance(turn, str):  # who said it?
      raise BadRow(
        "history",
        f"field history has the text {shorten(turn)}; a turn is a pair of a question and its reply,"
        ' or a message, {"role": "user", "content": "…"}',
      )
    else:
      found += messages.read_messages(turn, "history", role="user")
  return found


def _before(context: Messages, prompt: Messages) -> Messages:
  """Returns a prompt after its context, of which it may repeat some."""
  if context and prompt and context[0]["role"] == prompt[0]["role"] == "system":
    if context[0]["content"].strip() != prompt[0]["content"].strip():
      raise RowError("two system messages")
    return [prompt[0], *_before(context[1:], prompt[1:])]
  return prompt if prompt[: len(context)] == context else [*context, *prompt]


# --- completions that contain their prompt --------------------------------------------------------


def completion_texts(row: Row) -> list[str] | None:
  """Returns the texts of a row's completions, or None if it has no text prompt or other types."""
  given = [row[name] for name in COMPLETIONS if row.get(name) is not None]
  if isinstance(row.get("answers"), list):
    given += row["answers"]
  texts = isinstance(row.get("prompt"), str) and all(isinstance(one, str) for one in given)
  return given if texts and given else None


def repeats_prompt(rows: Iterable[Row]) -> bool:
  """Returns True if the completions of all rows begin with the row's prompt.

  One such row may be chance, so the prompts must have 16 characters together at least.
  """
  length = 0
  for row in rows:
    texts = completion_texts(row)
    if texts is None:
      continue
    prompt = row["prompt"]
    if not prompt or not all(text.startswith(prompt) and text != prompt for text in texts):
      return False
    length += len(prompt)
  return length >= 16


def note_repeated_prompts(rows: Iterable[Row]) -> str:
  """Returns a note if most rows, but not all, have completions that begin with their prompt."""
  known = [(row["prompt"], texts) for row in rows if (texts := completion_texts(row))]
  count = sum(bool(p) and all(text.startswith(p) for text in texts) for p, texts in known)
  if 2 * count <= len(known) or sum(len(prompt) for prompt, _ in known) < 16:
    return ""
  return (
    f"the completions begin with their prompt in {count} of {len(known)} rows; nothing is taken"
    " away, since the others do not"
  )


def without_prompt(row: Row) -> Row:
  """Returns a row whose completions no longer begin with its prompt.

  Raises:
    RowError: a completion does not begin with the prompt, as those of the other rows do.
  """
  if completion_texts(row) is None:
    return row
  prompt = cast(str, row["prompt"])

  def after(text: str) -> str:
    if not text.startswith(prompt):
      raise RowError("the completion does not begin with the prompt, as those of other rows do")
    return text[len(prompt) :]

  row = row | {name: after(row[name]) for name in COMPLETIONS if row.get(name) is not None}
  if isinstance(row.get("answers"), list):
    row["answers"] = list(map(after, row["answers"]))
  return row


# --- rendered texts -------------------------------------------------------------------------------

# What chat templates write around messages.
_MARKS = (
  *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>"),
  *("[INST]", "<|user|>", "<|assistant|>", "<|begin_of_text|>"),
)


def rendered_marks(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
  """Returns the marks of chat templates found in plain texts, and those found inside messages."""
  plain_texts, contents = [], []
  for row in rows:
    for name in (*TEXTS, "text", "conversations", "messages"):
      value = row.get(name)
      if isinstance(value, str):
        plain_texts.append(value)
      elif isinstance(value, list):
        found = (one.get("content", one.get("value")) for one in value if isinstance(one, dict))
        contents += [text for text in found if isinstance(text, str)]
  return (
    [mark for mark in _MARKS if any(mark in text for text in plain_texts)],
    [mark for mark in _MARKS if any(mark in text for text in contents)],
  )
