"""Which tokens are the answer's, where a text begins and ends, and what templates do to both."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dpo_jax.data import readers
from dpo_jax.data.fields import Conversation, Preference, RowError
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import UserError
from dpo_jax.training import setup
from tests.support import chat_templates, small_tokenizers

SHARED = ("gpt2", "qwen3", "mistral-7b-instruct-v0.3", "minimind", "stories260k")
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """One tokenizer of each family."""
  folder = tmp_path_factory.mktemp("tokenizers")
  return {
    "byte_level": load_tokenizer(small_tokenizers.byte_level(folder / "bytes")),
    "byte_fallback": load_tokenizer(small_tokenizers.byte_fallback(folder / "fallback")),
    "word_level": load_tokenizer(small_tokenizers.word_level(folder / "words")),
    "chatml": load_tokenizer(
      small_tokenizers.byte_level(
        folder / "chatml", chat_template=small_tokenizers.CHATML, eos_token="<|im_end|>"
      )
    ),
    "system_last": load_tokenizer(
      small_tokenizers.byte_fallback(
        folder / "system_last", chat_template=small_tokenizers.SYSTEM_LAST
      )
    ),
  }


def texts(tokenizer, preference):
  """Decoded prompt, and whole texts, special tokens written out."""
  prompt, completions = tokenizer.encode_preference(preference)
  whole = [tokenizer.decode([*prompt, *answer], special=True) for answer in completions]
  return tokenizer.decode(prompt, special=True), whole


def test_a_token_that_holds_any_of_the_answer_belongs_to_it(made):
  # "answer good" is `answer`, ` good`: the space that ends the prompt is the answer's first byte.
  tokenizer = made["byte_level"]
  prompt, (good, bad) = tokenizer.encode_preference(Preference("the answer ", ("good", "bad")))
  assert tokenizer.decode(prompt) == "the answer"
  assert tokenizer.decode(good) == " good" and tokenizer.decode(bad) == " bad"
  assert good[-1] == bad[-1] == tokenizer.eos_id


def test_the_prompt_is_what_all_answers_share(made):
  # With "good" the space goes to the answer, with "\n" it would not; the prompt is one for both.
  tokenizer = made["byte_level"]
  prompt, completions = tokenizer.encode_preference(Preference("the answer ", ("good", "\nbad")))
  assert tokenizer.decode(prompt) == "the answer"
  assert [tokenizer.decode(a) for a in completions] == [" good", " \nbad"]


def test_an_answer_may_change_the_tokens_before_it(tmp_path):
  # "abc" is a|bc and "abd" is ab|d: no token of the prompt's "ab" is in both.
  tokenizer = load_tokenizer(small_tokenizers.by_merges(tmp_path, ("b", "c"), ("a", "b")))
  prompt, (chosen, rejected) = tokenizer.encode_preference(Preference("xab", ("c", "d")))
  assert tokenizer.decode(prompt) == "x"
  assert [tokenizer.decode([id]) for id in chosen] == ["a", "bc"]
  assert [tokenizer.decode([id]) for id in rejected] == ["ab", "d"]


def test_a_space_at_the_end_of_a_token_is_the_answers_too(tmp_path):
  # "a " is one token, and trimmed offsets would have it end with the prompt.
  tokenizer = load_tokenizer(small_tokenizers.by_merges(tmp_path, ("a", "Ġ")))
  prompt, (chosen, _) = tokenizer.encode_preference(Preference("xa", (" b", " c")))
  assert tokenizer.decode(prompt) == "x" and tokenizer.decode(chosen) == "a b"


def test_bos_stands_once_and_eos_ends_the_answer(made):
  tokenizer = made["byte_fallback"]
  assert tokenizer.adds_bos
  for prompt in ("the answer", "<s>the answer"):  # the text may have written it already
    ids, completions = tokenizer.encode_preference(Preference(prompt, (" is good", " is bad")))
    for answer in completions:
      whole = [*ids, *answer]
      assert whole.count(tokenizer.bos_id) == 1 and whole[0] == tokenizer.bos_id
      assert whole.count(tokenizer.eos_id) == 1 and whole[-1] == tokenizer.eos_id


def test_bos_is_a_habit_of_the_tokenizer(tmp_path):
  said = load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "no", add_bos_token=False))
  assert said.bos_id is not None and not said.adds_bos
  assert said.encode_prompt("the")[0] != said.bos_id
  forced = load_tokenizer(
    small_tokenizers.byte_level(tmp_path / "yes", bos_token="<|endoftext|>", add_bos_token=True)
  )
  assert forced.encode_prompt("the")[0] == forced.bos_id


def test_an_eos_written_in_the_answer_is_not_doubled(made):
  tokenizer = made["byte_fallback"]
  _, (good, _) = tokenizer.encode_preference(Preference("the answer", (" is good</s>", " is bad")))
  assert good.tolist().count(tokenizer.eos_id) == 1


def test_a_row_needs_a_token_to_predict_its_answers_from(made):
  with pytest.raises(RowError, match="no prompt token before the answer"):
    made["byte_level"].encode_preference(Preference("", ("good", "bad")))
  # BOS is such a token.
  prompt, _ = made["byte_fallback"].encode_preference(Preference("", ("good", "bad")))
  assert prompt.tolist() == [made["byte_fallback"].bos_id]


def test_a_text_alone_gives_its_first_token(made):
  tokenizer = made["byte_level"]
  prompt, (text,) = tokenizer.encode_preference(Preference("", ("the answer",)))
  assert len(prompt) == 1 and tokenizer.decode([*prompt, *text]) == "the answer"


def test_answers_that_become_one_are_dropped(made):
  with pytest.raises(RowError, match="equal answers"):
    made["word_level"].encode_preference(Preference("the answer is", ("wonderful", "terrible")))


def test_ids_stand_as_they_are(made):
  prompt, completions = made["byte_fallback"].encode_preference(Preference([5, 6], ([7, 2], [8])))
  assert prompt.tolist() == [5, 6] and [a.tolist() for a in completions] == [[7, 2], [8]]
  assert prompt.dtype == np.int32


def test_many_rows_at_once_equal_one_by_one(made):
  tokenizer = made["byte_level"]
  rows = [
    Preference("the answer is", (" good", " bad")),
    Preference("", ("good", "bad")),
    Preference([1, 2], ([3], [4])),
    Preference([user("good?")], (assistant("yes"), assistant("no"))),
  ]
  many = tokenizer.encode_preferences(rows)
  assert isinstance(many[1], RowError)
  for row, encoded in ((rows[i], many[i]) for i in (0, 2, 3)):
    alone = tokenizer.encode_preference(row)
    np.testing.assert_equal(encoded, alone)


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
  prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
  first=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
  second=st.text(" \n\tgodb🙂é한", min_size=1, max_size=8),
)
def test_ids_decode_to_the_text_whatever_it_is(made, family, prompt, first, second):
  tokenizer = made[family]
  try:
    ids, completions = tokenizer.encode_preference(Preference(prompt, (first, second)))
  except RowError as error:
    assert str(error) in ("no prompt token before the answer", "equal answers")
    return
  for answer, text in zip(completions, (first, second), strict=True):
    whole = [int(x) for x in (*ids, *answer)]
    assert tokenizer.decode(whole) == prompt + text
    assert whole.count(tokenizer.eos_id) == 1 and whole[-1] == tokenizer.eos_id
    # The prompt's tokens hold nothing but the prompt.
    assert prompt.startswith(tokenizer.decode(ids).rstrip("\ufffd"))


# --- conversations --------------------------------------------------------------------------------


def test_a_template_ends_the_turn_itself(made):
  tokenizer = made["chatml"]
  question = [user("is it good?")]
  prompt, whole = texts(tokenizer, Preference(question, (assistant("yes"), assistant("no"))))
  assert prompt == "<|im_start|>user\nis it good?<|im_end|>\n<|im_start|>assistant\n"
  # The new line behind the end of a turn is no part of it: a model is not asked for it.
  assert whole == [prompt + "yes<|im_end|>", prompt + "no<|im_end|>"]
  assert tokenizer.decode(tokenizer.encode_prompt(question), special=True) == prompt


def test_a_prompt_that_is_no_prefix_of_the_whole_text(made):
  tokenizer = made["system_last"]
  turns = [{"role": "system", "content": "be kind"}, user("is it good?")]
  # The whole conversation, as the template writes it, has no system turn at all; "s" is found in
  # the end token as well as in the answer.
  prompt, whole = texts(tokenizer, Preference(turns, (assistant("s"), assistant(" it is good "))))
  assert prompt == "<s> [INST] be kind | is it good?[/INST]"
  assert whole == [prompt + " s</s>", prompt + " it is good</s>"]
  assert tokenizer.encode_prompt(turns).count(tokenizer.bos_id) == 1


def test_without_a_template_turns_are_written_plainly(made):
  tokenizer = made["byte_level"]
  turns = [{"role": "system", "content": "be kind"}, user("good?")]
  prompt, whole = texts(tokenizer, Preference(turns, (assistant("yes"), assistant("no"))))
  assert prompt == "System: be kind\n\nUser: good?\n\nAssistant:"
  assert whole == [prompt + " yes<|endoftext|>", prompt + " no<|endoftext|>"]


def test_what_a_template_refuses_is_dropped_with_its_reason(tmp_path):
  template = "{{ raise_exception('roles must alternate') }}"
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
  with pytest.raises(RowError, match="chat template: roles must alternate"):
    tokenizer.encode_preference(Preference([user("a")], (assistant("b"), assistant("c"))))


def test_a_template_reaches_nothing_but_the_conversation(tmp_path):
  template = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
  with pytest.raises(RowError, match=r"chat template: access to attribute .* is unsafe"):
    tokenizer.encode_preference(Preference([user("a")], (assistant("b"), assistant("c"))))


# --- kinds of templates ---------------------------------------------------------------------------

system = lambda text: {"role": "system", "content": text}
thinking = lambda thought, text: [
  {"role": "assistant", "content": text, "reasoning_content": thought}
]
calling = lambda name: [
  {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {"a": 1}}}],
  }
]
TOOLS = ({"type": "function", "function": {"name": "weigh", "parameters": {}}},)
ONE = [user("good?")]
MANY = [user("good?"), *assistant("bad"), user(" and that? ")]
THOUGHT = [user("good?"), *thinking("so", "bad"), user("and that?")]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
  """kind, template arguments -> tokenizer."""
  folder = tmp_path_factory.mktemp("kinds")
  for name, (template, special, named) in chat_templates.KINDS.items():
    small_tokenizers.byte_level(folder / name, special=special, chat_template=template, **named)
  return lambda name, **arguments: load_tokenizer(folder / name, template_arguments=arguments)


# kind, prompt, answer, arguments of the template; the text given and the text scored.
WRITTEN = {
  "llama3, a system turn": (
    "llama3",
    [system("be kind"), *ONE],
    assistant(" yes "),
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\ngood?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "yes<|eot_id|>",
  ),
  "mistral": ("mistral", ONE, assistant("yes"), "<s>[INST] good?[/INST]", " yes</s>"),
  "mistral, turns": (
    "mistral",
    MANY,
    assistant("yes"),
    "<s>[INST] good?[/INST] bad</s>[INST]  and that? [/INST]",
    " yes</s>",
  ),
  # Its whole conversation has the system turn nowhere: the prompt is no prefix of it.
  "mistral, a system turn": (
    "mistral",
    [system("be kind"), *MANY],
    assistant("be kind"),
    "<s>[INST] good?[/INST] bad</s>[INST] be kind\n\n and that? [/INST]",
    " be kind</s>",
  ),
  "mistral, a call behind a system turn": (
    "mistral",
    [system("be kind"), *ONE],
    calling("weigh"),
    "<s>[INST] be kind\n\ngood?[/INST]",
    '[TOOL_CALLS] {"name": "weigh", "arguments": {"a": 1}}</s>',
  ),
  "qwen3": (
    "qwen3",
    ONE,
    assistant("yes"),
    "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n",
    "<think>\n\n</think>\n\nyes<|im_end|>",
  ),
  "qwen3, thoughts before are forgotten and those of the answer are its own": (
    "qwen3",
    THOUGHT,
    thinking("hm", "yes"),
    "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n"
    "<|im_start|>user\nand that?<|im_end|>\n<|im_start|>assistant\n",
    "<think>\nhm\n</think>\n\nyes<|im_end|>",
  ),
  "qwen3, thoughts in the text": (
    "qwen3",
    ONE,
    assistant("<think>hm</think>yes"),
    "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n",
    "<think>\nhm\n</think>\n\nyes<|im_end|>",
  ),
  "qwen3, no thoughts wanted": (
    "qwen3 quick",
    ONE,
    assistant("yes"),
    "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "yes<|im_end|>",
  ),
  "qwen3, tools": (
    "qwen3",
    Conversation([*ONE, *calling("weigh"), {"role": "tool", "content": "2 kg"}], TOOLS),
    calling("weigh"),
    '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "weigh",'
    ' "parameters": {}}}\n<|im_end|>\n<|im_start|>user\ngood?<|im_end|>\n'
    '<|im_start|>assistant\n<tool_call>\n{"name": "weigh", "arguments": {"a": 1}}\n</tool_call>'
    "<|im_end|>\n<|im_start|>tool\n2 kg<|im_end|>\n<|im_start|>assistant\n",
    '<think>\n\n</think>\n\n<tool_call>\n{"name": "weigh", "arguments": {"a": 1}}\n</tool_call>'
    "<|im_end|>",
  ),
  # The turn's end is a special token, though not EOS: nothing is added to it.
  "gemma": (
    "gemma",
    MANY,
    assistant("yes"),
    "<bos><start_of_turn>user\ngood?<end_of_turn>\n<start_of_turn>model\nbad<end_of_turn>\n"
    "<start_of_turn>user\nand that?<end_of_turn>\n<start_of_turn>model\n",
    "yes<end_of_turn>",
  ),
  "an end that the row has written too": (
    "gemma",
    ONE,
    assistant("yes<end_of_turn>"),
    "<bos><start_of_turn>user\ngood?<end_of_turn>\n<start_of_turn>model\n",
    "yes<end_of_turn>",
  ),
  "no word of an answer that is awaited": (
    "no_prompt",
    MANY,
    assistant("yes"),
    "<|user|>\ngood?<|end|>\n<|assistant|>\nbad<|end|>\n<|user|>\n and that? <|end|>\n"
    "<|assistant|>\n",
    "yes<|end|>",
  ),
  "two ends": (
    "two_ends",
    ONE,
    assistant("yes"),
    "<|user|>\ngood?<|end|>\n<|assistant|>\n",
    "yes<|end|>",
  ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_given_and_what_is_scored(kinds, case):
  kind, prompt, answer, given, scored = WRITTEN[case]
  name, _, quick = kind.partition(" ")
  tokenizer = kinds(name, **({"enable_thinking": False} if quick else {}))
  # Another answer that begins alike: what both share is not the prompt's for that.
  other = assistant(answer[0]["content"][:1] + "nd more")
  ids, (one, two) = tokenizer.encode_preference(Preference(prompt, (answer, other)))
  assert tokenizer.decode(ids, special=True) == given
  assert tokenizer.decode(one, special=True) == scored
  assert tokenizer.encode_prompt(prompt) == ids.tolist()
  for completion_ids in (one.tolist(), two.tolist()):
    ends = [id for id in completion_ids if id in tokenizer.end_ids]
    assert ends == completion_ids[-1:]


@pytest.mark.parametrize("kind", ["llama3", "mistral", "qwen3", "gemma", "no_prompt", "two_ends"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
  asked=st.text(" \n\tgodb🙂é한", max_size=8),
  first=st.text(" \n\tgodb🙂é한", min_size=1, max_size=8),
  second=st.text(" \n\tgodb🙂é한", min_size=1, max_size=8),
  turns=st.integers(0, 2),
)
def test_ids_decode_to_what_the_template_writes(kinds, kind, asked, first, second, turns):
  tokenizer = kinds(kind)
  prompt = [*[*ONE, *assistant("bad")] * turns, user(asked)]
  prompt = [system("be kind"), *prompt] if kind in ("mistral", "qwen3") else prompt
  completions = assistant(first), assistant(second)
  start, written = tokenizer.template.texts(Conversation(prompt), completions)
  try:
    ids, found = tokenizer.encode_preference(Preference(prompt, completions))
  except RowError as error:
    assert str(error) == "equal answers" and first.strip() == second.strip()
    return
  for answer, text in zip(found, written, strict=True):
    whole = tokenizer.decode([*ids, *answer], special=True)
    assert (start + text).startswith(whole) and not (start + text)[len(whole) :].strip(
      "\n<|endoftx>"
    )
    assert answer[-1] in tokenizer.end_ids
  # What is given holds nothing of the answers, and is what generation starts from but for a token
  # that both hold a part of.
  given = tokenizer.decode(ids, special=True).rstrip("\ufffd")
  assert start.startswith(given) and not start[len(given) :].strip()


REFUSED = {
  "a system turn that is not known": ("gemma", [system("a"), *ONE], assistant("b"), "not known"),
  "a system turn that is left out": (
    "no_system", [system("be kind"), *ONE], assistant("b"), "leaves out some .* the system says"
  ),
  "thoughts that are left out": (
    "reasoner", ONE, assistant("<think>hm</think>yes"), "not the one that waits"
  ),
  "thoughts behind a prompt without": (
    "qwen3 quick", ONE, thinking("hm", "yes"), "not the one that waits"
  ),
  "thoughts that have no place": (
    "gemma", ONE, thinking("hm", "yes"), "leaves out some .* the assistant says"
  ),
  "calls that have no place": ("llama3", ONE, calling("weigh"), "leaves out .* the assistant says"),
  "tools that have no place": (
    "llama3", Conversation(ONE, TOOLS), assistant("b"), "no place for tools"
  ),
  "a turn of nobody": (
    "no_system",
    [*ONE, {"role": "system", "content": "be kind"}],
    assistant("b"),
    "leaves out some of what the system says",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_exactly_is_refused(kinds, case):
  kind, prompt, answer, message = REFUSED[case]
  name, _, quick = kind.partition(" ")
  tokenizer = kinds(name, **({"enable_thinking": False} if quick else {}))
  with pytest.raises(RowError, match=message):
    tokenizer.encode_preference(Preference(prompt, (answer, assistant("another"))))


def test_arguments_of_a_template_are_those_it_reads(kinds):
  assert kinds("qwen3").digest() != kinds("qwen3", enable_thinking=False).digest()
  for name in ("enable_thoughts", "messages"):
    with pytest.raises(UserError, match=f"template argument '{name}' is none that .* reads"):
      kinds("qwen3", **{name: True})


def test_a_run_gives_its_template_values(tmp_path):
  """By `data.template`, as JSON."""
  folder = small_tokenizers.byte_level(
    tmp_path, chat_template="{{ mood }} {{ messages[0].content }}"
  )
  shape = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1}
  model = ConfigDict({"path": "", "scratch": shape, "tokenizer": str(folder)})
  read = lambda template: setup.describe_model(model, template)[1].template.arguments
  assert read("") == {}
  assert read('{"mood": "calm"}') == {"mood": "calm"}
  for template, said in {
    "{x": "is not JSON",
    "[1]": 'is not a JSON object, {"name": value}',
  }.items():
    with pytest.raises(UserError, match=re.escape(f"data.template={template} {said}")):
      read(template)


def test_what_ends_an_answer(kinds, made, tmp_path):
  ends = lambda tokenizer: [tokenizer.token_text(id) for id in tokenizer.end_ids]
  assert ends(kinds("gemma")) == ["<eos>", "<end_of_turn>"]
  assert ends(kinds("two_ends")) == ["<|endoftext|>", "<|end|>"]
  assert ends(kinds("qwen3")) == ["<|im_end|>"]
  assert ends(made["byte_level"]) == ["<|endoftext|>"]
  folder = small_tokenizers.byte_level(tmp_path)
  (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "top_p": 0.8}')
  assert ends(load_tokenizer(folder)) == ["<|endoftext|>", "<|im_end|>"]
  (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
  with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is '2', not ids"):
    _ = load_tokenizer(folder).end_ids


def test_a_template_may_stand_in_a_file_of_its_own(tmp_path):
  folder = small_tokenizers.byte_level(tmp_path)
  (folder / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
  assert load_tokenizer(folder).template.source == "{{ messages[0].content }}!"
  (folder / "chat_template.jinja").write_text("{{ messages[0].content }}?")
  assert load_tokenizer(folder).template.source == "{{ messages[0].content }}?"
  (folder / "chat_template.jinja").unlink()
  (folder / "chat_template.json").write_text("{}")
  with pytest.raises(UserError, match=r"chat_template\.json holds no chat_template"):
    load_tokenizer(folder)


def test_digest_follows_vocabulary_template_and_bos(tmp_path):
  plain = load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "a"))
  again = load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "b"))
  other = [
    small_tokenizers.byte_fallback(tmp_path / "c", chat_template="{{ messages }}"),
    small_tokenizers.byte_fallback(tmp_path / "d", add_bos_token=False),
    small_tokenizers.byte_level(tmp_path / "e"),
  ]
  assert plain.digest() == again.digest()
  assert len({plain.digest(), *(load_tokenizer(path).digest() for path in other)}) == 4


# --- folders --------------------------------------------------------------------------------------


def test_special_ids_may_stand_in_the_model_configuration(tmp_path):
  folder = small_tokenizers.byte_level(tmp_path, eos_token=None)
  (folder / "config.json").write_text('{"eos_token_id": [0, 2], "bos_token_id": 1}')
  tokenizer = load_tokenizer(folder)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 0, False)


def test_padding_and_truncation_asked_for_by_the_file_are_off(tmp_path):
  folder = small_tokenizers.byte_level(tmp_path)
  file = folder / "tokenizer.json"
  content = json.loads(file.read_text("utf-8"))
  content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"} | {
    "stride": 0
  }
  file.write_text(json.dumps(content), "utf-8")
  tokenizer = load_tokenizer(folder)
  assert tokenizer.decode(tokenizer.encode_prompt("the answer is good")) == "the answer is good"


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
  with pytest.raises(UserError, match=r"no tokenizer folder .*gone"):
    load_tokenizer(tmp_path / "gone")
  with pytest.raises(UserError, match=r"holds no tokenizer\.json; save it there"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"model": 3}')
  with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
    load_tokenizer(tmp_path)
  folder = small_tokenizers.byte_fallback(tmp_path / "list")
  (folder / "tokenizer_config.json").write_text("[1]")
  with pytest.raises(UserError, match=r"tokenizer_config\.json holds a list, not an object"):
    load_tokenizer(folder)
  (folder / "tokenizer_config.json").write_text('{"eos_token": 5}')
  with pytest.raises(UserError, match="eos_token is 5, not text"):
    load_tokenizer(folder)


# --- real tokenizers ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHARED)
def real(request, shared_data):
  return load_tokenizer(shared_data / "tokenizers" / request.param)


SHORT = st.text(" \n\tgodb🙂é한", min_size=1, max_size=8)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
BY_MANY = settings(
  max_examples=60,
  deadline=None,
  suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@BY_MANY
@given(prompt=ANYTHING | SHORT, first=ANYTHING, second=SHORT)
def test_ids_of_real_tokenizers_decode_to_the_text(real, prompt, first, second):
  """The text, where the tokenizer itself gives it back; the end once; the answer's tokens alone."""
  try:
    ids, completions = real.encode_preference(Preference(prompt, (first, second)))
  except RowError as error:
    assert str(error) in ("no prompt token before the answer", "equal answers")
    return
  for answer, text in zip(completions, (first, second), strict=True):
    whole = [*ids, *answer.tolist()]
    if real.decode(real.encode_prompt(prompt + text)) == prompt + text:
      assert real.decode(whole) == prompt + text
    assert whole.count(real.eos_id) == 1 and whole[-1] == real.eos_id
    # What is given holds nothing of the answer.
    if real.decode(real.encode_prompt(prompt)) == prompt:
      assert prompt.startswith(real.decode(ids).rstrip("\ufffd"))


@pytest.mark.parametrize("real", ["minimind", "mistral-7b-instruct-v0.3", "qwen3"], indirect=True)
@BY_MANY
@given(asked=SHORT, first=SHORT, second=SHORT, turns=st.integers(0, 2))
def test_ids_of_real_templates_decode_to_what_they_write(real, asked, first, second, turns):
  prompt = [*[user("why?"), *assistant("so")] * turns, user(asked)]
  completions = assistant(first), assistant(second)
  start, written = real.template.texts(Conversation(prompt), completions)
  try:
    ids, found = real.encode_preference(Preference(prompt, completions))
  except RowError as error:
    assert str(error) == "equal answers"
    return
  for answer, text in zip(found, written, strict=True):
    whole = real.decode([*ids, *answer], special=True)
    # Behind the token that ends the turn nothing is learned.
    assert (start + text).startswith(whole) and not (start + text)[len(whole) :].strip()
    assert answer[-1] in real.end_ids
    assert sum(int(x) in real.end_ids for x in answer) == 1
  given_text = real.decode(ids, special=True).rstrip("\ufffd")
  assert start.startswith(given_text) and not start[len(given_text) :].strip()


def test_ids_equal_those_of_others(shared_data):
  vectors = json.loads((shared_data / "tokenizers" / "reference_vectors.json").read_text("utf-8"))
  tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2")
  cases = [case for case in vectors["gpt2"] if not case["text_pair"]]
  assert len(cases) > 20
  for case in cases:
    assert tokenizer.encode_prompt(case["text"]) == case["ids"], case["name"]


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weigh", "arguments": {"a": 1}}}
TALKS = {
  "turns": (Conversation([system("be kind"), *MANY]), assistant("yes")),
  "tools": (
    Conversation(
      [
        *ONE,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2 kg", "tool_call_id": "abcdefghi"},
      ],
      TOOLS,
    ),
    assistant("yes"),
  ),
  "a call": (
    Conversation(ONE, TOOLS),
    [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
  ),
  "a thought": (Conversation(THOUGHT), thinking("hm", "yes")),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize(
  ("name", "arguments"),
  [
    ("qwen3", {}),
    ("minimind", {"open_thinking": True}),
    ("mistral-7b-instruct-v0.3", {}),
  ],
)
def test_conversations_under_real_templates(shared_data, name, arguments, talk):
  from transformers import PreTrainedTokenizerFast

  prompt, answer = TALKS[talk]
  folder = shared_data / "tokenizers" / name
  tokenizer = load_tokenizer(folder, template_arguments=arguments)
  if (name, talk) == ("mistral-7b-instruct-v0.3", "a thought"):  # it knows of none
    with pytest.raises(RowError, match="leaves out some of what the assistant says"):
      tokenizer.encode_preference(Preference(prompt, (answer, assistant("no"))))
    return
  ids, (one, _) = tokenizer.encode_preference(Preference(prompt, (answer, assistant("no"))))
  theirs = PreTrainedTokenizerFast.from_pretrained(folder)
  write = lambda messages, **how: theirs.apply_chat_template(
    messages, tools=list(prompt.tools) or None, tokenize=False, **arguments, **how
  )
  waiting = write(prompt.messages, add_generation_prompt=True)
  assert tokenizer.decode(ids, special=True) == waiting
  assert tokenizer.encode_prompt(prompt) == ids.tolist()
  whole = write([*prompt.messages, *answer]).rstrip("\n")
  if whole.startswith(waiting):
    assert tokenizer.decode([*ids, *one], special=True) == whole
  else:
    assert (name, talk) == ("mistral-7b-instruct-v0.3", "turns")
    assert tokenizer.decode(one, special=True) == "yes</s>"
  assert [id for id in one.tolist() if id in tokenizer.end_ids] == [one[-1]]


@pytest.mark.parametrize(
  "file",
  ["rasbt_instruction_pref.open.json", "hh_helpful_base_test.open.jsonl", "lf_dpo_zh.open.json"],
)
def test_ids_of_real_rows_decode_to_their_text(real, shared_data, file):
  read = readers.read_rows(shared_data / "preferences" / file)
  rows = [row for _, row in itertools.islice(read, 60)]
  convert = readers.detect(rows[0]).convert
  seen = 0
  for row in rows:
    try:
      preference = convert(row)
    except RowError:
      continue
    prompt, completions = real.encode_preference(preference)
    whole = [real.decode([*prompt, *answer]) for answer in completions]
    ends = [answer.tolist().count(real.eos_id) for answer in completions]
    assert ends == [1, 1]
    if isinstance(preference.prompt, str):
      assert whole == [preference.prompt + answer for answer in preference.completions]
      # What is scored is the answer, and at most the space before it.
      for answer, text in zip(completions, preference.completions, strict=True):
        assert real.decode(answer).strip() == text.strip()
    else:
      for text, answer in zip(whole, preference.completions, strict=True):
        assert answer[0]["content"].strip() in text
        assert preference.prompt[-1]["content"].strip() in real.decode(prompt)
    seen += 1
  assert seen > 50
