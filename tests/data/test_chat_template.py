"""Chat templates: the prompt is what generation continues, the completion is what follows it."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dpo_jax.data.fields import Conversation, Preference, RowError
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import UserError
from dpo_jax.training import setup
from tests.support import chat_templates, small_tokenizers
from tests.support.messages import reply, system, user
from tests.support.random_texts import BY_MANY, SHORT


def texts(tokenizer, preference):
  """Decoded prompt, and whole texts, special tokens written out."""
  prompt, completions, _ = tokenizer.encode_preference(preference)
  whole = [tokenizer.decode([*prompt, *answer], special=True) for answer in completions]
  return tokenizer.decode(prompt, special=True), whole


def test_a_template_ends_the_turn_itself(made):
  tokenizer = made["chatml"]
  question = [user("is it good?")]
  prompt, whole = texts(tokenizer, Preference(question, (reply("yes"), reply("no"))))
  assert prompt == "<|im_start|>user\nis it good?<|im_end|>\n<|im_start|>assistant\n"
  # The new line behind the end of a turn is no part of it: a model is not asked for it.
  assert whole == [prompt + "yes<|im_end|>", prompt + "no<|im_end|>"]
  assert tokenizer.decode(tokenizer.encode_prompt(question), special=True) == prompt


def test_a_prompt_that_is_no_prefix_of_the_whole_text(made):
  tokenizer = made["system_last"]
  turns = [{"role": "system", "content": "be kind"}, user("is it good?")]
  # The whole conversation, as the template writes it, has no system turn at all; "s" is found in
  # the end token as well as in the answer.
  prompt, whole = texts(tokenizer, Preference(turns, (reply("s"), reply(" it is good "))))
  assert prompt == "<s> [INST] be kind | is it good?[/INST]"
  assert whole == [prompt + " s</s>", prompt + " it is good</s>"]
  assert tokenizer.encode_prompt(turns).count(tokenizer.bos_id) == 1


def test_without_a_template_turns_are_written_plainly(made):
  tokenizer = made["byte_level"]
  turns = [{"role": "system", "content": "be kind"}, user("good?")]
  prompt, whole = texts(tokenizer, Preference(turns, (reply("yes"), reply("no"))))
  assert prompt == "System: be kind\n\nUser: good?\n\nAssistant:"
  assert whole == [prompt + " yes<|endoftext|>", prompt + " no<|endoftext|>"]


def test_what_a_template_refuses_is_dropped_with_its_reason(tmp_path):
  template = "{{ raise_exception('roles must alternate') }}"
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
  with pytest.raises(RowError, match="chat template: roles must alternate"):
    tokenizer.encode_preference(Preference([user("a")], (reply("b"), reply("c"))))


def test_a_template_reaches_nothing_but_the_conversation(tmp_path):
  template = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
  with pytest.raises(RowError, match=r"chat template: access to attribute .* is unsafe"):
    tokenizer.encode_preference(Preference([user("a")], (reply("b"), reply("c"))))


# --- kinds of templates ---------------------------------------------------------------------------


def thinking(thought, text):
  """A completion with reasoning before its text."""
  return [{"role": "assistant", "content": text, "reasoning_content": thought}]


def calling(name):
  """A completion that calls a tool."""
  function = {"name": name, "arguments": {"a": 1}}
  call = {"type": "function", "function": function}
  return [{"role": "assistant", "content": "", "tool_calls": [call]}]


TOOLS = ({"type": "function", "function": {"name": "weigh", "parameters": {}}},)


ONE = [user("good?")]


MANY = [user("good?"), *reply("bad"), user(" and that? ")]


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
    reply(" yes "),
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\ngood?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "yes<|eot_id|>",
  ),
  "mistral": ("mistral", ONE, reply("yes"), "<s>[INST] good?[/INST]", " yes</s>"),
  "mistral, turns": (
    "mistral",
    MANY,
    reply("yes"),
    "<s>[INST] good?[/INST] bad</s>[INST]  and that? [/INST]",
    " yes</s>",
  ),
  # Its whole conversation has the system turn nowhere: the prompt is no prefix of it.
  "mistral, a system turn": (
    "mistral",
    [system("be kind"), *MANY],
    reply("be kind"),
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
    reply("yes"),
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
    reply("<think>hm</think>yes"),
    "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n",
    "<think>\nhm\n</think>\n\nyes<|im_end|>",
  ),
  "qwen3, no thoughts wanted": (
    "qwen3 quick",
    ONE,
    reply("yes"),
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
    reply("yes"),
    "<bos><start_of_turn>user\ngood?<end_of_turn>\n<start_of_turn>model\nbad<end_of_turn>\n"
    "<start_of_turn>user\nand that?<end_of_turn>\n<start_of_turn>model\n",
    "yes<end_of_turn>",
  ),
  "an end that the row has written too": (
    "gemma",
    ONE,
    reply("yes<end_of_turn>"),
    "<bos><start_of_turn>user\ngood?<end_of_turn>\n<start_of_turn>model\n",
    "yes<end_of_turn>",
  ),
  "no word of an answer that is awaited": (
    "no_prompt",
    MANY,
    reply("yes"),
    "<|user|>\ngood?<|end|>\n<|assistant|>\nbad<|end|>\n<|user|>\n and that? <|end|>\n"
    "<|assistant|>\n",
    "yes<|end|>",
  ),
  "two ends": (
    "two_ends",
    ONE,
    reply("yes"),
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
  other = reply(answer[0]["content"][:1] + "nd more")
  ids, (one, two), _ = tokenizer.encode_preference(Preference(prompt, (answer, other)))
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
  prompt = [*[*ONE, *reply("bad")] * turns, user(asked)]
  prompt = [system("be kind"), *prompt] if kind in ("mistral", "qwen3") else prompt
  completions = reply(first), reply(second)
  start, written = tokenizer.template.render(Conversation(prompt), completions)
  try:
    ids, found, _ = tokenizer.encode_preference(Preference(prompt, completions))
  except RowError as error:
    assert str(error) == "equal completions" and first.strip() == second.strip()
    return
  for answer, (text, _) in zip(found, written, strict=True):
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
  "a system turn that is not known": ("gemma", [system("a"), *ONE], reply("b"), "not known"),
  "a system turn that is left out": (
    "no_system", [system("be kind"), *ONE], reply("b"), "leaves out some .* the system says"
  ),
  "thoughts that are left out": (
    "reasoner", ONE, reply("<think>hm</think>yes"), "prompt is not the same with and without"
  ),
  "thoughts behind a prompt without": (
    "qwen3 quick", ONE, thinking("hm", "yes"), r"it ends the prompt with .* cannot have reasoning"
  ),
  "written thoughts behind a prompt without": (
    "qwen3 quick", ONE, reply("<think>hm</think>yes"), r"it ends the prompt with .* cannot have"
  ),
  "thoughts that have no place": (
    "gemma", ONE, thinking("hm", "yes"), "leaves out some of the assistant.s reasoning"
  ),
  "calls that have no place": ("llama3", ONE, calling("weigh"), "leaves out .* the assistant says"),
  "tools that have no place": (
    "llama3", Conversation(ONE, TOOLS), reply("b"), "no place for tools"
  ),
  "a turn of nobody": (
    "no_system",
    [*ONE, {"role": "system", "content": "be kind"}],
    reply("b"),
    "leaves out some of what the system says",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_exactly_is_refused(kinds, case):
  kind, prompt, answer, message = REFUSED[case]
  name, _, quick = kind.partition(" ")
  tokenizer = kinds(name, **({"enable_thinking": False} if quick else {}))
  with pytest.raises(RowError, match=message):
    tokenizer.encode_preference(Preference(prompt, (answer, reply("another"))))


def test_arguments_of_a_template_are_those_it_reads(kinds):
  assert kinds("qwen3").digest() != kinds("qwen3", enable_thinking=False).digest()
  for name in ("enable_thoughts", "messages"):
    with pytest.raises(UserError, match=f"template argument '{name}' is not one that .* reads"):
      kinds("qwen3", **{name: True})


def test_a_run_gives_its_template_values(tmp_path):
  """By `data.template`, as JSON."""
  folder = small_tokenizers.byte_level(
    tmp_path, chat_template="{{ mood }} {{ messages[0].content }}"
  )
  shape = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1}
  model = ConfigDict({"path": "", "scratch": shape, "tokenizer": str(folder)})

  def read(template):
    return setup.describe_model(model, template)[1].template.arguments

  assert read("") == {}
  assert read('{"mood": "calm"}') == {"mood": "calm"}
  for template, said in {
    "{x": "is not JSON",
    "[1]": 'is not a JSON object, {"name": value}',
  }.items():
    with pytest.raises(UserError, match=re.escape(f"data.template={template} {said}")):
      read(template)


def test_what_ends_an_answer(kinds, made, tmp_path):

  def ends(tokenizer):
    return [tokenizer.token_text(id) for id in tokenizer.end_ids]

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
  with pytest.raises(UserError, match=r"chat_template\.json has no chat_template"):
    load_tokenizer(folder)


@pytest.mark.parametrize("real", ["minimind", "mistral-7b-instruct-v0.3", "qwen3"], indirect=True)
@BY_MANY
@given(asked=SHORT, first=SHORT, second=SHORT, turns=st.integers(0, 2))
def test_ids_of_real_templates_decode_to_what_they_write(real, asked, first, second, turns):
  prompt = [*[user("why?"), *reply("so")] * turns, user(asked)]
  completions = reply(first), reply(second)
  start, written = real.template.render(Conversation(prompt), completions)
  try:
    ids, found, _ = real.encode_preference(Preference(prompt, completions))
  except RowError as error:
    assert str(error) == "equal completions"
    return
  for answer, (text, _) in zip(found, written, strict=True):
    whole = real.decode([*ids, *answer], special=True)
    # Behind the token that ends the turn nothing is learned.
    assert (start + text).startswith(whole) and not (start + text)[len(whole) :].strip()
    assert answer[-1] in real.end_ids
    assert sum(int(x) in real.end_ids for x in answer) == 1
  given_text = real.decode(ids, special=True).rstrip("\ufffd")
  assert start.startswith(given_text) and not start[len(given_text) :].strip()


# --- real templates -------------------------------------------------------------------------------


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weigh", "arguments": {"a": 1}}}


TALKS = {
  "turns": (Conversation([system("be kind"), *MANY]), reply("yes")),
  "tools": (
    Conversation(
      [
        *ONE,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2 kg", "tool_call_id": "abcdefghi"},
      ],
      TOOLS,
    ),
    reply("yes"),
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
    with pytest.raises(RowError, match="leaves out some of the assistant's reasoning"):
      tokenizer.encode_preference(Preference(prompt, (answer, reply("no"))))
    return
  ids, (one, _), _ = tokenizer.encode_preference(Preference(prompt, (answer, reply("no"))))
  theirs = PreTrainedTokenizerFast.from_pretrained(folder)

  def write(messages, **how):
    return theirs.apply_chat_template(
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
