"""Which tokens are the answer's, where a text begins and ends, and what templates do to both."""

import itertools
import json

import numpy as np
import pytest
import small_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax.data import chat, sources
from dpo_jax.data.forms import Preference, RowError
from dpo_jax.structs import UserError

SHARED = ("gpt2", "qwen3", "mistral-7b-instruct-v0.3", "minimind", "stories260k")
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """One tokenizer of each family."""
  folder = tmp_path_factory.mktemp("tokenizers")
  return {
    "byte_level": chat.load_tokenizer(small_tokenizers.byte_level(folder / "bytes")),
    "byte_fallback": chat.load_tokenizer(small_tokenizers.byte_fallback(folder / "fallback")),
    "word_level": chat.load_tokenizer(small_tokenizers.word_level(folder / "words")),
    "chatml": chat.load_tokenizer(
      small_tokenizers.byte_level(
        folder / "chatml", chat_template=small_tokenizers.CHATML, eos_token="<|im_end|>"
      )
    ),
    "system_last": chat.load_tokenizer(
      small_tokenizers.byte_fallback(
        folder / "system_last", chat_template=small_tokenizers.SYSTEM_LAST
      )
    ),
  }


def texts(tokenizer, preference):
  """Decoded prompt, and whole texts, special tokens written out."""
  prompt, answers = tokenizer.encode_preference(preference)
  whole = [tokenizer.decode([*prompt, *answer], special=True) for answer in answers]
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
  prompt, answers = tokenizer.encode_preference(Preference("the answer ", ("good", "\nbad")))
  assert tokenizer.decode(prompt) == "the answer"
  assert [tokenizer.decode(a) for a in answers] == [" good", " \nbad"]


def test_an_answer_may_change_the_tokens_before_it(tmp_path):
  # "abc" is a|bc and "abd" is ab|d: no token of the prompt's "ab" is in both.
  tokenizer = chat.load_tokenizer(small_tokenizers.by_merges(tmp_path, ("b", "c"), ("a", "b")))
  prompt, (chosen, rejected) = tokenizer.encode_preference(Preference("xab", ("c", "d")))
  assert tokenizer.decode(prompt) == "x"
  assert [tokenizer.decode([id]) for id in chosen] == ["a", "bc"]
  assert [tokenizer.decode([id]) for id in rejected] == ["ab", "d"]


def test_a_space_at_the_end_of_a_token_is_the_answers_too(tmp_path):
  # "a " is one token, and trimmed offsets would have it end with the prompt.
  tokenizer = chat.load_tokenizer(small_tokenizers.by_merges(tmp_path, ("a", "Ġ")))
  prompt, (chosen, _) = tokenizer.encode_preference(Preference("xa", (" b", " c")))
  assert tokenizer.decode(prompt) == "x" and tokenizer.decode(chosen) == "a b"


def test_bos_stands_once_and_eos_ends_the_answer(made):
  tokenizer = made["byte_fallback"]
  assert tokenizer.adds_bos
  for prompt in ("the answer", "<s>the answer"):  # the text may have written it already
    ids, answers = tokenizer.encode_preference(Preference(prompt, (" is good", " is bad")))
    for answer in answers:
      whole = [*ids, *answer]
      assert whole.count(tokenizer.bos_id) == 1 and whole[0] == tokenizer.bos_id
      assert whole.count(tokenizer.eos_id) == 1 and whole[-1] == tokenizer.eos_id


def test_bos_is_a_habit_of_the_tokenizer(tmp_path):
  said = chat.load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "no", add_bos_token=False))
  assert said.bos_id is not None and not said.adds_bos
  assert said.encode_prompt("the")[0] != said.bos_id
  forced = chat.load_tokenizer(
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
  prompt, answers = made["byte_fallback"].encode_preference(Preference([5, 6], ([7, 2], [8])))
  assert prompt.tolist() == [5, 6] and [a.tolist() for a in answers] == [[7, 2], [8]]
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
    ids, answers = tokenizer.encode_preference(Preference(prompt, (first, second)))
  except RowError as error:
    assert str(error) in ("no prompt token before the answer", "equal answers")
    return
  for answer, text in zip(answers, (first, second), strict=True):
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
  assert whole == [prompt + "yes<|im_end|>\n", prompt + "no<|im_end|>\n"]
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
  tokenizer = chat.load_tokenizer(small_tokenizers.byte_level(tmp_path, chat_template=template))
  with pytest.raises(RowError, match="chat template: roles must alternate"):
    tokenizer.encode_preference(Preference([user("a")], (assistant("b"), assistant("c"))))


def test_digest_follows_vocabulary_template_and_bos(tmp_path):
  plain = chat.load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "a"))
  again = chat.load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "b"))
  other = [
    small_tokenizers.byte_fallback(tmp_path / "c", chat_template="{{ messages }}"),
    small_tokenizers.byte_fallback(tmp_path / "d", add_bos_token=False),
    small_tokenizers.byte_level(tmp_path / "e"),
  ]
  assert plain.digest() == again.digest()
  assert len({plain.digest(), *(chat.load_tokenizer(path).digest() for path in other)}) == 4


# --- folders --------------------------------------------------------------------------------------


def test_special_ids_may_stand_in_the_model_configuration(tmp_path):
  folder = small_tokenizers.byte_level(tmp_path, eos_token=None)
  (folder / "config.json").write_text('{"eos_token_id": [0, 2], "bos_token_id": 1}')
  tokenizer = chat.load_tokenizer(folder)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 0, False)


def test_padding_and_truncation_asked_for_by_the_file_are_off(tmp_path):
  folder = small_tokenizers.byte_level(tmp_path)
  file = folder / "tokenizer.json"
  content = json.loads(file.read_text("utf-8"))
  content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"} | {
    "stride": 0
  }
  file.write_text(json.dumps(content), "utf-8")
  tokenizer = chat.load_tokenizer(folder)
  assert tokenizer.decode(tokenizer.encode_prompt("the answer is good")) == "the answer is good"


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
  with pytest.raises(UserError, match=r"no tokenizer folder .*gone"):
    chat.load_tokenizer(tmp_path / "gone")
  with pytest.raises(UserError, match=r"holds no tokenizer\.json; save it there"):
    chat.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"model": 3}')
  with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
    chat.load_tokenizer(tmp_path)
  folder = small_tokenizers.byte_fallback(tmp_path / "list")
  (folder / "tokenizer_config.json").write_text("[1]")
  with pytest.raises(UserError, match=r"tokenizer_config\.json holds a list, not an object"):
    chat.load_tokenizer(folder)
  (folder / "tokenizer_config.json").write_text('{"eos_token": 5}')
  with pytest.raises(UserError, match="eos_token is 5, not text"):
    chat.load_tokenizer(folder)


# --- real tokenizers ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHARED)
def real(request, shared_data):
  return chat.load_tokenizer(shared_data / "tokenizers" / request.param)


def test_ids_equal_those_of_others(shared_data):
  vectors = json.loads((shared_data / "tokenizers" / "reference_vectors.json").read_text("utf-8"))
  tokenizer = chat.load_tokenizer(shared_data / "tokenizers" / "gpt2")
  cases = [case for case in vectors["gpt2"] if not case["text_pair"]]
  assert len(cases) > 20
  for case in cases:
    assert tokenizer.encode_prompt(case["text"]) == case["ids"], case["name"]


@pytest.mark.parametrize(
  "file",
  ["rasbt_instruction_pref.open.json", "hh_helpful_base_test.open.jsonl", "lf_dpo_zh.open.json"],
)
def test_ids_of_real_rows_decode_to_their_text(real, shared_data, file):
  read = sources.read_rows(shared_data / "preferences" / file)
  rows = [row for _, row in itertools.islice(read, 60)]
  convert = sources.detect(rows[0]).convert
  seen = 0
  for row in rows:
    try:
      preference = convert(row)
    except RowError:
      continue
    prompt, answers = real.encode_preference(preference)
    whole = [real.decode([*prompt, *answer]) for answer in answers]
    ends = [answer.tolist().count(real.eos_id) for answer in answers]
    assert ends == [1, 1]
    if isinstance(preference.prompt, str):
      assert whole == [preference.prompt + answer for answer in preference.answers]
      # What is scored is the answer, and at most the space before it.
      for answer, text in zip(answers, preference.answers, strict=True):
        assert real.decode(answer).strip() == text.strip()
    else:
      for text, answer in zip(whole, preference.answers, strict=True):
        assert answer[0]["content"].strip() in text
        assert preference.prompt[-1]["content"].strip() in real.decode(prompt)
    seen += 1
  assert seen > 50
