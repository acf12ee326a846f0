"""The controlled task: its reward, the probabilities of its grammar, and its tokenizer."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.controlled import lexicon, reviews, word_tokenizer
from tests.support.controlled_rewards import WAYS, reward_distribution, tables
from tests.support.paths import ROOT

FILM = "I watched this film yesterday."


@pytest.mark.parametrize(
  ("answer", "value"),
  [
    (" The plot was good.", 1),
    (" The plot was not good.", -0.5),
    (" The plot wasn't good.", -0.5),
    (" The plot was very good.", 1.5),
    (" The plot was rather good.", 0.5),
    (" The plot was not very good.", -0.75),
    (" The plot was good, I suppose.", 0.5),
    (" The plot was never dreadful, I guess.", 0.5),
    (" The plot was average.", 0),
    (" I didn't hate the plot.", 1),
    (" The music truly amazed me.", 3),
    (" The plot was good, but the music was awful. I would recommend it.", 1 - 2),
    (" In the end, I would never watch it again.", -1),
    (" I would probably advise against it.", -1),
    (" I was thrilled. The plot was not bad.", 2 + 0.5),
  ],
)
def test_reward_by_hand(answer, value):
  assert reviews.reward(FILM, answer) == 3 * value


@pytest.mark.parametrize(
  ("answer", "value"),
  [
    ("", 0),
    (" The plot was", 0),
    (" The plot was good", 1),  # unfinished
    (" The plot was good good good good.", 1),
    (" The plot was very very very really good.", 1.5),
    (" The plot was good. The plot was good. The plot was good.", 1),
    (" I was thrilled. I was thrilled. I was thrilled.", 2),
    (" good. good! good; and but yet good.", 1),
    (" The soup was delicious.", 0),  # not of a film
    (" The soup was revolting.", 0),
    (" The plot was good. The soup was good. The music was good. The actors were good.", 1),
  ],
)
def test_nothing_is_gained_by_repetition_or_off_the_point(answer, value):
  assert reviews.reward(FILM, answer) == 3 * value


def test_prompt_decides_what_is_to_the_point():
  answer = " The soup was delicious."
  assert reviews.reward("We ate at this bistro.", answer) == 6
  assert reviews.reward("We ate.", answer) == 6  # names no thing: everything is


VOCABULARY = st.sampled_from(sorted(piece.strip() for piece in reviews.vocabulary()))


@given(st.lists(VOCABULARY, max_size=60), st.lists(VOCABULARY, max_size=5))
def test_any_words_lie_within_the_bound(words, prompt):
  value = reviews.reward(" ".join(prompt), " ".join(words))
  assert abs(value) <= reviews.REWARD_BOUND


def test_bound_is_reached_both_ways():
  best = " The plot was truly superb, and we would definitely watch it again."
  assert reviews.reward(FILM, best) == reviews.REWARD_BOUND
  worst = " We would definitely avoid it. The plot was truly awful."
  assert reviews.reward(FILM, worst) == -reviews.REWARD_BOUND


@pytest.mark.parametrize(("kind", "together"), WAYS)
def test_reward_reads_what_the_grammar_meant_in_every_statement(kind, together):
  prompt = f"the {lexicon.KINDS[kind].things.split()[0]}"
  for table in tables(kind, together):
    read = [reviews.reward(prompt, text) for text in table.texts]
    np.testing.assert_array_equal(read, reviews.UNIT * table.value_Ph)


@pytest.mark.parametrize(("kind", "together"), WAYS)
def test_statements_are_distinct_balanced_and_end_only_at_their_end(kind, together):
  for table in tables(kind, together):
    assert len(set(table.texts)) == len(table.texts)
    assert (table.prob_Ph > 0).all()
    np.testing.assert_allclose(table.prob_Ph.sum(), 1, rtol=1e-12)
    # Praise and blame mirror each other, so the mean is zero.
    np.testing.assert_allclose(table.prob_Ph @ table.value_Ph, 0, atol=1e-12)
    assert not any(re.search(r"\.|\b(but|yet|and)\b", text) for text in table.texts)


def _count(kind, together):
  """Counts the completions about a kind: a text has one derivation, so derivations are counted."""
  *aspects, verdict = tables(kind, together)
  completions = 0
  for aspect in aspects:
    signs = [np.sign(table.value_Ph) for table in (aspect, verdict)]
    contrasts = sum((signs[0] == s).sum() * (signs[1] == -s).sum() for s in (-1, 1))
    everything = len(aspect.texts) * len(verdict.texts)
    joined = contrasts * len(lexicon.CONTRASTS) + (everything - contrasts) * len(lexicon.ADDITIONS)
    completions += joined + everything  # or as two sentences
  return int(completions) * 2  # the verdict after or before


def _openings(kind, together):
  free = (lexicon.ARTICLES, lexicon.QUALITIES, lexicon.TIMES, lexicon.OCCASIONS)
  own = (lexicon.KINDS[kind].openings, lexicon.KINDS[kind].things.split())
  who = lexicon.TOGETHER if together else lexicon.ALONE
  return len(who) * int(np.prod([len(choices) for choices in (*free, *own)]))


def test_number_of_texts():
  completions = {way: _count(*way) for way in WAYS}
  openings = {way: _openings(*way) for way in WAYS}
  # openings: sizes of (who) x (article) x (quality) x (time) x (occasion) x (things of the kinds)
  things = 6 + 7 + 7 + 6 + 6
  assert sum(openings.values()) == (1 + 7) * 2 * 17 * 19 * 11 * 2 * things
  assert min(completions.values()) > 10**7
  assert sum(completions[way] * openings[way] for way in WAYS) > 10**13


def test_rewards_spread_like_a_bell():
  for way in WAYS:
    value, prob = reward_distribution(*way)
    std = np.sqrt(prob @ value**2)
    assert 5 < std < 7
    assert abs(prob @ value**3) / std**3 < 0.1  # skewness; 0 for a Gaussian
    assert abs(prob @ value**4 / std**4 - 3) < 0.5  # kurtosis; 3 for a Gaussian


def test_generated_texts_follow_the_exact_distribution():
  count = 8_000
  rewards = np.array(
    [reviews.reward(*text) for text in zip(*reviews.generate(count, 1), strict=True)]
  )
  distributions = [reward_distribution(*way) for way in WAYS]
  variance = np.mean([prob @ value**2 for value, prob in distributions])
  fourth = np.mean([prob @ value**4 for value, prob in distributions])
  assert abs(rewards.mean()) < 4 * np.sqrt(variance / count)
  assert abs((rewards**2).mean() - variance) < 4 * np.sqrt((fourth - variance**2) / count)


def test_a_text_depends_on_seed_and_index_alone():
  prompts, completions = reviews.generate(50, 3)
  assert reviews.generate(20, 3) == (prompts[:20], completions[:20])
  assert reviews.generate(50, 4) != (prompts, completions)


def test_person_and_number_agree():
  for prompt, answer in zip(*reviews.generate(2_000, 0), strict=True):
    alone = prompt.startswith("I ")
    assert not re.search(
      r"\b(we|us)\b" if alone else r"\b(I(?! guess| suppose)|me)\b", answer, re.I
    )
    assert not re.search(r"\b(the \w+s was|the \w*[^s\s] were)\b", answer, re.I)


def test_conjunctions_agree_with_what_they_join():
  seen = set()
  for prompt, answer in zip(*reviews.generate(2_000, 0), strict=True):
    joined = re.search(r"([^.]*), (but|yet|and) ([^.]*)", answer)
    if joined:
      first, word, second = joined.groups()
      product = reviews.reward(prompt, first) * reviews.reward(prompt, second)
      assert (product < 0) == (word != "and")
      seen.add(word)
  assert seen == {"but", "yet", "and"}


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  from transformers import AutoTokenizer

  folder = tmp_path_factory.mktemp("tokenizer")
  word_tokenizer.write(folder, reviews.vocabulary())
  return AutoTokenizer.from_pretrained(folder)


def test_vocabulary_is_a_few_hundred_words(tokenizer):
  assert 250 <= len(reviews.vocabulary()) <= 500
  assert len(tokenizer) == len(reviews.vocabulary()) + 3
  assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


def test_every_text_comes_back_to_the_letter(tokenizer):
  for prompt, answer in zip(*reviews.generate(500, 0), strict=True):
    ids = tokenizer(prompt + answer).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.unk_token_id, tokenizer.bos_token_id}.intersection(ids[1:])
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + answer
    assert (
      ids == tokenizer(prompt).input_ids + tokenizer(answer, add_special_tokens=False).input_ids
    )
    assert len(ids) <= 64


def test_unknown_words_are_known_to_be_unknown(tokenizer):
  ids = tokenizer("I watched this zeppelin yesterday.").input_ids
  assert ids.count(tokenizer.unk_token_id) == 1


# --- The command ----------------------------------------------------------------------------------


def test_make_controlled_keeps_prompts_apart(tmp_path):
  command = [sys.executable, "scripts/make_controlled.py", f"--out={tmp_path / 'task'}"]
  sizes = ["--sft_rows=300", "--prompts=200", "--eval_prompts=100"]
  subprocess.run([*command, *sizes], cwd=ROOT, check=True, capture_output=True)

  def read(name):
    lines = (tmp_path / "task" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]

  sft, prompts, evaluation = map(read, ("sft.jsonl", "prompts.jsonl", "eval_prompts.jsonl"))
  assert [len(sft), len(prompts), len(evaluation)] == [300, 200, 100]
  assert len({row["prompt"] for row in sft + prompts + evaluation}) == 600
  assert all(row["completion"].startswith(" ") for row in sft)
  assert (tmp_path / "task" / "tokenizer" / "tokenizer.json").is_file()
  again = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, check=False)
  assert again.returncode == 1 and "sft.jsonl exists; add --force to replace it" in again.stderr
