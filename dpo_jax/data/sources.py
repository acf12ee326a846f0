"""Rows of files to prompts and answers: reading, recognising a form, and what each form means.

A form is recognised from the first row, or from the fields that a field map gives other names. Rows
that hold no preference (equal or empty answers, prompts that differ) raise `RowError`, are dropped
and counted. Rows that are broken (a missing field, a boolean where text should be) raise
`UserError`: a file that is wrong in one place is wrong in others too.
"""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dpo_jax.structs import UserError

Row = dict[str, Any]
Messages = list[dict[str, Any]]  # of {"role": "system" | "user" | "assistant" | …, "content": …}
Content = str | Messages | list[int]  # plain text, a conversation, or token ids


class Preference(NamedTuple):
  """A prompt and its answers, best first; all of one kind.

  Text goes on where the prompt ends; an answer to messages is a list of one message; token ids
  stand as they are.
  """

  prompt: Content
  answers: tuple[Content, ...]


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


# --- reading --------------------------------------------------------------------------------------


def read_rows(path: str | pathlib.Path) -> Iterator[tuple[str, Row]]:
  """Rows of a JSONL or JSON array file, or of either gzipped, each with where it stands.

  Yields:
    ("file:line", row); rows of an array count from 1.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise UserError(f"{path} is a folder; name a file of rows (JSONL, JSON array, gzip of either)")
  if not path.is_file():
    raise UserError(f"no data file {path}")
  with path.open("rb") as file:
    magic = file.read(4)
  if magic == b"PAR1":
    raise UserError(f"{path} is Parquet, which is not read; write its rows as JSON, one a line")
  zipped = magic[:2] == b"\x1f\x8b"
  empty = True
  try:
    with gzip.open(path) if zipped else path.open("rb") as file:
      for where, row in _parse(file, path):
        if not isinstance(row, dict):
          raise UserError(f"{where}: a row is a JSON object with named fields, not {_show(row)}")
        empty = False
        yield where, row
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(f"{path}: broken gzip ({error}); fetch the file again") from None
  if empty:
    raise UserError(f"{path} holds no rows")


def _parse(file, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Values of a file with where they stand: array elements if it opens with a bracket, or lines."""
  first = b""
  for number, line in enumerate(file, 1):
    if number == 1:
      line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
      continue
    if not first and line.lstrip()[:1] == b"[":
      text = line + file.read()
      values = _load(text, f"{path}:{{line}}", number)
      yield from ((f"{path}:row {i}", value) for i, value in enumerate(values, 1))
      return
    first = first or line
    yield f"{path}:{number}", _load(line.rstrip(), f"{path}:{{line}}", number)


def _load(text: bytes, where: str, line: int) -> Any:
  """JSON of some bytes that begin at `line`; `where` has a place for the line of an error."""
  try:
    return json.loads(text.decode("utf-8"))
  except UnicodeDecodeError as error:
    at = where.format(line=line + text[: error.start].count(b"\n"))
    raise UserError(f"{at}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
  except json.JSONDecodeError as error:
    at = where.format(line=line + error.lineno - 1)
    raise UserError(
      f"{at}: not JSON ({error.msg} at column {error.colno}); a file is one JSON array or one"
      " JSON object a line"
    ) from None
  except (RecursionError, ValueError) as error:  # nested too deep, a number of too many digits
    raise UserError(f"{where.format(line=line)}: JSON that cannot be read ({error})") from None


# --- recognising ----------------------------------------------------------------------------------


def detect(row: Row, fields: dict[str, str] | None = None, *, answers: int = 2) -> Form:
  """The form of a data set, from one of its rows.

  Args:
    row: usually the first.
    fields: our names of fields (prompt, chosen, rejected, …) to the names in the rows.
    answers: 2 for preferences; 1 for texts to learn from, where preferences serve too and only
      what was chosen is kept.

  Returns:
    The form; its `convert` takes rows as they are in the file and returns `answers` answers.
  """
  fields = {ours: theirs for ours, theirs in (fields or {}).items() if theirs}
  row = _rename(row, fields)
  known = PREFERENCES if answers > 1 else PREFERENCES + TEXTS
  for form in known:
    if all(field in row for field in form.fields) and form.fits(row):
      return form._replace(convert=functools.partial(_convert, form, fields, answers))
  has = ", ".join(sorted(row)) or "no fields"
  want = "; ".join(dict.fromkeys(" + ".join(form.fields) for form in known))
  raise UserError(
    f"a row with {has} is of no known form; known are {want}; the field map (data.fields) gives"
    " other names to prompt, chosen and rejected"
  )


def _rename(row: Row, fields: dict[str, str]) -> Row:
  for ours, theirs in fields.items():
    if theirs not in row:
      has = ", ".join(sorted(row)) or "no fields"
      raise UserError(f"the field map's {ours}={theirs} is not in the row, which has {has}")
  theirs = set(fields.values())
  kept = {name: value for name, value in row.items() if name not in theirs and name not in fields}
  return kept | {ours: row[name] for ours, name in fields.items()}


def _convert(form: Form, fields: dict[str, str], answers: int, row: Row) -> Preference:
  """The best `answers` answers, if there is something to learn from them."""
  preference = form.convert(_rename(row, fields))
  kept = preference.answers[:answers]
  if not all(_has_text(answer) for answer in kept):
    raise RowError("empty answer")
  if len(kept) > 1 and any(kept[0] == other for other in kept[1:]):
    raise RowError("equal answers")
  return preference._replace(answers=kept)


def _has_text(answer: Content) -> bool:
  if isinstance(answer, str):
    return bool(answer.strip())
  if answer and isinstance(answer[0], dict):
    return any(_has_text(message["content"]) for message in answer)
  return bool(answer)


# --- fields ---------------------------------------------------------------------------------------


def _text(row: Row, field: str) -> str:
  value = _field(row, field)
  if not isinstance(value, str):
    raise UserError(f"field {field} is {_show(value)}, not text")
  return _valid(value)


def _valid(text: str) -> str:
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
  value = _field(row, field)
  if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
    raise UserError(f"field {field} is {_show(value)}, not a list of token ids")
  return value


def read_prompt(row: Row) -> str | Messages:
  """The `prompt` of a row to sample from.

  Raises:
    UserError: it is neither text nor messages, is empty, or is no Unicode.
  """
  prompt = row.get("prompt")
  if not prompt or not isinstance(prompt, (str, list)):
    raise UserError("field 'prompt' must be a text or a list of messages")
  try:
    return _valid(prompt) if isinstance(prompt, str) else _messages(prompt, "prompt", role="user")
  except RowError as error:
    raise UserError(f"field 'prompt': {error}") from None


ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "bot": "assistant"}


def _messages(value: Any, field: str, *, role: str) -> Messages:
  """A conversation from any way of writing one: a list, a single message, or the text of one."""
  if isinstance(value, str):
    return [{"role": role, "content": _valid(value)}]
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise UserError(f"field {field} is {_show(value)}, not text or a list of messages")
  return [_message(message, field) for message in value]


def _message(message: dict[str, Any], field: str) -> dict[str, Any]:
  role = message.get("role", message.get("from"))
  content = message.get("content", message.get("value"))
  if isinstance(content, list):  # parts: {"type": "text", "text": …}
    parts = [part.get("text", part.get("value")) for part in content if isinstance(part, dict)]
    whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
    content = "".join(parts) if whole else content
  if not isinstance(role, str) or not isinstance(content, str):
    raise UserError(
      f"field {field} has the message {_show(message)}; a message is a role and a text, as in"
      ' {"role": "user", "content": "…"}'
    )
  return {"role": ROLES.get(role, role), "content": _valid(content)}


def _show(value: Any) -> str:
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
  prompt = _messages(_field(row, "prompt"), "prompt", role="user")
  chosen, rejected = (
    _messages(_field(row, field), field, role="assistant") for field in ("chosen", "rejected")
  )
  if len(chosen) > 1 and len(rejected) > 1:
    return _after_shared(chosen, rejected)
  if len(chosen) != 1 or len(rejected) != 1:
    raise RowError("answer of several messages")
  return Preference(prompt, (_reply(chosen), _reply(rejected)))


def _from_shared_messages(row: Row) -> Preference:
  return _after_shared(
    *(_messages(_field(row, field), field, role="assistant") for field in ("chosen", "rejected"))
  )


def _after_shared(chosen: Messages, rejected: Messages) -> Preference:
  """Two conversations that are the same up to their last message."""
  if chosen[:-1] != rejected[:-1]:
    raise RowError("prompts differ")
  if len(chosen) < 2:
    raise RowError("empty prompt")
  return Preference(chosen[:-1], (_reply(chosen), _reply(rejected)))


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
  prompt = _messages(_field(row, "conversations"), "conversations", role="user")
  answers = (
    _reply(_messages(_field(row, field), field, role="assistant"))
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
  conversation = _messages(_field(row, field), field, role="user")
  return Preference(conversation[:-1], (_reply(conversation),))


def _from_completion(row: Row) -> Preference:
  if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
    return Preference(_text(row, "prompt"), (_text(row, "completion"),))
  prompt = _messages(row["prompt"], "prompt", role="user")
  return Preference(prompt, (_reply(_messages(row["completion"], "completion", role="assistant")),))


def _all_text(row: Row) -> bool:
  return all(not isinstance(row[field], (list, dict)) for field in ("prompt", "chosen", "rejected"))


def _both(kind: type | tuple[type, ...]) -> Callable[[Row], bool]:
  return lambda row: all(isinstance(row[field], kind) for field in ("chosen", "rejected"))


def _always(row: Row) -> bool:
  return True


def _unlabelled(row: Row) -> bool:
  # A boolean label marks good and bad answers; learning from both alike would be a silent mistake.
  return not isinstance(row.get("label"), bool)


# Forms of preferences, the first that fits; more particular ones stand first.
PREFERENCES = (
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
