"""Forms of rows, and what a row of each form means.

Rows that hold no preference (equal or empty answers, prompts that differ) raise `RowError`, are
dropped and counted. Rows that are broken (a missing field, a boolean where text should be) raise
`UserError`: a file that is wrong in one place is wrong in others too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
    prompt, answers: see above.
    grades: a number for each answer: its score, or its label as 1 or 0; or nothing.
  """

  prompt: Content
  answers: tuple[Content, ...]
  grades: tuple[float, ...] = ()


class RowError(Exception):
  """A row without a preference in it; the message is the reason under which it is counted."""


class Form(NamedTuple):
  """One kind of row.

  Attributes:
    name: as the ledger has it.
    fields: what such a row has.
    fits: whether this is one, given that the fields are there.
    convert: the row's prompt and answers.
  """

  name: str
  fields: tuple[str, ...]
  fits: Callable[[Row], bool]
  convert: Callable[[Row], Preference]


# --- fields ---------------------------------------------------------------------------------------


def _text(row: Row, field: str) -> str:
  value = _field(row, field)
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


def _field(row: Row, field: str) -> Any:
  if field not in row:
    raise UserError(f"field {field} is missing; the row has {', '.join(sorted(row)) or 'none'}")
  return row[field]


def _ids(row: Row, field: str) -> list[int]:
  return _check_ids(_field(row, field), field)


def _check_ids(value: Any, field: str) -> list[int]:
  if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
    raise UserError(f"field {field} is {show(value)}, not a list of token ids")
  return value


def _answers(row: Row, field: str) -> list[Any]:
  """The answers of a ranked row, of whatever type they are."""
  value = _field(row, field)
  if not isinstance(value, list):
    raise UserError(f"field {field} is {show(value)}, not a list of answers, best first")
  if len(value) < 2:
    raise RowError("fewer than two answers")
  return value


def _number(value: Any, field: str) -> float:
  # Grades are float32 on the device; NaN fails every comparison.
  if type(value) not in (int, float) or not abs(value) < 3e38:
    raise UserError(f"field {field} is {show(value)}, not a finite number")
  return float(value)


def _label(row: Row) -> float:
  """1 if the answer is desirable, 0 if not."""
  value = _field(row, "label")
  if not _is_label(value):
    raise UserError(
      f"field label is {show(value)}; it must be true or 1 for a desirable answer, false or 0 for"
      " one that is not"
    )
  return float(value)


def _is_label(value: Any) -> bool:
  return type(value) in (bool, int) and value in (0, 1)


def pair_grades(row: Row) -> tuple[float, ...]:
  """Grades of chosen and rejected, from the first of these that the row has; nothing without.

    margin                             by how much chosen is better, 0 or more: grades margin and 0
    chosen_score and rejected_score    a score each
    chosen_reward and rejected_reward  a reward each, as `scripts/make_pairs.py` writes them

  A null is a field that is not there. A chosen answer may score below the rejected one: labels are
  drawn, or people's.
  """
  if row.get("margin") is not None:
    margin = _number(row["margin"], "margin")
    if margin < 0:
      raise UserError(f"field margin is {show(margin)}; chosen is the better by 0 or more")
    return (margin, 0.0)
  for fields in (("chosen_score", "rejected_score"), ("chosen_reward", "rejected_reward")):
    if any(row.get(field) is not None for field in fields):
      return tuple(_number(_field(row, field), field) for field in fields)
  return ()


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


# --- forms ----------------------------------------------------------------------------------------

TURN = "\n\nAssistant:"  # what an answer follows in a transcript


def _from_ids(row: Row) -> Preference:
  prompt = _ids(row, "prompt_ids")
  if not prompt:
    raise RowError("empty prompt")
  return Preference(prompt, (_ids(row, "chosen_ids"), _ids(row, "rejected_ids")))


def _from_strings(row: Row) -> Preference:
  return Preference(_text(row, "prompt"), (_text(row, "chosen"), _text(row, "rejected")))


def _from_messages(row: Row) -> Preference:
  """A prompt and answers of which at least one is messages; answers may repeat the prompt."""
  prompt = messages(_field(row, "prompt"), "prompt", role="user")
  return _after(
    prompt,
    *(messages(_field(row, field), field, role="assistant") for field in ("chosen", "rejected")),
  )


def _after(prompt: Messages, *answers: Messages) -> Preference:
  """Answers of one message each to a prompt, or whole conversations, which bring their own."""
  if all(len(answer) > 1 for answer in answers):
    return _after_shared(*answers)
  if any(len(answer) != 1 for answer in answers):
    raise RowError("answer of several messages")
  return Preference(prompt, tuple(map(_reply, answers)))


def _from_shared_messages(row: Row) -> Preference:
  return _after_shared(
    *(messages(_field(row, field), field, role="assistant") for field in ("chosen", "rejected"))
  )


def _after_shared(*conversations: Messages) -> Preference:
  """Conversations that are the same up to their last message."""
  prompt = conversations[0][:-1]
  if any(conversation[:-1] != prompt for conversation in conversations):
    raise RowError("prompts differ")
  if not prompt:
    raise RowError("empty prompt")
  return Preference(prompt, tuple(map(_reply, conversations)))


def _reply(conversation: Messages) -> Messages:
  """The last message, which must be the assistant's."""
  if not conversation or conversation[-1]["role"] != "assistant":
    raise RowError("last message is not the assistant's")
  return conversation[-1:]


def _from_transcripts(row: Row) -> Preference:
  """Helpful and harmless dialogues: an answer is what follows the last `\\n\\nAssistant:`."""
  (prompt, chosen), (other, rejected) = (
    _split_transcript(_text(row, field)) for field in ("chosen", "rejected")
  )
  if prompt != other:
    raise RowError("prompts differ")
  return Preference(prompt, (chosen, rejected))


def _split_transcript(text: str) -> tuple[str, str]:
  before, turn, answer = text.rpartition(TURN)
  if not turn:
    raise RowError("no assistant turn")
  return before + turn, answer


def _from_conversations(row: Row) -> Preference:
  prompt = messages(_field(row, "conversations"), "conversations", role="user")
  answers = (
    _reply(messages(_field(row, field), field, role="assistant"))
    for field in ("chosen", "rejected")
  )
  return Preference(prompt, tuple(answers))


def instruction_prompt(instruction: str, context: str = "") -> str:
  """An instruction and what it is about, under Alpaca's headings.

  Alpaca's opening sentence is left out: it says the same for every row, and costs tokens.
  """
  about = f"### Input:\n{context}\n\n" if context.strip() else ""
  return f"### Instruction:\n{instruction}\n\n{about}### Response:\n"


def _instruction(row: Row) -> str:
  context = _text(row, "input") if row.get("input") is not None else ""
  return instruction_prompt(_text(row, "instruction"), context)


def _from_instruction(row: Row) -> Preference:
  return Preference(_instruction(row), (_text(row, "chosen"), _text(row, "rejected")))


def _from_conversation(row: Row, field: str) -> Preference:
  conversation = messages(_field(row, field), field, role="user")
  return Preference(conversation[:-1], (_reply(conversation),))


def _from_completion(row: Row) -> Preference:
  prompt, completion = _field(row, "prompt"), _field(row, "completion")
  if isinstance(prompt, str) and isinstance(completion, str):
    return Preference(valid(prompt), (valid(completion),))
  answer = _reply(messages(completion, "completion", role="assistant"))
  return Preference(messages(prompt, "prompt", role="user"), (answer,))


def _judged(form: Form) -> Form:
  """The same form with a label that says whether the answer is desirable."""

  def convert(row: Row) -> Preference:
    return form.convert(row)._replace(grades=(_label(row),))

  return Form(f"{form.name} with label", (*form.fields, "label"), _always, convert)


def _from_ranked_ids(row: Row) -> Preference:
  prompt = _ids(row, "prompt_ids")
  if not prompt:
    raise RowError("empty prompt")
  answers = [_check_ids(value, "answers_ids") for value in _answers(row, "answers_ids")]
  return _by_scores(Preference(prompt, tuple(answers)), row)


def _from_ranked(row: Row) -> Preference:
  """A prompt and a list of answers: all texts, or messages as those of a pair."""
  prompt, answers = _field(row, "prompt"), _answers(row, "answers")
  if all(isinstance(value, str) for value in (prompt, *answers)):
    return _by_scores(Preference(valid(prompt), tuple(map(valid, answers))), row)
  answers = [messages(value, "answers", role="assistant") for value in answers]
  return _by_scores(_after(messages(prompt, "prompt", role="user"), *answers), row)


def _by_scores(preference: Preference, row: Row) -> Preference:
  """Answers in the order of their `scores`, the highest first, where the row has them.

  Answers of equal score stay in the order of the row; where all are equal nothing is preferred.
  """
  scores = row.get("scores")
  if scores is None:
    return preference
  count = len(preference.answers)
  if not isinstance(scores, list) or len(scores) != count:
    raise UserError(f"field scores is {show(scores)}, not a list of {count} numbers, one an answer")
  scores = [_number(score, "scores") for score in scores]
  if len(set(scores)) == 1:
    raise RowError("equal scores")
  order = sorted(range(count), key=lambda k: -scores[k])
  return preference._replace(
    answers=tuple(preference.answers[k] for k in order), grades=tuple(scores[k] for k in order)
  )


def _all_text(row: Row) -> bool:
  return all(not isinstance(row[field], (list, dict)) for field in ("prompt", "chosen", "rejected"))


def _both(kind: type | tuple[type, ...]) -> Callable[[Row], bool]:
  return lambda row: all(isinstance(row[field], kind) for field in ("chosen", "rejected"))


def _always(row: Row) -> bool:
  return True


def _unlabelled(row: Row) -> bool:
  # A label marks good and bad answers; learning from both alike would be a silent mistake.
  return not _is_label(row.get("label"))


# Forms of a chosen and a rejected answer.
PAIRS = (
  Form("ids", ("prompt_ids", "chosen_ids", "rejected_ids"), _always, _from_ids),
  Form("strings", ("prompt", "chosen", "rejected"), _all_text, _from_strings),
  Form("messages", ("prompt", "chosen", "rejected"), _always, _from_messages),
  Form("conversations", ("conversations", "chosen", "rejected"), _always, _from_conversations),
  Form("instruction", ("instruction", "chosen", "rejected"), _always, _from_instruction),
  Form("transcripts", ("chosen", "rejected"), _both(str), _from_transcripts),
  Form("shared messages", ("chosen", "rejected"), _both(list), _from_shared_messages),
)

# Forms of texts to learn from. Of a conversation the last message is the answer.
TEXTS = (
  Form("completion", ("prompt", "completion"), _unlabelled, _from_completion),
  Form("chat", ("messages",), _unlabelled, lambda row: _from_conversation(row, "messages")),
  Form(
    "chat", ("conversations",), _unlabelled, lambda row: _from_conversation(row, "conversations")
  ),
  Form(
    "instruction",
    ("instruction", "output"),
    _unlabelled,
    lambda row: Preference(_instruction(row), (_text(row, "output"),)),
  ),
  Form("text", ("text",), _always, lambda row: Preference("", (_text(row, "text"),))),
)

# Forms of one answer and its label.
UNPAIRED = tuple(_judged(form) for form in TEXTS if form.name != "text")

# Forms of K answers.
RANKED = (
  Form("ranked ids", ("prompt_ids", "answers_ids"), _always, _from_ranked_ids),
  Form("ranked", ("prompt", "answers"), _always, _from_ranked),
)

# By kind of rows; within a kind the first that fits, so more particular ones stand first.
FORMS = {"pairs": PAIRS, "text": TEXTS, "unpaired": UNPAIRED, "ranked": RANKED}
