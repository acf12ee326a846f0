"""Reads rows from JSON: an object per line, objects one after the other, an array, or a table.

A file that consists of one object is a row, or a table in one of the usual ways of writing it:

  {"data": [row, …], …}                    the only list of objects under a name of `_TABLES`
  {"prompt": [a, …], "chosen": [b, …]}     columns, all of one length
  {"prompt": {"0": a, …}, "chosen": …}     columns by row number, as pandas writes by default
  {"0": row, "1": row, …}                  rows by number
  {"columns": [name, …], "data": [[a, b], …]}
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from dpo_jax.data.fields import Row
from dpo_jax.data.file_kinds import BOM
from dpo_jax.structs import UserError

_NO_SPACE = re.compile(r"[^ \t\r\n]")
# Names under which a file has its rows. With two of them in one file, which is meant is a guess.
_TABLES = (
  *("data", "rows", "examples", "samples", "records", "items", "instances", "entries", "dataset"),
  *("train", "training", "valid", "validation", "dev", "eval", "test", "pairs", "preferences"),
  *("comparisons", "results"),
)
# Names of a row's own fields: those that contain texts or messages, and those that may be lists.
_TEXTS = {"prompt", "instruction", "chosen", "rejected", "completion", "answer_a", "answer_b"}
_LISTS = {
  *("answers", "answers_ids", "completions", "responses", "history", "preference", "scores"),
  *("messages", "conversations", "tools"),
}


def read(file: BinaryIO, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Reads the JSON values of a file that are meant as rows.

  Objects are read line by line. An array, or an object over several lines, is read in memory.

  Yields:
    (place, value), the place being "file:LINE", or "file:row NUMBER" within an array or a table.

  Raises:
    UserError: something is not JSON, or a name occurs twice in an object.
  """
  lines = enumerate(file, 1)
  number, line = next(((n, text) for n, text in lines if text.removeprefix(BOM).strip()), (0, b""))
  if not number:
    return
  if _goes_on(line):
    values = _values(line + file.read(), path, number)
  else:
    values = _line_values(number, line, lines, path)
  first, second = next(values, None), next(values, None)
  if first is not None and second is None:  # the file has one value
    yield from _rows_of(*first, path)
    return
  for one in (first, second):
    if one is not None:
      yield _check_several(*one, path)
  for one in values:
    yield _check_several(*one, path)


def _goes_on(line: bytes) -> bool:
  """Returns True if the JSON value that begins in a line does not end in it, or is an array."""
  text = line.removeprefix(BOM).strip()
  if text[:1] == b"[":
    return True
  try:
    json.loads(text)
  except json.JSONDecodeError as error:
    # At the end something is missing. Elsewhere something is wrong, and the rest need not be read.
    return error.pos >= len(error.doc)
  except (ValueError, RecursionError):
    pass
  return False


def _line_values(
  number: int, line: bytes, lines: Iterator[tuple[int, bytes]], path: pathlib.Path
) -> Iterator[tuple[int, Any]]:
  """Yields (line, value) of every line that is not blank, the given one first."""
  yield from _values(line, path, number)
  for number, line in lines:
    if line.strip():
      yield from _values(line, path, number)


def _check_several(line: int, value: Any, path: pathlib.Path) -> tuple[str, Any]:
  if isinstance(value, list):
    raise UserError(
      f"{path}:{line}: one of several JSON arrays in the file; write one array with all rows, or"
      " one JSON object per line"
    )
  return f"{path}:{line}", value


# --- parsing --------------------------------------------------------------------------------------


def _values(data: bytes, path: pathlib.Path, line: int) -> Iterator[tuple[int, Any]]:
  """Parses the JSON values of some bytes, which may follow each other without a separator.

  Args:
    data: UTF-8.
    path: for errors.
    line: the number of the first line of `data` in the file.

  Yields:
    (line, value).
  """
  data = data.removeprefix(BOM).rstrip()
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    at = line + data[: error.start].count(b"\n")
    column = error.start - data.rfind(b"\n", 0, error.start)
    raise UserError(f"{path}:{at}: byte {column} is not UTF-8; save the file as UTF-8") from None
  end = seen = 0
  while begin := _NO_SPACE.search(text, end):
    position = begin.start()
    line += text.count("\n", seen, position)
    seen = position
    try:
      value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
      at = line + text.count("\n", seen, error.pos)
      column = error.pos - text.rfind("\n", 0, error.pos)
      raise UserError(
        f"{path}:{at}: not JSON ({error.msg.removesuffix(' starting at')} at column {column});"
        f" {_way_out(text, error)}"
      ) from None
    except _Repeated as error:
      raise UserError(f"{path}:{line}: {error}") from None
    except (RecursionError, ValueError) as error:  # nested too deep, a number of too many digits
      raise UserError(f"{path}:{line}: JSON that cannot be read ({error})") from None
    yield line, value


class _Repeated(Exception):
  """An object has a name twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object; json alone would keep the last of two values in silence."""
  found = dict(pairs)
  if len(found) != len(pairs):
    names = [name for name, _ in pairs]
    name = next(name for name in names if names.count(name) > 1)
    raise _Repeated(f"an object has the name {json.dumps(name)[:60]} twice; keep one of its values")
  return found


def _constant(name: str) -> float | None:
  """Returns null for NaN, which tables write where a value is missing."""
  return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _way_out(text: str, error: json.JSONDecodeError) -> str:
  """Returns what probably went wrong at a place that is not JSON, and what to do."""
  before = text[max(error.pos - 200, 0) : error.pos].rstrip()
  rest = text[error.pos : error.pos + 20].lstrip()
  if error.msg.startswith("Unterminated"):
    return (
      "the text does not end on this line: write a line break within it as \\n, or download the"
      " file again if it was cut off"
    )
  if not rest:
    return "the file ends too early, or the line is broken in two: write or download it again"
  # Python before 3.13 reports what follows the comma, later ones the comma.
  if (before.endswith(",") and rest[0] in "}]") or re.match(r",\s*[}\]]", rest):
    return "leave out the comma before the closing bracket"
  if rest[0] == "," and before.endswith("}"):
    return "put [ and ] around objects that commas separate"
  if rest.startswith(("'", "None", "True", "False")):
    return "that is Python's notation: write the rows with json.dumps"
  if rest.startswith(("//", "/*", "#")):
    return "JSON has no comments"
  rule = "a file is one JSON array or one JSON object per line"
  if before:
    return rule
  return f"it begins with {json.dumps(rest)}; {rule}, or CSV with a line of column names"


# --- a file of one value --------------------------------------------------------------------------


def _rows_of(line: int, value: Any, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields the rows of a file that consists of one JSON value."""
  rows = value if isinstance(value, list) else None
  if isinstance(value, dict):
    try:
      rows = _rows_of_table(value)
    except UserError as error:
      raise UserError(f"{path}: {error}") from None
  if rows is None:
    yield f"{path}:{line}", value
    return
  for number, row in enumerate(rows, 1):
    yield f"{path}:row {number}", row


def _rows_of_table(value: Row) -> list[Any] | None:
  """Returns the rows of a table that is written as one object; None if it is a row itself."""
  columns, data = value.get("columns"), value.get("data")
  if isinstance(columns, list) and isinstance(data, list) and _all(data, list):
    if any(len(row) != len(columns) for row in data):
      raise UserError("a row of data has not one value for each of columns")
    return [dict(zip(columns, row, strict=True)) for row in data]
  if _all_values(value, dict):
    numbers = list(next(iter(value.values())))
    if _are_numbers(value):
      return list(value.values())
    if _are_numbers(numbers) and all(list(column) == numbers for column in value.values()):
      return [{name: column[i] for name, column in value.items()} for i in numbers]
  if _all_values(value, list) and any(_is_column(*one) for one in value.items()):
    return _rows_of_columns(value)
  return _rows_by_name(value)


def _rows_of_columns(value: Row) -> list[Any]:
  lengths = {name: len(column) for name, column in value.items()}
  if len(set(lengths.values())) > 1:
    found = ", ".join(f"{name} {length}" for name, length in lengths.items())
    raise UserError(f"an object of columns of different lengths ({found}); write one object a row")
  columns = zip(*value.values(), strict=True)
  return [dict(zip(value, row, strict=True)) for row in columns]


def _is_column(name: str, values: list[Any]) -> bool:
  """Returns True if a list must be a column, because no row has such a list under its name."""
  if name in _LISTS:
    return False
  return bool(values) and (_all(values, str) or _all(values, list))


def _rows_by_name(value: Row) -> list[Any] | None:
  """Returns the list of objects that an object has under a name such as data."""
  if set(value) & (_TEXTS | _LISTS):
    return None
  lists = {name: one for name, one in value.items() if isinstance(one, list) and _all(one, dict)}
  found = [name for name in lists if name.lower() in _TABLES]
  if not found and len(value) == 1:
    found = [name for name in lists if lists[name]]
  if len(found) > 1:
    named = ", ".join(f"{name} ({len(lists[name])})" for name in found)
    raise UserError(
      f"an object with several lists of rows: {named}; save the one to use as a file of its own,"
      f" such as with jq .{found[0]}"
    )
  if not found:
    return None
  rows = lists[found[0]]
  # The web API of the Hugging Face hub wraps rows, and cuts long values.
  if rows and all("row_idx" in row and isinstance(row.get("row"), dict) for row in rows):
    if any(row.get("truncated_cells") for row in rows):
      raise UserError("a page of rows with cut cells (truncated_cells); download the data set")
    rows = [row["row"] for row in rows]
  return rows


def _all(values: list[Any], kind: type) -> bool:
  return all(isinstance(one, kind) for one in values)


def _all_values(value: Row, kind: type) -> bool:
  return len(value) > 0 and all(isinstance(one, kind) for one in value.values())


def _are_numbers(names: Collection[str]) -> bool:
  return len(names) > 0 and all(name.isdecimal() for name in names)
