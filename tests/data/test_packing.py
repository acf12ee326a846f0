"""Dealing examples to groups, and how full the rows of groups then are."""

import numpy as np
import pytest

from dpo_jax.benchmarking import timing
from dpo_jax.data import batches, packing
from dpo_jax.data.examples import Example, Measured, lengths


def measured(*costs, completions=2):
  """Lengths of examples without a prompt, whose completions are about equally long."""
  size = len(costs)
  tokens = np.zeros((size, completions), np.int64)
  for k in range(completions):
    tokens[:, k] = [(cost + k) // completions for cost in costs]
  return Measured(np.ones(size, np.int64), tokens, tokens)


def loads(some, group_B, groups, layout="shared"):
  return np.bincount(group_B, packing.costs(some, layout), minlength=groups).tolist()


def test_examples_are_dealt_by_hand():
  # Largest first, to the least full group: 9 | 8, then 7 to the second, 6 to the first, and so on:
  # {9, 6, 4} and {8, 7, 5} have 19 and 20 tokens, and no exchange does better.
  some = measured(4, 5, 6, 7, 8, 9)
  group_B = packing.deal(some, "shared", 2)
  assert sorted(loads(some, group_B, 2)) == [19, 20]
  assert np.bincount(group_B).tolist() == [3, 3]


def test_the_fullest_group_exchanges_examples():
  # 8, 7 and 6 go to three groups, then 5, 4 and 4 to the least full: 8 + 4, 7 + 4, 6 + 5.
  # With 3 more the greedy rule ends at 14, 12, 11 or worse, while 12, 12, 13 exist.
  some = measured(8, 7, 6, 5, 4, 4, 3)
  assert max(loads(some, packing.deal(some, "shared", 3), 3)) == 13


def test_scored_tokens_are_dealt_as_evenly_as_tokens():
  # Four examples of 12 tokens, of which two score 10 each and two 2: every group gets one of both.
  tokens = np.full((4, 2), 6)
  scored = np.array([[5, 5], [5, 5], [1, 1], [1, 1]])
  group_B = packing.deal(Measured(np.ones(4, np.int64), tokens, scored), "shared", 2)
  assert np.bincount(group_B, scored.sum(1)).tolist() == [12, 12]


def test_a_group_has_one_example_more_than_its_share_at_most():
  # By tokens alone, one group would have the long example and the other the seven short ones.
  some = measured(100, 2, 2, 2, 2, 2, 2, 2)
  for layout, counts in (("shared", [3, 5]), ("padded", [4, 4])):
    assert sorted(np.bincount(packing.deal(some, layout, 2))) == counts


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("size,groups", [(1, 4), (7, 4), (8, 8), (40, 4), (300, 2)])
def test_no_group_has_many_more_examples_than_another(layout, size, groups):
  rng = np.random.default_rng(size)
  some = measured(*rng.integers(2, 90, size).tolist())
  count_G = np.bincount(packing.deal(some, layout, groups), minlength=groups)
  # Padded rows are as many as examples, so one more would be a row more for every group.
  assert count_G.sum() == size and count_G.max() <= -(-size // groups) + (layout != "padded")


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_rows_of_a_group_have_its_examples_alone(layout):
  some = measured(*np.random.default_rng(0).integers(2, 60, 30).tolist())
  places = packing.place(some, layout, 64, groups=4)
  rows = packing.round_up(places.rows, 8)
  numbered = packing.assign_rows(places, rows, 4)
  assert places.rows % 4 == 0
  assert (numbered.row_B // (rows // 4)).tolist() == places.group_B.tolist()


def test_one_group_is_packed_best_fit():
  # Largest first: 44 | 34, then 30 to the row of 34, which it fills, and 20 to that of 44.
  some = measured(30, 34, 20, 44)
  assert packing.deal(some, "shared", 1).tolist() == [0] * 4
  places = packing.place(some, "shared", 64)
  assert (places.rows, places.row_B.tolist()) == (2, [1, 1, 0, 0])


@pytest.fixture(scope="module")
def pairs():
  """Pairs with lengths like those of UltraFeedback."""
  rows = timing.make_pairs(
    64, pairs=1024, mean_length=500, prompt_fraction=0.35, sigma=0.8, max_length=2048
  )
  return [
    Example(
      np.array(row["prompt_ids"]),
      tuple(np.array(row[name]) for name in ("chosen_ids", "rejected_ids")),
      row=number,
    )
    for number, row in enumerate(rows)
  ]


# With one pair for every group the longest decides: mean over longest is 0.36 (of scored tokens).
@pytest.mark.parametrize("groups,size,least", [(4, 32, 0.85), (8, 32, 0.8)])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_groups_of_few_pairs_are_full(pairs, layout, groups, size, least):
  how = batches.Batching(layout=layout, groups=groups)
  stream = batches.batches(pairs, batch_size=size, batching=how, balance=True)
  scored = room = tokens = taken = 0
  shapes = set()
  for batch, _ in zip(stream, range(8), strict=False):
    scored, room = scored + (batch.weight_NL > 0).sum(), room + batch.scored_GM.size
    tokens, taken = tokens + (batch.pair_NL >= 0).sum(), taken + batch.pair_NL.size
    shapes.add((batch.pair_NL.shape, batch.scored_GM.shape))
  assert scored / room >= least and tokens / taken >= least
  assert len(shapes) <= 2


def test_the_usual_shape_is_that_of_most_batches(pairs):
  how = batches.Batching(groups=8, per_line=9)
  settings = {"batch_size": 64, "batching": how, "accumulate": 2, "balance": True}
  usual = batches.usual_shape(lengths(pairs), **settings)
  batch = next(batches.batches(pairs, **settings))
  assert batch.ids_NL.shape == (2, usual.rows, usual.length)
  assert batch.scored_GM.shape == (2, 8, usual.scored)
  assert batch.sequence_GTW is not None
  assert batch.sequence_GTW.shape == (2, 8, usual.lines, usual.width)


def test_lengths_alone_decide(pairs):
  some = pairs[:32]
  first = packing.place(lengths(some), "shared", 3456, groups=8)
  again = packing.place(lengths(list(some)), "shared", 3456, groups=8)
  assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
