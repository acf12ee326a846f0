"""Tokens are split exactly into prompt and completion."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax.data import detection, readers
from dpo_jax.data.fields import Preference, RowError
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import UserError
from tests.support import small_tokenizers
from tests.support.messages import reply, user
from tests.support.random_texts import ANYTHING, BY_MANY, SHORT


def test_a_token_that_holds_any_of_the_answer_belongs_to_it(made):
  # "answer good" is `answer`, ` good`: the space that ends the prompt is the first byte of ` good`.
  tokenizer = made["byte_level"]
  prompt, (good, bad), _ = tokenizer.encode_preference(Preference("the answer ", ("good", "bad")))
  assert tokenizer.decode(prompt) == "the answer"
  assert tokenizer.decode(good) == " good" and tokenizer.decode(bad) == " bad"
  assert good[-1] == bad[-1] == tokenizer.eos_id


def test_the_prompt_is_what_all_answers_share(made):
  # With "good" the space goes to the answer, with "\n" it would not; the prompt is one for both.
  tokenizer = made["byte_level"]
  prompt, completions, _ = tokenizer.encode_preference(Preference("the answer ", ("good", "\nbad")))
  assert tokenizer.decode(prompt) == "the answer"
  assert [tokenizer.decode(a) for a in completions] == [" good", " \nbad"]


def test_an_answer_may_change_the_tokens_before_it(tmp_path):
  # "abc" is a|bc and "abd" is ab|d: no token of the prompt's "ab" is in both.
  tokenizer = load_tokenizer(small_tokenizers.by_merges(tmp_path, ("b", "c"), ("a", "b")))
  prompt, (chosen, rejected), _ = tokenizer.encode_preference(Preference("xab", ("c", "d")))
  assert tokenizer.decode(prompt) == "x"
  assert [tokenizer.decode([id]) for id in chosen] == ["a", "bc"]
  assert [tokenizer.decode([id]) for id in rejected] == ["ab", "d"]


def test_a_space_at_the_end_of_a_token_is_the_answers_too(tmp_path):
  # "a " is one token, and trimmed offsets would have it end with the prompt.
  tokenizer = load_tokenizer(small_tokenizers.by_merges(tmp_path, ("a", "Ġ")))
  prompt, (chosen, _), _ = tokenizer.encode_preference(Preference("xa", (" b", " c")))
  assert tokenizer.decode(prompt) == "x" and tokenizer.decode(chosen) == "a b"


def test_bos_stands_once_and_eos_ends_the_answer(made):
  tokenizer = made["byte_fallback"]
  assert tokenizer.adds_bos
  for prompt in ("the answer", "<s>the answer"):  # the text may have written it already
    ids, completions, _ = tokenizer.encode_preference(Preference(prompt, (" is good", " is bad")))
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
  _, (good, _), _ = tokenizer.encode_preference(
    Preference("the answer", (" is good</s>", " is bad"))
  )
  assert good.tolist().count(tokenizer.eos_id) == 1


def test_a_row_needs_a_token_to_predict_its_answers_from(made):
  with pytest.raises(RowError, match="no prompt token before the completion"):
    made["byte_level"].encode_preference(Preference("", ("good", "bad")))
  # BOS is such a token.
  prompt, _, _ = made["byte_fallback"].encode_preference(Preference("", ("good", "bad")))
  assert prompt.tolist() == [made["byte_fallback"].bos_id]


def test_a_text_alone_gives_its_first_token(made):
  tokenizer = made["byte_level"]
  prompt, (text,), _ = tokenizer.encode_preference(Preference("", ("the answer",)))
  assert len(prompt) == 1 and tokenizer.decode([*prompt, *text]) == "the answer"


def test_answers_that_become_one_are_dropped(made):
  with pytest.raises(RowError, match="equal completions"):
    made["word_level"].encode_preference(Preference("the answer is", ("wonderful", "terrible")))


def test_ids_stand_as_they_are(made):
  prompt, completions, _ = made["byte_fallback"].encode_preference(
    Preference([5, 6], ([7, 2], [8]))
  )
  assert prompt.tolist() == [5, 6] and [a.tolist() for a in completions] == [[7, 2], [8]]
  assert prompt.dtype == np.int32


def test_many_rows_at_once_equal_one_by_one(made):
  tokenizer = made["byte_level"]
  rows = [
    Preference("the answer is", (" good", " bad")),
    Preference("", ("good", "bad")),
    Preference([1, 2], ([3], [4])),
    Preference([user("good?")], (reply("yes"), reply("no"))),
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
    ids, completions, _ = tokenizer.encode_preference(Preference(prompt, (first, second)))
  except RowError as error:
    assert str(error) in ("no prompt token before the completion", "equal completions")
    return
  for answer, text in zip(completions, (first, second), strict=True):
    whole = [int(x) for x in (*ids, *answer)]
    assert tokenizer.decode(whole) == prompt + text
    assert whole.count(tokenizer.eos_id) == 1 and whole[-1] == tokenizer.eos_id
    # The prompt's tokens hold nothing but the prompt.
    assert prompt.startswith(tokenizer.decode(ids).rstrip("\ufffd"))


def test_an_end_token_that_an_export_names_leaves_the_digest_as_it_was(tmp_path):
  folder = small_tokenizers.byte_level(tmp_path, chat_template=small_tokenizers.CHATML)
  (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
  before = load_tokenizer(folder)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": before.end_ids}))
  assert load_tokenizer(folder).digest() == before.digest()
  (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
  assert load_tokenizer(folder).digest() != before.digest()


# --- folders --------------------------------------------------------------------------------------


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
  with pytest.raises(UserError, match=r"contains no tokenizer\.json; save it there"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"model": 3}')
  with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
    load_tokenizer(tmp_path)
  folder = small_tokenizers.byte_fallback(tmp_path / "list")
  (folder / "tokenizer_config.json").write_text("[1]")
  with pytest.raises(UserError, match=r"tokenizer_config\.json contains a list, not an object"):
    load_tokenizer(folder)
  (folder / "tokenizer_config.json").write_text('{"eos_token": 5}')
  with pytest.raises(UserError, match="eos_token is 5, not text"):
    load_tokenizer(folder)


# --- real tokenizers ------------------------------------------------------------------------------


@BY_MANY
@given(prompt=ANYTHING | SHORT, first=ANYTHING, second=SHORT)
def test_ids_of_real_tokenizers_decode_to_the_text(real, prompt, first, second):
  """The text, where the tokenizer itself gives it back; the end once; the answer's tokens alone."""
  try:
    ids, completions, _ = real.encode_preference(Preference(prompt, (first, second)))
  except RowError as error:
    assert str(error) in ("no prompt token before the completion", "equal completions")
    return
  for answer, text in zip(completions, (first, second), strict=True):
    whole = [*ids, *answer.tolist()]
    if real.decode(real.encode_prompt(prompt + text)) == prompt + text:
      assert real.decode(whole) == prompt + text
    assert whole.count(real.eos_id) == 1 and whole[-1] == real.eos_id
    # What is given holds nothing of the answer.
    if real.decode(real.encode_prompt(prompt)) == prompt:
      assert prompt.startswith(real.decode(ids).rstrip("\ufffd"))


def test_ids_equal_those_of_others(shared_data):
  vectors = json.loads((shared_data / "tokenizers" / "reference_vectors.json").read_text("utf-8"))
  tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2")
  cases = [case for case in vectors["gpt2"] if not case["text_pair"]]
  assert len(cases) > 20
  for case in cases:
    assert tokenizer.encode_prompt(case["text"]) == case["ids"], case["name"]


@pytest.mark.parametrize(
  "file",
  ["rasbt_instruction_pref.open.json", "hh_helpful_base_test.open.jsonl", "lf_dpo_zh.open.json"],
)
def test_ids_of_real_rows_decode_to_their_text(real, shared_data, file):
  read = readers.read_rows(shared_data / "preferences" / file)
  rows = [row for _, row in itertools.islice(read, 60)]
  convert = detection.detect(rows[0]).convert
  seen = 0
  for row in rows:
    try:
      preference = convert(row)
    except RowError:
      continue
    prompt, completions, _ = real.encode_preference(preference)
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
