"""Numbers in rows: margins and scores, verdicts of comparisons, weights."""

import pytest

from dpo_jax.data import detection
from dpo_jax.data.fields import BadRow
from dpo_jax.structs import UserError
from tests.support.messages import assistant, convert, user


@pytest.mark.parametrize(
  ("fields", "scores"),
  [
    ({}, ()),
    ({"margin": None, "chosen_score": None}, ()),
    ({"margin": 2}, (2.0, 0.0)),
    ({"margin": "2"}, (2.0, 0.0)),  # as in CSV
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
    ({"margin": "two"}, r'field margin is "two", not a finite number'),
    ({"margin": float("nan")}, r"field margin is NaN, not a finite number"),
    ({"margin": float("inf")}, r"field margin is Infinity, not a finite number"),
    ({"margin": True}, r"field margin is true, not a finite number"),
    ({"margin": 10**400}, r"field margin is 1000.*\.\.\., not a finite number"),
    ({"chosen_score": 1}, r"field rejected_score is missing; the row has chosen, chosen_score"),
    ({"chosen_score": 1, "rejected_score": None}, r"field rejected_score is missing"),
    ({"chosen_reward": "high", "rejected_reward": 0}, r'field chosen_reward is "high", not a'),
  ],
)
def test_broken_scores_are_named(fields, line):
  with pytest.raises(BadRow, match=line):
    convert({"prompt": "a", "chosen": "b", "rejected": "c"} | fields, scores=True)


# --- compared answers and weights ---------------------------------------------------------------


COMPARED = {"prompt": "p", "answer_a": "a", "answer_b": "b"}


def test_compared_answers_may_be_messages_and_serve_other_kinds():
  row = {
    "prompt": [{"role": "user", "content": "p"}],
    "answer_a": [{"role": "assistant", "content": "a"}],
    "answer_b": "b",
    "preference": "b",
  }
  name, found = convert(row, kind="unpaired")
  assert name == "compared" and found.scores == (1.0, 0.0)
  assert [answer[0]["content"] for answer in found.completions] == ["b", "a"]
  assert convert(COMPARED | {"preference": "a"}, kind="ranked")[1].completions == ("a", "b")


def test_a_row_may_say_how_much_it_counts():
  pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
  assert convert(pair)[1].weight == 1
  assert convert(pair | {"weight": 2})[1].weight == 2
  assert convert(pair | {"weight": None})[1].weight == 1
  half = COMPARED | {"preference": "a-is-slightly-better", "weight": 3}
  assert convert(half)[1].weight == 1.5
  for value, line in ((0, "must be above 0"), (-1, "above 0"), ("two", "not a finite number")):
    with pytest.raises(UserError, match=line):
      convert(pair | {"weight": value})
