"""Every layout lets a token see its own sequence alone, and scores exactly the completions."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax import logprobs
from dpo_jax.data import packing
from dpo_jax.data.collate import check_fits, collate, collate_many, fit_row_length
from dpo_jax.data.examples import Example, fill_up, lengths, weights_of
from dpo_jax.structs import TokenBatch, UserError
from tests.support import tiny

tiny_logps = jax.jit(logprobs.make_logps_fn(tiny.MODEL))


def ids(*values):
  return np.array(values, np.int32)


def example(rng, row, *, completions=2, longest=12):

  def text():
    return rng.integers(1, 100, rng.integers(1, longest + 1)).astype(np.int32)

  return Example(text(), tuple(text() for _ in range(completions)), float(rng.uniform(0.5, 2)), row)


def examples(size, seed=0, **kwargs):
  rng = np.random.default_rng(seed)
  return [example(rng, row, **kwargs) for row in range(size)]


def read_back(batch: TokenBatch) -> dict[int, list[tuple[list[int], list[int], float]]]:
  """Reads a batch back: data row -> (given, scored, weight) of its completions, in order.

  For every scored target, in row order, the keys that the mask rule lets its query see are put in
  order of position; they must be the prompt and the completion up to there.
  """
  found: dict[int, list] = {}
  slots = batch.weight_NS.shape[1]
  for n, s in np.ndindex(*batch.weight_NS.shape):
    if batch.row_NS[n, s] < 0:
      assert batch.weight_NS[n, s] == 0
      continue
    at = np.flatnonzero((batch.weight_NL[n] > 0) & (batch.slot_NL[n] == s))
    scored = batch.target_NL[n, at].tolist()
    given = None
    for t, q in enumerate(at):
      position, pair, branch = batch.position_NL[n], batch.pair_NL[n], batch.branch_NL[n]
      seen = (pair == pair[q]) & (position <= position[q])
      seen &= (branch == 0) | (branch == branch[q])
      keys = np.flatnonzero(seen)
      assert keys.max() == q, "attention must be causal in the row too"
      order = keys[np.argsort(position[keys])]
      assert position[order].tolist() == list(range(len(order)))
      text = batch.ids_NL[n, order].tolist()
      given = text if t == 0 else given
      assert text == given + scored[:t]
    found.setdefault(int(batch.row_NS[n, s]), []).append(
      (given, scored, float(batch.weight_NS[n, s]))
    )
  assert batch.slot_NL.max() < slots
  return found


def expected(some: list[Example]) -> dict:
  return {
    e.row: [
      (e.prompt.tolist(), answer.tolist(), float(np.float32(e.weight)))
      for answer in e.completions
      if len(answer)
    ]
    for e in some
  }


def test_shared_row_by_hand():
  pair = Example(ids(5, 6, 7), (ids(8, 9), ids(10)), 2.0, 41)
  batch = collate([pair], layout="shared", row_length=8)
  #                  prompt | chosen: 7 8 -> 8 9 | rejected: 7 -> 10 | padding
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 7, 0, 0, 0]]
  assert batch.target_NL.tolist() == [[0, 0, 8, 9, 10, 0, 0, 0]]
  assert batch.position_NL.tolist() == [[0, 1, 2, 3, 2, 0, 0, 0]]
  assert batch.branch_NL.tolist() == [[0, 0, 1, 1, 2, 0, 0, 0]]
  assert batch.pair_NL.tolist() == [[0, 0, 0, 0, 0, -1, -1, -1]]
  assert batch.slot_NL.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0]]
  assert batch.weight_NL.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0]]
  assert batch.weight_NS.tolist() == [[2, 2]]
  assert batch.row_NS.tolist() == [[41, 41]]
  assert batch.scored_GM[0, :4].tolist() == [2, 3, 4, 8]


def test_packed_row_by_hand():
  pair = Example(ids(5, 6, 7), (ids(8, 9), ids(10)))
  batch = collate([pair], layout="packed", row_length=8)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 5, 6, 7, 0]]
  assert batch.target_NL.tolist() == [[0, 0, 8, 9, 0, 0, 10, 0]]
  assert batch.position_NL.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
  assert batch.branch_NL.tolist() == [[0, 0, 1, 1, 0, 0, 2, 0]]
  assert batch.pair_NL.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]
  assert batch.slot_NL[batch.weight_NL > 0].tolist() == [0, 0, 1]


def test_padded_rows_by_hand():
  pair = Example(ids(5, 6, 7), (ids(8, 9), ids(10)), row=3)
  batch = collate([pair], layout="padded", row_length=5)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 0], [5, 6, 7, 0, 0]]
  assert batch.target_NL.tolist() == [[0, 0, 8, 9, 0], [0, 0, 10, 0, 0]]
  assert batch.weight_NS.shape == (2, 1) and batch.row_NS.tolist() == [[3], [3]]


def test_context_is_an_input_and_no_target():
  """Token 9 has weight 0: it is attended to and not scored; token 10 counts half."""
  weights = (np.float32([1, 0, 0.5]), np.float32([1]))
  pair = Example(ids(5, 6, 7), (ids(8, 9, 10), ids(11)), token_weights=weights)
  batch = collate([pair], layout="shared", row_length=8)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 9, 7, 0, 0]]
  assert batch.branch_NL.tolist() == [[0, 0, 1, 1, 1, 2, 0, 0]]
  assert batch.target_NL.tolist() == [[0, 0, 8, 0, 10, 11, 0, 0]]
  assert batch.weight_NL.tolist() == [[0, 0, 1, 0, 0.5, 1, 0, 0]]
  assert batch.scored_GM[0].tolist() == [2, 4, 5, *[8] * 5]
  batch = collate([pair], layout="packed", row_length=8)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 9, 5, 6, 7]]
  assert batch.weight_NL.tolist() == [[0, 0, 1, 0, 0.5, 0, 0, 1]]
  batch = collate([pair], layout="padded", row_length=6)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0]]
  assert batch.weight_NL.tolist() == [[0, 0, 1, 0, 0.5, 0], [0, 0, 1, 0, 0, 0]]
  # Stored log-probs are of all tokens; those of context are not read.
  known = pair._replace(reference=(np.float32([-1, -2, -3]), np.float32([-4])))
  batch = collate([known], layout="shared", row_length=8)
  assert batch.reference_NL is not None
  assert batch.reference_NL.tolist() == [[0, 0, -1, 0, -3, -4, 0, 0]]


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_weights_of_one_are_no_weights(name):
  plain = examples(5)
  ones = [e._replace(token_weights=weights_of(e)) for e in plain]
  expected = collate(plain, layout=name, row_length=64)
  for some in (ones, plain[:2] + ones[2:]):
    jax.tree.map(np.testing.assert_array_equal, collate(some, layout=name, row_length=64), expected)
  # Beside an example without weights, those of another count.
  mixed = plain[:1] + tiny.with_context(plain[1:])
  total = sum(weights.sum() for e in mixed for weights in weights_of(e))
  assert (
    collate(mixed, layout=name, row_length=64).weight_NL.sum() == total < expected.weight_NL.sum()
  )


def test_the_head_has_no_room_for_context():
  """Of every 100 tokens one is scored: the list of scored tokens is as short as that."""
  weights = np.zeros(100, np.float32)
  weights[-1] = 1
  some = [
    Example(ids(1), (np.full(100, 2, np.int32),) * 2, row=i, token_weights=(weights,) * 2)
    for i in range(8)
  ]
  measured = lengths(some)
  assert measured.tokens_BK.sum() == 1600 and measured.scored_BK.sum() == 16
  for name in packing.LAYOUTS:
    assert collate(some, layout=name, row_length=256).scored_GM.shape == (1, 16)


@pytest.mark.parametrize("name", packing.LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 10_000),
  size=st.integers(1, 12),
  completions=st.sampled_from([1, 2, 3]),
  groups=st.sampled_from([1, 2, 4]),
)
def test_a_batch_holds_exactly_its_pairs(name, seed, size, completions, groups):
  some = examples(size, seed, completions=completions)
  length = fit_row_length(some, name)
  batch = collate(some, layout=name, row_length=length, groups=groups)
  assert read_back(batch) == expected(some)
  rows, slots = batch.weight_NS.shape
  assert rows % groups == 0 and batch.ids_NL.shape == (rows, length)
  # Neighbouring slots are one pair, and no pair is in two groups.
  pairs = batch.row_NS.reshape(-1, completions)
  assert (pairs == pairs[:, :1]).all()
  assert rows // groups * slots % completions == 0


# --- fewer completions than others ----------------------------------------------------------------


def ragged(size, seed=0, *, most=4):
  """Examples of 1 to `most` completions, with scores."""
  rng = np.random.default_rng(seed)
  some = [example(rng, row, completions=int(rng.integers(1, most + 1))) for row in range(size)]
  return [e._replace(scores=tuple(rng.normal(size=len(e.completions)).tolist())) for e in some]


def test_absent_answers_by_hand():
  one = Example(ids(5, 6, 7), (ids(8, 9),), 2.0, 41, (0.5,))
  (filled,) = fill_up([one], 3)
  assert [len(answer) for answer in filled.completions] == [2, 0, 0] and filled.scores == (
    0.5,
    0,
    0,
  )
  assert fill_up([one]) == [one] and fill_up([]) == []
  assert fill_up([one._replace(scores=())], 2)[0].scores == ()
  with pytest.raises(ValueError, match="an example has 1 completions; completions=0 is too few"):
    fill_up([one], 0)
  for name in ("shared", "packed"):  # one completion has the same layout in both
    batch = collate([filled], layout=name, row_length=6)
    assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 0, 0]]
    assert batch.target_NL.tolist() == [[0, 0, 8, 9, 0, 0]]
    assert batch.pair_NL.tolist() == [[0, 0, 0, 0, -1, -1]]
    assert batch.weight_NS.tolist() == [[2, 0, 0]]
    assert batch.score_NS.tolist() == [[0.5, 0, 0]]
    assert batch.row_NS.tolist() == [[41, -1, -1]]
  # Padded, absent answers are rows of padding.
  batch = collate([filled], layout="padded", row_length=6)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 8, 0, 0], [0] * 6, [0] * 6]
  assert batch.pair_NL.tolist() == [[0, 0, 0, 0, -1, -1], [-1] * 6, [-1] * 6]
  assert batch.row_NS.tolist() == [[41], [-1], [-1]]
  assert batch.weight_NS.tolist() == [[2], [0], [0]]


def test_absent_answers_cost_nothing():
  (filled,) = fill_up([Example(ids(*range(1, 11)), (ids(1, 2), ids(3)))], 5)

  def cost(name):
    return packing.costs(lengths([filled]), name).tolist()

  assert (cost("shared"), cost("packed"), cost("padded")) == ([9 + 3], [2 * 9 + 3], [9 + 2])


@pytest.mark.parametrize("name", packing.LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 10_000),
  size=st.integers(1, 12),
  spare=st.integers(0, 2),
  groups=st.sampled_from([1, 2, 4]),
)
def test_a_batch_of_ragged_answers_holds_exactly_those_there_are(name, seed, size, spare, groups):
  some = ragged(size, seed)
  completions = max(len(e.completions) for e in some) + spare
  filled = fill_up(some, completions)
  length = fit_row_length(filled, name)
  batch = collate(filled, layout=name, row_length=length, groups=groups)
  assert read_back(batch) == expected(some)
  # Neighbouring slots belong to one prompt; completions that are present come first.
  by_row = {e.row: e for e in some}
  kept = (x.reshape(-1, completions) for x in (batch.row_NS, batch.weight_NS, batch.score_NS))
  for row_K, weight_K, score_K in zip(*kept, strict=True):
    if row_K[0] < 0:
      assert (row_K < 0).all() and not weight_K.any() and not score_K.any()
      continue
    e = by_row.pop(int(row_K[0]))
    missing = completions - len(e.completions)
    assert row_K.tolist() == [e.row] * len(e.completions) + [-1] * missing
    assert weight_K.tolist() == [float(np.float32(e.weight))] * len(e.completions) + [0] * missing
    np.testing.assert_array_equal(score_K, np.float32((*e.scores, *[0] * missing)))
  assert not by_row


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_log_probs_of_ragged_answers_are_those_of_each_prompt_alone(name, groups):
  params = tiny.init()
  some = tiny.pairs(13, seed=3, completions=4)
  some = [e._replace(completions=e.completions[: 1 + e.row % 4]) for e in some]
  batch = collate(fill_up(some), layout=name, row_length=48, groups=groups)
  logps_BK = np.asarray(tiny_logps(params, batch)).reshape(-1, 4)
  row_BK = batch.row_NS.reshape(-1, 4)
  assert (logps_BK[row_BK < 0] == 0).all()
  found = {int(row_K[0]): logps_BK[b] for b, row_K in enumerate(row_BK) if row_K[0] >= 0}
  one_shape = packing.Sizes(rows=4, rows_step=4, scored=8, slots=1)  # compiled once
  for e in some:
    alone = collate([e], layout="padded", row_length=24, sizes=one_shape)
    alone_K = np.asarray(tiny_logps(params, alone)).reshape(-1)[: len(e.completions)]
    assert (alone_K < 0).all()
    np.testing.assert_allclose(found[e.row][: len(e.completions)], alone_K, rtol=1e-5)


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_scored_positions_are_listed_once_in_their_group(name, groups):
  some = tiny.with_context(examples(23))
  batch = collate(some, layout=name, row_length=64, groups=groups)
  block = batch.ids_NL.size // groups
  for g in range(groups):
    listed = batch.scored_GM[g]
    real = listed[listed < block]
    assert (listed[len(real) :] == block).all(), "unused entries are one past the end"
    assert real.tolist() == np.flatnonzero(batch.weight_NL.reshape(groups, -1)[g]).tolist()
  scored = sum(np.count_nonzero(weights) for e in some for weights in e.token_weights)
  assert (batch.scored_GM < block).sum() == scored


def test_masks_come_from_lengths_not_from_ids():
  # Padding has id 0, and so has the end token here; the end token must be scored all the same.
  pair = Example(ids(0, 4), (ids(5, 0), ids(0)))
  for name in packing.LAYOUTS:
    batch = collate([pair], layout=name, row_length=16)
    assert read_back(batch) == expected([pair])


def test_groups_score_about_as_many_tokens():
  some = examples(64, longest=20)
  batch = collate(some, layout="shared", row_length=64, groups=4)
  count = (batch.scored_GM < batch.ids_NL.size // 4).sum(1)
  assert count.max() - count.min() <= 64, "no further apart than one row"


def test_packing_is_tight_and_loses_nothing():
  some = examples(200, longest=30)
  cost = packing.costs(lengths(some), "shared")
  places = packing.place(lengths(some), "shared", 256)
  assert places.rows <= np.ceil(cost.sum() / 256) + 1
  for row in range(places.rows):
    here = np.flatnonzero(places.row_B == row)
    here = here[np.argsort(places.column_B[here])]
    ends = places.column_B[here] + cost[here]
    assert (places.column_B[here][1:] == ends[:-1]).all() and ends[-1] <= 256
    assert places.order_B[here].tolist() == list(range(len(here)))


def test_shared_rows_cost_the_prompt_once():
  # P - 1 + n_a + n_b against 2 (P - 1) + n_a + n_b
  some = [Example(ids(*range(1, 101)), (ids(1, 2), ids(3, 4, 5)))]
  assert packing.costs(lengths(some), "shared").tolist() == [99 + 5]
  assert packing.costs(lengths(some), "packed").tolist() == [2 * 99 + 5]
  assert packing.costs(lengths(some), "padded").tolist() == [99 + 3]


def test_no_row_takes_more_pairs_than_slots():
  some = [Example(ids(1), (ids(2), ids(3)), row=i) for i in range(20)]
  sizes = packing.Sizes(rows=1, rows_step=1, scored=8, slots=8)
  batch = collate(some, layout="shared", row_length=64, sizes=sizes)
  assert batch.weight_NS.shape == (5, 8)
  assert read_back(batch) == expected(some)


def test_micro_batches_share_one_shape():
  some = examples(30, longest=30)
  batch = collate_many([some[:5], some[5:29], some[29:]], row_length=128, groups=2)
  for a, part in enumerate((some[:5], some[5:29], some[29:])):
    assert read_back(jax.tree.map(lambda x, a=a: x[a], batch)) == expected(part)


def test_errors_name_the_row_and_the_way_out():
  long = Example(ids(*range(50)), (ids(1), ids(2)), row=17)
  with pytest.raises(
    UserError, match=r"data row 17 takes 51 tokens.*rows have 32; raise row_length"
  ):
    collate([long], layout="shared", row_length=32)
  with pytest.raises(UserError, match="row_length is -5; a row has 1 token or more"):
    check_fits([long], "shared", -5)
  with pytest.raises(UserError, match="unknown layout 'dense'; choose one of shared"):
    collate([long], layout="dense", row_length=64)


# --- equal log-probs ------------------------------------------------------------------------------


def test_layouts_agree_on_every_log_prob():
  from dpo_jax.model import families, transformer

  model_config = families.from_hf(
    {
      "model_type": "llama",
      "vocab_size": 100,
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "intermediate_size": 48,
      "max_position_embeddings": 64,
    }
  )
  logps_fn = jax.jit(logprobs.make_logps_fn(transformer.build(model_config)))
  params = transformer.init_params(model_config, seed=0)
  some = examples(24, longest=20)

  def by_row(name, groups):
    length = fit_row_length(some, name)
    batch = collate(some, layout=name, row_length=length, groups=groups)
    logps_NS = np.asarray(logps_fn(params, batch))
    pairs = zip(batch.row_NS.reshape(-1, 2), logps_NS.reshape(-1, 2), strict=True)
    return np.stack(
      [logps for _, logps in sorted((row[0], tuple(x)) for row, x in pairs if row[0] >= 0)]
    )

  padded = by_row("padded", 1)
  assert padded.shape == (24, 2) and (padded < -1).all()
  np.testing.assert_allclose(by_row("packed", 1), padded, rtol=1e-5)
  np.testing.assert_allclose(by_row("shared", 1), padded, rtol=1e-5)
  np.testing.assert_allclose(by_row("shared", 4), padded, rtol=1e-5)
