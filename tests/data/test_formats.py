"""Every row format is converted as documented, and rows without a preference are dropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data import detection
from dpo_jax.data.detection import detect
from dpo_jax.data.fields import BadRow, Preference, RowError
from dpo_jax.structs import UserError
from tests.support.messages import assistant, convert, user


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
  assert convert(row, kind="text") == (name, meaning._replace(completions=meaning.completions[:1]))
  # Ranked they are two of two; judged by themselves, one is desirable and one is not.
  assert convert(row, kind="ranked") == (name, meaning)
  assert convert(row, kind="unpaired") == (name, meaning._replace(scores=(1.0, 0.0)))


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
      Preference([user("a")], ([assistant("b"), user("c"), assistant("d")],)),
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
    with pytest.raises(UserError, match="single completions without a label are for --loss sft"):
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


@pytest.mark.parametrize("label", [True, False, 1, 0, "True", "0"])
@pytest.mark.parametrize(("row", "name", "meaning"), UNPAIRED)
def test_answers_judged_by_themselves(row, name, meaning, label):
  row = row | {"label": label}
  assert detection.detect_kind(row) == "unpaired"
  expected = (f"{name} with label", meaning._replace(scores=(float(label in (True, "True")),)))
  assert convert(row, kind="unpaired") == expected
  for kind in ("pairs", "text", "ranked"):
    with pytest.raises(
      UserError, match=r"has fields .*label.*: single completions with a label are for --loss kto"
    ):
      detect(row, kind=kind)


@pytest.mark.parametrize(("label", "score"), [(1.0, 1.0), (0.0, 0.0), ("1.0", 1.0), ("0.0", 0.0)])
def test_labels_of_tables_in_which_one_is_missing(label, score):
  row = {"prompt": "a", "completion": "b", "label": label}
  assert convert(row, kind="unpaired")[1].scores == (score,)


@pytest.mark.parametrize("label", ["yes", "", -1, 2, 1.5, 0.5, [True], float("nan")])
def test_a_label_is_true_or_false(label):
  row = {"prompt": "a", "completion": "b", "label": label}
  with pytest.raises(BadRow, match=r"field label is .*; it must be true or 1 for a desirable"):
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
  assert detection.detect_kind(row) == "ranked"
  assert convert(row, kind="ranked") == (name, meaning)
  assert convert(row | {"scores": None}, kind="ranked") == (name, meaning)
  # Scores put them in order; those of equal score stay as they stand.
  b, c, d = meaning.completions
  by_scores = Preference(meaning.prompt, (c, b, d), (2.5, -1.0, -1.0))
  assert convert(row | {"scores": [-1, 2.5, -1]}, kind="ranked") == (name, by_scores)
  for kind in ("pairs", "text", "unpaired"):
    with pytest.raises(UserError, match="lists of ranked completions are for --loss plackett_luce"):
      detect(row, kind=kind)


@given(scores=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6, unique=True))
def test_the_highest_score_is_the_best(scores):
  row = {"prompt": "a", "answers": [f"answer {score}" for score in scores], "scores": scores}
  completions, found = convert(row, kind="ranked")[1][1:3]
  assert list(found) == sorted(scores, reverse=True)
  assert list(completions) == [f"answer {score}" for score in found]


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"answers": ["b"]}, "fewer than two completions"),
    ({"answers": ["b", None, "c"]}, "a completion is null"),
    ({"answers": []}, "fewer than two completions"),
    ({"answers": ["b", "c", " "]}, "empty completion"),
    ({"answers": ["b", "c", "c"]}, "equal completions"),
    ({"answers": ["b", "c", "half a \ud800 pair"]}, "text is not valid Unicode"),
    (
      {"answers": [[user(p), assistant("c")] for p in "ax"]},
      "the prompt and the conversation beside it differ",
    ),
    ({"answers": None}, "no answers"),
    ({"prompt": None}, "no prompt"),
    ({"answers": [user("b"), assistant("c")]}, "last message is not the assistant's"),
    ({"scores": [1, 1, 1.0]}, "equal scores"),
  ],
)
def test_ranked_rows_without_a_preference_are_dropped(change, reason):
  row = {"prompt": "a", "answers": ["b", "c", "d"]}
  with pytest.raises(RowError) as raised:
    detect(row, kind="ranked").convert(row | change)
  assert str(raised.value) == reason


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"answers": "b"}, r'field answers is "b", not a list of answers, best first'),
    ({"answers": ["b", 3]}, r"field answers is 3, not text or a list of messages"),
    ({"answers": ["b", {"text": "c"}]}, r"field answers has the message .*; a message is a role"),
    ({"prompt": 3}, r"field prompt is 3, not text or a list of messages"),
    ({"scores": [1, 2]}, r"field scores is \[1, 2\], not a list of 3 numbers, one per completion"),
    ({"scores": 3}, r"field scores is 3, not a list of 3 numbers"),
    ({"scores": [1, 2, None]}, r"field scores is null, not a finite number"),
    ({"scores": [1, 2, True]}, r"field scores is true, not a finite number"),
    ({"scores": [1, 2, "high"]}, r'field scores is "high", not a finite number'),
    ({"scores": [1, 2, float("nan")]}, r"field scores is NaN, not a finite number"),
    ({"scores": [1, 2, 1e39]}, r"field scores is 1e\+39, not a finite number"),
  ],
)
def test_broken_ranked_rows_are_named(change, line):
  row = {"prompt": "a", "answers": ["b", "c", "d"]}
  with pytest.raises(BadRow, match=line):
    detect(row, kind="ranked").convert(row | change)
  ids = {"prompt_ids": [1], "answers_ids": [[2], "3"]}
  with pytest.raises(UserError, match=r'field answers_ids is "3", not a list of token ids'):
    convert(ids, kind="ranked")


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
    (STRINGS, {"rejected": "b"}, "equal completions"),
    (STRINGS, {"rejected": True}, "true or false where text should be"),
    (STRINGS, {"rejected": " \n"}, "empty completion"),
    (STRINGS, {"rejected": "half a \ud800 pair"}, "text is not valid Unicode"),
    (MESSAGES, {"rejected": [assistant("b")]}, "equal completions"),
    (MESSAGES, {"rejected": [assistant(" ")]}, "empty completion"),
    (MESSAGES, {"rejected": [user("c")]}, "last message is not the assistant's"),
    (MESSAGES, {"rejected": [assistant("c"), user("d")]}, "last message is not the assistant's"),
    (
      MESSAGES,
      {"rejected": [user("x"), assistant("c")]},
      "the prompt and the conversation beside it differ",
    ),
    (IDS, {"rejected_ids": [2]}, "equal completions"),
    (IDS, {"rejected_ids": []}, "empty completion"),
    (IDS, {"prompt_ids": []}, "empty prompt"),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: x\n\nAssistant: c"}, "prompts differ"),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: a"}, "no assistant turn"),
    (
      TRANSCRIPTS,
      {"rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d"},
      "last message is not the assistant's",
    ),
    (TRANSCRIPTS, {"rejected": "\n\nHuman: a\n\nAssistant:"}, "empty completion"),
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
    (STRINGS, {"chosen": 1.5}, r"field chosen is 1\.5, not text"),
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


@pytest.mark.parametrize("missing", [{}, {"prompt": None}])
def test_a_missing_field_and_a_null_are_one_and_counted(missing):
  """A table cannot tell them apart, so neither can we."""
  for row, kind in (
    ({"prompt": "a", "completion": "b", "label": 1}, "unpaired"),
    (STRINGS, "pairs"),
    (MESSAGES, "pairs"),
    ({"prompt": "a", "answers": ["b", "c"]}, "ranked"),
  ):
    without = {name: value for name, value in row.items() if name != "prompt"} | missing
    for rows in ([row, row, without], [without, row, row]):
      with pytest.raises(RowError, match="no prompt"):
        detect(rows, kind=kind).convert(without)
