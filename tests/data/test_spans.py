"""What is scored of completions of several messages: what the assistant wrote, and nothing else."""

import numpy as np
import pytest

from dpo_jax.data import detection
from dpo_jax.data.fields import Conversation, Preference, RowError
from dpo_jax.data.spans import weigh
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import chat_templates, small_tokenizers
from tests.support.messages import assistant, reply, system, user

SCHEMA = {"type": "function", "function": {"name": "weigh", "parameters": {}}}


def calling(text="", **more):
  call = {"type": "function", "function": {"name": "weigh", "arguments": {"a": 1}}}
  return {"role": "assistant", "content": text, "tool_calls": [call], **more}


def tool(text):
  return {"role": "tool", "content": text}


def scored(tokenizer, prompt, completion, other=None):
  """Returns the whole text, and the runs of it that are scored, special tokens written out."""
  preference = Preference(prompt, (completion, other or reply("something else")))
  ids, (first, _), weights = tokenizer.encode_preference(preference)
  weight = weights[0] if weights else np.ones(len(first))
  assert len(weight) == len(first)
  whole = tokenizer.decode([*ids, *first], special=True)
  edges = np.flatnonzero(np.diff([0, *(weight > 0), 0]))
  runs = [first[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
  return whole, [tokenizer.decode(run, special=True) for run in runs]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
  folder = tmp_path_factory.mktemp("kinds")
  found = {}
  for name, (template, special, named) in chat_templates.KINDS.items():
    small_tokenizers.byte_level(folder / name, special=special, chat_template=template, **named)
    found[name] = lambda name=name, **more: load_tokenizer(folder / name, template_arguments=more)
  small_tokenizers.byte_level(folder / "plain")
  found["plain"] = lambda: load_tokenizer(folder / "plain")
  return found


TURNS = [assistant("one"), user("and?"), assistant("two")]
TRAJECTORY = [calling("I look."), tool("17 degrees"), assistant("warm")]


@pytest.mark.parametrize(
  ("kind", "completion", "written"),
  [
    ("llama3", TURNS, ["one<|eot_id|>", "two<|eot_id|>"]),
    ("mistral", TURNS, [" one</s>", " two</s>"]),
    ("gemma", TURNS, ["one<end_of_turn>", "two<end_of_turn>"]),
    # Without a template a turn has no end but the last one has.
    ("plain", TURNS, [" one", " two<|endoftext|>"]),
    # The empty block of reasoning is written by the model, which only the last turn has.
    ("qwen3", TURNS, ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]),
    (
      "qwen3",
      TRAJECTORY,
      [
        'I look.<tool_call>\n{"name": "weigh", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nwarm<|im_end|>",
      ],
    ),
    (
      "qwen3",
      [calling(reasoning_content="hm"), tool("17"), tool("18"), assistant("warm")],
      [
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "weigh", "arguments": {"a": 1}}\n'
        "</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nwarm<|im_end|>",
      ],
    ),
    (
      "mistral",
      [calling(), tool("17 degrees"), assistant("warm")],
      ['[TOOL_CALLS] {"name": "weigh", "arguments": {"a": 1}}</s>', " warm</s>"],
    ),
  ],
)
@pytest.mark.parametrize("before", [[], [system("be kind")], [user("x"), *reply("one")]])
def test_the_assistants_turns_are_scored_to_their_ends(kinds, kind, completion, written, before):
  tokenizer = kinds[kind]()
  with_system = before[:1] == [system("be kind")]
  # Gemma's template refuses system turns. Mistral's leaves them out of a prompt that ends with a
  # tool's result, so the message after it would have been written without the system message.
  if with_system and (kind == "gemma" or (kind == "mistral" and completion[1]["role"] == "tool")):
    with pytest.raises(RowError, match=r"system turns are not known|leaves out .* the system says"):
      scored(tokenizer, [*before, user("how is it?")], completion)
    return
  whole, runs = scored(tokenizer, [*before, user("how is it?")], completion)
  assert runs == written
  # Everything else that the completion contains is there, as context.
  for message in completion:
    assert message["content"] in whole
  if kind == "mistral" and with_system:
    return  # it writes the system turn elsewhere when another user turn follows
  # Scored are the very tokens that a completion of one message ends with.
  alone = scored(tokenizer, [*before, user("how is it?"), *completion[:-1]], completion[-1:])
  assert alone[1] == runs[-1:] and alone[0] == whole


def test_the_same_text_elsewhere_is_not_mistaken(kinds):
  """A user repeats the assistant's words, the end of a turn and all."""
  turns = [assistant("one"), user("one <|im_end|>\n<|im_start|>assistant\none"), assistant("one")]
  _, runs = scored(kinds["qwen3"](), [user("one")], turns)
  assert runs == ["one<|im_end|>", "<think>\n\n</think>\n\none<|im_end|>"]


def test_weights_of_messages_are_weights_of_their_tokens(kinds):
  tokenizer = kinds["llama3"]()
  turns = [{**assistant("one"), "weight": 0.5}, user("and?"), {**assistant("two"), "weight": 2}]
  preference = Preference([user("a")], (turns, reply("b")))
  _, completions, (first, second) = tokenizer.encode_preference(preference)
  assert sorted(set(first.tolist())) == [0, 0.5, 2] and set(second.tolist()) == {1}
  half = tokenizer.decode(completions[0][first == 0.5], special=True)
  assert half == "one<|eot_id|>"
  # A weight of 0 makes the message context: what the last message alone is.
  zero = [{**turns[0], "weight": 0}, *turns[1:]]
  assert scored(tokenizer, [user("a")], zero)[1] == ["two<|eot_id|>"]


def test_a_completion_without_a_scored_message_is_none(kinds):
  for silent in (assistant("one"), [assistant("one"), user("and?"), assistant("two")]):
    turns = silent if isinstance(silent, list) else [silent]
    silent = [{**m, "weight": 0.0} for m in turns]
    with pytest.raises(RowError, match="no scored message"):
      scored(kinds["llama3"](), [user("a")], silent)


def test_reasoning_of_messages_that_are_not_scored_may_be_missing(kinds):
  first, last = (assistant(f"<think>\nhm {x}\n</think>\n\n{x}") for x in ("one", "two"))
  turns = [first, user("and?"), last]
  with pytest.raises(RowError, match="leaves out some of the assistant's reasoning"):
    scored(kinds["qwen3"](), [user("a")], turns)
  only_last = detection.messages.last_alone(Preference([user("a")], (turns,))).completions[0]
  _, runs = scored(kinds["qwen3"](), [user("a")], only_last)
  assert runs == ["<think>\nhm two\n</think>\n\ntwo<|im_end|>"]


def test_one_message_needs_no_weights(kinds):
  for kind in ("llama3", "mistral", "gemma", "qwen3", "plain"):
    found = kinds[kind]().encode_preference(Preference([user("a")], (reply("b"), reply("c"))))
    assert found.token_weights == ()


def test_a_turn_without_an_end_is_refused(tmp_path):
  template = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
  with pytest.raises(RowError, match="cannot find where a message of the completion ends"):
    tokenizer.encode_preference(Preference([user("a")], (TURNS, reply("c"))))


def test_real_templates_score_what_the_assistant_wrote(shared_data):
  """Qwen 3's own template, a trajectory with tools; the words of the tool are context."""
  tokenizer = load_tokenizer(shared_data / "tokenizers" / "qwen3")
  prompt = Conversation([system("be kind"), user("Weather in Rome?")], (SCHEMA,))
  whole, runs = scored(tokenizer, prompt, TRAJECTORY)
  assert len(runs) == 2 and "17 degrees" in whole and "17 degrees" not in "".join(runs)
  assert runs[0].startswith("I look.") and runs[0].endswith("</tool_call><|im_end|>")
  assert '"name": "weigh"' in runs[0] and runs[1].endswith("warm<|im_end|>")


def test_rows_of_ids_bring_masks():
  row = {"prompt_ids": [1], "chosen_ids": [2, 3, 4], "rejected_ids": [5, 6]}
  reading = detection.detect(row)
  assert reading.convert(row).token_weights == ()
  found = reading.convert(row | {"chosen_mask": [1, 0, True]})
  assert found.token_weights == ([1.0, 0.0, 1.0], None)
  ranked = {
    "prompt_ids": [1],
    "answers_ids": [[2, 3], [4], [5]],
    "answers_mask": [[0, 1], [1], None],
  }
  found = detection.detect(ranked, kind="ranked").convert(ranked | {"scores": [1, 2, 3]})
  assert found.completions == ([5], [4], [2, 3])
  assert found.token_weights == (None, [1.0], [0.0, 1.0])
  with pytest.raises(RowError, match="no scored token"):
    reading.convert(row | {"rejected_mask": [0, 0]})
  for mask in ([1], "ab", [1, 1, -1], [1, 1, None]):
    with pytest.raises(Exception, match="field chosen_mask"):
      reading.convert(row | {"chosen_mask": mask})


def test_weigh_by_hand():
  # Characters 4 to 9 are the completion; 4 and 5, and 8 and 9, are the assistant's.
  offsets = [(3, 5), (5, 6), (6, 8), (7, 9), (9, 10)]
  spans = ((0, 2, 1.0), (4, 6, 0.5))
  assert weigh(offsets, 4, spans, 6).tolist() == [1, 1, 0, 0.5, 0.5, 0.5]
  assert weigh(offsets, 4, (), 5) is None and weigh(offsets, 4, ((0, 6, 1.0),), 5) is None
  with pytest.raises(RowError, match="no scored token"):
    weigh(offsets, 4, ((4, 6, 1.0),), 2)
