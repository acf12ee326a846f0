"""Reads rows from files, as JSON values with their places; `detection` says what a row means.

`file_kinds` recognizes what a file is. `json_rows`, `csv_rows` and `arrow_rows` read a format each,
`external` the data sets of other libraries.
"""

from __future__ import annotations

import difflib
import glob
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data import arrow_rows, csv_rows, external, file_kinds, json_rows
from dpo_jax.data import fields as row_fields
from dpo_jax.data.fields import Row
from dpo_jax.structs import UserError
from dpo_jax.utils import model_folder

FILE_FORMATS = "JSONL, JSON, CSV, TSV, Parquet, Arrow; text may be gzip, bzip2, xz or zstd"
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
  if model_folder.is_model(path):
    raise UserError(f"{path} is a model folder; name a file of rows ({FILE_FORMATS})")
  if path.is_dir():
    raise UserError(f"{path} is a folder; name a file of rows ({FILE_FORMATS}), or {path}/*")
  if not path.is_file():
    raise UserError(_no_file(path))
  return path


def _no_file(path: pathlib.Path) -> str:
  """Describes a file that does not exist, with what was probably meant."""
  line = f"no data file {path}"
  if address := re.match(r"(https?|s3|gs):/", str(path)):
    # A path has lost one of two slashes.
    whole = f"{address[0]}/{str(path).removeprefix(address[0])}"
    return f"{whole} is an address; download the file and name it"
  name = model_folder.hub_name(path)
  # A name with a suffix is more likely a file of a folder that is missing.
  if name and not path.suffix:
    return f"{line}; a data set of the Hugging Face hub is named hf:{name}"
  there = [one.name for one in path.parent.glob(f"*{path.suffix[:5]}*") if one.is_file()]
  near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.8)
  return f"{line}; did you mean {path.with_name(near[0])}?" if near else line


def read_rows(path: Source) -> Iterator[tuple[str, Row]]:
  """Reads the rows of a file, or of another library's data set.

  What the file is, its first bytes say (see `file_kinds`): JSON in any layout, CSV or TSV, Parquet,
  Arrow. JSON, CSV and TSV may be compressed. A null in a table, an empty cell of CSV included, is
  read as a field that the row does not have.

  Yields:
    (place, row), one at a time: "file:LINE" in text, otherwise "file:row NUMBER", from 1.

  Raises:
    UserError: the file cannot be read, contains no rows, or a row is not a JSON object.
  """
  try:
    if external.is_dataset(path):
      rows = external.read_rows(path)
    else:
      path = _check_file(pathlib.Path(path))
      rows = _read_file(path)
    empty = True
    for where, row in rows:
      _check_row(row, where)
      empty = False
      yield where, row
  except OSError as error:  # no permission, a disk that fails
    raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
  if empty:
    raise UserError(f"{path} contains no rows")


def _read_file(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  kind = file_kinds.recognize(path)
  if kind.format not in ("json", "csv"):
    yield from arrow_rows.read(path, kind.format)
    return
  read = json_rows.read if kind.format == "json" else csv_rows.read
  with file_kinds.open_decompressed(path, kind.compression) as file:
    yield from read(file, path)


# A name with one of these is not what it looks like, and would break the line of an error.
_UNSEEN = re.compile("[\x00-\x1f\x7f\u2028\u2029\ufeff]")


def _check_row(row: Any, where: str) -> None:
  if not isinstance(row, dict):
    raise UserError(
      f"{where}: a row is a JSON object with named fields, not {row_fields.shorten(row)}"
    )
  if unseen := next(filter(_UNSEEN.search, row), None):
    raise UserError(
      f"{where}: the field name {row_fields.shorten(unseen)} has a control character; rename it"
    )
  # The fields of an export of Label Studio are those of its own objects, not those of the data.
  if isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list):
    raise UserError(
      f"{where}: an export of Label Studio in its own JSON; export the project as JSON-MIN or CSV"
    )
