"""Messages of conversations: reads them in any usual notation, and divides prompt and completions.

No message of a row is dropped in silence: it becomes part of the prompt or of a completion, or the
row is refused or counted with a reason.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

from dpo_jax.data.fields import (
  BadRow,
  Content,
  Conversation,
  Messages,
  Preference,
  Row,
  RowError,
  check_number,
  check_unicode,
  shorten,
)

# Names under which a message may contain the reasoning that precedes its content.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields of a message that chat templates read besides role and content.
_EXTRA_FIELDS = ("tool_calls", "tool_call_id", "name", *REASONING)
# Names of roles, in small letters, and the names that chat templates know.
ROLES = {
  **dict.fromkeys(("system", "system_prompt"), "system"),
  **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
  **dict.fromkeys(
    ("assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "ai", "bing", "bard", "answer"),
    "assistant",
  ),
  **dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool"),
  **dict.fromkeys(("developer", "context", "documents"), ""),  # kept as they are
}
# Names under which a message has its text, or parts of it (Gemini's `parts`).
_CONTENTS = ("content", "value", "text", "parts", "message")
# Names under which a message says whether it is scored, besides `weight`: axolotl's and ms-swift's.
_SCORED = ("train", "training", "loss")
# How a list of messages, or one message, begins as text, in JSON or Python.
_WRITTEN_MESSAGES = re.compile(r"""\s*(\[\s*)?\{\s*(["'])(role|from|content|value)\2\s*:""")
# Roles whose message is a call of a tool, written as JSON.
_CALLS = ("function_call", "tool_call")


# --- reading --------------------------------------------------------------------------------------


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
    raise BadRow(field, f"field {field} is {shorten(value)}, not text or a list of messages")
  return [_read_message(message, field) for message in value]


def read_system(value: Any, field: str) -> Messages:
  """Returns the system message that a text, parts of a text, or a message stand for."""
  if isinstance(value, list) and not all(map(is_message, value)):
    value = {"content": value}
  if isinstance(value, dict):
    value = {"role": "system", **value}
  found = read_messages(value, field, role="system")
  if any(message["role"] != "system" for message in found):
    raise BadRow(field, f"field {field} is {shorten(value)}, not a system message")
  return found


def is_message(value: Any) -> bool:
  """Returns True for an object that has a role, in OpenAI's or ShareGPT's notation."""
  return isinstance(value, dict) and any(name in value for name in ("role", "from"))


def role_of(message: Any) -> str | None:
  """Returns the role of a message by the name that templates know, or None if it has none."""
  role = message.get("role", message.get("from")) if isinstance(message, dict) else None
  name = role.lower() if isinstance(role, str) else ""
  return "assistant" if name in _CALLS else ROLES[name] or name if name in ROLES else None


def _read_message(message: dict[str, Any], field: str) -> dict[str, Any]:
  """Returns a message as {"role", "content", …}, from OpenAI's field names or ShareGPT's."""
  role = message.get("role", message.get("from"))
  content = next((message[name] for name in _CONTENTS if message.get(name) is not None), None)
  extra = {name: message[name] for name in _EXTRA_FIELDS if message.get(name) is not None}
  if message.get("function_call") is not None:  # OpenAI's notation before tool_calls
    extra["tool_calls"] = [{"type": "function", "function": message["function_call"]}]
  if isinstance(role, str) and role.lower() in _CALLS:
    role, content, extra["tool_calls"] = "assistant", "", _parse_calls(content, field)
  # The content of a message that only calls tools is null in OpenAI's format.
  if content is None and extra.get("tool_calls"):
    content = ""
  if isinstance(content, list):  # parts: {"type": "text", "text": …}
    parts = [part.get("text", part.get("value")) for part in content if isinstance(part, dict)]
    texts = [part for part in parts if isinstance(part, str)]
    # Joined only if every part is text: an image must be an error, not a silent omission.
    content = "".join(texts) if len(texts) == len(content) else content
  if not isinstance(role, str) or not isinstance(content, str):
    raise BadRow(
      field,
      f"field {field} has the message {shorten(message)}; a message is a role and a text, as in"
      ' {"role": "user", "content": "…"}',
    )
  if role.lower() not in ROLES:
    raise BadRow(
      field,
      f"field {field} has a message of the role {shorten(role)}; known: {', '.join(ROLES)};"
      " rename the role to the one of these that it means",
    )
  weight = message.get("weight", _scored(message))
  if weight is not None:
    extra["weight"] = _read_message_weight(weight, field)
  if "tool_calls" in extra:
    extra["tool_calls"] = _read_calls(extra["tool_calls"], field)
  _check_extra_fields(extra, field)
  role = ROLES[role.lower()] or role.lower()
  return {"role": role, "content": check_unicode(content), **extra}


def _scored(message: dict[str, Any]) -> bool | None:
  """Returns whether a message says that it is scored, or None if it says nothing."""
  # Only true and false: a number may be anything, such as the loss that a model had.
  return next((message[name] for name in _SCORED if isinstance(message.get(name), bool)), None)


def _read_message_weight(value: Any, field: str) -> float:
  weight = check_number(float(value) if isinstance(value, bool) else value, field)
  if weight < 0:
    raise BadRow(field, f"field {field} has a message of weight {weight:g}; weights are 0 or above")
  return weight


def _parse_calls(content: Any, field: str) -> Any:
  """Returns the calls in a message that is one call or several, as JSON."""
  try:
    found = json.loads(content) if isinstance(content, str) else content
  except ValueError:
    found = None
  calls = found if isinstance(found, list) else [found]
  if not all(isinstance(call, dict) and "name" in call for call in calls):
    raise BadRow(
      field,
      f"field {field} has the call {shorten(content)}; a call is JSON with name and arguments",
    )
  return [{"type": "function", "function": call} for call in calls]


def _read_calls(calls: Any, field: str) -> list[dict[str, Any]]:
  """Returns tool calls with their arguments as objects, as chat templates expect them."""
  if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
    raise BadRow(field, f"field {field} has tool_calls {shorten(calls)}, not a list of calls")
  return [_with_object_arguments(call) for call in calls]


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
  function = call.get("function", call)
  if not isinstance(function, dict):
    return call
  arguments = function.get("arguments", function.get("parameters"))  # Llama's name
  # OpenAI has them as JSON text. Most templates write JSON, so a text would be quoted twice.
  try:
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
  except ValueError:
    return call
  if not isinstance(parsed, dict):
    return call
  changed = {k: v for k, v in function.items() if k != "parameters"} | {"arguments": parsed}
  return {**call, "function": changed} if "function" in call else changed


def _check_extra_fields(extra: dict[str, Any], field: str) -> None:
  for name, value in extra.items():
    if name not in ("tool_calls", "weight") and not isinstance(value, str):
      raise BadRow(field, f"field {field} has a message whose {name} is {shorten(value)}, not text")
    # ensure_ascii=False keeps a lone surrogate as it is, so that the check can find it.
    check_unicode(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def parse_text(value: Any, field: str) -> Any:
  """Returns messages that are written as text, in JSON or Python; any other value unchanged.

  Tables that cannot contain lists contain such texts.

  Raises:
    BadRow: the text begins as messages do, and cannot be read back.
  """
  if not isinstance(value, str) or not _WRITTEN_MESSAGES.match(value):
    return value
  for parse in (json.loads, ast.literal_eval):
    try:
      with warnings.catch_warnings(action="ignore"):  # about escapes such as \\d
        found = parse(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue
    several = found if isinstance(found, list) else [found]
    if all(map(is_message, several)):
      return found
    if not any(map(is_message, several)):
      return value  # a text that happens to be JSON
    break
  raise BadRow(
    field,
    f"field {field} has messages in a notation that cannot be read back (NumPy's, without commas);"
    " write the rows as JSONL, or this column with json.dumps",
  )


# --- tools ----------------------------------------------------------------------------------------


def as_conversation(prompt: Messages | Conversation) -> Conversation:
  """Returns messages as a conversation without tools; a conversation is returned unchanged."""
  return prompt if isinstance(prompt, Conversation) else Conversation(prompt)


def with_tools(prompt: Content, row: Row) -> Content:
  """Returns the prompt together with the row's `tools`, if it has any.

  `tools` is a list of JSON schemas, or the JSON text of such a list.

  Raises:
    BadRow: the tools are malformed, or the prompt is text: only a chat template can write tools.
  """
  tools = row.get("tools")
  if isinstance(tools, str):
    try:
      tools = json.loads(tools) if tools.strip() else None
    except ValueError:
      raise BadRow("tools", f"field tools is {shorten(tools)}, not JSON") from None
  if not tools:
    return prompt
  if isinstance(tools, list):  # a schema by itself may be text too
    tools = [json.loads(tool) if _is_json_object(tool) else tool for tool in tools]
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise BadRow("tools", f"field tools is {shorten(tools)}, not a list of JSON schemas")
  # Templates expect OpenAI's notation of a function; many data sets have its inner part alone.
  tools = [
    {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
    for tool in tools
  ]
  if isinstance(prompt, str):
    raise BadRow(
      "tools",
      "field tools is given and the prompt is text; a chat template writes tools: give the prompt"
      " as messages, or leave the field out",
    )
  # A prompt of token ids was rendered before: its tools are already among the ids.
  messages = prompt and isinstance(prompt[0], dict)
  return Conversation(cast(Messages, prompt), tuple(tools)) if messages else prompt


def _is_json_object(value: Any) -> bool:
  try:
    return isinstance(value, str) and isinstance(json.loads(value), dict)
  except ValueError:
    return False


# --- prompt and completions -----------------------------------------------------------------------


def is_assistant(message: dict[str, Any]) -> bool:
  """Returns True for a message that the assistant wrote."""
  return message["role"] == "assistant"


def join(prompt: Messages, *replies: Messages) -> Preference:
  """Joins a prompt with completions, of which some may repeat the prompt or a part of it.

  Raises:
    RowError: the prompt is not that of the completions, or a completion is none.
  """
  whole = [_join_one(prompt, reply) for reply in replies]
  if len(whole) > 1:
    return divide(*(conversation for conversation, _ in whole))
  # By itself a conversation says nothing about where its completion begins, but the prompt does.
  ((conversation, end),) = whole
  if not is_assistant(conversation[-1]):
    raise RowError("last message is not the assistant's")
  start = min(end, len(conversation) - 1)
  while not is_assistant(conversation[start]):
    start += 1
  return Preference(conversation[:start], (conversation[start:],))


def _join_one(prompt: Messages, reply: Messages) -> tuple[Messages, int]:
  """Returns the conversation of a prompt and what follows it, or repeats and follows it.

  Returns:
    The conversation, and the number of its messages up to the end of the prompt.
  """
  if not reply:
    raise RowError("empty completion")
  plain_prompt, plain_reply = _bare(prompt), _bare(reply)
  # 1. The reply repeats the whole prompt, or its end: perhaps all but the system message. A reply
  #    begins with the assistant, so what begins with the assistant repeats nothing but by chance.
  for start in range(len(prompt)):
    if start and is_assistant(prompt[start]):
      continue
    if plain_reply[: len(prompt) - start] == plain_prompt[start:]:
      return prompt + reply[len(prompt) - start :], len(prompt)
  # 2. The reply has a system message that the prompt lacks.
  for start in range(1, len(reply)):
    if reply[start - 1]["role"] not in ("system", "developer"):
      break
    if prompt and plain_reply[start : start + len(prompt)] == plain_prompt:
      return reply, start + len(prompt)
  # 3. The reply is a whole conversation in which the prompt comes later: it is the last question.
  if found := _find_inside(prompt, reply):
    return found
  # 4. It goes on where the prompt ends. What begins as the prompt does is another conversation.
  if _opening(plain_prompt) == _opening(plain_reply) is not None:
    raise RowError("the prompt and the conversation beside it differ")
  if not prompt or prompt[-1]["role"] in ("system", "developer", "assistant"):
    return prompt + reply, len(prompt)
  if reply[0]["role"] in ("user", "system", "developer"):
    if any(map(is_assistant, reply)):
      raise RowError("the prompt and the conversation beside it differ")
    raise RowError("last message is not the assistant's")
  return prompt + reply, len(prompt)


def _find_inside(prompt: Messages, reply: Messages) -> tuple[Messages, int] | None:
  """Returns what `_join_one` does for a reply that has the prompt inside, after earlier turns."""
  head = next((i for i, one in enumerate(prompt) if one["role"] != "system"), len(prompt))
  question, plain_reply = _bare(prompt[head:]), _bare(reply)
  if not question or reply[0]["role"] not in ("user", "system"):
    return None
  if plain_reply[:head] == _bare(prompt[:head]):
    whole = reply
  elif reply[0]["role"] == "user":
    whole = prompt[:head] + reply
  else:
    return None
  for end in range(head + len(question) + 1, len(whole)):
    if _bare(whole[end - len(question) : end]) == question:
      return whole, end
  return None


def _opening(conversation: Messages) -> dict[str, Any] | None:
  """Returns the message with which a user begins a conversation, or None if none does."""
  first = next((one for one in conversation if one["role"] not in ("system", "developer")), None)
  return first if first and first["role"] == "user" else None


def divide(*conversations: Messages) -> Preference:
  """Divides whole conversations into the prompt that they share, and completions.

  The prompt is as long as possible; every completion begins with a message of the assistant.

  Raises:
    RowError: a conversation does not end with the assistant, or the prompts differ.
  """
  for conversation in conversations:
    if not conversation or not is_assistant(conversation[-1]):
      raise RowError("last message is not the assistant's")
  bare = [_bare(conversation) for conversation in conversations]
  shared = 0
  while all(len(one) > shared and one[shared] == bare[0][shared] for one in bare):
    shared += 1
  # A completion must be left of every conversation: one may be the beginning of another.
  shared = min(shared, min(map(len, bare)) - 1)
  while shared and not all(is_assistant(one[shared]) for one in conversations):
    shared -= 1
  if not all(is_assistant(one[shared]) for one in conversations):
    raise RowError("prompts differ")
  if not shared:
    raise RowError("empty prompt")
  return Preference(
    conversations[0][:shared], tuple(conversation[shared:] for conversation in conversations)
  )


def divide_one(conversation: Messages) -> Preference:
  """Divides a conversation before the assistant's first message that is scored.

  A greeting, with which the assistant opens the conversation, answers nothing and is prompt.
  """
  scored = [i for i, one in enumerate(conversation) if is_assistant(one) and one.get("weight", 1)]
  if scored == [0]:
    raise RowError("empty prompt")
  scored = [i for i in scored if i]
  if not scored or not is_assistant(conversation[-1]):
    raise RowError("last message is not the assistant's" if scored else "no scored message")
  return Preference(conversation[: scored[0]], (conversation[scored[0] :],))


def last_alone(preference: Preference) -> Preference:
  """Returns the preference with all messages of a completion as context, but its last one."""

  def context(completion: Content) -> Content:
    if not (isinstance(completion, list) and completion and isinstance(completion[0], dict)):
      return completion
    *before, last = cast(Messages, completion)
    return [*({**message, "weight": 0.0} for message in before), last]

  return preference._replace(completions=tuple(map(context, preference.completions)))


def _bare(messages: Sequence[dict[str, Any]]) -> Messages:
  """Returns messages as they are compared: texts trimmed, without weights."""
  return [
    {**{name: one for name, one in message.items() if name != "weight"}}
    | {"content": message["content"].strip()}
    for message in messages
  ]
