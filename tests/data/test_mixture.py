"""Mixes: which rows of a source are used, how often, and in which order."""

import collections

import numpy as np
import pytest

from dpo_jax.data import batches, mixture, packing
from dpo_jax.data.examples import lengths
from dpo_jax.data.mixture import Mixture, Source
from dpo_jax.structs import UserError
from tests.support.small_rows import examples


def mix_of(sizes, weights, per_epoch=None):
  """A mixture of sources of these sizes, with the shares that the weights ask for."""
  per_epoch = per_epoch or mixture.apportion(sum(sizes), weights)
  starts = np.cumsum([0, *sizes[:-1]]).tolist()
  return Mixture(tuple("abc"[: len(sizes)]), tuple(starts), tuple(sizes), tuple(per_epoch))


def taken(mix, count, size=1, **kwargs):
  steps = batches.order(sum(mix.sizes), size, mixture=mix, **kwargs)
  return [int(i) for k in range(count) for i in steps[k]]


def test_a_description_is_a_path_or_options():
  given = {
    "a": "a.jsonl",
    "b-2": {"path": "b.jsonl", "fields": {"prompt": "q", "chosen": ""}, "verdict": "signed"},
    "c": {"path": "c", "count": 5},
    "d": {"path": "d", "fraction": 0.5},
  }
  assert mixture.read_sources(given, "data.mix") == (
    Source("a", "a.jsonl"),
    Source("b-2", "b.jsonl", fields={"prompt": "q"}, verdict="signed"),
    Source("c", "c", count=5),
    Source("d", "d", fraction=0.5),
  )
  assert mixture.read_sources({}, "data.mix") == ()


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"a/b": "x"}, r"has the name 'a/b'.*letters"),
    ({"sampled": "x"}, "none of by_source"),
    ({"a": 3}, "data.mix.a is 3; give a path"),
    ({"a": {"count": 3}}, "data.mix.a.path is ''"),
    ({"a": {"path": "x", "wieght": 3}}, "no option 'wieght'; did you mean 'weight'"),
    ({"a": {"path": "x", "weight": 0}}, "data.mix.a.weight is 0; it must be a number above 0"),
    ({"a": {"path": "x", "weight": float("nan")}}, "weight is nan"),
    ({"a": {"path": "x", "weight": "2"}}, "weight is '2'"),
    ({"a": {"path": "x", "count": 0}}, "count is 0; it must be a number of rows"),
    ({"a": {"path": "x", "count": 2.5}}, "count is 2.5"),
    ({"a": {"path": "x", "fraction": 1.5}}, "fraction is 1.5; it must be a share"),
    ({"a": {"path": "x", "fraction": 0.5, "count": 2}}, "a count and a fraction; keep one"),
    ({"a": {"path": "x", "weight": 1}, "b": "y"}, "data.mix.b has no weight and others have"),
    ({"a": {"path": "x", "fields": "q"}}, "data.mix.a.fields is 'q'"),
    ({"a": {"path": "x", "fields": {"promt": "q"}}}, "data.mix.a.fields.promt=.* mean 'prompt'"),
    ({"a": {"path": "x", "verdict": "index3"}}, "verdict is 'index3'; choose index1, index0"),
  ],
)
def test_a_description_that_cannot_be_used_is_refused(given, words):
  with pytest.raises(UserError, match=words):
    mixture.read_sources(given, "data.mix")


def test_an_evaluation_set_has_no_weight():
  with pytest.raises(UserError, match=r"data\.eval_sets\.a has no option 'weight'; known: path"):
    mixture.read_evaluation_sets({"a": {"path": "x", "weight": 1}}, "data.eval_sets")


def test_rows_are_drawn_without_replacement_by_seed_and_name():
  some = examples(40)
  drawn = [e.row for e in mixture.draw(some, Source("a", "x", count=10), 0)]
  assert len(set(drawn)) == 10 and drawn == sorted(drawn)
  again = [e.row for e in mixture.draw(some, Source("a", "x", fraction=0.25), 0)]
  assert again == drawn  # a quarter of 40 is 10, and seed and name are the same
  for name, seed in (("b", 0), ("a", 1)):
    assert [e.row for e in mixture.draw(some, Source(name, "x", count=10), seed)] != drawn
  assert mixture.draw(some, Source("a", "x"), 0) == some
  assert len(mixture.draw(some, Source("a", "x", fraction=0.001), 0)) == 1
  with pytest.raises(UserError, match="count is 41 and x has 40 rows to use"):
    mixture.draw(some, Source("a", "x", count=41), 0)


def test_examples_of_a_drawn_row_stay_together():
  some = [e._replace(row=e.row // 2) for e in examples(20)]  # two completions per row
  drawn = mixture.draw(some, Source("a", "x", count=3), 0)
  assert sorted(collections.Counter(e.row for e in drawn).values()) == [2, 2, 2]


def test_duplicates_are_rows_that_say_the_same():
  one, other = examples(2)
  again = one._replace(row=2)
  differs = [
    one._replace(row=3, scores=(1.0, 0.0)),
    one._replace(row=4, completions=one.completions[::-1]),
    one._replace(row=5, weight=2.0),
    one._replace(row=6, token_weights=tuple(np.zeros(len(x)) for x in one.completions)),
    # the same ids, cut at another place
    one._replace(row=7, prompt=one.prompt[:-1], completions=(
      np.concatenate([one.prompt[-1:], one.completions[0]]), one.completions[1])),
  ]  # fmt: skip
  seen = set()
  kept = mixture.drop_duplicates([one, other, again, *differs], seen)
  assert [e.row for e in kept] == [0, 1, 3, 4, 5, 6, 7]
  assert mixture.drop_duplicates([again], seen) == []


def test_a_prompt_of_one_token_does_not_name_a_text():
  bos = np.array([1], np.int32)
  texts = [e._replace(prompt=bos) for e in examples(3)]
  assert len(mixture.prompt_digests(texts)) == 3
  prompts = [e._replace(prompt=np.array([1, 2], np.int32)) for e in examples(3)]
  assert len(mixture.prompt_digests(prompts)) == 1


def test_parts_are_in_proportion_and_add_up():
  assert mixture.apportion(10, [1, 1, 1]) == [4, 3, 3]
  assert mixture.apportion(30, [2, 1]) == [20, 10]
  assert mixture.apportion(1000, [0.999, 0.001]) == [999, 1]
  assert mixture.apportion(7, [1e9, 1]) == [7, 0]


def test_every_epoch_has_the_shares_and_uses_the_rows_of_a_source_equally_often():
  # Of 8 and 4 examples at 1 : 3, an epoch of 12 has 3 of a and 9 of b.
  mix = mix_of((8, 4), (1, 3))
  assert mix.per_epoch == (3, 9) and mix.is_weighted
  some, counts = taken(mix, 12 * 8, seed=3), collections.Counter(dict.fromkeys(range(12), 0))
  for epoch in np.split(np.array(some), 8):
    assert sum(epoch < 8) == 3
    counts.update(epoch.tolist())
    for source in (range(8), range(8, 12)):
      uses = [counts[i] for i in source]
      assert max(uses) - min(uses) <= 1
  # Over 8 epochs: 24 uses of 8 examples, and 72 of 4.
  assert counts == {**dict.fromkeys(range(8), 3), **dict.fromkeys(range(8, 12), 18)}
  assert some[:12] != taken(mix, 12, seed=4)


def test_sources_of_one_size_are_in_different_orders():
  mix = mix_of((16, 16), (3, 1))
  passes = taken(mix, 32 * 8, seed=0)
  firsts = [i for i in passes if i < 16], [i - 16 for i in passes if i >= 16]
  assert firsts[0][:8] != firsts[1][:8]


def test_without_weights_the_order_is_that_of_the_examples_together():
  mix = mix_of((8, 4), None, per_epoch=(8, 4))
  assert not mix.is_weighted
  plain = batches.order(12, 4, seed=2)
  assert taken(mix, 9, size=4, seed=2) == [i for k in range(9) for i in plain[k]]


def test_balanced_batches_are_the_same_uses_in_another_order():
  some = examples(60, longest=30)
  mix, cost_B = mix_of((20, 40), (1, 1)), packing.costs(lengths(some), "shared")
  plain = taken(mix, 15, size=8, seed=1)
  balanced = taken(mix, 15, size=8, seed=1, cost_B=cost_B)
  assert plain != balanced
  # 15 batches of 8 are two epochs of 60.
  assert collections.Counter(plain) == collections.Counter(balanced)


def test_batches_of_a_mix_seek():
  some, mix = examples(24), mix_of((18, 6), (1, 2))
  settings = {"batch_size": 4, "seed": 5, "mixture": mix, "balance": True}
  stream = batches.batches(some, **settings)
  straight = [next(stream) for _ in range(9)]
  for start in (1, 8):
    resumed = next(batches.batches(some, start=start, **settings))
    np.testing.assert_equal(resumed._asdict(), straight[start]._asdict())


def test_a_mixture_is_of_the_examples_that_are_left():
  sources = [Source("a", "x", weight=1.0), Source("b", "y", weight=3.0)]
  some = [e for e in examples(12) if e.row not in (0, 11)]  # held out
  mix = Mixture.make(sources, [0, 8], some)
  # 10 examples at 1 : 3 are 2.5 and 7.5; of equal remainders the first source's is rounded up.
  assert mix == (("a", "b"), (0, 8), (7, 3), (3, 7))
  np.testing.assert_allclose(mix.rates(), [3 / 7] * 7 + [7 / 3] * 3)
  assert mix.name_rows([1, 7, 8, 10]) == "1 of a, 7 of a, 0 of b, 2 of b"
  assert mix.describe() == (
    "an epoch has 10 examples: a 3 (0.429 passes over 7), b 7 (2.33 passes over 3)"
  )
  with pytest.raises(UserError, match=r"data\.mix\.b has no row left"):
    Mixture.make(sources, [0, 8], some[:7])
  with pytest.raises(UserError, match=r"weight of data\.mix\.a gives it none of the 10"):
    Mixture.make([sources[0]._replace(weight=0.01), sources[1]], [0, 8], some)
