"""JSON is read in every layout that people write, and anything else is named with its place."""

import json

import pytest

from dpo_jax.data.readers import read_rows
from dpo_jax.structs import UserError

ROWS = [{"prompt": f"p{i}", "chosen": "é\u2028🙂", "rejected": "b"} for i in range(3)]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
BY_NUMBER = {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}
CHAT = {
  "prompt": [{"role": "user", "content": "a"}],
  "chosen": [{"role": "assistant", "content": "b"}],
  "rejected": [{"role": "assistant", "content": "c"}],
}


def dumped(*rows, between="\n", **options):
  return between.join(json.dumps(row, ensure_ascii=False, **options) for row in rows)


def read(folder, text):
  """The rows of a file, with the part of each place after the file's name."""
  file = folder / "rows"
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  return [(where.removeprefix(f"{file}:"), row) for where, row in read_rows(file)]


@pytest.mark.parametrize(
  ("text", "places"),
  [
    (dumped(*ROWS), "1 2 3"),
    (dumped(*ROWS, between="\n\n") + "\n", "1 3 5"),
    (dumped(*ROWS, between="\r\n"), "1 2 3"),
    ("\ufeff" + dumped(*ROWS, between="\n\ufeff"), "1 2 3"),  # files with marks, put together
    (dumped(*ROWS, between=""), "1 1 1"),
    (dumped(*ROWS, between="\r"), "1 1 1"),
    (dumped(*ROWS, indent=2), "1 6 11"),  # as jq writes
    (dumped(*ROWS, indent=2, between=""), "1 5 9"),
  ],
)
def test_objects_one_after_the_other(tmp_path, text, places):
  assert read(tmp_path, text) == list(zip(places.split(), ROWS, strict=True))


@pytest.mark.parametrize(
  "value",
  [
    ROWS,
    {"data": ROWS},
    {"version": "1", "license": {"name": "x"}, "data": ROWS, "tags": ["a"]},
    {"train": ROWS},
    {"my_pairs": ROWS},
    COLUMNS,
    BY_NUMBER,
    {str(i): row for i, row in enumerate(ROWS)},
    {"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [[*row.values()] for row in ROWS]},
    {"schema": {"fields": [{"name": "prompt"}]}, "data": ROWS},  # pandas: orient="table"
    {"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": row, "truncated_cells": []}
                                                for i, row in enumerate(ROWS)]},
  ],
)  # fmt: skip
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_and_tables_in_one_value(tmp_path, value, indent):
  expected = [(f"row {i}", row) for i, row in enumerate(ROWS, 1)]
  assert read(tmp_path, dumped(value, indent=indent)) == expected
  assert read(tmp_path, "\n" + dumped(value, indent=indent) + "\n\n") == expected


@pytest.mark.parametrize(
  "row",
  [
    ROWS[0],
    CHAT,
    {"prompt": "a", "answers": ["b", "c"], "scores": [1, 2]},
    {"prompt": CHAT["prompt"] * 2, "answers": ["b", "c"]},
    {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    {"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]},
    {"messages": CHAT["prompt"] + CHAT["chosen"]},
    {name: messages[0] for name, messages in CHAT.items()},
    {"prompt": "a", "results": [{"response": "b"}, {"response": "c"}]},
    {"error": "The dataset does not exist."},
  ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_row_stays_a_row(tmp_path, row, indent):
  assert read(tmp_path, dumped(row, indent=indent)) == [("1", row)]


def test_columns_of_messages_and_of_nothing(tmp_path):
  columns = {name: [messages, messages] for name, messages in CHAT.items()}
  assert [row for _, row in read(tmp_path, dumped(columns))] == [CHAT, CHAT]
  with pytest.raises(UserError, match="contains no rows"):
    read(tmp_path, '{"data": []}')


def test_nan_is_null_and_infinity_is_not(tmp_path):
  assert read(tmp_path, '{"prompt": NaN, "score": -Infinity}') == [
    ("1", {"prompt": None, "score": float("-inf")})
  ]


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ('{"a": 1}\n\n{"a": ', r"rows:3: not JSON \(Expecting value at column \d+\); the file ends"),
    ('{"a": 1}\n{"a":\n 2}\n', r"rows:2: not JSON .*; the file ends too early, or"),
    ('{"a": 1}\n{"a": "x}\n{"a": 3}', r"rows:2: .*Unterminated .* at column 7\); the text does"),
    ('[{"a": 1},\n {"a": 2},\n {"a" 3}]', r"rows:3: not JSON .* at column 7\)"),
    ('{\n  "a": 1\n', r"rows:\d: not JSON .*; the file ends too early"),
    ('{"a": 1,}', r"rows:1: not JSON .*; leave out the comma before the closing bracket"),
    ('[{"a": 1},]', r"rows:1: not JSON .*; leave out the comma before the closing bracket"),
    ('{"a": 1},\n{"a": 2}', r"rows:1: not JSON .*; put \[ and \] around objects"),
    ("{'a': 1}", r"rows:1: not JSON .*; that is Python's notation: write the rows with json.dumps"),
    ('{"a": True}', r"rows:1: not JSON .*; that is Python's notation"),
    ('[1] // one', r"rows:1: not JSON .*; JSON has no comments"),
    ("Entry not found", r'rows:1: not JSON .*; it begins with "Entry not found"; a file'),
    ('{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', r'rows:2: .* has the name "c" twice; keep'),
    ("[1]\n[2]", r"rows:1: one of several JSON arrays in the file"),
    ("[" * 100_000, r"rows:1: JSON that cannot be read"),
    ('{"a": ' + "9" * 5000 + "}", r"rows:1: JSON that cannot be read \(Exceeds the limit"),
    (b'{"a": 1}\n{"a": "\xff"}', r"rows:2: byte 8 is not UTF-8; save the file as UTF-8"),
    (b'[\n{"a": "\xff"}]', r"rows:2: byte 8 is not UTF-8"),
    (dumped({"train": ROWS, "test": ROWS[:1]}), r"rows: train \(3\), test \(1\); .*jq .train"),
    (dumped({"prompt": ["a", "b"], "chosen": ["c"]}), r"different lengths \(prompt 2, chosen 1\)"),
    (dumped({"columns": ["a", "b"], "data": [[1, 2], [3]]}), r"not one value for each of columns"),
    (
      dumped({"rows": [{"row_idx": 0, "row": ROWS[0], "truncated_cells": ["chosen"]}]}),
      r"a page of rows with cut cells \(truncated_cells\); download the data set",
    ),
    (dumped(dumped(ROWS[0])), r'rows:1: a row is a JSON object with named fields, not "\{'),
  ],
)  # fmt: skip
def test_what_is_no_json_is_one_line_with_its_place(tmp_path, text, line):
  with pytest.raises(UserError, match=line) as raised:
    read(tmp_path, text)
  assert "\n" not in str(raised.value)


def test_lines_are_read_one_by_one(tmp_path):
  """The rows before a broken line are given, and a broken first line is not read on after."""
  file = tmp_path / "rows"
  file.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
  rows = read_rows(file)
  assert [next(rows)[1], next(rows)[1]] == [{"a": 1}, {"a": 2}]
  with pytest.raises(UserError, match="rows:3"):
    next(rows)
