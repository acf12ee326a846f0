"""Files to rows, and rows to prompts and answers: reading, and recognising a form.

A form is recognised from the first row, or from the fields that a field map gives other names; what
each form means stands in `formats`.
"""

from __future__ import annotations

import functools
import glob
import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data import external, formats
from dpo_jax.data import fields as row_fields
from dpo_jax.data.fields import Conversation, Messages, Preference, Row, RowError
from dpo_jax.data.formats import Form
from dpo_jax.structs import UserError

# --- reading --------------------------------------------------------------------------------------


KNOWN = "JSONL, JSON array, gzip of either, Parquet"
# A file, or a data set of `external`.
Source = str | pathlib.Path


def files(given: Source | Sequence[Source]) -> list[Source]:
  """The files that are meant: a path; several, or patterns such as `part-*.parquet`, with commas.

  A name that exists is itself, whatever is in it. Those of a pattern are sorted. Data sets of
  `external` stay as they are named.

  Raises:
    UserError: one names no file.
  """
  if not isinstance(given, (str, pathlib.Path)):
    return [path for one in given for path in files(one)]
  if str(given) and pathlib.Path(given).exists():
    return [_file(pathlib.Path(given))]
  names = list(filter(None, (part.strip() for part in str(given).split(","))))
  if not names:
    raise UserError(f"no data file is named; name a file of rows ({KNOWN})")
  found: list[Source] = []
  for name in names:
    if external.holds_one(name):
      found.append(name)
      continue
    matching = sorted(map(pathlib.Path, glob.glob(name, recursive=True)))
    if not matching and glob.has_magic(name):
      raise UserError(f"no data file fits the pattern {name}")
    found += [_file(path) for path in matching or [pathlib.Path(name)]]
  return found


def _file(path: pathlib.Path) -> pathlib.Path:
  if external.holds_one(path):
    return path
  if path.is_dir():
    raise UserError(f"{path} is a folder; name a file of rows ({KNOWN}), or {path}/*")
  if not path.is_file():
    raise UserError(f"no data file {path}")
  return path


def read_rows(path: Source) -> Iterator[tuple[str, Row]]:
  """Rows of a JSONL or JSON array file, of either gzipped, of Parquet, or of a library's data set.

  A null in Parquet is a field that a row does not have.

  Yields:
    ("file:line", row) as they stand there; rows of all but lines count from 1.
  """
  reader = external.read_rows
  if not external.holds_one(path):
    path = _file(pathlib.Path(path))
    with path.open("rb") as file:
      magic = file.read(4)
    if path.suffix == ".parquet" and magic != b"PAR1":
      raise UserError(
        f"{path} is named .parquet and is no Parquet; fetch it again, or name it otherwise"
      )
    reader = _read_parquet if magic == b"PAR1" else _read_json
  empty = True
  for where, row in reader(path):
    if not isinstance(row, dict):
      raise UserError(
        f"{where}: a row is a JSON object with named fields, not {row_fields.show(row)}"
      )
    empty = False
    yield where, row
  if empty:
    raise UserError(f"{path} holds no rows")


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """A batch of rows at a time: a file may be larger than memory."""
  import pyarrow  # takes a moment to load
  from pyarrow import parquet

  number = 0
  try:
    # Read ahead, all that was read would be held until the end.
    with parquet.ParquetFile(path, pre_buffer=False) as file:
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
          number += 1
          yield f"{path}:row {number}", row_fields.without_nulls(row)
  except (pyarrow.ArrowException, OSError) as error:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path}: broken Parquet ({line}); fetch the file again") from None


def _read_json(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  with path.open("rb") as file:
    zipped = file.read(2) == b"\x1f\x8b"
  if path.suffix == ".gz" and not zipped:
    raise UserError(f"{path} is named .gz and is no gzip; fetch it again, or name it otherwise")
  try:
    with gzip.open(path) if zipped else path.open("rb") as file:
      yield from _parse(file, path)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(f"{path}: broken gzip ({error}); fetch the file again") from None


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


# What may be learned, and the kinds of rows that serve it, the first that fits.
SERVED_BY = {
  "pairs": ("pairs",),
  "text": ("pairs", "text"),
  "unpaired": ("unpaired", "pairs"),
  "ranked": ("ranked", "pairs"),
}
KINDS = tuple(SERVED_BY)

# What is said of rows of another kind than what is wanted.
_MEANT_FOR = {
  "pairs": "rows with chosen and rejected are pairs",
  "text": "rows of one answer without a label are for loss sft",
  "unpaired": "rows with a label are for loss kto",
  "ranked": "rows with a list of answers are for loss plackett_luce",
}


def detect(row: Row, fields: dict[str, str] | None = None, *, kind: str = "pairs") -> Form:
  """The form of a data set, from one of its rows, and what each row is to give.

    kind        rows that serve                    what each gives
    "pairs"     chosen and rejected                both answers
    "text"      an answer without a label          the answer
                chosen and rejected                chosen
    "unpaired"  an answer and a label              the answer; its score is 1 if desirable, or 0
                chosen and rejected                both, of scores 1 and 0, to be judged apart
    "ranked"    answers, best first, or by scores  all of them
                chosen and rejected                both

  Ranked rows do not serve pairs: best against worst would be a guess at what was meant. Scores of
  pairs and ranked answers are their scores or margins: see `fields.pair_scores`.

  Args:
    row: usually the first.
    fields: our names of fields (prompt, chosen, rejected, …) to the names in the rows.
    kind: of the table.

  Returns:
    The form; its `convert` takes rows as they are in the file.

  Raises:
    UserError: the row does not serve, is of no known form, or lacks a field of the map.
  """
  fields = _given(fields)
  row = _rename(row, fields)
  for of in SERVED_BY[kind]:
    if form := _find(row, of):
      return form._replace(convert=functools.partial(_convert, form, of, fields, kind))
  of = next((of for of in KINDS if _find(row, of)), None)
  want = _wanted(*SERVED_BY[kind])
  if of:
    raise UserError(
      f"a row with {_names(row)} does not serve: {_MEANT_FOR[of]}; wanted here are {want}"
    )
  raise _unknown(row, want)


def detect_kind(row: Row, fields: dict[str, str] | None = None) -> str:
  """What the rows of a data set are, from one of them: a key of the table of `detect`."""
  row = _rename(row, _given(fields))
  for of in ("unpaired", "ranked", "pairs", "text"):
    if _find(row, of):
      return of
  raise _unknown(row, _wanted(*KINDS))


def _given(fields: dict[str, str] | None) -> dict[str, str]:
  return {ours: theirs for ours, theirs in (fields or {}).items() if theirs}


def _find(row: Row, of: str) -> Form | None:
  fitting = (form for form in formats.FORMS[of] if form.serves(row))
  return next(fitting, None)


def _unknown(row: Row, want: str) -> UserError:
  return UserError(
    f"a row with {_names(row)} is of no known form; known are {want}; the field map (data.fields)"
    " gives other names to prompt, chosen, rejected and the rest"
  )


def _wanted(*kinds: str) -> str:
  known = [" + ".join(form.fields) for of in kinds for form in formats.FORMS[of]]
  return "; ".join(dict.fromkeys(known))


def _names(row: Row) -> str:
  return ", ".join(sorted(row)) or "no fields"


def _rename(row: Row, fields: dict[str, str]) -> Row:
  """The row under our names; several of theirs, joined by +, are a list of their values."""
  found, used = {}, set(fields)
  for ours, theirs in fields.items():
    names = [theirs] if theirs in row else theirs.split("+")
    for name in names:
      if name not in row:
        raise UserError(
          f"the field map's {ours}={theirs} is not in the row, which has {_names(row)}"
        )
    found[ours] = [row[name] for name in names] if len(names) > 1 else row[names[0]]
    used |= set(names)
  return {name: value for name, value in row.items() if name not in used} | found


def _convert(form: Form, of: str, fields: dict[str, str], kind: str, row: Row) -> Preference:
  """What the table of `detect` says, if there is something to learn from it."""
  row = _rename(row, fields)
  preference = form.convert(row)
  preference = preference._replace(
    prompt=row_fields.with_tools(preference.prompt, row),
    weight=preference.weight * row_fields.weight_of(row),
  )
  if of == "pairs" and kind == "text":
    preference = preference._replace(completions=preference.completions[:1])
  elif of == "pairs":
    known = preference.scores or row_fields.pair_scores(row)
    preference = preference._replace(scores=(1.0, 0.0) if kind == "unpaired" else known)
  if not all(_has_text(answer) for answer in preference.completions):
    raise RowError("empty answer")
  if any(one == other for one, other in itertools.combinations(preference.completions, 2)):
    raise RowError("equal answers")
  return preference


def _has_text(answer: row_fields.Content) -> bool:
  if isinstance(answer, str):
    return bool(answer.strip())
  if answer and isinstance(answer[0], dict):
    return any(message.get("tool_calls") or _has_text(message["content"]) for message in answer)
  return bool(answer)


# --- prompts alone -------------------------------------------------------------------------------


def read_prompt(row: Row) -> str | Messages | Conversation:
  """The `prompt` of a row to sample from, with its `tools` if it has any.

  Raises:
    UserError: it is missing, neither text nor messages, empty, or no Unicode.
  """
  prompt = row.get("prompt")
  if "prompt" not in row:
    raise UserError(f"field 'prompt' is missing; the row has {_names(row)}")
  if not isinstance(prompt, (str, list)):
    raise UserError(
      f"field 'prompt' is {row_fields.show(prompt)}; it must be a text or a list of messages"
    )
  if not prompt:
    what = "text" if isinstance(prompt, str) else "list"
    raise UserError(f"field 'prompt' is an empty {what}; fill it, or leave the row out")
  try:
    if isinstance(prompt, str):
      return row_fields.with_tools(row_fields.valid(prompt), row)
    return row_fields.with_tools(row_fields.messages(prompt, "prompt", role="user"), row)
  except RowError as error:
    raise UserError(f"field 'prompt': {error}") from None
