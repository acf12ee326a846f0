"""Reads rows from CSV and TSV, whose first line names the columns.

Columns are separated by commas, semicolons (as a European Excel writes them) or tabs; quoting is
that of RFC 4180, so a quoted cell may contain separators and line breaks, and its quotes are
doubled. A cell is text, digits too: the completion "12" is a text, and what must be a number, such
as a score or a label, is read as one where it is used (`fields`). An empty cell is a field that the
row does not have.
"""

from __future__ import annotations

import csv
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from dpo_jax.data.fields import Row
from dpo_jax.data.file_kinds import BOM
from dpo_jax.structs import UserError

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LONGEST_NAME = 100  # characters; the first line of a file without names is a row, often long
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SEP = re.compile(r"sep=(.)\r?\n?")  # a first line that tells Excel the separator


def read(file: BinaryIO, path: pathlib.Path) -> Iterator[tuple[str, Row]]:
  """Reads the rows of a CSV or TSV file.

  Yields:
    (place, row), the place being "file:LINE" with the line where the row begins.

  Raises:
    UserError: the text is not UTF-8, the quoting is broken, a row has more or fewer cells than
      there are columns, or two columns have one name.
  """
  lines = _decoded(file, path)
  separator, skipped = None, 0
  for first in lines:
    found = _SEP.fullmatch(first)
    if first.strip() and not found:
      break
    separator = found[1] if found else separator
    skipped += 1
  else:
    return
  # The limit is 131,072 characters a cell, and long conversations are longer.
  csv.field_size_limit(2**31 - 1)
  separator = separator or _separator(first, path)
  # strict: otherwise a quote that is never closed swallows the rest of the file in silence.
  reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
  columns: list[str] = []
  while True:
    start = skipped + reader.line_num + 1
    try:
      cells = next(reader, None)
    except csv.Error as error:
      raise UserError(
        f"{path}:{start}: broken CSV ({error}); a cell with a quote in it is quoted, and its quotes"
        ' are doubled ("")'
      ) from None
    if cells is None:
      return
    if not cells:  # a blank line
      continue
    if not columns:
      columns = _columns(cells, f"{path}:{start}")
      continue
    if len(cells) != len(columns):
      raise UserError(
        f"{path}:{start}: {len(cells)} cells and {len(columns)} columns, separated by"
        f" {_SEPARATORS.get(separator, separator)}; quote cells that contain a separator or a line"
        " break"
      )
    where = f"{path}:{start}"
    filled = ((name, cell) for name, cell in zip(columns, cells, strict=True) if cell)
    yield where, dict(filled)


def _decoded(file: BinaryIO, path: pathlib.Path) -> Iterator[str]:
  for number, line in enumerate(file, 1):
    try:
      text = (line.removeprefix(BOM) if number == 1 else line).decode("utf-8")
    except UnicodeDecodeError as error:
      raise UserError(
        f"{path}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8 (Excel: CSV"
        " UTF-8)"
      ) from None
    # Excel for Mac can end lines with a carriage return alone.
    yield from _LINE.findall(text)


def _separator(line: str, path: pathlib.Path) -> str:
  """Returns the separator that gives the line of names the most cells."""
  counts = {}
  for separator in _SEPARATORS:
    # Not strict: the line may be the beginning of a name over several lines.
    counts[separator] = len(next(csv.reader([line], delimiter=separator), []))
  most = max(counts.values())
  found = [separator for separator, count in counts.items() if count == most]
  if most > 1 and len(found) > 1:
    named = " and ".join(_SEPARATORS[one] for one in found)
    raise UserError(f"{path}:1: {named} both may separate the columns; save it with one of them")
  return found[0]


def _columns(cells: list[str], where: str) -> list[str]:
  """Returns the names of the columns; one without a name, as pandas writes its index, gets one."""
  names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
  for name in names:
    if len(name) > _LONGEST_NAME or "\n" in name:
      raise UserError(
        f"{where}: the first line of CSV names the columns, and here it has {name[:40]!r}…; add a"
        " line such as prompt,chosen,rejected"
      )
    if names.count(name) > 1:
      raise UserError(f"{where}: two columns are named {name}; rename one")
  return names
