"""Renders conversations as text, by the chat template of a tokenizer's folder.

The prompt of training is the text that generation would continue, and the completion is the text
that the template writes after it. So a model is trained on exactly what it will see when sampling.

Some templates write a prompt differently once it has a completion (Mistral puts the system message
into the last user turn; others fill in an empty reasoning block for the model). The two renderings
are then compared after the prompt's last message only. If they differ there too, or if part of a
message is missing from the text, the row is refused: nothing is guessed.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.fields import REASONING, Conversation, Messages, RowError
from dpo_jax.structs import UserError

# Placeholders for the last message of a prompt and for a completion. Letters only: templates strip
# white space and escape marks, but alter no letters.
_LAST, _COMPLETION = "QlastmessageofthepromptQ", "QcompletionofthepromptQ"
# Directives of `strftime` that a template may ask for.
_DIRECTIVES = [flag + letter for flag in ("", "-") for letter in "aAbBcdHIjmMpSUwWxXyYZ"]
# Arguments that rendering itself passes to a template.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


def read_arguments(text: str, name: str) -> dict[str, Any]:
  """Parses the arguments of a chat template, such as `enable_thinking`, from a JSON object.

  Args:
    text: the JSON text; "" gives no arguments.
    name: of the flag or field that the text comes from, for errors.
  """
  try:
    found = json.loads(text or "{}")
  except ValueError as error:
    raise UserError(f"{name}={text} is not JSON ({error})") from None
  if not isinstance(found, dict):
    raise UserError(f'{name}={text} is not a JSON object, {{"name": value}}')
  return found


class Template:
  """The chat template of a folder.

  Attributes:
    arguments: values that the template reads besides the conversation.
    source: the template, or several named ones. None if the folder has none: conversations are then
      written as `User: …` and `Assistant: …`.
  """

  def __init__(
    self, folder: pathlib.Path, settings: Mapping[str, Any], arguments: Mapping[str, Any]
  ):
    self._folder = folder
    self._begin = ""  # what is written before the template
    self.arguments = dict(arguments)
    self.source = _find_template(folder, settings)
    for name in self.arguments:
      # Jinja ignores arguments that a template does not read, so a misspelt one would have no
      # effect, without an error. json.dumps, since `source` may be a list of named templates.
      if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", json.dumps(self.source)):
        raise UserError(
          f"template argument {name!r} is not one that the chat template of {folder} reads; leave"
          " it out, or look for its name there"
        )

  def pin_date(self, moment: datetime.datetime) -> bool:
    """Makes the template write one date, whenever it is rendered from now on.

    Some templates write today's date into every prompt (Llama 3.2 does, by `strftime_now`). A run
    that is resumed on another day would then learn from other prompts.

    Returns:
      Whether the template writes a date at all.
    """
    if "strftime_now" not in json.dumps(self.source):
      return False
    # In the template's own language, since transformers lets no function reach a template. A macro
    # hides the library's function of that name.
    replaced = "".join(
      f"|replace({json.dumps('%' + name)}, {json.dumps(moment.strftime('%' + name))})"
      for name in _DIRECTIVES
    )
    # "+%}" keeps a line break that the template itself begins with.
    self._begin = "{% macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro +%}"
    return True

  def render_prompt(self, conversation: Conversation) -> str:
    """Returns the text that generation continues: the prompt and the head of the assistant's turn.

    Raises:
      RowError: the template refuses the conversation or omits a part of it.
    """
    waiting = self._render(conversation, add_generation_prompt=True)
    for message in conversation.messages:
      _check_complete(message, waiting)
    if waiting != self._render(conversation):
      return waiting
    # The template ignores add_generation_prompt. The head of the assistant's turn is then what a
    # rendering with a completion adds before the completion. A space at its end is left out: to a
    # BPE tokenizer it is the beginning of the completion's first word.
    marked = _with_mark(conversation)
    here = _after_mark(self._render(marked))
    there = _after_mark(self._render(marked, [{"role": "assistant", "content": _COMPLETION}]))
    head, *rest = there.split(_COMPLETION)
    if len(rest) != 1 or not head.startswith(here):
      raise RowError("chat template: cannot find where a completion begins")
    return waiting + head.removeprefix(here).rstrip(" ")

  def render(
    self, conversation: Conversation, completions: Sequence[Messages]
  ) -> tuple[str, list[str]]:
    """Returns the text of the prompt, and the text that follows it for each completion.

    The text of a completion includes the end of its turn.

    Raises:
      RowError: as `render_prompt`; or a completion does not begin where the prompt ends.
    """
    prompt = self.render_prompt(conversation)
    return prompt, [self._render_completion(conversation, one, prompt) for one in completions]

  def _render_completion(
    self, conversation: Conversation, completion: Messages, prompt: str
  ) -> str:
    """Returns the text of a completion, which follows the text of its prompt."""
    whole = self._render(conversation, completion)
    if whole.startswith(prompt):
      written = whole.removeprefix(prompt)
    else:
      # The template writes the prompt differently once it has a completion. What follows the
      # prompt's last message must still be the same in both renderings: the mark finds that place,
      # since the message's own text may occur several times.
      marked = _with_mark(conversation)
      here = _after_mark(self.render_prompt(marked))
      there = _after_mark(self._render(marked, completion))
      if not (there.startswith(here) and prompt.endswith(here) and whole.endswith(there)):
        raise RowError("chat template: the prompt is not the same with and without a completion")
      written = there.removeprefix(here)
    for message in completion:
      _check_complete(message, written, with_reasoning=True)
    return written

  @functools.cached_property
  def turn_end(self) -> str:
    """The text that ends the assistant's turn; "" without a template, or if it cannot be found."""
    if not self.source:
      return ""
    question = Conversation([{"role": "user", "content": _LAST}])
    reply = [{"role": "assistant", "content": _COMPLETION}]
    try:
      _, _, end = self._render(question, reply).partition(_COMPLETION)
    except RowError:
      return ""
    return end

  def _render(
    self, conversation: Conversation, completion: Sequence[dict[str, Any]] = (), **options: bool
  ) -> str:
    """Returns the text of a conversation and perhaps a completion, as transformers renders it."""
    messages = [*conversation.messages, *completion]
    # Without this check such a template would drop the tools in silence.
    if conversation.tools and "tools" not in json.dumps(self.source):
      raise RowError("chat template: no place for tools")
    if not self.source:
      return _render_plainly(messages, **options)
    import jinja2  # for its errors only; transformers renders with it

    try:
      return self._library.apply_chat_template(
        messages,
        tools=list(conversation.tools) or None,
        # None lets the library choose among named templates.
        chat_template=self._begin + self.source if isinstance(self.source, str) else None,
        tokenize=False,
        **options,
        **self.arguments,
      )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      # Templates raise by themselves, e.g. where roles do not alternate: the row is at fault.
      raise RowError(f"chat template: {error}") from None

  @functools.cached_property
  def _library(self):
    """The tokenizer class of transformers, for its templates (a Jinja sandbox); not for its ids."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast  # slow to import

    library = PreTrainedTokenizerFast.from_pretrained(self._folder, local_files_only=True)
    if self._begin and isinstance(library.chat_template, dict):  # several, by name
      named = library.chat_template.items()
      library.chat_template = {name: self._begin + text for name, text in named}
    return library


def _find_template(folder: pathlib.Path, settings: Mapping[str, Any]) -> Any:
  """Returns the template of a folder, from any of the three files that may contain it."""
  # chat_template.jinja wins, as in transformers; chat_template.json is an older place for it.
  file = folder / "chat_template.jinja"
  if file.is_file():
    return file.read_text("utf-8")
  if settings.get("chat_template"):
    return settings["chat_template"]
  file = folder / "chat_template.json"
  try:
    return json.loads(file.read_text("utf-8"))["chat_template"] if file.is_file() else None
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{file} has no chat_template; copy it again or remove it") from None


def _render_plainly(messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
  """Renders a conversation for tokenizers without a template, a blank line between the turns.

  A turn is `User: …` or `Assistant: …`. The prompt ends in `Assistant:`, without a space: the space
  belongs to the first token of the completion.
  """
  turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
  return "\n\n".join([*turns, "Assistant:"] if add_generation_prompt else turns)


def _with_mark(conversation: Conversation) -> Conversation:
  """Returns the conversation with the text of its last message replaced by a placeholder."""
  *earlier, last = conversation.messages
  return conversation._replace(messages=[*earlier, {**last, "content": _LAST}])


def _after_mark(text: str) -> str:
  """Returns the text that follows the placeholder."""
  _, *rest = text.split(_LAST)
  if len(rest) != 1:
    raise RowError("chat template: cannot find the prompt's last message in its text")
  return rest[0]


def _check_complete(message: dict[str, Any], text: str, *, with_reasoning: bool = False) -> None:
  """Raises `RowError` if a part of a message is missing from its rendered text.

  Reasoning before earlier completions may be missing (`with_reasoning` False): templates of
  reasoning models leave it out of the prompt on purpose. Reasoning of a completion that is trained
  on may not.
  """
  parts = [message["content"]]
  if message["role"] == "assistant":
    parts = re.split("</?think>", message["content"])
    extra = [message.get(name) or "" for name in REASONING]
    parts = [*parts, *extra] if with_reasoning else parts[-1:]
  for call in message.get("tool_calls") or ():
    parts.append(str(call.get("function", call).get("name", "")))
  # Stripped, since most templates trim messages.
  for part in (part.strip() for part in parts):
    # Some templates write the results of tools as JSON.
    if part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
      raise RowError(f"chat template: it leaves out some of what the {message['role']} says")
