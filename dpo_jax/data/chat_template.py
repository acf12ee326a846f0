"""Conversations to text, by the chat template of a tokenizer's folder.

What generation goes on from is the prompt of training, and what the template writes behind it is
the answer. Where a template writes an answered prompt otherwise than one that waits (a system turn
told only in the last user's turn, a block that is filled in for the waiting model), the two are set
side by side behind the prompt's last message; where they do not go on alike there, or something
that was said is not in the text, the row is refused: nothing is guessed.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.fields import REASONING, Conversation, Messages, RowError
from dpo_jax.structs import UserError

# Stand for the last message of a prompt and for an answer: letters, which no template alters.
_LAST, _ANSWER = "QlastmessageofthepromptQ", "QanswertothepromptQ"
_OWN = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


def read_arguments(text: str, name: str) -> dict[str, Any]:
  """Values that a chat template reads, from a JSON object; "" is none. `name` is for errors."""
  try:
    found = json.loads(text or "{}")
  except ValueError as error:
    raise UserError(f"{name}={text} is not JSON ({error})") from None
  if not isinstance(found, dict):
    raise UserError(f'{name}={text} is not a JSON object, {{"name": value}}')
  return found


class Template:
  """How the model of a folder writes conversations.

  Attributes:
    source: the template, or named ones; None without: turns are then written plainly.
  """

  def __init__(
    self, folder: pathlib.Path, settings: Mapping[str, Any], arguments: Mapping[str, Any]
  ):
    self._folder = folder
    self.arguments = dict(arguments)
    self.source = _find(folder, settings)
    for name in self.arguments:
      if name in _OWN or not re.search(rf"\b{re.escape(name)}\b", json.dumps(self.source)):
        raise UserError(
          f"template argument {name!r} is none that the chat template of {folder} reads; leave it"
          " out, or look for its name there"
        )

  def start(self, talk: Conversation) -> str:
    """What generation goes on from: the prompt and the head of the turn that is to come.

    Raises:
      RowError: the template refuses the conversation or leaves out a part of it.
    """
    waiting = self._write(talk, add_generation_prompt=True)
    for message in talk.messages:
      _check_told(message, waiting)
    if waiting != self._write(talk):
      return waiting
    # The template does not say that an answer is awaited: the head of its turn is what stands
    # before any answer. A space there is the first of the answer's first word.
    here = _behind_last(self._write(_marked(talk)))
    there = _behind_last(self._write(_marked(talk), [{"role": "assistant", "content": _ANSWER}]))
    head, *rest = there.split(_ANSWER)
    if len(rest) != 1 or not head.startswith(here):
      raise RowError("chat template: where an answer begins cannot be told")
    return waiting + head.removeprefix(here).rstrip(" ")

  def texts(self, talk: Conversation, completions: Sequence[Messages]) -> tuple[str, list[str]]:
    """`start`, and what the template writes of each answer behind it, the turn's end included.

    Raises:
      RowError: as `start`; or an answer does not begin where the prompt ends.
    """
    start = self.start(talk)
    return start, [self._reply(talk, answer, start) for answer in completions]

  def _reply(self, talk: Conversation, answer: Messages, start: str) -> str:
    whole = self._write(talk, answer)
    if whole.startswith(start):
      written = whole.removeprefix(start)
    else:
      marked = _marked(talk)
      here = _behind_last(self.start(marked))
      there = _behind_last(self._write(marked, answer))
      if not (there.startswith(here) and start.endswith(here) and whole.endswith(there)):
        raise RowError("chat template: an answered prompt is not the one that waits for its answer")
      written = there.removeprefix(here)
    for message in answer:
      _check_told(message, written, thoughts=True)
    return written

  @functools.cached_property
  def turn_end(self) -> str:
    """What ends the turn of an answer; nothing without a template, or where it cannot be told."""
    if not self.source:
      return ""
    talk = Conversation([{"role": "user", "content": _LAST}])
    try:
      _, _, end = self._write(talk, [{"role": "assistant", "content": _ANSWER}]).partition(_ANSWER)
    except RowError:
      return ""
    return end

  def _write(self, talk: Conversation, answer: Messages = (), **how: bool) -> str:
    messages = [*talk.messages, *answer]
    if talk.tools and "tools" not in json.dumps(self.source):
      raise RowError("chat template: no place for tools")
    if not self.source:
      return _plain(messages, **how)
    import jinja2  # here for its errors; transformers renders with it

    try:
      return self._library.apply_chat_template(
        messages,
        tools=list(talk.tools) or None,
        chat_template=self.source if isinstance(self.source, str) else None,
        tokenize=False,
        **how,
        **self.arguments,
      )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise RowError(f"chat template: {error}") from None

  @functools.cached_property
  def _library(self):
    """transformers' own class, for its templates; its ids are not used."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast  # slow to import

    return PreTrainedTokenizerFast.from_pretrained(self._folder, local_files_only=True)


def _find(folder: pathlib.Path, settings: Mapping[str, Any]) -> Any:
  """The template of a folder, in any of the three places where it may stand."""
  file = folder / "chat_template.jinja"
  if file.is_file():
    return file.read_text("utf-8")
  if settings.get("chat_template"):
    return settings["chat_template"]
  file = folder / "chat_template.json"
  try:
    return json.loads(file.read_text("utf-8"))["chat_template"] if file.is_file() else None
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{file} holds no chat_template; copy it again or remove it") from None


def _plain(messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
  """A conversation for tokenizers without a template: `User: …`, a blank line, `Assistant: …`.

  The prompt ends in `Assistant:` and an answer begins with a space.
  """
  turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
  return "\n\n".join([*turns, "Assistant:"] if add_generation_prompt else turns)


def _marked(talk: Conversation) -> Conversation:
  """The same conversation, the text of its last message replaced by a mark."""
  *earlier, last = talk.messages
  return talk._replace(messages=[*earlier, {**last, "content": _LAST}])


def _behind_last(text: str) -> str:
  """What follows the marked message."""
  _, *rest = text.split(_LAST)
  if len(rest) != 1:
    raise RowError("chat template: the prompt's last message cannot be told from the rest")
  return rest[0]


def _check_told(message: dict[str, Any], text: str, *, thoughts: bool = False) -> None:
  """All that a message says is in the text; what was thought before earlier answers need not be."""
  said = [message["content"]]
  if message["role"] == "assistant":
    said = re.split("</?think>", message["content"])
    said = [*said, *(message.get(name) or "" for name in REASONING)] if thoughts else said[-1:]
  for call in message.get("tool_calls") or ():
    said.append(str(call.get("function", call).get("name", "")))
  for part in (part.strip() for part in said):
    # Some templates write what tools say as JSON.
    if part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
      raise RowError(f"chat template: it leaves out some of what the {message['role']} says")
