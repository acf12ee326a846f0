"""Numbers in rows: margins and scores, verdicts of comparisons, weights."""

import pytest

from dpo_jax.data import detection
from dpo_jax.data.fields import Preference, RowError
from dpo_jax.structs import UserError
from tests.support.messages import assistant, convert, user


@pytest.mark.parametrize(
  ("fields", "scores"),
  [
    ({}, ()),
    ({"margin": None, "chosen_score": None}, ()),
    ({"margin": 2}, (2.0, 0.0)),
    ({"margin": 0}, (0.0, 0.0)),
    ({"chosen_score": 1.5, "rejected_score": -3}, (1.5, -3.0)),
    ({"chosen_reward": -1.0, "rejected_reward": 2.0}, (-1.0, 2.0)),
    ({"chosen_score": 1, "rejected_score": 0, "chosen_reward": 9, "rejected_reward": 9}, (1, 0)),
    ({"margin": 3, "chosen_score": 1, "rejected_score": 0}, (3.0, 0.0)),
  ],
)
@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
  ],
)
def test_pairs_may_say_by_how_much(row, fields, scores):
  row = row | fields
  assert detection.detect_kind(row) == "pairs"
  for kind in ("pairs", "ranked"):
    assert convert(row, kind=kind)[1].scores == scores
  # Unpaired and SFT training do not use the scores of a pair.
  assert convert(row, kind="unpaired")[1].scores == (1.0, 0.0)
  assert convert(row, kind="text")[1].scores == ()


@pytest.mark.parametrize(
  ("fields", "line"),
  [
    ({"margin": -0.5}, r"field margin is -0\.5; chosen must be better by 0 or more"),
    ({"margin": "2"}, r'field margin is "2", not a finite number'),
    ({"margin": float("nan")}, r"field margin is NaN, not a finite number"),
    ({"margin": float("inf")}, r"field margin is Infinity, not a finite number"),
    ({"margin": True}, r"field margin is true, not a finite number"),
    ({"margin": 10**400}, r"field margin is 1000.*\.\.\., not a finite number"),
    ({"chosen_score": 1}, r"field rejected_score is missing; the row has chosen, chosen_score"),
    ({"chosen_score": 1, "rejected_score": None}, r"field rejected_score is null, not a finite"),
    ({"chosen_reward": "high", "rejected_reward": 0}, r'field chosen_reward is "high", not a'),
  ],
)
def test_broken_scores_are_named(fields, line):
  with pytest.raises(UserError, match=line):
    convert({"prompt": "a", "chosen": "b", "rejected": "c"} | fields)


# --- compared answers and weights ---------------------------------------------------------------


COMPARED = {"prompt": "p", "answer_a": "a", "answer_b": "b"}


@pytest.mark.parametrize(
  ("said", "better", "margin"),
  [
    (1, "a", 1),
    (2, "b", 1),
    (2.0, "b", 1),  # Parquet has whole columns of floats where one is null
    ("1", "a", 1),
    ("A", "a", 1),
    (" model_b ", "b", 1),
    ("Response 2", "b", 1),
    ("a-is-better", "a", 1),
    ("b is slightly better", "b", 0.5),
    ("b-is-clearly-better", "b", 1),
    ([1, 1, 1], "a", 1),
    ([2, 1, 2], "b", 1 / 3),
    ([1, 0, None], "a", 0.5),
    (["a-is-better", "b-is-slightly-better"], "a", 0.25),
  ],
)
def test_the_better_of_two_is_chosen_and_counts_by_how_sure_the_judges_are(said, better, margin):
  name, found = convert(COMPARED | {"preference": said})
  other = {"a": "b", "b": "a"}[better]
  expected = Preference("p", (better, other), (pytest.approx(margin), 0.0), pytest.approx(margin))
  assert (name, found) == ("compared", expected)


@pytest.mark.parametrize(
  ("said", "reason"),
  [
    (0, "tie"),
    ("tie", "tie"),
    ("Neither", "tie"),
    ([1, 2], "tie"),
    ([0, 0], "tie"),
    (None, "no verdict"),
    ([None], "no verdict"),
    ([], "no verdict"),
  ],
)
def test_judges_who_do_not_decide(said, reason):
  with pytest.raises(RowError, match=reason):
    convert(COMPARED | {"preference": said})


@pytest.mark.parametrize("said", [3, True, "c", "a or b", "better", 1.5, {"a": 1}, [[1]]])
def test_a_verdict_that_is_none_is_named(said):
  with pytest.raises(UserError, match=r"field preference is .*; it must be 1, 2 or 0, or a, b"):
    convert(COMPARED | {"preference": said})


def test_compared_answers_may_be_messages_and_serve_other_kinds():
  row = {
    "prompt": [{"role": "user", "content": "p"}],
    "answer_a": [{"role": "assistant", "content": "a"}],
    "answer_b": "b",
    "preference": 2,
  }
  name, found = convert(row, kind="unpaired")
  assert name == "compared" and found.scores == (1.0, 0.0)
  assert [answer[0]["content"] for answer in found.completions] == ["b", "a"]
  assert convert(COMPARED | {"preference": 1}, kind="ranked")[1].completions == ("a", "b")


def test_a_row_may_say_how_much_it_counts():
  pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
  assert convert(pair)[1].weight == 1
  assert convert(pair | {"weight": 2})[1].weight == 2
  assert convert(pair | {"weight": None})[1].weight == 1
  half = COMPARED | {"preference": "a-is-slightly-better", "weight": 3}
  assert convert(half)[1].weight == 1.5
  for value, line in ((0, "must be above 0"), (-1, "above 0"), ("2", "not a finite number")):
    with pytest.raises(UserError, match=line):
      convert(pair | {"weight": value})
