"""Reads rows from files, as JSON values with their places; `detection` says what a row means."""

from __future__ import annotations

import glob
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data import external
from dpo_jax.data import fields as row_fields
from dpo_jax.data.fields import Row
from dpo_jax.structs import UserError

FILE_FORMATS = "JSONL, JSON array, gzip of either, Parquet"
# A file, or a data set of `external`.
Source = str | pathlib.Path


def files(given: Source | Sequence[Source]) -> list[Source]:
  """Resolves what a user names as data to a list of files and data sets.

  Args:
    given: a path; several paths or patterns such as `part-*.parquet`, separated by commas; or a
      sequence of these. Files of a pattern are sorted. Names of `external` are returned unchanged.

  Raises:
    UserError: a name matches no file.
  """
  if not isinstance(given, (str, pathlib.Path)):
    return [path for one in given for path in files(one)]
  # The order is important: a name that exists is taken literally, even if it contains commas or
  # brackets; only then is it split at commas and read as a pattern.
  if str(given) and pathlib.Path(given).exists():
    return [_check_file(pathlib.Path(given))]
  names = list(filter(None, (part.strip() for part in str(given).split(","))))
  if not names:
    raise UserError(f"no data file is named; name a file of rows ({FILE_FORMATS})")
  found: list[Source] = []
  for name in names:
    if external.is_dataset(name):
      found.append(name)
      continue
    matching = sorted(map(pathlib.Path, glob.glob(name, recursive=True)))
    if not matching and glob.has_magic(name):
      raise UserError(f"no data file fits the pattern {name}")
    found += [_check_file(path) for path in matching or [pathlib.Path(name)]]
  return found


def _check_file(path: pathlib.Path) -> pathlib.Path:
  if external.is_dataset(path):
    return path
  if path.is_dir():
    raise UserError(f"{path} is a folder; name a file of rows ({FILE_FORMATS}), or {path}/*")
  if not path.is_file():
    raise UserError(f"no data file {path}")
  return path


def read_rows(path: Source) -> Iterator[tuple[str, Row]]:
  """Reads the rows of a JSONL, JSON array or Parquet file, or of another library's data set.

  JSON may be compressed with gzip. A null in Parquet is read as a field that the row does not have.

  Yields:
    (place, row), one at a time: "file:LINE" in JSONL, otherwise "file:row NUMBER", from 1.

  Raises:
    UserError: the file cannot be read, contains no rows, or a row is not a JSON object.
  """
  if external.is_dataset(path):
    rows = external.read_rows(path)
  else:
    path = _check_file(pathlib.Path(path))
    # The first bytes decide, not the name: files are often named otherwise than they are written.
    with path.open("rb") as file:
      magic = file.read(4)
    if path.suffix == ".parquet" and magic != b"PAR1":
      raise UserError(
        f"{path} is named .parquet and is not Parquet; download it again, or rename it"
      )
    rows = _read_parquet(path) if magic == b"PAR1" else _read_json(path)
  empty = True
  for where, row in rows:
    if not isinstance(row, dict):
      raise UserError(
        f"{where}: a row is a JSON object with named fields, not {row_fields.shorten(row)}"
      )
    empty = False
    yield where, row
  if empty:
    raise UserError(f"{path} contains no rows")


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Reads a Parquet file in batches of rows, since it may be larger than memory."""
  import pyarrow  # slow to import
  from pyarrow import parquet

  number = 0
  try:
    # pre_buffer=False: with read-ahead, pyarrow keeps every row group it has read until the end.
    with parquet.ParquetFile(path, pre_buffer=False) as file:
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
          number += 1
          yield f"{path}:row {number}", row_fields.without_nulls(row)
  except (pyarrow.ArrowException, OSError) as error:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path}: broken Parquet ({line}); download the file again") from None


def _read_json(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Reads a JSONL or JSON array file, decompressing it if it is gzip."""
  with path.open("rb") as file:
    is_gzip = file.read(2) == b"\x1f\x8b"
  if path.suffix == ".gz" and not is_gzip:
    raise UserError(f"{path} is named .gz and is not gzip; download it again, or rename it")
  try:
    with gzip.open(path) if is_gzip else path.open("rb") as file:
      yield from _parse(file, path)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(f"{path}: broken gzip ({error}); download the file again") from None


def _parse(file, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Parses the lines of a file, or the elements of one array if the file starts with a bracket."""
  first = b""
  # Bytes, not text: Python splits text at U+2028 and others too, which JSON allows inside a string.
  for number, line in enumerate(file, 1):
    if number == 1:
      line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows editors
    if not line.strip():
      continue
    if not first and line.lstrip()[:1] == b"[":
      # An array is one JSON value and is parsed as a whole, in memory.
      text = line + file.read()
      values = _load(text, f"{path}:{{line}}", number)
      yield from ((f"{path}:row {i}", value) for i, value in enumerate(values, 1))
      return
    first = first or line
    yield f"{path}:{number}", _load(line.rstrip(), f"{path}:{{line}}", number)


def _load(text: bytes, where: str, line: int) -> Any:
  """Parses JSON.

  Args:
    text: the bytes, as UTF-8.
    where: place for an error message; contains `{line}`.
    line: number of the first line of `text` in its file.
  """
  try:
    return json.loads(text.decode("utf-8"))
  except UnicodeDecodeError as error:
    at = where.format(line=line + text[: error.start].count(b"\n"))
    raise UserError(f"{at}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
  except json.JSONDecodeError as error:
    at = where.format(line=line + error.lineno - 1)
    raise UserError(
      f"{at}: not JSON ({error.msg} at column {error.colno}); a file is one JSON array or one"
      " JSON object per line"
    ) from None
  except (RecursionError, ValueError) as error:  # nested too deep, a number of too many digits
    raise UserError(f"{where.format(line=line)}: JSON that cannot be read ({error})") from None
