"""Reads rows from Parquet and Arrow files (Feather too), as values that JSON has.

Dates and times become text in ISO 8601, decimals numbers, maps objects, and bytes text where they
are UTF-8, as some writers store text. A null or NaN is a field that the row does not have. What has
no such value, an image or text that is not UTF-8, becomes an object `{"unreadable": type}`: a
column that nothing uses does not stop a run, and one that is used is refused by its name.
"""

from __future__ import annotations

import datetime
import decimal
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from dpo_jax.data.fields import Row
from dpo_jax.structs import UserError

_ROWS = 1024  # rows that are converted at a time


def read(path: pathlib.Path, format: str) -> Iterator[tuple[str, Row]]:
  """Reads a Parquet or Arrow file in batches of rows, since it may be larger than memory.

  Args:
    path: the file.
    format: "parquet", "arrow" (a file, as Feather is) or "arrow stream" (as `datasets` saves it).

  Yields:
    (place, row), the place being "file:row NUMBER", from 1.

  Raises:
    UserError: the file is broken, or two of its columns have one name.
  """
  import pyarrow  # slow to import

  number = 0
  try:
    for batch in _read_parquet(path) if format == "parquet" else _read_arrow(path, format):
      names = batch.schema.names
      if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two columns are named {repeated}; rename one")
      for row in _rows(batch):
        number += 1
        yield f"{path}:row {number}", row
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    what = "Parquet" if format == "parquet" else "Arrow"
    line = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path}: broken {what} ({line}); download the file again") from None


def _read_parquet(path: pathlib.Path) -> Iterator[Any]:
  from pyarrow import parquet

  # pre_buffer=False: with read-ahead, pyarrow keeps every row group it has read until the end.
  with parquet.ParquetFile(path, pre_buffer=False) as file:
    yield from file.iter_batches(batch_size=_ROWS)


def _read_arrow(path: pathlib.Path, format: str) -> Iterator[Any]:
  import pyarrow

  with pyarrow.memory_map(str(path)) as source:
    if format == "arrow":
      reader = pyarrow.ipc.open_file(source)
      batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
      batches = iter(pyarrow.ipc.open_stream(source))
    for batch in batches:
      # Arrow trusts the offsets of a file, and wrong ones would read memory that is not its own.
      batch.validate(full=True)
      for start in range(0, len(batch), _ROWS):
        yield batch.slice(start, _ROWS)


def _rows(batch: Any) -> Iterator[Row]:
  """Yields the rows of a batch, without nulls."""
  columns = {name: _values(column) for name, column in zip(batch.schema.names, batch, strict=True)}
  for i in range(len(batch)):
    yield {name: values[i] for name, values in columns.items() if values[i] is not None}


def _values(column: Any) -> list[Any]:
  """Returns the values of a column; one that Python cannot express becomes an unreadable one."""
  try:
    return list(map(plain, column.to_pylist()))
  except (ValueError, OverflowError):  # text that is not UTF-8, nanoseconds, the year 10000
    return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
  try:
    return plain(scalar.as_py())
  except (ValueError, OverflowError):
    return {"unreadable": str(scalar.type)}


def plain(value: Any) -> Any:
  """Returns a value of a table or of another library as one that JSON has, without nulls."""
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, float):
    return value if value == value else None  # NaN is how tables write that a value is missing
  if isinstance(value, dict):
    fields = ((name, plain(one)) for name, one in value.items())
    return {name: one for name, one in fields if one is not None}
  if isinstance(value, list):
    # The entries of a map are tuples; nothing else is.
    if value and all(isinstance(one, tuple) and isinstance(one[0], str) for one in value):
      return plain(dict(value))
    return list(map(plain, value))
  if isinstance(value, tuple):
    return list(map(plain, value))
  if isinstance(value, decimal.Decimal):
    return int(value) if value.as_tuple().exponent == 0 else float(value)
  if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
    return value.isoformat()
  if isinstance(value, (datetime.timedelta, uuid.UUID)):
    return str(value)
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError:
      pass
  return {"unreadable": type(value).__name__}
