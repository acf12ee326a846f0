"""Rows written in other ways become the rows that they mean."""

import json

import pytest

from dpo_jax.data import canonical, encode
from dpo_jax.data.detection import detect
from dpo_jax.data.fields import BadRow, Preference, RowError
from dpo_jax.structs import UserError
from tests.support.messages import assistant, convert, reply, system, user

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_openais_form_of_preferences():
  row = {
    "input": {
      "messages": [user("a")],
      "tools": [{"type": "function"}],
      "parallel_tool_calls": True,
    },
    "preferred_output": reply("b"),
    "non_preferred_output": reply("c"),
  }
  name, found = convert(row)
  assert name == "messages" and found.completions == (reply("b"), reply("c"))
  assert found.prompt.messages == [user("a")] and found.prompt.tools == ({"type": "function"},)


@pytest.mark.parametrize("chosen_first", [True, False])
def test_objects_as_completions(chosen_first):
  b = {"answer": "b", "model": "x", "rank": 1.0}
  c = {"answer": "c", "model": "y", "rank": 2.0}
  ranked = [b, c] if chosen_first else [c, b]
  meaning = Preference("a", ("b", "c"))
  assert convert({"prompt": "a", "answers": ranked}, kind="ranked")[1] == meaning
  for text in ("response", "text", "content", "output"):
    for score in ("overall_score", "score", "rating", "reward", "pm_score"):
      objects = [{text: "b", score: 8.5}, {text: "c", score: 2}]
      objects = objects if chosen_first else objects[::-1]
      found = convert({"prompt": "a", "answers": objects}, kind="ranked")[1]
      assert found == meaning._replace(scores=(8.5, 2.0))
  # So are messages with a score, and objects that have messages (NeMo RL).
  said = [assistant("b") | {"score": 8.5}, assistant("c") | {"score": 2}]
  said = said if chosen_first else said[::-1]
  found = convert({"prompt": "a", "answers": said}, kind="ranked")[1]
  assert found == Preference("a", ("b", "c"), (8.5, 2.0))
  nested = [{"rank": one["rank"], "completion": reply(one["answer"])} for one in ranked]
  found = convert({"prompt": "a", "answers": nested}, kind="ranked")[1]
  assert found == Preference([user("a")], (reply("b"), reply("c")))
  as_text = {"prompt": "a", "answers": json.dumps(ranked)}
  assert convert(as_text, kind="ranked")[1] == meaning


def test_objects_may_be_columns():
  # So `datasets` stores a sequence of objects.
  turns = {"role": ["user", "assistant"], "content": ["a", "b"]}
  assert convert({"messages": turns}, kind="text")[1] == Preference([user("a")], (reply("b"),))
  pair = {"chosen": turns, "rejected": turns | {"content": ["a", "c"]}}
  assert convert(pair)[1] == Preference([user("a")], (reply("b"), reply("c")))
  answers = {"text": ["b", "c"], "score": [1, 2], "id": ["x", "y"]}
  found = convert({"prompt": "a", "answers": answers}, kind="ranked")[1]
  assert found == Preference("a", ("c", "b"), (2.0, 1.0))


def test_objects_that_nothing_ranks_are_refused():
  row = {"prompt": "a", "answers": [{"text": "b"}, {"text": "c"}]}
  with pytest.raises(BadRow, match=r"objects without a rank or a score \(text\); give each a rank"):
    convert(row, kind="ranked")
  assert convert(row | {"scores": [1, 2]}, kind="ranked")[1].completions == ("c", "b")
  equal = [{"text": "b", "rank": 1}, {"text": "c", "rank": 1}]
  good = {"prompt": "a", "answers": ["b", "c"]}
  with pytest.raises(RowError, match="equal scores"):
    detect(good, kind="ranked").convert({"prompt": "a", "answers": equal})


def test_a_tree_of_messages_is_a_row_for_every_message_with_ranked_replies():
  def message(text, role, *replies, **more):
    return {"text": text, "role": role, "replies": list(replies), **more}

  first = message("b", "assistant", rank=1)
  second = message(
    "c",
    "assistant",
    message("d", "prompter", message("e", "assistant", rank=0), message("f", "assistant", rank=1)),
    rank=0,
  )
  tree = {"message_tree_id": "x", "prompt": message("a", "prompter", first, second)}
  rows = canonical.expand(tree)
  found = [detect(rows, kind="ranked").convert(row) for row in rows]
  assert [(one.prompt, one.completions) for one in found] == [
    ([user("a")], (reply("c"), reply("b"))),
    ([user("a"), assistant("c"), user("d")], (reply("e"), reply("f"))),
  ]
  assert canonical.expand(PAIR) == [PAIR]
  # A tree without ranks still is a row, which is counted.
  (row,) = canonical.expand({"prompt": message("a", "prompter", message("b", "assistant"))})
  with pytest.raises(RowError, match="fewer than two completions"):
    detect(rows, kind="ranked").convert(row)


def test_trees_count_as_the_rows_they_give(rows_file, tokenizer):
  replies = [{"text": t, "role": "assistant", "rank": i} for i, t in enumerate((" good", " bad"))]
  tree = {"prompt": {"text": "the answer is", "role": "prompter", "replies": replies}}
  _, ledger, form = encode.load_examples(rows_file([tree, tree]), tokenizer, kind="ranked")
  assert (form, ledger.rows, ledger.pairs) == ("ranked", 2, 2)
  with pytest.raises(UserError, match="loss plackett_luce"):
    encode.load_examples(rows_file([tree]), tokenizer)


def test_single_messages_of_trees_are_named():
  row = {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter", "label": 3}
  with pytest.raises(UserError, match="the row is one message of a tree"):
    detect(row)


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (PAIR, ([SYSTEM, user("a")], reply("b"))),
    ({"prompt": [user("a")], "chosen": reply("b"), "rejected": reply("c")}, None),
    ({"chosen": [user("a"), *reply("b")], "rejected": [user("a"), *reply("c")]}, None),
    (
      {"conversations": [{"from": "human", "value": "a"}], "chosen": reply("b")}
      | {"rejected": reply("c")},
      None,
    ),
    ({"instruction": "a", "chosen": "b", "rejected": "c"}, None),
    (
      {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c"},
      ([SYSTEM, user("a\nx")], reply("b")),
    ),
    ({"prompt": "a", "answer_a": "b", "answer_b": "c", "preference": "a"}, None),
  ],
)
def test_a_system_column_becomes_the_system_message(row, expected):
  for name in ("system", "system_prompt"):
    found = convert(row | {name: "s"})[1]
    assert (found.prompt, found.completions[0]) == (expected or ([SYSTEM, user("a")], reply("b")))
    # Rows of the file without one are messages too, so that all are rendered alike.
    reading = detect([row | {name: "s"}, row | {name: ""}])
    assert reading.convert(row | {name: ""}).prompt == (expected or ([0, user("a")],))[0][1:]
  # A column that is always empty changes nothing.
  assert convert(row | {"system": ""}) == convert(row)


def test_a_history_stands_before_the_prompt():
  turns = [user("x"), *reply("y")]
  for history in ([["x", "y"]], turns, json.dumps(turns)):
    found = convert(PAIR | {"history": history, "system": "s"})[1]
    assert found.prompt == [SYSTEM, *turns, user("a")]
  sft = {"instruction": "a", "input": "", "output": "b", "history": [["x", "y"]]}
  found = convert(sft, kind="text")[1]
  assert (found.prompt, found.completions) == ([*turns, user("a")], (reply("b"),))


def test_context_that_cannot_be_used_is_refused():
  twice = {"prompt": [system("t"), user("a")], "chosen": reply("b"), "rejected": reply("c")}
  good = twice | {"system": "t"}
  assert convert(good)[1].prompt == [system("t"), user("a")]
  with pytest.raises(RowError, match="two system messages"):
    detect(good).convert(twice | {"system": "s"})
  with pytest.raises(BadRow, match="system message or a history, and the first rows of the file"):
    detect(PAIR).convert(PAIR | {"system": "s"})
  with pytest.raises(BadRow, match=r"history is \"long ago\", not a list .*prompt=history"):
    convert(PAIR | {"history": "long ago"})
  dialogue = {name: f"\n\nHuman: a\n\nAssistant: {name}" for name in ("chosen", "rejected")}
  with pytest.raises(BadRow, match="beside a text that contains its own prompt"):
    convert(dialogue | {"system": "s"})
  # Token ids were rendered with their context.
  ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "system": "s"}
  assert convert(ids)[1].prompt == [1]


def test_a_system_message_in_two_columns():
  row = PAIR | {"system": "s", "system_prompt": "s"}
  assert convert(row)[1].prompt == [SYSTEM, user("a")]
  with pytest.raises(RowError, match="two system messages"):
    detect(row).convert(row | {"system_prompt": "t"})
  for value in ([{"text": "s"}], {"role": "system", "parts": [{"text": "s"}]}, [SYSTEM]):
    assert convert(PAIR | {"system": value})[1].prompt == [SYSTEM, user("a")]
  with pytest.raises(BadRow, match="not a system message"):
    convert(PAIR | {"system": user("s")})
  # Of several columns that have the prompt, the one that is read has it.
  row = {"prompt": "a", "messages": [user("a"), *reply("b")], "system": "s"}
  assert convert(row, kind="text")[1].prompt == [SYSTEM, user("a")]
  row |= {"chosen": reply("b"), "rejected": reply("c")}
  assert convert(row)[1].prompt == [SYSTEM, user("a")]
  with pytest.raises(BadRow, match="beside a text that contains its own prompt"):
    convert({"text": "a b", "system": "s"}, kind="text")


def test_a_history_of_texts_is_refused():
  # Who wrote which?
  with pytest.raises(BadRow, match=r"history has the text \"x\"; a turn is a pair"):
    convert(PAIR | {"history": ["x", "y"]})


def test_an_input_beside_the_instruction_is_not_left_out():
  row = {"instruction": "a", "input": "x", "better": "b", "worse": "c"}
  sides = {"chosen": "better", "rejected": "worse"}
  with pytest.raises(UserError, match="prompt=instruction leaves out the field input beside it"):
    detect(row, {"prompt": "instruction", **sides})
  assert "### Input:\nx" in detect(row, sides).convert(row).prompt
  assert convert(row | {"input": ""}, fields={"prompt": "instruction", **sides})[1].prompt == "a"
  ranked = {"instruction": "a", "input": "x", "answers": ["b", "c"]}
  assert "### Input:\nx" in convert(ranked, kind="ranked")[1].prompt
  said = convert(ranked | {"answers": [reply("b"), reply("c")]}, kind="ranked")[1]
  assert said.prompt == [user("a\nx")]


@pytest.mark.parametrize("name", ["ratings", "reward_scores", "labels"])
def test_scores_of_another_name_are_not_passed_over(name):
  row = {"prompt": "a", "answers": ["b", "c"], name: [0.1, 0.9]}
  with pytest.raises(UserError, match=rf"{name} has a value for each .*fields\.scores={name} "):
    detect(row, kind="ranked")
  assert detect(row, {"scores": name}, kind="ranked").convert(row).completions == ("c", "b")
  # Another number of values is about something else.
  assert convert(row | {name: [1, 2, 3]}, kind="ranked")[1].completions == ("b", "c")


def test_completions_that_begin_with_their_prompt():
  rows = [
    {"prompt": p, "chosen": f"{p} good", "rejected": f"{p} bad"}
    for p in ("How is it?", "And that?")
  ]
  reading = detect(rows)
  assert reading.notes == ("the completions begin with their prompt, which is taken away",)
  assert reading.convert(rows[0]) == Preference("How is it?", (" good", " bad"))
  with pytest.raises(RowError, match="does not begin with the prompt, as those of other rows do"):
    reading.convert({"prompt": "p", "chosen": "good", "rejected": "p bad"})
  # Most rows are worth a note.
  (note,) = detect([*rows, PAIR]).notes
  assert note.startswith("the completions begin with their prompt in 2 of 3 rows; nothing is taken")
  # Once is chance, and one row that does not is proof.
  for others in ([{"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi, how"}], [*rows, PAIR]):
    assert not detect(others).repeats
  ranked = [{"prompt": "How long is it?", "answers": [f"How long is it? {i}" for i in "ab"]}] * 2
  assert detect(ranked, kind="ranked").convert(ranked[0]).completions == (" a", " b")


def test_texts_that_a_template_wrote_are_noted():
  rendered = {"prompt": "<|im_start|>user\na<|im_end|>\n", "chosen": "b<|im_end|>", "rejected": "c"}
  (note,) = detect(rendered).notes
  assert "the texts contain <|im_start|> <|im_end|>, so a chat template wrote them already" in note
  inside = {"prompt": [user("[INST] a")], "chosen": reply("b"), "rejected": reply("c")}
  (note,) = detect(inside).notes
  assert "the messages contain [INST]" in note


@pytest.mark.parametrize("name", ["images", "image", "videos", "audios"])
def test_what_a_text_model_cannot_see_is_refused(name):
  with pytest.raises(BadRow, match=f"field {name} is given, and only text is trained on"):
    convert(PAIR | {name: ["x.png"]})
  assert convert(PAIR | {name: []}) == convert(PAIR)


@pytest.mark.parametrize(
  ("row", "hint"),
  [
    ({"question": "a", "chosen": "b", "rejected": "c"}, "prompt=question"),
    (
      {"question": "a", "better": "b", "worse": "c", "system": "s"},
      "prompt=question,chosen=better,rejected=worse",
    ),
    (
      {"Prompt_text": "a", "response_0": "b", "response_1": "c", "safer_response_id": 1},
      "prompt=Prompt_text,answer_a=response_0,answer_b=response_1,preference=safer_response_id",
    ),
    (
      {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1},
      "answer_a=response_1,answer_b=response_2,preference=preference_strength",
    ),
    (
      {"winner": "model_a", "conversation_a": [user("a")], "conversation_b": [user("a")]},
      "answer_a=conversation_a,answer_b=conversation_b,preference=winner",
    ),
    (
      {"Prompt": "a", "Chosen": "b", "Rejected": "c"},
      "prompt=Prompt,chosen=Chosen,rejected=Rejected",
    ),
    (
      {"context_messages": [user("a")], "chosen": reply("b"), "rejected": reply("c")},
      "prompt=context_messages",
    ),
    (
      {"prompt": "a", "response_a": "b", "response_b": "c"}
      | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
      "answer_a=response_a,answer_b=response_b,preference=winner_model_a+winner_model_b+winner_tie",
    ),
  ],
)
def test_a_refusal_names_the_map_that_would_fit(row, hint):
  with pytest.raises(UserError, match="looks like") as raised:
    detect(row)
  line = str(raised.value)
  assert line.endswith(f"(in other commands: --fields {hint})") and "\n" not in line
  flags = " ".join(f"--config.data.fields.{pair}" for pair in hint.split(","))
  assert flags in line
  # With that map the row is understood, or the next question is asked.
  fields = dict(pair.split("=") for pair in hint.split(","))
  try:
    detect(row, fields)
  except UserError as error:
    assert "can be read in two ways" in str(error)


@pytest.mark.parametrize(
  ("row", "kind", "hint"),
  [
    # Without the scores the first completion would be the best.
    (
      {"instruction": "a", "generations": ["b", "c"], "ratings": [1, 2]},
      "ranked",
      "answers=generations,scores=ratings",
    ),
    # Without the context half of the question would be missing.
    (
      {"instruction": "a", "context": "x", "response": "b"},
      "text",
      "output=response,input=context",
    ),
    (
      {"prompt": "a", "response": "b", "is_safe": 0},
      "unpaired",
      "completion=response,label=is_safe",
    ),
    ({" prompt": "a", "completion": "b"}, "text", "'prompt= prompt'"),
  ],
)
def test_a_hint_leaves_out_no_column_that_changes_the_meaning(row, kind, hint):
  with pytest.raises(UserError, match="looks like") as raised:
    detect(row, kind=kind)
  assert str(raised.value).endswith(f"(in other commands: --fields {hint})")
  detect(row, dict(pair.split("=") for pair in hint.strip("'").split(",")), kind=kind)


def test_a_malformed_row_stops_or_is_counted_with_the_first_of_its_kind(rows_file, tokenizer):
  good = {"prompt": "the answer is", "chosen": " good", "rejected": " bad"}
  rows = [good, good | {"chosen": 3}, good | {"weight": -1}, good | {"chosen": {}}, good]
  with pytest.raises(BadRow, match=r"rows\.jsonl:2: field chosen is 3, not text"):
    encode.load_examples(rows_file(rows), tokenizer)
  found, ledger, _ = encode.load_examples(rows_file(rows), tokenizer, on_bad_row="drop")
  assert [e.row for e in found] == [0, 4]
  assert ledger.dropped == {"broken field chosen": 2, "broken field weight": 1}
  assert list(ledger.bad) == ["broken field chosen", "broken field weight"]
  assert "rows.jsonl:2: field chosen is 3, not text" in ledger.bad["broken field chosen"]
  with pytest.raises(UserError, match=r"data\.on_bad_row is 'skip'; choose stop, drop"):
    encode.load_examples(rows_file(rows), tokenizer, on_bad_row="skip")
