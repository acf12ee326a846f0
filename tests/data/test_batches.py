"""Batch k is the same whether a run resumes or not, and little of it is padding."""

import collections
import itertools

import jax
import numpy as np
import pytest

from dpo_jax.data import batches as data_batches
from dpo_jax.data import collate, encode, packing
from dpo_jax.data.examples import Example, Lazy, Measured, lengths, split, with_mismatched
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import TokenBatch, UserError
from tests.support.small_rows import examples


def data_rows(batch: TokenBatch, completions=2) -> list[int]:
  """Data rows of a batch, each named once."""
  rows = batch.row_NS.reshape(-1, completions)[:, 0]
  return sorted(rows[rows >= 0].tolist())


def shapes(batch: TokenBatch):
  return tuple(x.shape for x in jax.tree.leaves(batch))


def judged(label=True, prompt="the answer is", completion=" good"):
  return {"prompt": prompt, "completion": completion, "label": label}


# --- batches --------------------------------------------------------------------------------------


def apart(layout="shared", row_length=0, groups=1, per_line=0, **others):
  """Keyword arguments with those of rows as one `Batching`."""
  return {"batching": data_batches.Batching(layout, row_length, groups, per_line), **others}


def take(count, some, **kwargs):
  stream = data_batches.batches(some, **apart(**kwargs))
  return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_batch_k_is_the_same_however_one_gets_there(name):
  some = examples(37)
  kwargs = {"batch_size": 8, "accumulate": 2, "seed": 5, "layout": name, "groups": 2}
  straight = take(12, some, **kwargs)
  for start in (0, 1, 7, 11):
    resumed = take(1, some, start=start, **kwargs)[0]
    np.testing.assert_equal(resumed._asdict(), straight[start]._asdict())
  other = take(1, some, **(kwargs | {"seed": 6}))[0]
  assert data_rows(other) != data_rows(straight[0])


def test_an_epoch_is_every_example_once_and_in_another_order_than_the_last():
  some = examples(24)
  got = [data_rows(batch) for batch in take(12, some, batch_size=4, seed=1)]
  first, second = got[:6], got[6:]
  assert all(sorted(itertools.chain(*epoch)) == list(range(24)) for epoch in (first, second))
  assert first != second
  ordered = take(2, some, batch_size=4, shuffle=False)
  assert [data_rows(batch) for batch in ordered] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def varied(count, seed=0):
  """Pairs with the lengths of helpful dialogues: log-normal, a factor of two and more."""
  rng = np.random.default_rng(seed)

  def tokens(mean):
    return int(np.clip(mean * np.exp(0.9 * rng.standard_normal() - 0.4), 2, 600))

  zeros = np.zeros(600, np.int32)
  return [
    Example(zeros[: tokens(120)], (zeros[: tokens(50)], zeros[: tokens(50)]), 1.0, row)
    for row in range(count)
  ]


@pytest.mark.parametrize(("count", "size"), [(50, 8), (48, 8), (7, 3), (5, 5), (4, 9), (9000, 512)])
def test_balanced_batches_are_the_same_rows_in_another_order(count, size):
  """Every epoch has every row once, and a batch that spans two epochs exchanges nothing."""
  cost_B = np.random.default_rng(0).integers(1, 1000, count)
  plain = data_batches.order(count, size, seed=1)
  balanced = data_batches.order(count, size, seed=1, cost_B=cost_B)
  batches = [balanced[k] for k in range(3 * count // size + 2)]
  assert all(len(batch) == size for batch in batches)
  for epoch in range(2):
    whole = range(-(-epoch * count // size), (epoch + 1) * count // size)
    exchanged, kept = (
      sorted(row for k in whole for row in steps[k]) for steps in (balanced, plain)
    )
    assert exchanged == kept
    straddling = (epoch + 1) * count // size
    if (epoch + 1) * count % size:
      assert sorted(balanced[straddling]) == sorted(plain[straddling])
  # Batch k does not depend on which batches were read before.
  again = data_batches.order(count, size, seed=1, cost_B=cost_B)
  for k in (len(batches) - 1, 0, len(batches) // 2):
    assert again[k] == batches[k]


def test_balanced_batches_have_as_many_tokens_each():
  some = varied(3000)
  cost_B = packing.costs(lengths(some), "shared")

  def tokens(steps):
    return np.array([cost_B[steps[k]].sum() for k in range(40)])

  plain = tokens(data_batches.order(3000, 32, seed=0))
  balanced = tokens(data_batches.order(3000, 32, seed=0, cost_B=cost_B))
  assert plain.std() / plain.mean() > 0.1
  assert balanced.std() / balanced.mean() < 0.01


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_little_of_balanced_rows_is_padding(size):
  some = varied(3000)
  real, room, seen = 0, 0, set()
  for batch in take(20, some, batch_size=size, balance=True):
    real, room = real + (batch.pair_NL >= 0).sum(), room + batch.pair_NL.size
    seen.add(shapes(batch))
  assert real / room > 0.95 and len(seen) <= 3


def test_balance_knows_no_layout_micro_batches_devices_or_hosts():
  some = varied(200)
  how = {"batch_size": 12, "seed": 2, "row_length": 2048, "balance": True}
  plain = [data_rows(batch) for batch in take(5, some, **how)]
  for kwargs in ({"accumulate": 3}, {"groups": 4}, {"layout": "padded"}, {"layout": "packed"}):
    assert [data_rows(batch) for batch in take(5, some, **how, **kwargs)] == plain
  assert [data_rows(batch) for batch in take(2, some, start=3, **how)] == plain[3:]
  shares = [take(5, some, share=(i, 2), groups=2, **how) for i in range(2)]
  for rows, *parts in zip(plain, *shares, strict=True):
    assert sorted(itertools.chain(*map(data_rows, parts))) == rows
  # Micro-batches have as many tokens each, too.
  (batch,) = take(1, some, accumulate=4, **how | {"batch_size": 48})
  tokens_A = (batch.pair_NL >= 0).sum((1, 2))
  assert tokens_A.max() / tokens_A.min() < 1.1


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_divide_every_batch_among_them(name, hosts):
  """The shares of all hosts together are the batch of one host, even if some have only padding."""
  some = examples(23)
  for size, accumulate in ((8, 2), (2, 1)):
    how = {"batch_size": size, "accumulate": accumulate, "groups": 4, "layout": name, "seed": 1}
    whole = take(4, some, start=3, **how)
    shares = [take(4, some, start=3, share=(i, hosts), **how) for i in range(hosts)]
    for batch, *parts in zip(whole, *shares, strict=True):
      together = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
      jax.tree.map(np.testing.assert_array_equal, together, batch)
  evaluated = apart(batch_size=5, groups=4, layout=name)
  parts = [data_batches.eval_batches(some, share=(i, hosts), **evaluated) for i in range(hosts)]
  for batch, *shares in zip(data_batches.eval_batches(some, **evaluated), *parts, strict=True):
    together = jax.tree.map(lambda *x: np.concatenate(x), *shares)
    jax.tree.map(np.testing.assert_array_equal, together, batch)


def test_a_host_reads_its_own_examples_alone():
  some, seen = examples(16), []
  lazy = Lazy(lambda i: seen.append(i) or some[i], lengths(some))
  collate.collate(lazy, row_length=128, groups=2, share=(1, 2))
  assert 4 <= len(set(seen)) <= 12  # half of them, and the first


def test_hosts_that_cannot_share_are_refused():
  for share in ((0, 3), (2, 2), (-1, 2)):
    with pytest.raises(UserError, match=r"host -?\d of \d cannot have its share of 4 groups"):
      data_batches.batches(examples(8), **apart(batch_size=4, groups=4, share=share))


def test_order_does_not_know_layout_micro_batches_or_devices():
  some = examples(50)
  plain = [data_rows(batch) for batch in take(5, some, batch_size=12, seed=2)]
  for kwargs in ({"accumulate": 3}, {"groups": 4}, {"layout": "padded"}, {"layout": "packed"}):
    batches = take(5, some, batch_size=12, seed=2, **kwargs)
    assert [data_rows(batch) for batch in batches] == plain
    assert all(len(x) == kwargs.get("accumulate", 1) for x in jax.tree.leaves(batches))


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_few_shapes(name):
  some = examples(400, longest=40)
  seen = collections.Counter(
    shapes(batch) for batch in take(100, some, batch_size=32, layout=name, accumulate=2)
  )
  assert len(seen) <= 3 and seen.most_common(1)[0][1] >= 70


def test_fewer_examples_than_a_batch_are_repeated():
  (batch,) = take(1, examples(3), batch_size=6)
  assert data_rows(batch) == [0, 0, 1, 1, 2, 2]


def test_a_batch_is_whole_micro_batches():
  with pytest.raises(UserError, match="batch size 10 is not divisible by 4 micro-batches; try 8"):
    data_batches.batches(examples(20), batch_size=10, accumulate=4)


def test_a_row_that_is_too_short_is_found_before_the_first_batch():
  some = [*examples(50, longest=5), *examples(1, longest=90)]
  with pytest.raises(UserError, match=r"data row 0 takes .* rows have 16; raise row_length"):
    data_batches.batches(some, **apart(batch_size=4, row_length=16))


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_evaluation_sees_every_example_once_in_one_shape(name, groups):
  some = examples(21)
  batches = list(data_batches.eval_batches(some, **apart(batch_size=8, layout=name, groups=groups)))
  assert len({shapes(batch) for batch in batches}) == 1
  got = [data_rows(batch) for batch in batches]
  assert got == [list(range(8)), list(range(8, 16)), list(range(16, 21))]
  assert sum(float(batch.weight_NS.sum()) for batch in batches) == 2 * 21
  assert list(data_batches.eval_batches([], batch_size=8)) == []


def test_padding_is_counted_for_each_layout():
  # P - 1 + n + n: 5 tokens shared, 7 packed; two rows of 4 when padded.

  def ids(n):
    return np.ones(n, np.int32)

  some = [Example(ids(3), (ids(1), ids(2)), row=i) for i in range(4)]

  def count(name, length):
    return collate.count_padding(some, batch_size=2, layout=name, row_length=length)

  assert count("shared", 10) == 0
  assert count("shared", 12) == 2 * 2
  assert count("packed", 7) == 0
  assert count("padded", None) == 4 * (2 * 8 - 7), "rows of 8, the least multiple above 4"


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_judged_answers_make_batches(rows_file, tokenizer, name):
  rows = [judged(i % 2 == 1, f"{'a' * i} question", " good" * (i + 1)) for i in range(8)]
  some, _, _ = encode.load_examples(rows_file(rows), tokenizer, kind="unpaired")
  some = with_mismatched(some, max_length=40)
  (batch,) = data_batches.eval_batches(some, **apart(batch_size=8, layout=name))
  row_B2, score_B2 = batch.row_NS.reshape(-1, 2), batch.score_NS.reshape(-1, 2)
  there_B = row_B2[:, 0] >= 0
  assert sorted(row_B2[there_B, 0].tolist()) == list(range(8))
  assert (row_B2[there_B] % 2 == score_B2[there_B]).all(), "odd rows are desirable"


# --- real files -----------------------------------------------------------------------------------


def test_real_judged_answers_make_batches(shared_data):
  real = load_tokenizer(shared_data / "tokenizers" / "stories260k")
  path = shared_data / "preferences" / "lf_kto_en.open.json"
  some, ledger, form = encode.load_examples(path, real, kind="unpaired", max_length=1024)
  assert form == "chat with label" and ledger.rows == 236
  assert ledger.pairs == len(some) == sum(ledger.labels.values())
  assert ledger.rows == ledger.pairs + ledger.dropped.total()
  train, held_out = (with_mismatched(side, max_length=1024) for side in split(some, 0.2))
  assert Measured.concatenate(train, held_out).longest().max() <= 1024
  batch = take(1, train, batch_size=16)[0]
  assert len(data_rows(batch)) == 16


@pytest.mark.parametrize(
  ("file", "dropped"),
  [
    ("rasbt_instruction_pref.open.json", {"equal completions": 5}),
    (
      "hh_helpful_base_test.open.jsonl",
      {"prompts differ": 8, "empty completion": 3, "too long": 109},
    ),
  ],
)
def test_real_preferences_make_batches(shared_data, file, dropped):
  real = load_tokenizer(shared_data / "tokenizers" / "stories260k")
  some, ledger, _ = encode.load_examples(shared_data / "preferences" / file, real, max_length=512)
  assert ledger.dropped == dropped
  assert ledger.pairs == len(some) == ledger.rows - sum(dropped.values())
  assert ledger.tokens["padding"] < 0.15 * (ledger.tokens["prompt"] + ledger.tokens["answer"])
  batch = take(1, some, batch_size=16)[0]
  assert len(data_rows(batch)) == 16
  assert (batch.position_NL < 511).all() and batch.ids_NL.max() < real.vocab_size
