"""Conversations: every message becomes prompt or completion, or the row is refused."""

import json

import pytest

from dpo_jax.data import messages
from dpo_jax.data.detection import detect
from dpo_jax.data.fields import BadRow, RowError
from tests.support.messages import assistant, convert, reply, system, user

CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def tool(text):
  return {"role": "tool", "content": text}


@pytest.mark.parametrize(
  ("prompt", "replies", "expected"),
  [
    # The completions follow the prompt, or repeat it, or all of it but the system message.
    ([user("a")], [reply("b"), reply("c")], ([user("a")], reply("b"), reply("c"))),
    (
      [user("a")],
      [[user("a"), *reply("b")], [user("a"), *reply("c")]],
      ([user("a")], reply("b"), reply("c")),
    ),
    (
      [system("s"), user("a")],
      [[user("a "), *reply("b")], reply("c")],
      ([system("s"), user("a")], reply("b"), reply("c")),
    ),
    # The prompt is the system message alone, or lacks the one that the conversations have.
    (
      [system("s")],
      [[user("a"), *reply("b")], [user("a"), *reply("c")]],
      ([system("s"), user("a")], reply("b"), reply("c")),
    ),
    (
      [user("a")],
      [[system("s"), user("a"), *reply("b")], [system("s"), user("a"), *reply("c")]],
      ([system("s"), user("a")], reply("b"), reply("c")),
    ),
    # Completions of several messages stay whole; what they share is prompt.
    (
      [user("a")],
      [[CALLING, tool("1"), *reply("b")], [*reply("c")]],
      ([user("a")], [CALLING, tool("1"), *reply("b")], reply("c")),
    ),
    (
      [user("a")],
      [[CALLING, tool("1"), *reply("b")], [CALLING, tool("1"), *reply("c")]],
      ([user("a"), CALLING, tool("1")], reply("b"), reply("c")),
    ),
    # Tools that say different things are part of what follows the call, not of the prompt.
    (
      [user("a")],
      [[CALLING, tool("1"), *reply("b")], [CALLING, tool("2"), *reply("c")]],
      ([user("a")], [CALLING, tool("1"), *reply("b")], [CALLING, tool("2"), *reply("c")]),
    ),
    # One conversation is the beginning of the other.
    (
      [user("a")],
      [reply("b"), [*reply("b"), user("c"), *reply("d")]],
      ([user("a")], reply("b"), [*reply("b"), user("c"), *reply("d")]),
    ),
    # By itself a completion begins where the prompt ends.
    (
      [user("a")],
      [[CALLING, tool("1"), *reply("b")]],
      ([user("a")], [CALLING, tool("1"), *reply("b")]),
    ),
    # A history that ends with the assistant.
    (
      [user("a"), *reply("b")],
      [[user("c"), *reply("d")], [user("c"), *reply("e")]],
      ([user("a"), *reply("b"), user("c")], reply("d"), reply("e")),
    ),
  ],
)
def test_prompt_and_completions(prompt, replies, expected):
  found = messages.join(prompt, *replies)
  assert (found.prompt, *found.completions) == expected
  # Nothing is lost: the whole conversation is there, in order.
  for given, completion in zip(replies, found.completions, strict=True):
    written = [message["content"] for message in [*found.prompt, *completion]]
    assert written[-len(given) :] == [m["content"].strip() for m in given]
    assert {m["content"] for m in prompt} <= set(written)


def test_a_prompt_may_be_the_last_question_of_whole_conversations():
  before = [user("x"), *reply("y"), user("a")]
  whole = [[*before, *reply("b")], [*before, *reply("c")]]
  assert messages.join([user("a")], *whole)[:2] == (before, (reply("b"), reply("c")))
  # A system message beside the question is that of the conversation.
  found = messages.join([system("s"), user("a")], *whole)
  assert found[:2] == ([system("s"), *before], (reply("b"), reply("c")))
  # By itself a conversation is learned from after that question, not from its first reply on.
  assert messages.join([user("a")], whole[0])[:2] == (before, (reply("b"),))


def test_a_prompt_that_is_the_chosen_conversation_is_no_history():
  # Read as a history, the good reply would be a part of the rejected completion, and be scored.
  good, bad = [user("a"), *reply("b")], [user("a"), *reply("c")]
  with pytest.raises(RowError, match="the prompt and the conversation beside it differ"):
    messages.join(good, good, bad)
  # A history ends with the assistant too, but what follows it does not begin as it does.
  found = messages.join(good, [user("d"), *reply("e")], [user("d"), *reply("f")])
  assert found[:2] == ([*good, user("d")], (reply("e"), reply("f")))


@pytest.mark.parametrize(
  ("prompt", "replies", "reason"),
  [
    ([user("a")], [[user("x"), *reply("b")], reply("c")], "the prompt and the conversation beside"),
    ([user("a")], [reply("b"), [*reply("c"), user("d")]], "last message is not the assistant's"),
    ([user("a")], [[CALLING, tool("1")], reply("c")], "last message is not the assistant's"),
    ([user("a")], [[], reply("c")], "empty completion"),
    ([], [[user("a"), *reply("b")], [user("x"), *reply("c")]], "prompts differ"),
    ([], [reply("b"), reply("c")], "empty prompt"),
  ],
)
def test_what_cannot_be_divided(prompt, replies, reason):
  with pytest.raises(RowError, match=reason):
    messages.join(prompt, *replies)


TRAJECTORY = [user("q"), CALLING, tool("t"), assistant("b"), user("r"), assistant("c")]


@pytest.mark.parametrize("fields", [{"label": True}, {}])
def test_a_conversation_is_learned_from_the_assistants_first_message_on(fields):
  kind = "unpaired" if fields else "text"
  found = convert({"messages": TRAJECTORY} | fields, kind=kind)[1]
  assert (found.prompt, found.completions) == (TRAJECTORY[:1], (TRAJECTORY[1:],))
  # OpenAI's weights leave a message out: it becomes context.
  first = [{**m, "weight": 0} if m is CALLING else m for m in TRAJECTORY]
  found = convert({"messages": first} | fields, kind=kind)[1]
  assert found.completions == (TRAJECTORY[3:],)
  last = [{**m, "weight": 0} if m["content"] == "b" else m for m in TRAJECTORY]
  found = convert({"messages": last} | fields, kind=kind)[1]
  assert [m.get("weight") for m in found.completions[0]] == [None, None, 0, None, None]
  with pytest.raises(RowError, match="no scored message"):
    none = [{**m, "weight": 0} for m in TRAJECTORY]
    convert({"messages": none} | fields, kind=kind)


@pytest.mark.parametrize("name", ["train", "training", "loss"])
def test_a_message_may_say_that_it_is_not_scored(name):
  turns = [{**m, name: m["content"] != "b"} if m["role"] == "assistant" else m for m in TRAJECTORY]
  found = convert({"messages": turns}, kind="text")[1]
  assert [m.get("weight") for m in found.completions[0]] == [1, None, 0, None, 1]
  # A number is something else, such as the loss that a model had on the message.
  turns = [{**m, name: 0.5} for m in TRAJECTORY]
  assert convert({"messages": turns}, kind="text")[1].completions == (TRAJECTORY[1:],)


def test_a_greeting_is_prompt():
  turns = [assistant("hi"), user("a"), assistant("b")]
  found = convert({"messages": turns}, kind="text")[1]
  assert (found.prompt, found.completions) == (turns[:2], (turns[2:],))
  with pytest.raises(RowError, match="empty prompt"):
    convert({"messages": turns[:1]}, kind="text")


def test_the_last_message_alone():
  found = convert({"messages": TRAJECTORY}, kind="text", train_on="last")[1]
  assert found.prompt == TRAJECTORY[:1]
  assert [m.get("weight") for m in found.completions[0]] == [0, 0, 0, 0, None]
  pair = {"prompt": "a", "chosen": reply("b"), "rejected": reply("c")}
  assert convert(pair, train_on="last") == convert(pair)


@pytest.mark.parametrize(
  ("given", "role"),
  [
    ("Human", "user"),
    ("prompter", "user"),
    ("USER", "user"),
    ("gpt", "assistant"),
    ("Assistant", "assistant"),
    ("model", "assistant"),
    ("ChatGPT", "assistant"),
    ("observation", "tool"),
    ("function", "tool"),
    ("system", "system"),
    ("developer", "developer"),
  ],
)
@pytest.mark.parametrize(
  ("key", "text"), [("role", "content"), ("from", "value"), ("role", "text")]
)
def test_roles_by_other_names(given, role, key, text):
  (found,) = messages.read_messages([{key: given, text: "a"}], "prompt", role="user")
  assert found == {"role": role, "content": "a"}


def test_a_role_that_is_none_is_named():
  with pytest.raises(BadRow, match=r'field prompt has a message of the role "wizard"; known: '):
    messages.read_messages([{"role": "wizard", "content": "a"}], "prompt", role="user")


@pytest.mark.parametrize(
  "message",
  [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    # OpenAI writes arguments as JSON text, and had another field before.
    {
      "role": "assistant",
      "content": None,
      "tool_calls": [{"type": "function", "function": {"name": "weigh", "arguments": '{"a": 1}'}}],
    },
    {
      "role": "assistant",
      "function_call": {"name": "weigh", "arguments": '{"a": 1}'},
      "content": "",
    },
    # Llama has another name for the arguments.
    {
      "role": "assistant",
      "tool_calls": [{"type": "function", "function": {"name": "weigh", "parameters": {"a": 1}}}],
    },
    # ShareGPT has a role of its own for calls.
    {"from": "function_call", "value": json.dumps({"name": "weigh", "arguments": {"a": 1}})},
    {"from": "function_call", "value": json.dumps([{"name": "weigh", "arguments": {"a": 1}}])},
  ],
)
def test_calls_of_tools_in_every_notation(message):
  assert messages.read_messages([message], "prompt", role="user") == [CALLING]


@pytest.mark.parametrize(
  ("message", "line"),
  [
    ({"from": "function_call", "value": "weigh(1)"}, r"has the call .*; a call is JSON with name"),
    ({"role": "assistant", "content": "a", "tool_calls": {"x": 1}}, r"not a list of calls"),
    ({"role": "assistant", "content": "a", "weight": -1}, r"a message of weight -1; weights are 0"),
    ({"role": "assistant", "content": "a", "weight": "much"}, r'is "much", not a finite number'),
  ],
)
def test_broken_messages_are_named(message, line):
  with pytest.raises(BadRow, match=line):
    messages.read_messages([message], "prompt", role="user")


@pytest.mark.parametrize(
  "written",
  [
    json.dumps,  # JSON
    repr,  # Python, as pandas writes lists into CSV
    lambda value: "\n " + json.dumps(value, indent=1) + "\n",
  ],
)
def test_messages_written_as_text(written):
  row = {"prompt": [user('it\'s "a"')], "chosen": reply("b"), "rejected": reply("c")}
  as_text = {name: written(value) for name, value in row.items()}
  assert convert(as_text) == convert(row)
  assert convert({"messages": written(TRAJECTORY)}, kind="text") == convert(
    {"messages": TRAJECTORY}, kind="text"
  )


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2]", "[{1: 2}]", "{x}", "{}", "[]"])
def test_other_texts_in_brackets_stay_texts(text):
  row = {"prompt": text, "chosen": text + "b", "rejected": text + "c"}
  reading = detect(row)
  assert reading.name == "strings"
  assert reading.convert({**row, "chosen": "x", "rejected": "y"}).prompt == text


def test_schemas_of_tools_may_be_text():
  schema = {"type": "function", "function": {"name": "weigh"}}
  row = {"prompt": [user("a")], "chosen": reply("b"), "rejected": reply("c")}
  expected = convert(row | {"tools": [schema]})
  assert expected[1].prompt.tools == (schema,)
  for tools in (json.dumps([schema]), [json.dumps(schema)]):
    assert convert(row | {"tools": tools}) == expected
  for nothing in ("", [], None, "[]"):
    assert convert(row | {"tools": nothing}) == convert(row)


@pytest.mark.parametrize("between", ["\n ", ", ..., ", ", array(['a'], dtype=object), "])
def test_messages_that_cannot_be_read_back_are_refused(between):
  """NumPy leaves out the commas between messages, and the middle of long lists."""
  text = "[" + between.join(["{'role': 'user', 'content': 'a'}"] * 2) + "]"
  with pytest.raises(BadRow, match="field chosen has messages in a notation that cannot be read"):
    convert({"prompt": "a", "chosen": text, "rejected": "c"})
