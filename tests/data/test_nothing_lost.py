"""No visible character of a row is lost: it is in the ids of its example, or the row is counted."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data import encode
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import UserError
from tests.support import small_tokenizers
from tests.support.random_texts import ANYTHING, BY_MANY, SHORT

# Whatever a person may type, and few characters so that equal and nested texts are frequent.
TEXT = st.one_of(ANYTHING, SHORT, st.just("ab"), st.just("abab"))
# Names of fields, and of the roles user, assistant, tool and system.
NOTATIONS = {
  "OpenAI": ("role", "content", ("user", "assistant", "tool", "system")),
  "parts": ("role", "content", ("user", "assistant", "tool", "system")),
  "ShareGPT": ("from", "value", ("human", "gpt", "observation", "system")),
  "capitals": ("role", "content", ("Human", "Assistant", "Tool", "System")),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  return load_tokenizer(
    small_tokenizers.byte_level(
      folder, chat_template=small_tokenizers.CHATML, eos_token="<|im_end|>"
    )
  )


# --- rows of every form ---------------------------------------------------------------------------
# A form draws a row and its texts: those of the prompt, and those of each completion, best first.


def turns(draw, roles, notation=None):
  """Draws messages with roles such as "ua", for user and assistant: their texts, the messages."""
  notation = notation or draw(st.sampled_from(list(NOTATIONS)))
  name, content, known = NOTATIONS[notation]
  texts = [draw(TEXT) for _ in roles]
  said = []
  for role, one in zip(roles, texts, strict=True):
    value = [{"type": "text", "text": one}] if notation == "parts" else one
    said.append({name: known["uats".index(role)], content: value})
  return texts, said


def dialogue(draw, notation=None):
  return turns(draw, draw(st.sampled_from(["u", "su", "uau", "suau", "uatu"])), notation)


def reply(draw, notation=None):
  """Draws a completion of one message, or of several with tool results and questions between."""
  return turns(draw, draw(st.sampled_from(["a", "a", "ata", "aua"])), notation)


def strings(draw):
  prompt, chosen, rejected = (draw(TEXT) for _ in range(3))
  row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
  return row, [prompt], [[chosen], [rejected]]


def messages(draw):
  prompt, said = dialogue(draw)
  (chosen, better), (rejected, worse) = reply(draw), reply(draw)
  row = {"prompt": said, "chosen": better, "rejected": worse}
  return row, prompt, [chosen, rejected]


def text_beside_messages(draw):
  prompt = draw(TEXT)
  (chosen, better), (rejected, worse) = reply(draw), reply(draw)
  row = {"prompt": prompt, "chosen": better, "rejected": worse}
  return row, [prompt], [chosen, rejected]


def with_calls(draw):
  """The template writes no calls and no reasoning, so these rows cannot be used."""
  row, prompt, completions = messages(draw)
  name = draw(st.sampled_from(["tool_calls", "reasoning_content"]))
  call = [{"type": "function", "function": {"name": "add", "arguments": {"x": draw(TEXT)}}}]
  side = row[draw(st.sampled_from(["prompt", "chosen", "rejected"]))]
  said = [one for one in side if one["role"].lower() == "assistant"] if "role" in side[0] else []
  if said and (name == "tool_calls" or side is not row["prompt"]):
    said[-1][name] = call if name == "tool_calls" else "xyz"
    return row, ["a text that is in no row"], completions
  return row, prompt, completions


def prompt_repeated(draw):
  """The prompt stands beside whole conversations that contain it."""
  prompt, said = dialogue(draw)
  (chosen, better), (rejected, worse) = reply(draw), reply(draw)
  row = {"prompt": said, "chosen": said + better, "rejected": said + worse}
  row = row | {"prompt": prompt[0]} if len(said) == 1 and draw(st.booleans()) else row
  return row, prompt, [chosen, rejected]


def shared_messages(draw):
  row, prompt, completions = prompt_repeated(draw)
  return {name: row[name] for name in ("chosen", "rejected")}, prompt, completions


def conversations(draw):
  prompt, said = dialogue(draw, "ShareGPT")
  (chosen, better), (rejected, worse) = (turns(draw, "a", "ShareGPT") for _ in range(2))
  row = {"conversations": said, "chosen": better[0], "rejected": worse[0]}
  return row, prompt, [chosen, rejected]


def instruction(draw):
  row, (prompt,), completions = strings(draw)
  row["instruction"] = row.pop("prompt")
  if draw(st.booleans()):
    row["input"] = draw(TEXT)
    return row, [prompt, row["input"]], completions
  return row, [prompt], completions


def transcripts(draw):
  _, (prompt,), (chosen, rejected) = strings(draw)
  before = f"\n\nHuman: {prompt}\n\nAssistant:"
  return (
    {"chosen": before + chosen[0], "rejected": before + rejected[0]},
    [before],
    [chosen, rejected],
  )


def compared(draw):
  row, prompt, completions = draw(st.sampled_from([strings, text_beside_messages]))(draw)
  first = draw(st.booleans())
  a, b = ("chosen", "rejected") if first else ("rejected", "chosen")
  row = {"prompt": row["prompt"], "answer_a": row[a], "answer_b": row[b]}
  return row | {"preference": "a" if first else "b"}, prompt, completions


def completion(draw):
  prompt, said = dialogue(draw) if draw(st.booleans()) else ([x := draw(TEXT)], x)
  texts, better = reply(draw) if draw(st.booleans()) else ([x := draw(TEXT)], x)
  return {"prompt": said, "completion": better}, prompt, [texts]


def chat(draw):
  notation = draw(st.sampled_from(["OpenAI", "ShareGPT"]))
  (prompt, said), (texts, better) = dialogue(draw, notation), reply(draw, notation)
  name = "messages" if notation == "OpenAI" else "conversations"
  return {name: said + better}, prompt, [texts]


def alpaca(draw):
  row, prompt, ((output,), _) = instruction(draw)
  del row["chosen"], row["rejected"]
  return row | {"output": output}, prompt, [[output]]


def text(draw):
  found = draw(TEXT)
  return {"text": found}, [], [[found]]


def labeled(form):
  def draw_row(draw):
    row, prompt, completions = form(draw)
    return row | {"label": draw(st.sampled_from([True, False, 1, 0]))}, prompt, completions

  return draw_row


def ranked(draw):
  prompt, *texts = (draw(TEXT) for _ in range(draw(st.integers(3, 5))))
  return {"prompt": prompt, "answers": texts}, [prompt], [[one] for one in texts]


def scored(draw):
  row, prompt, completions = ranked(draw)
  row = row | {"answers": row["answers"][::-1], "scores": list(range(len(completions)))}
  return row, prompt, completions


def ranked_messages(draw):
  prompt, said = dialogue(draw)
  replies = [reply(draw) for _ in range(3)]
  return {"prompt": said, "answers": [one for _, one in replies]}, prompt, [x for x, _ in replies]


def with_context(form):
  """The form, with a system message and a history in fields of their own."""

  def draw_row(draw):
    row, prompt, completions = form(draw)
    system, *history = (draw(TEXT) for _ in range(3))
    before = [system, *history]
    return row | {"system": system, "history": [history]}, before + prompt, completions

  return draw_row


FORMS = {
  "pairs": (
    *(strings, messages, text_beside_messages, prompt_repeated, shared_messages),
    *(with_calls, conversations, instruction, transcripts, compared),
    *map(with_context, (strings, text_beside_messages, instruction)),
  ),
  "text": (completion, chat, alpaca, text, with_context(alpaca)),
  "unpaired": (labeled(completion), labeled(chat), labeled(alpaca)),
  "ranked": (ranked, scored, ranked_messages, with_context(ranked)),
}
EVERY = [(kind, form) for kind, forms in FORMS.items() for form in forms]


# --- the property ---------------------------------------------------------------------------------


def visible(written):
  """Templates trim texts, so white space may be lost."""
  return re.sub(r"\s", "", written)


def is_in(texts, whole):
  """Returns True if the visible characters of all texts are in `whole`, one after the other."""
  at, whole = 0, visible(whole)
  for one in map(visible, texts):
    found = whole.find(one, at)
    if found < 0:
      return False
    at = found + len(one)
  return True


@settings(BY_MANY, max_examples=120)
@given(data=st.data())
def test_every_text_of_a_row_is_in_its_ids_or_the_row_is_counted(tokenizer, tmp_path_factory, data):
  kind, form = data.draw(st.sampled_from(EVERY))
  drawn = [form(data.draw) for _ in range(data.draw(st.integers(1, 4)))]
  file = tmp_path_factory.getbasetemp() / "rows.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row, _, _ in drawn))
  try:
    examples, ledger, _ = encode.load_examples(file, tokenizer, kind=kind)
  except UserError as error:
    # All rows were dropped, each with a reason.
    assert re.search(rf"no usable row in .*: {len(drawn)} rows?, dropped \w", str(error)), str(
      error
    )
    return
  kept = {example.row for example in examples}
  assert len(kept) + ledger.dropped.total() == ledger.rows == len(drawn)
  assert all(ledger.dropped)
  for example in examples:
    _, prompt, completions = drawn[example.row]
    assert len(example.completions) >= len(completions)
    for texts, ids in zip(completions, example.completions, strict=False):
      whole = tokenizer.decode([*example.prompt, *ids], special=True)
      assert is_in([*prompt, *texts], whole), (prompt, texts, whole)
