"""What each form of row means, which rows hold no preference, and which files are wrong."""

import gzip
import json

import pytest

from dpo_jax.data import sources
from dpo_jax.data.sources import Preference, RowError, detect, read_rows
from dpo_jax.structs import UserError

user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}


def convert(row, **kwargs):
  form = detect(row, **kwargs)
  return form.name, form.convert(row)


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
    (b"PAR1....", r"rows is Parquet, which is not read"),
    (gzip.compress(b'{"a": 1}' * 999)[:40], r"rows: broken gzip"),
    (gzip.compress(b"")[:10] + b"\xff" * 40, r"rows: broken gzip"),
  ],
)
def test_a_broken_file_is_one_line_with_file_and_line(tmp_path, data, line):
  path = tmp_path / "rows"
  path.write_bytes(data)
  with pytest.raises(UserError, match=line) as raised:
    list(read_rows(path))
  assert "\n" not in str(raised.value)


def test_missing_files_and_folders(tmp_path):
  with pytest.raises(UserError, match="no data file"):
    list(read_rows(tmp_path / "gone.jsonl"))
  with pytest.raises(UserError, match="is a folder; name a file"):
    list(read_rows(tmp_path))


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
  assert convert(row, answers=1) == (name, meaning._replace(answers=meaning.answers[:1]))


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
  assert convert(row, answers=1) == (name, meaning)
  with pytest.raises(UserError, match="of no known form"):
    detect(row, answers=2)


def test_a_field_map_names_what_is_what():
  row = {"question": "q", "response_j": "good", "response_k": "bad", "prompt": "not this"}
  fields = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
  assert convert(row, fields=fields) == ("strings", Preference("q", ("good", "bad")))
  assert convert({"a": "x", "chosen": "b", "rejected": "c"}, fields={"prompt": "a", "chosen": ""})
  with pytest.raises(UserError, match="the field map's prompt=quest is not in the row, which has"):
    detect(row, {"prompt": "quest"})


def test_an_unknown_row_says_what_is_known():
  with pytest.raises(UserError, match=r"a row with a, b is of no known form; known are prompt_ids"):
    detect({"b": 1, "a": 2})


def test_good_and_bad_texts_are_not_learned_from_alike():
  with pytest.raises(UserError, match="label, messages is of no known form"):
    detect({"messages": [user("a"), assistant("b")], "label": False}, answers=1)


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
