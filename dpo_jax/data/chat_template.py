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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.data.fields import Conversation, Messages, RowError
from dpo_jax.data.messages import REASONING, is_assistant
from dpo_jax.data.spans import Written, common_start
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
    self._check_calls(conversation)
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
  ) -> tuple[str, list[Written]]:
    """Returns the text of the prompt, and what follows it for each completion.

    The text of a completion includes the end of its turn.

    Raises:
      RowError: as `render_prompt`; or a completion does not begin where the prompt ends, or cannot
        be divided into its messages.
    """
    prompt = self.render_prompt(conversation)
    written = []
    for completion in completions:
      text = self._render_completion(conversation, completion, prompt)
      # The usual completion is one message, all of which is scored.
      usual = len(completion) == 1 and completion[0].get("weight", 1.0) == 1.0
      spans = () if usual else tuple(self._spans(conversation, completion, text))
      if not usual and not spans:  # no span would mean that all is scored
        raise RowError("no scored message")
      written.append(Written(text, spans))
    return prompt, written

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
        raise RowError(self._why_no_prefix(here, there, completion))
      written = there.removeprefix(here)
    for message in completion:
      _check_complete(message, written, with_reasoning=message.get("weight", 1.0) > 0)
    return written

  def _why_no_prefix(self, here: str, there: str, completion: Messages) -> str:
    """Returns why a completion does not begin where the prompt ends."""
    flags = re.findall(r"\b\w*thinking\w*\b", json.dumps(self.source))
    reasons = any(message.get(name) for name in REASONING for message in completion)
    if flags and (reasons or any("<think>" in message["content"] for message in completion)):
      # The template fills in an empty reasoning block for the model, unless a flag is set.
      end = json.dumps(here[common_start(here, there) :])
      return (
        f"chat template: it ends the prompt with {end}, so a completion cannot have reasoning;"
        f' with data.template={{"{flags[0]}": true}} it may let the model reason'
      )
    return "chat template: the prompt is not the same with and without a completion"

  def _spans(
    self, conversation: Conversation, completion: Messages, written: str
  ) -> Iterator[tuple[int, int, float]]:
    """Yields where the assistant's messages stand in the text of a completion.

    A message's text starts where generation would start and ends with the end of its turn. The
    messages before and after it are marked to find these places: their own texts may occur
    anywhere.
    """
    turns, first = [*conversation.messages, *completion], len(conversation.messages)
    for at in range(first, len(turns)):
      message = turns[at]
      if not is_assistant(message) or not message.get("weight", 1.0):
        continue
      marked = [*turns]
      if at:
        marked[at - 1] = {**turns[at - 1], "content": _LAST}
      head = _after_mark(self.render_prompt(conversation._replace(messages=marked[:at])), bool(at))
      tail = _after_mark(self._render(conversation._replace(messages=marked)), bool(at))
      # A prompt may end in what the template fills in for the model, such as an empty reasoning
      # block, and writes in no earlier turn.
      start = common_start(head, tail)
      end = len(tail)
      if at + 1 < len(turns):
        marked[at + 1] = {**turns[at + 1], "content": _COMPLETION}
        rest = _after_mark(self._render(conversation._replace(messages=marked)), bool(at))
        end = self._end_of_turn(rest, start)
      if not written.endswith(tail[start:]):
        raise RowError("chat template: cannot divide the completion into its messages")
      offset = len(written) - len(tail)
      yield max(0, offset + start), offset + end, message.get("weight", 1.0)

  def _end_of_turn(self, text: str, start: int) -> int:
    """Returns where a message ends that starts at `start` and is followed by the mark."""
    before, *rest = text.split(_COMPLETION)
    turn_end = self.turn_end.strip()
    if len(rest) == 1 and not self.source:
      return max(start, before.rfind("\n\n"))  # where the next turn's name begins
    found = before.rfind(turn_end, start) if turn_end and len(rest) == 1 else -1
    if found < 0:
      raise RowError("chat template: cannot find where a message of the completion ends")
    return found + len(turn_end)

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

  def _check_calls(self, conversation: Conversation) -> None:
    """Raises `RowError` if a call in the prompt is missing from its text.

    The name of the tool is no sign of it, since it stands in the list of tools as well.
    """
    marks: list[str] = []

    def marked(call: dict[str, Any]) -> dict[str, Any]:
      marks.append(f"Qcall{'abcdefghij'[len(marks) % 10] * (1 + len(marks) // 10)}Q")
      function = {**call.get("function", call), "name": marks[-1]}
      return {**call, "function": function} if "function" in call else function

    turns = [
      {**one, "tool_calls": list(map(marked, one["tool_calls"]))} if "tool_calls" in one else one
      for one in conversation.messages
    ]
    if not marks:
      return
    text = self._render(conversation._replace(messages=turns))
    if not all(mark in text for mark in marks):
      raise RowError("chat template: it leaves out a tool call of the assistant")

  def _render(
    self, conversation: Conversation, completion: Sequence[dict[str, Any]] = (), **options: bool
  ) -> str:
    """Returns the text of a conversation and perhaps a completion, as transformers renders it."""
    messages = [_without_weight(one) for one in (*conversation.messages, *completion)]
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


def _without_weight(message: dict[str, Any]) -> dict[str, Any]:
  return {name: one for name, one in message.items() if name != "weight"}


def _after_mark(text: str, marked: bool = True) -> str:
  """Returns the text that follows the placeholder; all of it if nothing is marked."""
  if not marked:
    return text
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
  parts, reasoning = [message["content"]], []
  if message["role"] == "assistant":
    *reasoning, last = re.split("</?think>", message["content"])
    parts = [last]
    reasoning = [*reasoning, *(message.get(name) or "" for name in REASONING)]
  for call in message.get("tool_calls") or ():
    function = call.get("function", call)
    arguments = function.get("arguments")
    parts += [str(function.get("name", "")), *(arguments if isinstance(arguments, dict) else ())]
  if not all(_is_written(part, text) for part in parts):
    raise RowError(f"chat template: it leaves out some of what the {message['role']} says")
  if with_reasoning and not all(_is_written(part, text) for part in reasoning):
    raise RowError("chat template: it leaves out some of the assistant's reasoning")


def _is_written(part: str, text: str) -> bool:
  """Returns True if a text contains a part of a message."""
  part = part.strip()  # most templates trim messages
  # Some templates write the results of tools as JSON.
  return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
