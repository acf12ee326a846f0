"""Rows in the notations of training services and tools become the rows that they mean."""

import json

import pytest

from dpo_jax.data import detection
from dpo_jax.data.detection import detect
from dpo_jax.data.fields import BadRow, Preference, RowError
from tests.support.messages import assistant, convert, reply, system, user

PAIR = Preference([user("a")], (reply("b"), reply("c")))
WITH_SYSTEM = PAIR._replace(prompt=[system("s"), user("a")])


def parts(*texts):
  return [{"text": text} for text in texts]


def candidates(*labels):
  return [
    {"content": parts(text), "preferenceLabel": label}
    for text, label in zip("cb", labels, strict=True)
  ]


@pytest.mark.parametrize(
  ("row", "meaning"),
  [
    # ms-swift: the last reply of the conversation is chosen.
    ({"messages": [user("a"), *reply("b")], "rejected_response": "c"}, PAIR),
    ({"messages": [user("a"), *reply("b")], "rejected_response": reply("c")}, PAIR),
    ({"messages": [user("a"), *reply("b")], "rejected_response": assistant("c")}, PAIR),
    (
      {"messages": [user("a"), *reply("b")], "rejected_messages": [user("a"), *reply("c")]},
      PAIR,
    ),
    # axolotl: the conversation goes on with either message.
    ({"messages": [user("a")], "chosen": assistant("b"), "rejected": assistant("c")}, PAIR),
    # The whole chosen conversation beside both.
    (
      {"messages": [user("a"), *reply("b")]}
      | {"chosen": [user("a"), *reply("b")], "rejected": [user("a"), *reply("c")]},
      PAIR,
    ),
    # Amazon: two candidates end the conversation.
    (
      {
        "system": parts("s"),
        "messages": [
          {"role": "user", "content": parts("a")},
          {"role": "assistant", "candidates": candidates("non-preferred", "preferred")},
        ],
      },
      WITH_SYSTEM,
    ),
    # A prompt of another column as instruction, with completions as messages (Magpie).
    ({"instruction": "a", "chosen": reply("b"), "rejected": reply("c")}, PAIR),
    (
      {
        "instruction": "a",
        "chosen": [user("a"), *reply("b")],
        "rejected": [user("a"), *reply("c")],
      },
      PAIR,
    ),
  ],
)
def test_pairs(row, meaning):
  assert convert(row)[1] == meaning
  assert detection.detect_kind(row) == "pairs"
  # For SFT the chosen completion alone; the rejected one is never learned from.
  assert convert(row, kind="text")[1].completions == meaning.completions[:1]


def test_a_rejected_response_replaces_all_after_the_question():
  call = {"role": "assistant", "content": "I look"}
  tool = {"role": "tool", "content": "17"}
  turns = [user("x"), *reply("y"), user("a"), call, tool, *reply("b")]
  found = convert({"messages": turns, "rejected_response": reply("c")})[1]
  assert found == Preference(turns[:3], (turns[3:], reply("c")))
  # A text replaces the last message alone.
  found = convert({"messages": turns, "rejected_response": "c"})[1]
  assert found == Preference(turns[:5], (reply("b"), reply("c")))


def test_messages_as_text_in_every_notation():
  # Tables without lists contain them so; the rejected response must not be lost.
  row = {"messages": json.dumps([user("a"), *reply("b")]), "rejected_response": "c"}
  assert convert(row)[1] == PAIR
  assert convert(row | {"rejected_response": json.dumps(reply("c"))})[1] == PAIR


@pytest.mark.parametrize("labels", [("preferred", "preferred"), ("good", "bad"), (None, None)])
def test_candidates_that_nothing_ranks_are_refused(labels):
  turns = [user("a"), {"role": "assistant", "candidates": candidates(*labels)}]
  with pytest.raises(BadRow, match="must be two, with the preferenceLabel preferred and non-"):
    convert({"messages": turns})


def test_googles_contents():
  said = [{"role": "user", "parts": parts("a", "a")}, {"role": "model", "parts": parts("b")}]
  instruction = {"role": "system", "parts": parts("s")}
  found = convert({"contents": said, "systemInstruction": instruction}, kind="text")[1]
  assert found == Preference([system("s"), user("aa")], (reply("b"),))
  scored = [{"score": s, "completion": {"role": "model", "parts": parts(str(s))}} for s in (0, 1)]
  found = convert({"contents": said[:1], "completions": scored}, kind="ranked")[1]
  assert found == Preference([user("aa")], (reply("1"), reply("0")), (1.0, 0.0))


def test_other_columns_of_these_names_are_not_in_the_way():
  row = {"prompt": "a", "chosen": "b", "rejected": "c", "contents": ["x"], "completions": [1]}
  row |= {"messages": ["x"], "conversations": 3}
  assert convert(row)[1] == Preference("a", ("b", "c"))
  assert convert(row | {"system": "s"})[1] == WITH_SYSTEM


@pytest.mark.parametrize("as_text", [False, True])
def test_arenas_lists_of_turns(as_text):
  write = json.dumps if as_text else list
  row = {"prompt": write(["a", "d"]), "preference": 1}
  row |= {"answer_a": write(["b", "e"]), "answer_b": write(["c", "f"])}
  rows = [row, row | {"preference": 2}]
  reading = detect(rows)
  first, second = ([user("a"), *reply(x), user("d"), *reply(y)] for x, y in (("be"), ("cf")))
  assert [reading.convert(one).completions for one in rows] == [
    (first[1:], second[1:]),
    (second[1:], first[1:]),
  ]
  with pytest.raises(RowError, match="a turn without text"):
    reading.convert(row | {"answer_b": write(["c", None])})
  # Completions that are lists in JSON, of a prompt that is none, stay texts.
  texts = {"prompt": "a", "answer_a": '["b"]', "answer_b": '["c"]', "preference": 2}
  assert convert(texts)[1].completions == ('["c"]', '["b"]')


def test_a_tag_of_kto_is_a_label():
  row = {"instruction": "a", "input": "", "output": "b", "kto_tag": False}
  assert detection.detect_kind(row) == "unpaired"
  assert convert(row, kind="unpaired")[1].scores == (0.0,)
  # Not one more good example for SFT.
  with pytest.raises(Exception, match="single completions with a label are for --loss kto"):
    detect(row, kind="text")


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_wherever_they_are(name):
  inner = {"name": "weigh", "parameters": {}}
  schema = {"type": "function", "function": inner}
  turns = [{"role": "system", "content": "s"}, user("a"), *reply("b")]
  for given in ([schema], [inner], json.dumps([inner]), [json.dumps(inner)]):
    found = convert({"messages": turns, name: given}, kind="text")[1]
    assert found.prompt.tools == (schema,)
    first = [{**turns[0], name: given}, *turns[1:]]
    assert convert({"messages": first}, kind="text")[1] == found
