"""Files are read or refused, field maps are applied, and real files give the rows they contain."""

import collections
import gzip
import io
import json

import pyarrow
import pytest
from pyarrow import parquet

from dpo_jax import defaults
from dpo_jax.data import detection, encode, formats, readers
from dpo_jax.data.detection import detect
from dpo_jax.data.fields import Preference, RowError
from dpo_jax.data.readers import read_rows
from dpo_jax.structs import UserError
from tests.support.messages import assistant, convert, user


def parquet_bytes(rows):
  file = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file.getvalue()


# --- files ----------------------------------------------------------------------------------------

ROWS = [{"prompt": f"p{i}", "chosen": "é\u2028🙂", "rejected": "b"} for i in range(3)]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
  ("content", "wheres"),
  [
    ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), ["1", "2", "3"]),
    ("\n\n".join(json.dumps(row) for row in ROWS) + "\n", ["1", "3", "5"]),
    (json.dumps(ROWS), ["row 1", "row 2", "row 3"]),
    ("\n" + json.dumps(ROWS, indent=2), ["row 1", "row 2", "row 3"]),
    ("\ufeff" + json.dumps(ROWS[0]) + "\r\n" + json.dumps(ROWS[1]), ["1", "2"]),
  ],
)
def test_lines_and_arrays_gzipped_or_not(tmp_path, content, wheres, zipped):
  path = tmp_path / "rows"
  data = content.encode("utf-8")
  path.write_bytes(gzip.compress(data) if zipped else data)
  assert list(read_rows(path)) == [
    (f"{path}:{where}", row) for where, row in zip(wheres, ROWS, strict=False)
  ]


@pytest.mark.parametrize(
  ("data", "line"),
  [
    (b"", r"rows contains no rows"),
    (b"\n \n", r"rows contains no rows"),
    (b"[]", r"rows contains no rows"),
    (b'{"a": 1}\n\n{"a": ', r"rows:3: not JSON \(Expecting value at column \d+\)"),
    (b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', r"rows:3: not JSON"),
    (b'{"a": 1}\n"text"', r'rows:2: a row is a JSON object with named fields, not "text"'),
    (b'{"a": 1}\n{"a": "\xff"}', r"rows:2: byte 7 is not UTF-8"),
    (b'{\n  "a": 1\n}', r"rows:1: not JSON"),
    (b"[" * 100_000, r"rows:1: "),
    (b"PAR1....", r"rows: broken Parquet \(.+\); download the file again"),
    (parquet_bytes([{"a": "long " * 99}])[:200], r"rows: broken Parquet"),
    (parquet_bytes([]), r"rows contains no rows"),
    (gzip.compress(b'{"a": 1}' * 999, mtime=0)[:40], r"rows: broken gzip"),
    (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40, r"rows: broken gzip"),
  ],
)
def test_a_broken_file_is_one_line_with_file_and_line(tmp_path, data, line):
  path = tmp_path / "rows"
  path.write_bytes(data)
  with pytest.raises(UserError, match=line) as raised:
    list(read_rows(path))
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "kind"), [("rows.jsonl.gz", "gzip"), ("r.parquet", "Parquet")])
def test_what_is_named_gz_or_parquet_is_that(tmp_path, name, kind):
  (tmp_path / name).write_bytes(b'{"a": 1}')
  with pytest.raises(UserError, match=rf"{name} is named \.[a-z]+ and is not {kind}"):
    list(read_rows(tmp_path / name))


def test_parquet_a_batch_at_a_time(tmp_path):
  """Messages of a column have the same fields in Parquet; nulls become absent fields."""
  called = {"role": "assistant", "tool_calls": [{"name": "add"}]}
  rows = [{"chosen": [user(f"{i}"), called], "score": i if i % 2 else None} for i in range(1500)]
  path = tmp_path / "rows.anything"
  path.write_bytes(parquet_bytes(rows))
  expected = [{name: value for name, value in row.items() if value is not None} for row in rows]
  assert [row for _, row in read_rows(path)] == expected
  assert [where for where, _ in read_rows(path)][-1] == f"{path}:row 1500"


def test_several_files_and_patterns(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("b.jsonl", "a.jsonl", "a,b.jsonl", "c[1].jsonl", "sub/a.jsonl"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")

  def found(given):
    return [str(path) for path in readers.files(given)]

  assert found("b.jsonl, a.jsonl") == ["b.jsonl", "a.jsonl"]
  assert found("a,b.jsonl") == ["a,b.jsonl"] and found("c[1].jsonl") == ["c[1].jsonl"]
  assert found("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
  assert found("**/a.jsonl,b.jsonl") == ["a.jsonl", "sub/a.jsonl", "b.jsonl"]
  assert found(["b.jsonl", tmp_path / "a.jsonl"]) == ["b.jsonl", str(tmp_path / "a.jsonl")]


@pytest.mark.parametrize(
  ("given", "line"),
  [
    ("gone.jsonl", "no data file gone.jsonl$"),
    ("rows.jsonl,gone.jsonl", "no data file gone.jsonl$"),
    ("gone-*.jsonl", r"no data file fits the pattern gone-\*.jsonl$"),
    (" , ", "no data file is named"),
    ("", "no data file is named"),
    (".", "[.] is a folder; name a file of rows"),
    ("s*", "sub is a folder; name a file of rows .*, or sub/[*]$"),
  ],
)
def test_files_that_are_none(tmp_path, monkeypatch, given, line):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "sub").mkdir()
  (tmp_path / "rows.jsonl").write_text("{}")
  with pytest.raises(UserError, match=line):
    readers.files(given)


# --- recognising ----------------------------------------------------------------------------------


def test_a_field_map_names_what_is_what():
  row = {"question": "q", "response_j": "good", "response_k": "bad", "prompt": "not this"}
  fields = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
  assert convert(row, fields=fields) == ("strings", Preference("q", ("good", "bad")))
  assert convert({"a": "x", "chosen": "b", "rejected": "c"}, fields={"prompt": "a", "chosen": ""})
  with pytest.raises(UserError, match="the field map's prompt=quest is not in the row, which has"):
    detect(row, {"prompt": "quest"})
  row = {"question": "q", "text": "a", "good": True, "label": "spam"}
  fields = {"prompt": "question", "completion": "text", "label": "good"}
  assert convert(row, fields=fields, kind="unpaired")[1] == Preference("q", ("a",), (1.0,))
  assert detection.detect_kind(row, fields) == "unpaired"
  row = {"q": "a", "chosen": "b", "rejected": "c", "gap": 2}
  assert convert(row, fields={"prompt": "q", "margin": "gap"})[1].scores == (2.0, 0.0)


def test_columns_joined_by_a_plus_are_a_list():
  row = {"q": "p", "x": "one", "y": "two", "first": 2, "second": 2, "a+b": "best"}
  fields = {"prompt": "q", "answer_a": "x", "answer_b": "y", "preference": "first+second"}
  assert convert(row, fields=fields)[1].completions == ("two", "one")
  ranked = {"prompt": "q", "answers": "y+x", "scores": "first+second"}
  assert convert(row | {"first": 1}, fields=ranked, kind="ranked")[1].completions == ("one", "two")
  # A name that is there is itself, whatever is in it.
  pair = {"prompt": "q", "chosen": "a+b", "rejected": "x"}
  assert convert(row, fields=pair)[1].completions == ("best", "one")
  with pytest.raises(UserError, match=r"preference=first\+third is not in the row"):
    convert(row, fields=fields | {"preference": "first+third"})


def test_names_of_a_map_are_known_ones():
  assert set(defaults.FIELDS) <= set(formats.FIELD_NAMES)
  assert encode.read_fields(["weight=w", "prompt=a"]) == {"weight": "w", "prompt": "a"}
  with pytest.raises(
    UserError, match=r"no row format has a field 'weigth'; did you mean 'weight'\?"
  ):
    encode.read_fields(["weigth=w"])
  with pytest.raises(UserError, match="field 'x'; known: prompt_ids, chosen_ids"):
    encode.read_fields(["x=prompt"])


def test_an_unknown_row_says_what_is_known():
  with pytest.raises(UserError, match=r"the row has fields a, b; needed: prompt_ids"):
    detect({"b": 1, "a": 2})
  with pytest.raises(UserError, match=r"answers_ids; prompt \+ answers.* the field map"):
    detection.detect_kind({"b": 1, "a": 2})


def test_good_and_bad_texts_are_not_learned_from_alike():
  for label in (False, 0, 1):
    with pytest.raises(
      UserError, match="fields label, messages: single completions with a label are for loss kto"
    ):
      detect({"messages": [user("a"), assistant("b")], "label": label}, kind="text")


# --- real files -----------------------------------------------------------------------------------


A_OR_B = {"answer_a": "completion_a", "answer_b": "completion_b"}
LLMBAR = {"prompt": "input", "answer_a": "output_1", "answer_b": "output_2", "preference": "label"}
PANDALM = {
  "answer_a": "response1",
  "answer_b": "response2",
  "preference": "annotator1+annotator2+annotator3",
}


@pytest.mark.parametrize(
  ("file", "fields", "name", "rows", "kept", "dropped"),
  [
    ("rasbt_instruction_pref.open.json", {}, "instruction", 882, 877, {"equal answers": 5}),
    (
      "hh_helpful_base_test.open.jsonl",
      {},
      "transcripts",
      1903,
      1892,
      {"prompts differ": 8, "empty answer": 3},
    ),
    ("lf_dpo_en.open.json", {}, "conversations", 242, 242, {}),
    ("lf_dpo_zh.open.json", {}, "conversations", 233, 233, {}),
    ("lf_kto_en.open.json", {}, "chat with label", 236, 236, {}),
    ("llmbar.open.json", LLMBAR, "compared", 343, 343, {}),
    (
      "pandalm_human_test.open.json",
      PANDALM,
      "compared",
      725,
      637,
      {"tie": 53, "true or false where text should be": 6, "empty answer": 29},
    ),
    ("tulu_human_eval.open.jsonl", A_OR_B, "compared", 900, 607, {"tie": 293}),
    ("derived/derived_lf_dpo_en_conversational.open.jsonl", {}, "messages", 242, 242, {}),
    ("derived/derived_lf_dpo_zh_conversational.open.jsonl", {}, "messages", 233, 233, {}),
    ("derived/derived_llmbar_prompt_chosen_rejected.open.jsonl", {}, "strings", 343, 343, {}),
    ("format_samples/maxtext_dpo_2col.json", {}, "transcripts", 22, 22, {}),
    ("format_samples/maxtext_dpo_3col.json", {}, "strings", 22, 22, {}),
    ("format_samples/torchtune_hh_rlhf_tiny.json", {}, "shared messages", 1, 1, {}),
  ],
)
def test_real_files_hold_what_they_hold(shared_data, file, fields, name, rows, kept, dropped):
  read = [row for _, row in read_rows(shared_data / "preferences" / file)]
  form = detect(read, fields, kind=detection.detect_kind(read, fields))
  held, lost = 0, collections.Counter()
  for row in read:
    try:
      form.convert(row)
      held += 1
    except RowError as error:
      lost[str(error)] += 1
  assert (form.name, len(read), held, lost) == (name, rows, kept, dropped)


def test_real_judged_answers(shared_data):
  read = [row for _, row in read_rows(shared_data / "preferences" / "lf_kto_en.open.json")]
  assert detection.detect_kind(read) == "unpaired"
  form = detect(read, kind="unpaired")
  found = [form.convert(row) for row in read]
  assert form.name == "chat with label" and len(found) == 236
  assert sum(preference.scores == (1.0,) for preference in found) == 113


@pytest.mark.parametrize(
  ("file", "fields"),
  [
    (
      "format_samples/torchtune_stack_exchange_paired_tiny.json",
      {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    (
      "format_samples/nemo_dummy_dpo.jsonl",
      {"chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    (
      "format_samples/lf_v1_dpo_demo.jsonl",
      {"chosen": "chosen_messages", "rejected": "rejected_messages"},
    ),
  ],
)
def test_other_projects_files_by_field_map(shared_data, file, fields):
  read = [row for _, row in readers.read_rows(shared_data / "preferences" / file)]
  form = detect(read[0], fields)
  for row in read:
    preference = form.convert(row)
    assert preference.completions[0] != preference.completions[1]


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
