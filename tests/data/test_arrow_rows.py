"""Parquet and Arrow are read a batch at a time, and every type becomes JSON or says what it is."""

import datetime
import decimal
import io
import json

import pyarrow
import pytest
from pyarrow import feather, parquet

from dpo_jax.data.readers import read_rows
from dpo_jax.structs import UserError
from tests.support.messages import convert, user


def parquet_bytes(table):
  file = io.BytesIO()
  parquet.write_table(table, file)
  return file.getvalue()


def feather_bytes(table):
  file = io.BytesIO()
  feather.write_feather(table, file, compression="lz4")
  return file.getvalue()


def stream_bytes(table):
  """As `datasets` saves tables."""
  file = io.BytesIO()
  with pyarrow.ipc.new_stream(file, table.schema) as writer:
    writer.write_table(table, max_chunksize=700)
  return file.getvalue()


WRITERS = [parquet_bytes, feather_bytes, stream_bytes]


def read(folder, data):
  (folder / "rows").write_bytes(data)
  return list(read_rows(folder / "rows"))


@pytest.mark.parametrize("write", WRITERS)
def test_rows_of_a_table(tmp_path, write):
  """Messages of a column have the same fields in a table; nulls become absent fields."""
  called = {"role": "assistant", "tool_calls": [{"name": "add"}]}
  rows = [{"chosen": [user(f"{i}"), called], "score": i if i % 2 else None} for i in range(1500)]
  found = read(tmp_path, write(pyarrow.Table.from_pylist(rows)))
  expected = [{name: value for name, value in row.items() if value is not None} for row in rows]
  assert [row for _, row in found] == expected
  assert found[-1][0] == f"{tmp_path / 'rows'}:row 1500"


TYPES = {
  "text": (pyarrow.array(["a", None], pyarrow.large_string()), "a"),
  "view": (pyarrow.array(["a", None], pyarrow.string_view()), "a"),
  "category": (pyarrow.array(["a", None]).dictionary_encode(), "a"),
  "utf8": (pyarrow.array([b"caf\xc3\xa9", None]), "café"),
  "bytes": (pyarrow.array([b"\xff", None]), {"unreadable": "bytes"}),
  "image": (
    pyarrow.array([{"bytes": b"\xff", "path": "a.png"}, None]),
    {"bytes": {"unreadable": "bytes"}, "path": "a.png"},
  ),
  "price": (pyarrow.array([decimal.Decimal("1.50"), None]), 1.5),
  "count": (pyarrow.array([decimal.Decimal("2"), None], pyarrow.decimal128(5, 0)), 2),
  "half": (pyarrow.array([1.5, None], pyarrow.float32()).cast(pyarrow.float16()), 1.5),
  "nan": (pyarrow.array([float("nan"), None], pyarrow.float64(), from_pandas=False), None),
  "null": (pyarrow.nulls(2), None),
  "day": (pyarrow.array([datetime.date(2024, 5, 6), None]), "2024-05-06"),
  "clock": (pyarrow.array([datetime.time(1, 2), None]), "01:02:00"),
  "when": (pyarrow.array([datetime.datetime(2024, 5, 6), None]), "2024-05-06T00:00:00"),
  "nanoseconds": (
    pyarrow.array([1, None], pyarrow.timestamp("ns")),
    {"unreadable": "timestamp[ns]"},
  ),
  "far": (pyarrow.array([10**18, None], pyarrow.timestamp("ms")), {"unreadable": "timestamp[ms]"}),
  "long": (pyarrow.array([datetime.timedelta(1), None]), "1 day, 0:00:00"),
  "map": (
    pyarrow.array([[("a", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
    {"a": 1},
  ),
  "numbers": (
    pyarrow.array([[(1, "a")], None], pyarrow.map_(pyarrow.int8(), pyarrow.string())),
    [[1, "a"]],
  ),
}


@pytest.mark.parametrize("name", TYPES)
def test_every_type_becomes_json(tmp_path, name):
  column, expected = TYPES[name]
  table = pyarrow.table({"x": column, "y": ["p", "q"]})
  for write in WRITERS:
    (_, first), (_, second) = read(tmp_path, write(table))
    assert first == ({"x": expected} if expected is not None else {}) | {"y": "p"}
    assert second == {"y": "q"}
    json.dumps(first)


def test_what_has_no_json_is_refused_only_where_it_is_used(tmp_path):
  text = pyarrow.array(["p", "q"])
  table = pyarrow.table({"prompt": text, "chosen": text, "rejected": [b"\xff", b"\xfe"]})
  row = read(tmp_path, parquet_bytes(table))[0][1]
  with pytest.raises(UserError, match=r'field rejected .*\{"unreadable": "bytes"\}'):
    convert(row)
  table = table.set_column(2, "rejected", pyarrow.array(["x", "y"])).append_column(
    "picture", pyarrow.array([b"\xff", b"\xfe"])
  )
  assert convert(read(tmp_path, parquet_bytes(table))[0][1])[1].completions == ("p", "x")


def test_text_that_is_not_utf8_is_not_used(tmp_path):
  offsets = b"".join(i.to_bytes(4, "little") for i in (0, 1, 2))
  broken = pyarrow.StringArray.from_buffers(
    2, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"a\xff")
  )
  table = pyarrow.table({"x": broken})
  rows = [row for _, row in read(tmp_path, parquet_bytes(table))]
  assert rows == [{"x": "a"}, {"x": {"unreadable": "string"}}]
  with pytest.raises(UserError, match=r"broken Arrow .*UTF8"):
    read(tmp_path, stream_bytes(table))


@pytest.mark.parametrize(
  ("data", "line"),
  [
    (b"PAR1....", r"rows: broken Parquet \(.+\); download the file again"),
    (parquet_bytes(pyarrow.table({"a": ["long " * 99]}))[:200], r"rows: broken Parquet"),
    (b"PARE....", "rows is an encrypted Parquet file"),
    (b"ARROW1..", r"rows: broken Arrow \(.+\); download the file again"),
    (stream_bytes(pyarrow.table({"a": ["long " * 99]}))[:-300], r"rows: broken Arrow"),
    (b"\xff\xff\xff\xff\x10\x00\x00\x00" + b"\x00" * 16, r"rows: broken Arrow"),
    *((write(pyarrow.table({"a": []})), "rows contains no rows") for write in WRITERS),
    *(
      (write(pyarrow.table([["x"], ["y"]], ["a", "a"])), "rows: two columns are named a; rename")
      for write in WRITERS[2:]
    ),
  ],
)
def test_a_broken_table_is_one_line(tmp_path, data, line):
  with pytest.raises(UserError, match=line) as raised:
    read(tmp_path, data)
  assert "\n" not in str(raised.value)


def test_parquet_is_read_a_row_group_at_a_time(tmp_path):
  """Memory does not grow with the file: of 40 groups of 0.4 MB, never more than a few are read."""
  text = pyarrow.array([f"{i:06d}" * 70 for i in range(1000)])
  table = pyarrow.table({"prompt": text, "chosen": text, "rejected": text})
  file = tmp_path / "rows.parquet"
  with parquet.ParquetWriter(
    file, table.schema, compression="none", use_dictionary=False
  ) as writer:
    for _ in range(40):
      writer.write_table(table)
  before, most = pyarrow.total_allocated_bytes(), 0
  for _ in read_rows(file):
    most = max(most, pyarrow.total_allocated_bytes() - before)
  assert most < file.stat().st_size / 5
