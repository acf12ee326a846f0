"""Files are read or refused, field maps are applied, and real files give the rows they contain."""

import bz2
import collections
import functools
import gzip
import io
import json
import lzma
import pathlib
import pickle
import tarfile
import zipfile

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
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
CSV = "prompt,chosen,rejected\np0,é\u2028🙂,b\np1,é\u2028🙂,b\np2,é\u2028🙂,b\n".encode()
COMPRESS = {
  "": bytes,
  "gzip": gzip.compress,
  "bzip2": bz2.compress,
  "xz": lzma.compress,
  "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE),
  "zstd": functools.partial(pyarrow.compress, codec="zstd", asbytes=True),
}


def read(path, data, name="rows"):
  """The rows of a file with these bytes, with the part of each place after the file's name."""
  (path / name).write_bytes(data)
  return [(where.removeprefix(f"{path / name}:"), row) for where, row in read_rows(path / name)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(("text", "first"), [(JSONL, 1), (CSV, 2)])
def test_first_bytes_decide_and_text_may_be_compressed(tmp_path, text, first, compression):
  data = COMPRESS[compression](text)
  expected = [(str(first + i), row) for i, row in enumerate(ROWS)]
  assert read(tmp_path, data) == expected
  # Streams that follow each other are one file, as `cat a.gz b.gz` makes them.
  if compression and compression != "lzma" and text is JSONL:
    assert len(read(tmp_path, data + COMPRESS[compression](b"\n" + text))) == 6


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz", "zstd"])
def test_broken_compression_is_named(tmp_path, compression):
  text = b"".join(b'{"a": "%d"}\n' % (i * i) for i in range(9999))
  data = COMPRESS[compression](text)
  for broken in (data[:-9], data[:40], data[:40] + b"\xff" * 40 + data[80:]):
    with pytest.raises(UserError, match=rf"rows: broken {compression} \(.+\); download") as raised:
      read(tmp_path, broken)
    assert "\n" not in str(raised.value)
  for inner, line in (
    (data, f"{compression} inside {compression}; decompress it once: [a-z]+"),
    (parquet_bytes(ROWS), f"Parquet compressed by {compression}"),
    (b"<!DOCTYPE html>", "a web page"),
  ):
    with pytest.raises(UserError, match=f"rows is {line}"):
      read(tmp_path, COMPRESS[compression](inner))


def zip_bytes(*names):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name in names:
      archive.writestr(name, "x")
  return file.getvalue()


def tar_bytes():
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("rows.jsonl"))
  return file.getvalue()


@pytest.mark.parametrize(
  ("data", "line"),
  [
    (
      b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
      "a Git LFS pointer instead of the data; git lfs pull",
    ),
    (b"\n<!DOCTYPE html><html>", r"a web page \(HTML\) instead of the data; download the file"),
    (b"<?xml version='1.0'?>", "XML"),
    (zip_bytes("rows.jsonl"), "a zip archive; unzip it"),
    (zip_bytes("xl/workbook.xml"), "an Excel workbook; save its sheet as CSV UTF-8"),
    (zip_bytes("archive/data.pkl"), "a file of arrays"),
    (tar_bytes(), "a tar archive; unpack it"),
    (gzip.compress(tar_bytes(), mtime=0), "a tar archive; unpack it"),
    (pickle.dumps(ROWS), "a pickle, which is never loaded"),
    ((16).to_bytes(8, "little") + b'{"w":{}}        ', "weights in safetensors"),
    (b"SQLite format 3\x00", "an SQLite database; export"),
    (b"\x04\x22\x4d\x18....", "compressed by lz4; lz4 -d .*rows"),
    (b"FEA1....", "a Feather file of version 1; save it again"),
    (JSONL.decode().encode("utf-16"), "text in UTF-16; .*iconv -f UTF-16"),
    (CSV.replace("é\u2028🙂".encode(), b"a").decode().encode("utf-16-le"), "text in UTF-16"),
    (b"\x01\x02\x00\x03\xff\xfe" * 9, "binary data of an unknown kind"),
  ],
)
def test_what_has_no_rows_is_refused_as_what_it_is(tmp_path, data, line):
  with pytest.raises(UserError, match=f"rows is {line}") as raised:
    read(tmp_path, data)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    *(("r.jsonl.gz", "gzip"), ("r.jsonl.xz", "xz"), ("r.csv.bz2", "bzip2"), ("r.zst", "zstd")),
    *(("r.parquet", "Parquet"), ("r.arrow", "Arrow"), ("r.feather", "Feather")),
  ],
)
def test_what_has_a_binary_name_is_that(tmp_path, name, kind):
  with pytest.raises(UserError, match=rf"{name} is named \.[a-z2]+ and is not {kind}; download"):
    read(tmp_path, b'{"a": 1}', name)
  with pytest.raises(UserError, match=r"is a Git LFS pointer"):
    read(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", name)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "rows").write_bytes(JSONL)

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "open", refuse)
  with pytest.raises(UserError, match=r"rows cannot be read \(Permission denied\)"):
    list(read_rows(tmp_path / "rows"))


@pytest.mark.parametrize(
  ("row", "line"),
  [
    ('{"\\ufeffprompt": "a"}', r'rows:1: the field name "\\ufeffprompt" has a control character'),
    (
      '{"id": 1, "data": {"prompt": "a"}, "annotations": []}',
      r"rows:1: .* Label Studio .* JSON-MIN",
    ),
    ('{"a": 1}\n"text"', r'rows:2: a row is a JSON object with named fields, not "text"'),
    ("[1]", r"rows:row 1: a row is a JSON object with named fields, not 1"),
    ("", r"rows contains no rows"),
  ],
)
def test_rows_that_are_none(tmp_path, row, line):
  with pytest.raises(UserError, match=line):
    read(tmp_path, row.encode())


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
    encode.read_fields(["x=y"])
  with pytest.raises(UserError, match=r"our name of a field comes first, .*: --fields prompt=x"):
    encode.read_fields(["x=prompt"])


def test_an_unknown_row_says_what_is_known():
  with pytest.raises(
    UserError, match=r"the row has fields a, b; a pair has prompt, chosen and rej"
  ):
    detect({"b": 1, "a": 2})
  with pytest.raises(UserError, match=r"docs/data\.md\)\. If .* names: --config\.data\.fields"):
    detection.detect_kind({"b": 1, "a": 2})


def test_good_and_bad_texts_are_not_learned_from_alike():
  for label in (False, 0, 1):
    with pytest.raises(
      UserError, match="fields label, messages: single completions with a label are for --loss kto"
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
    ("rasbt_instruction_pref.open.json", {}, "instruction", 882, 877, {"equal completions": 5}),
    (
      "hh_helpful_base_test.open.jsonl",
      {},
      "transcripts",
      1903,
      1892,
      {"prompts differ": 8, "empty completion": 3},
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
      {"tie": 53, "true or false where text should be": 6, "empty completion": 29},
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
