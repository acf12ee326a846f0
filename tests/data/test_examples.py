"""Examples are truncated, split by prompt and given mismatched completions as documented."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.examples import Example, fill_up, lengths, split, truncate, with_mismatched
from dpo_jax.structs import UserError
from tests.support.small_rows import examples


def ids(*values):
  return np.array(values, np.int32)


# --- truncation -----------------------------------------------------------------------------------


def test_weights_are_cut_like_the_tokens_they_belong_to():
  weights = np.float32([0, 1, 0.5]), np.float32([1])
  texts = ids(1, 2), (ids(3, 4, 5), ids(6))
  for window, expected in ((4, [[0, 1], [1]]), (5, [[0, 1, 0.5], [1]]), (None, [[0, 1, 0.5], [1]])):
    kept = truncate(*texts, weights, max_length=window, prompt_floor=2, mode="cut")
    assert kept is not None and [one.tolist() for one in kept[2]] == expected


def cut(prompt, *completions, **kwargs):
  out = truncate(ids(*prompt), [ids(*a) for a in completions], **kwargs)
  return out and (out[0].tolist(), [a.tolist() for a in out[1]], out[3])


def test_what_fits_is_left_alone():
  assert cut([1, 2, 3], [4, 5], [6], max_length=5) == ([1, 2, 3], [[4, 5], [6]], ())
  assert cut([1] * 99, [4], max_length=None) == ([1] * 99, [[4]], ())


def test_the_prompt_is_cut_from_the_left_and_keeps_its_bos():
  kept = cut([1, 2, 3, 4, 5, 6], [7, 8], [9], max_length=6, prompt_floor=2, bos_id=1)
  assert kept == ([1, 4, 5, 6], [[7, 8], [9]], ("prompt",))
  kept = cut([1, 2, 3, 4, 5, 6], [7, 8], [9], max_length=6, prompt_floor=2)
  assert kept == ([3, 4, 5, 6], [[7, 8], [9]], ("prompt",))


def test_below_the_floor_a_pair_is_dropped_or_both_answers_cut_alike():
  completions = [11, 12, 13, 14, 15, 99], [21, 22, 99]  # 99 ends a text
  where = {"max_length": 8, "prompt_floor": 4}
  assert cut([1, 2, 3, 4, 5, 6], *completions, **where) is None
  kept = cut([1, 2, 3, 4, 5, 6], *completions, mode="cut", **where)
  # Four tokens of the prompt leave four for each answer; the cut one has lost its end token.
  assert kept == ([3, 4, 5, 6], [[11, 12, 13, 14], [21, 22, 99]], ("prompt", "answer"))


def test_the_floor_never_takes_more_than_half_the_window():
  kept = cut(range(1, 101), [1, 2, 3, 4], [5], max_length=8, prompt_floor=64)
  assert kept == ([97, 98, 99, 100], [[1, 2, 3, 4], [5]], ("prompt",))


def test_truncation_has_two_modes():
  with pytest.raises(UserError, match="unknown truncation 'left'; choose 'drop' or 'cut'"):
    cut([1], [2], max_length=8, mode="left")


@settings(max_examples=100, deadline=None)
@given(
  prompt=st.integers(1, 30),
  a=st.integers(1, 30),
  b=st.integers(1, 30),
  window=st.integers(2, 40),
  floor=st.integers(0, 40),
  mode=st.sampled_from(["drop", "cut"]),
)
def test_truncation_always_fits_and_keeps_ends_of_prompts_and_starts_of_answers(
  prompt, a, b, window, floor, mode
):
  texts = np.arange(prompt), (np.arange(a), np.arange(b))
  out = truncate(*texts, max_length=window, prompt_floor=floor, mode=mode, bos_id=0)
  if out is None:
    assert mode == "drop" and prompt + max(a, b) > window
    return
  kept, completions, _, cuts = out
  assert len(kept) + max(map(len, completions)) <= window
  assert len(kept) >= 1 and min(map(len, completions)) >= 1
  assert kept[-1] == prompt - 1
  assert ("prompt" in cuts) == (len(kept) < prompt)
  limit = max(map(len, completions))
  for original, answer in zip(texts[1], completions, strict=True):
    assert answer.tolist() == original[:limit].tolist()


# --- mismatched completions -----------------------------------------------------------------------


def judged_examples(prompts):
  """An answer to each of these prompts: answer i is i, a few times."""
  return [
    Example(ids(p), (ids(*[i] * (1 + i % 6)),), 1.0 + i, i, (i % 2,)) for i, p in enumerate(prompts)
  ]


@given(
  prompts=st.lists(st.integers(0, 4), min_size=2, max_size=30).filter(lambda x: len(set(x)) > 1),
  seed=st.integers(0, 99),
)
def test_a_mismatched_answer_is_to_another_prompt(prompts, seed):
  some = judged_examples(prompts)
  found = with_mismatched(some, max_length=4, seed=seed)
  whole = with_mismatched(some, seed=seed)
  assert len(found) == len(whole) == len(some)
  for before, cut, after in zip(some, found, whole, strict=True):
    assert (after.weight, after.row, after.prompt) == (before.weight, before.row, before.prompt)
    assert after.completions[0] is before.completions[0] and after.scores == before.scores * 2
    source = some[int(after.completions[1][0])]
    assert source.prompt.tolist() != before.prompt.tolist()
    assert after.completions[1].tolist() == source.completions[0].tolist()
    # A window of 4 and a prompt of 1 token leave 3, for this one alone.
    assert cut.completions[1].tolist() == source.completions[0][:3].tolist()
    assert cut._replace(completions=after.completions) == after
  for known, read in zip(lengths(found), lengths(list(found)), strict=True):
    assert known.tolist() == read.tolist(), "lengths are known before anything is read"


def test_a_mismatched_answer_keeps_its_context():
  some = [
    Example(ids(1), (ids(5, 6),), scores=(1,)),
    Example(ids(2), (ids(7, 8, 9),), scores=(0,), token_weights=(np.float32([0, 0.5, 1]),)),
  ]
  for window, left in ((9, 3), (3, 2), (2, 1)):
    found = with_mismatched(some, max_length=window)
    (own, other), (mine, theirs) = (example.token_weights for example in found)
    assert own.tolist() == [1, 1] and other.tolist() == [0, 0.5, 1][:left]
    assert mine.tolist() == [0, 0.5, 1] and theirs.tolist() == [1, 1][:left]
    scored = lengths(found).scored_BK.tolist()
    assert scored == [[2, left - 1], [2, min(left, 2)]] == lengths(list(found)).scored_BK.tolist()


def test_an_absent_answer_has_no_weights_and_scores_nothing():
  two = Example(ids(1), (ids(5, 6), ids(7)), token_weights=(np.float32([0, 1]), np.float32([1])))
  (filled,) = fill_up([two], 3)
  assert [weights.tolist() for weights in filled.token_weights] == [[0, 1], [1], []]
  assert lengths([filled]).scored_BK.tolist() == [[1, 1, 0]]
  assert fill_up([two._replace(token_weights=())], 3)[0].token_weights == ()


def test_mismatched_answers_are_a_function_of_examples_and_seed():
  some = judged_examples(range(40))

  def sources(some, seed):
    mismatched = with_mismatched(some, seed=seed)
    return [int(example.completions[1][0]) for example in mismatched]

  first = sources(some, 1)
  assert sources(some, 1) == first != sources(some, 2)
  assert sorted(first) == list(range(40)), "where prompts differ every answer serves once"
  assert sources(with_mismatched(some, seed=2), 1) == first
  assert with_mismatched([], seed=1) == []


def test_answers_to_one_prompt_alone_cannot_be_mismatched():
  with pytest.raises(UserError, match="all 3 completions have the same prompt, and kto needs"):
    with_mismatched(judged_examples([7, 7, 7]))


# --- held-out examples ----------------------------------------------------------------------------


def test_split_keeps_a_prompt_on_one_side():
  some = [e._replace(prompt=np.array([e.row // 3], np.int32)) for e in examples(60)]
  train, held_out = split(some, 0.2, seed=3)
  sides = [{int(e.prompt[0]) for e in side} for side in (train, held_out)]
  assert len(train) + len(held_out) == 60 and len(sides[1]) == 4
  assert not sides[0] & sides[1]
  again = split(some, 0.2, seed=3)[1]
  assert [e.row for e in again] == [e.row for e in held_out]
  assert {e.row for e in split(some, 0.2, seed=4)[1]} != {e.row for e in held_out}
  assert split(some, 0.0) == (some, [])
  line = "0.01 of 20 distinct prompts leaves one side.*data.eval_fraction=0 .*data.eval_path"
  with pytest.raises(UserError, match=line):
    split(some, 0.01)


def test_texts_of_one_prompt_are_split_one_by_one():
  some = [e._replace(prompt=np.array([1], np.int32)) for e in examples(20)]
  train, held_out = split(some, 0.2)
  assert len(held_out) == 4 and sorted(e.row for e in train + held_out) == list(range(20))
  with pytest.raises(UserError, match=r"0.01 of 20 rows \(7 dropped: too long\) leaves one side"):
    split(some, 0.01, dropped={"too long": 7})
