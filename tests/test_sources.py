"""What each form of row means, which rows hold no preference, and which files are wrong."""

import gzip
import io
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dpo_jax.data import sources
from dpo_jax.data.forms import Preference, RowError
from dpo_jax.data.sources import detect, read_rows
from dpo_jax.structs import UserError

user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}


def convert(row, **kwargs):
  form = detect(row, **kwargs)
  return form.name, form.convert(row)


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
    (b"", r"rows holds no rows"),
    (b"\n \n", r"rows holds no rows"),
    (b"[]", r"rows holds no rows"),
    (b'{"a": 1}\n\n{"a": ', r"rows:3: not JSON \(Expecting value at column \d+\)"),
    (b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', r"rows:3: not JSON"),
    (b'{"a": 1}\n"text"', r'rows:2: a row is a JSON object with named fields, not "text"'),
    (b'{"a": 1}\n{"a": "\xff"}', r"rows:2: byte 7 is not UTF-8"),
    (b'{\n  "a": 1\n}', r"rows:1: not JSON"),
    (b"[" * 100_000, r"rows:1: "),
    (b"PAR1....", r"rows: broken Parquet \(.+\); fetch the file again"),
    (parquet_bytes([{"a": "long " * 99}])[:200], r"rows: broken Parquet"),
    (parquet_bytes([]), r"rows holds no rows"),
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


def test_parquet_a_batch_at_a_time(tmp_path):
  """Messages of a column have the same fields there; those that are null are absent here."""
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
  found = lambda given: [str(path) for path in sources.files(given)]
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
    sources.files(given)


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("row", "name", "meaning"),
  [
    (
      {"prompt": "a ", "chosen": "b", "rejected": "c", "score": 3},
      "strings",
      Preference("a ", ("b", "c")),
    ),
    (
      {"prompt": "x", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]}
      | {"chosen": "text beside ids", "rejected": "is not read"},
      "ids",
      Preference([1], ([2], [3, 4])),
    ),
    (
      {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
      "messages",
      Preference([user("a")], ([assistant("b")], [assistant("c")])),
    ),
    (
      # The prompt as text, whole conversations as answers.
      {
        "prompt": "a",
        "chosen": [user("a"), assistant("b")],
        "rejected": [user("a"), assistant("c")],
      },
      "messages",
      Preference([user("a")], ([assistant("b")], [assistant("c")])),
    ),
    (
      {
        "chosen": [user("a"), assistant("m"), user("n"), assistant("b")],
        "rejected": [user("a"), assistant("m"), user("n"), assistant("c")],
      },
      "shared messages",
      Preference([user("a"), assistant("m"), user("n")], ([assistant("b")], [assistant("c")])),
    ),
    (
      {
        "chosen": "\n\nHuman: a\n\nAssistant: m\n\nHuman: n\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: m\n\nHuman: n\n\nAssistant: c\n\nHuman",
      },
      "transcripts",
      Preference("\n\nHuman: a\n\nAssistant: m\n\nHuman: n\n\nAssistant:", (" b", " c\n\nHuman")),
    ),
    (
      {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
      },
      "conversations",
      Preference(
        [{"role": "system", "content": "s"}, user("a")], ([assistant("b")], [assistant("c")])
      ),
    ),
    (
      {"instruction": "Add", "input": "1 2", "output": "3", "chosen": "3", "rejected": "4"},
      "instruction",
      Preference("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", ("3", "4")),
    ),
    (
      {"instruction": "Add", "input": None, "chosen": "3", "rejected": "4"},
      "instruction",
      Preference("### Instruction:\nAdd\n\n### Response:\n", ("3", "4")),
    ),
    (
      # Messages in parts.
      {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "chosen": assistant("b"),
        "rejected": "c",
      },
      "messages",
      Preference([user("a")], ([assistant("b")], [assistant("c")])),
    ),
  ],
)
def test_what_rows_mean(row, name, meaning):
  assert convert(row) == (name, meaning)
  # Where one answer is learned from, it is the chosen one.
  assert convert(row, kind="text") == (name, meaning._replace(answers=meaning.answers[:1]))
  # Ranked they are two of two; judged by themselves, one is desirable and one is not.
  assert convert(row, kind="ranked") == (name, meaning)
  assert convert(row, kind="unpaired") == (name, meaning._replace(grades=(1.0, 0.0)))


@pytest.mark.parametrize(
  ("row", "name", "meaning"),
  [
    ({"prompt": "a", "completion": "b"}, "completion", Preference("a", ("b",))),
    (
      {"prompt": [user("a")], "completion": [assistant("b")]},
      "completion",
      Preference([user("a")], ([assistant("b")],)),
    ),
    ({"text": "a b", "label": 1}, "text", Preference("", ("a b",))),
    (
      {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
      "chat",
      Preference([user("a"), assistant("b"), user("c")], ([assistant("d")],)),
    ),
    (
      {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
      "chat",
      Preference([user("a")], ([assistant("b")],)),
    ),
    (
      {"instruction": "Add 1 and 2", "input": "", "output": "3"},
      "instruction",
      Preference("### Instruction:\nAdd 1 and 2\n\n### Response:\n", ("3",)),
    ),
  ],
)
def test_texts_to_learn_from(row, name, meaning):
  assert convert(row, kind="text") == (name, meaning)
  for kind in ("pairs", "ranked", "unpaired"):
    with pytest.raises(UserError, match="rows of one answer without a label are for loss sft"):
      detect(row, kind=kind)


UNPAIRED = [
  ({"prompt": "a ", "completion": "b"}, "completion", Preference("a ", ("b",))),
  (
    {"prompt": [user("a")], "completion": [assistant("b")]},
    "completion",
    Preference([user("a")], ([assistant("b")],)),
  ),
  (
    {"prompt": "a", "completion": [assistant("b")]},
    "completion",
    Preference([user("a")], ([assistant("b")],)),
  ),
  ({"messages": [user("a"), assistant("b")]}, "chat", Preference([user("a")], ([assistant("b")],))),
  (
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "chat",
    Preference([user("a")], ([assistant("b")],)),
  ),
  (
    {"instruction": "Add 1 and 2", "output": "3"},
    "instruction",
    Preference("### Instruction:\nAdd 1 and 2\n\n### Response:\n", ("3",)),
  ),
]


@pytest.mark.parametrize("label", [True, False, 1, 0])
@pytest.mark.parametrize(("row", "name", "meaning"), UNPAIRED)
def test_answers_judged_by_themselves(row, name, meaning, label):
  row = row | {"label": label}
  assert sources.detect_kind(row) == "unpaired"
  expected = (f"{name} with label", meaning._replace(grades=(float(label),)))
  assert convert(row, kind="unpaired") == expected
  for kind in ("pairs", "text", "ranked"):
    with pytest.raises(
      UserError, match=r"label.* does not serve: rows with a label are for loss kto"
    ):
      detect(row, kind=kind)


@pytest.mark.parametrize("label", [None, "true", "", -1, 2, 1.0, 0.5, [True], float("nan")])
def test_a_label_is_true_or_false(label):
  row = {"prompt": "a", "completion": "b", "label": label}
  with pytest.raises(UserError, match=r"field label is .*; it must be true or 1 for a desirable"):
    convert(row, kind="unpaired")


RANKED = [
  ({"prompt": "a ", "answers": ["b", "c", "d"]}, "ranked", Preference("a ", ("b", "c", "d"))),
  (
    {"prompt": "a", "answers": [assistant("b"), [assistant("c")], "d"]},
    "ranked",
    Preference([user("a")], ([assistant("b")], [assistant("c")], [assistant("d")])),
  ),
  (
    {"prompt": [user("a")], "answers": ["b", "c", "d"]},
    "ranked",
    Preference([user("a")], ([assistant("b")], [assistant("c")], [assistant("d")])),
  ),
  (
    {"prompt": "a", "answers": [[user("a"), assistant(text)] for text in "bcd"]},
    "ranked",
    Preference([user("a")], ([assistant("b")], [assistant("c")], [assistant("d")])),
  ),
  (
    {"prompt_ids": [1], "answers_ids": [[2], [3, 4], [5]]},
    "ranked ids",
    Preference([1], ([2], [3, 4], [5])),
  ),
]


@pytest.mark.parametrize(("row", "name", "meaning"), RANKED)
def test_ranked_answers(row, name, meaning):
  assert sources.detect_kind(row) == "ranked"
  assert convert(row, kind="ranked") == (name, meaning)
  assert convert(row | {"scores": None}, kind="ranked") == (name, meaning)
  # Scores put them in order; those of equal score stay as they stand.
  b, c, d = meaning.answers
  by_scores = Preference(meaning.prompt, (c, b, d), (2.5, -1.0, -1.0))
  assert convert(row | {"scores": [-1, 2.5, -1]}, kind="ranked") == (name, by_scores)
  for kind in ("pairs", "text", "unpaired"):
    with pytest.raises(UserError, match="rows with a list of answers are for loss plackett_luce"):
      detect(row, kind=kind)


@given(scores=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6, unique=True))
def test_the_highest_score_is_the_best(scores):
  row = {"prompt": "a", "answers": [f"answer {score}" for score in scores], "scores": scores}
  _, (_, answers, grades) = convert(row, kind="ranked")
  assert list(grades) == sorted(scores, reverse=True)
  assert list(answers) == [f"answer {score}" for score in grades]


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"answers": ["b"]}, "fewer than two answers"),
    ({"answers": []}, "fewer than two answers"),
    ({"answers": ["b", "c", " "]}, "empty answer"),
    ({"answers": ["b", "c", "c"]}, "equal answers"),
    ({"answers": ["b", "c", "half a \ud800 pair"]}, "text is not valid Unicode"),
    ({"answers": ["b", [user("a"), assistant("c")]]}, "answer of several messages"),
    ({"answers": [[user(p), assistant("c")] for p in "ax"]}, "prompts differ"),
    ({"answers": [user("b"), assistant("c")]}, "last message is not the assistant's"),
    ({"scores": [1, 1, 1.0]}, "equal scores"),
  ],
)
def test_ranked_rows_without_a_preference_are_dropped(change, reason):
  row = {"prompt": "a", "answers": ["b", "c", "d"]}
  with pytest.raises(RowError) as raised:
    convert(row | change, kind="ranked")
  assert str(raised.value) == reason


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"answers": "b"}, r'field answers is "b", not a list of answers, best first'),
    ({"answers": None}, r"field answers is null, not a list of answers"),
    ({"answers": ["b", 3]}, r"field answers is 3, not text or a list of messages"),
    ({"answers": ["b", {"text": "c"}]}, r"field answers has the message .*; a message is a role"),
    ({"prompt": 3}, r"field prompt is 3, not text or a list of messages"),
    ({"scores": [1, 2]}, r"field scores is \[1, 2\], not a list of 3 numbers, one an answer"),
    ({"scores": 3}, r"field scores is 3, not a list of 3 numbers"),
    ({"scores": [1, 2, None]}, r"field scores is null, not a finite number"),
    ({"scores": [1, 2, True]}, r"field scores is true, not a finite number"),
    ({"scores": [1, 2, "3"]}, r'field scores is "3", not a finite number'),
    ({"scores": [1, 2, float("nan")]}, r"field scores is NaN, not a finite number"),
    ({"scores": [1, 2, 1e39]}, r"field scores is 1e\+39, not a finite number"),
  ],
)
def test_broken_ranked_rows_are_named(change, line):
  row = {"prompt": "a", "answers": ["b", "c", "d"]}
  with pytest.raises(UserError, match=line):
    convert(row | change, kind="ranked")
  ids = {"prompt_ids": [1], "answers_ids": [[2], "3"]}
  with pytest.raises(UserError, match=r'field answers_ids is "3", not a list of token ids'):
    convert(ids, kind="ranked")


@pytest.mark.parametrize(
  ("fields", "grades"),
  [
    ({}, ()),
    ({"margin": None, "chosen_score": None}, ()),
    ({"margin": 2}, (2.0, 0.0)),
    ({"margin": 0}, (0.0, 0.0)),
    ({"chosen_score": 1.5, "rejected_score": -3}, (1.5, -3.0)),
    ({"chosen_reward": -1.0, "rejected_reward": 2.0}, (-1.0, 2.0)),
    ({"chosen_score": 1, "rejected_score": 0, "chosen_reward": 9, "rejected_reward": 9}, (1, 0)),
    ({"margin": 3, "chosen_score": 1, "rejected_score": 0}, (3.0, 0.0)),
  ],
)
@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
  ],
)
def test_pairs_may_say_by_how_much(row, fields, grades):
  row = row | fields
  assert sources.detect_kind(row) == "pairs"
  for kind in ("pairs", "ranked"):
    assert convert(row, kind=kind)[1].grades == grades
  # Where answers are judged by themselves, or one is learned from, nobody asks.
  assert convert(row, kind="unpaired")[1].grades == (1.0, 0.0)
  assert convert(row, kind="text")[1].grades == ()


@pytest.mark.parametrize(
  ("fields", "line"),
  [
    ({"margin": -0.5}, r"field margin is -0\.5; chosen is the better by 0 or more"),
    ({"margin": "2"}, r'field margin is "2", not a finite number'),
    ({"margin": float("nan")}, r"field margin is NaN, not a finite number"),
    ({"margin": float("inf")}, r"field margin is Infinity, not a finite number"),
    ({"margin": True}, r"field margin is true, not a finite number"),
    ({"margin": 10**400}, r"field margin is 1000.*\.\.\., not a finite number"),
    ({"chosen_score": 1}, r"field rejected_score is missing; the row has chosen, chosen_score"),
    ({"chosen_score": 1, "rejected_score": None}, r"field rejected_score is null, not a finite"),
    ({"chosen_reward": "high", "rejected_reward": 0}, r'field chosen_reward is "high", not a'),
  ],
)
def test_broken_grades_are_named(fields, line):
  with pytest.raises(UserError, match=line):
    convert({"prompt": "a", "chosen": "b", "rejected": "c"} | fields)


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
  assert sources.detect_kind(row, fields) == "unpaired"
  row = {"q": "a", "chosen": "b", "rejected": "c", "gap": 2}
  assert convert(row, fields={"prompt": "q", "margin": "gap"})[1].grades == (2.0, 0.0)


def test_an_unknown_row_says_what_is_known():
  with pytest.raises(UserError, match=r"a row with a, b is of no known form; known are prompt_ids"):
    detect({"b": 1, "a": 2})
  with pytest.raises(UserError, match=r"answers_ids; prompt \+ answers.* the field map"):
    sources.detect_kind({"b": 1, "a": 2})


def test_good_and_bad_texts_are_not_learned_from_alike():
  for label in (False, 0, 1):
    with pytest.raises(UserError, match="label, messages does not serve: rows with a label are"):
      detect({"messages": [user("a"), assistant("b")], "label": label}, kind="text")


# --- rows that are dropped, rows that are wrong ---------------------------------------------------

STRINGS = {"prompt": "a", "chosen": "b", "rejected": "c"}
MESSAGES = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
TRANSCRIPTS = {
  "chosen": "\n\nHuman: a\n\nAssistant: b",
  "rejected": "\n\nHuman: a\n\nAssistant: c",
}
IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
SHARED = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}


@pytest.mark.parametrize(
  ("row", "change", "reason"),
  [
    (STRINGS, {"rejected": "b"}, "equal answers"),
    (STRINGS, {"rejected": " \n"}, "empty answer"),
    (STRINGS, {"rejected": "half a \ud800 pair"}, "text is not valid Unicode"),
    (MESSAGES, {"rejected": [assistant("b")]}, "equal answers"),
    (MESSAGES, {"rejected": [assistant(" ")]}, "empty answer"),
    (MESSAGES, {"rejected": [user("c")]}, "last message is not the assistant's"),
    (MESSAGES, {"rejected": [assistant("c"), user("d")]}, "answer of several messages"),
    (IDS, {"rejected_ids": [2]}, "equal answers"),
    (IDS, {"rejected_ids": []}, "empty answer"),
    (IDS, {"prompt_ids": []}, "empty prompt"),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: x\n\nAssistant: c"}, "prompts differ"),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: a"}, "no assistant turn"),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: a\n\nAssistant:"}, "empty answer"),
    (SHARED, {"rejected": [user("x"), assistant("c")]}, "prompts differ"),
    (SHARED, {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "empty prompt"),
  ],
)
def test_rows_without_a_preference_are_dropped(row, change, reason):
  form = detect(row)
  assert form.convert(row)
  with pytest.raises(RowError) as raised:
    form.convert(row | change)
  assert str(raised.value) == reason


@pytest.mark.parametrize(
  ("row", "change", "line"),
  [
    (STRINGS, {"chosen": True}, r"field chosen is true, not text"),
    (STRINGS, {"prompt": None}, r"field prompt is null, not text"),
    (STRINGS, {"rejected": 3}, r"field rejected is 3, not text"),
    (MESSAGES, {"chosen": [True]}, r"field chosen is \[true\], not text or a list of messages"),
    (MESSAGES, {"prompt": [{"role": "user"}]}, r"field prompt has the message .*; a message is"),
    (IDS, {"chosen_ids": [1, True]}, r"field chosen_ids is \[1, true\], not a list of token ids"),
    (IDS, {"chosen_ids": [-1]}, r"not a list of token ids"),
    (IDS, {"chosen_ids": [2**31]}, r"not a list of token ids"),
    (IDS, {"prompt_ids": "1 2"}, r'field prompt_ids is "1 2", not a list'),
  ],
)
def test_broken_fields_are_named(row, change, line):
  with pytest.raises(UserError, match=line):
    detect(row).convert(row | change)


def test_a_missing_field_is_named():
  form = detect({"prompt": "a", "completion": "b", "label": 1}, kind="unpaired")
  for field in ("prompt", "completion", "label"):
    row = {"prompt": "a", "completion": "b", "label": 1}
    del row[field]
    with pytest.raises(UserError, match=f"field {field} is missing"):
      form.convert(row)
  with pytest.raises(UserError, match="field rejected is missing; the row has chosen, prompt"):
    detect(STRINGS).convert({"prompt": "a", "chosen": "b"})


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("file", "name", "rows", "kept"),
  [
    ("rasbt_instruction_pref.open.json", "instruction", 882, 877),
    ("hh_helpful_base_test.open.jsonl", "transcripts", 1903, 1892),
    ("lf_dpo_en.open.json", "conversations", 242, 242),
    ("lf_dpo_zh.open.json", "conversations", 233, 233),
    ("derived/derived_lf_dpo_en_conversational.open.jsonl", "messages", 242, 242),
    ("derived/derived_llmbar_prompt_chosen_rejected.open.jsonl", "strings", 343, 343),
    ("format_samples/maxtext_dpo_2col.json", "transcripts", 22, 22),
    ("format_samples/maxtext_dpo_3col.json", "strings", 22, 22),
    ("format_samples/torchtune_hh_rlhf_tiny.json", "shared messages", 1, 1),
  ],
)
def test_real_files_hold_what_they_hold(shared_data, file, name, rows, kept):
  read = [row for _, row in read_rows(shared_data / "preferences" / file)]
  form = detect(read[0])
  held = 0
  for row in read:
    try:
      form.convert(row)
      held += 1
    except RowError:
      pass
  assert (form.name, len(read), held) == (name, rows, kept)


def test_real_judged_answers(shared_data):
  read = [row for _, row in read_rows(shared_data / "preferences" / "lf_kto_en.open.json")]
  assert sources.detect_kind(read[0]) == "unpaired"
  form = detect(read[0], kind="unpaired")
  found = [form.convert(row) for row in read]
  assert form.name == "chat with label" and len(found) == 236
  assert sum(preference.grades == (1.0,) for preference in found) == 113


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
  read = [row for _, row in sources.read_rows(shared_data / "preferences" / file)]
  form = detect(read[0], fields)
  for row in read:
    preference = form.convert(row)
    assert preference.answers[0] != preference.answers[1]
