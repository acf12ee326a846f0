"""Tests that the production path equals the naive one in value and gradient, with less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logprobs
from dpo_jax.data import packing
from dpo_jax.data.collate import collate
from dpo_jax.data.examples import Example
from dpo_jax.structs import Head
from tests.support import tiny


def _batch(layout="shared", groups=1, completions=2, count=6):
  examples = tiny.with_context(tiny.pairs(count, completions=completions))
  return collate(examples, layout=layout, row_length=48, groups=groups)


def _naive(params, batch):
  return logprobs.naive_slot_logps(tiny.MODEL.hidden(params, batch), tiny.MODEL.head(params), batch)


def test_token_logps_by_hand():
  logits = np.log(np.array([[1.0, 2.0, 5.0]]))
  np.testing.assert_allclose(logprobs.token_logps(logits, np.array([1])), np.log([0.25]), rtol=1e-6)


def test_a_uniform_head_gives_minus_log_vocabulary_a_token():
  params = tiny.init() | {"head": np.zeros((tiny.VOCAB, tiny.WIDTH)), "bias": np.zeros(tiny.VOCAB)}
  batch = _batch()
  tokens_NS = logprobs.slot_tokens(batch)
  logps_NS = jax.jit(logprobs.make_logps_fn(tiny.MODEL))(params, batch)
  np.testing.assert_allclose(logps_NS, -np.log(tiny.VOCAB) * tokens_NS, rtol=1e-6)


def test_log_probs_of_all_answers_of_two_tokens_sum_to_one():
  """Σ_y π(y|x) = 1 over all y of exactly two tokens, as for any distribution."""
  vocab = 5
  params = tiny.init(vocab=vocab)
  everything = [
    Example(np.array([1, 3], np.int32), (np.array([a, b], np.int32),))
    for a in range(vocab)
    for b in range(vocab)
  ]
  batch = collate(everything, layout="shared", row_length=16)
  logps_NS = jax.jit(logprobs.make_logps_fn(tiny.MODEL))(params, batch)
  np.testing.assert_allclose((np.exp(logps_NS) * batch.weight_NS).sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("layout", "groups", "budget"),  # all at once, eight tokens a chunk, one token a chunk
  [
    ("shared", 1, logprobs.LogitBudget(2**22, 2**22)),
    ("shared", 1, logprobs.LogitBudget(2**22, 0)),
    ("shared", 1, logprobs.LogitBudget(37 * 8, 2**22)),
    ("shared", 2, logprobs.LogitBudget(37 * 8, 2**22)),
    ("packed", 2, logprobs.LogitBudget(37, 0)),
    ("padded", 1, logprobs.LogitBudget(37 * 8, 0)),
  ],
)
def test_production_equals_naive(layout, groups, budget):
  params = jax.tree.map(jnp.asarray, tiny.init())
  batch = _batch(layout, groups)
  weights_NS = np.random.default_rng(0).normal(size=batch.weight_NS.shape)
  production = logprobs.make_logps_fn(tiny.MODEL, budget=budget)

  def loss(params, fn):
    logps_NS = fn(params, batch)
    return (logps_NS * weights_NS).sum(), logps_NS

  both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  ((value, logps_NS), grads), ((expected, expected_NS), expected_grads) = (
    both(params, fn) for fn in (production, _naive)
  )
  np.testing.assert_allclose(logps_NS, expected_NS, rtol=1e-5)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for key in params:
    scale = np.abs(expected_grads[key]).max()
    np.testing.assert_allclose(
      grads[key], expected_grads[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key
    )


def test_the_three_layouts_agree():
  params = tiny.init()
  logps = []
  for layout in ("shared", "packed", "padded"):
    batch = _batch(layout)
    logps_NS = np.asarray(jax.jit(logprobs.make_logps_fn(tiny.MODEL))(params, batch))
    order = np.argsort(batch.row_NS.ravel(), kind="stable")
    logps.append(logps_NS.ravel()[order][batch.row_NS.ravel()[order] >= 0])
  np.testing.assert_allclose(logps[1], logps[0], rtol=1e-5)
  np.testing.assert_allclose(logps[2], logps[0], rtol=1e-5)


def test_soft_cap_and_bias_are_part_of_the_head():
  hidden, kernel = np.ones((1, 2), np.float32), np.array([[3, 4], [0, 1]], np.float32)
  head = Head(kernel, np.array([1, 0], np.float32), soft_cap=5.0)
  np.testing.assert_allclose(
    logprobs.logits(hidden, head), 5 * np.tanh(np.array([[8.0, 1.0]]) / 5), rtol=1e-6
  )


def test_bfloat16_hidden_states_still_sum_in_float32():
  """With 400 tokens of log(1/37), a bfloat16 sum would be nats off."""
  logps_NS = jax.jit(logprobs.slot_logps)(
    jnp.zeros((1, 512, 4), jnp.bfloat16),
    Head(jnp.zeros((tiny.VOCAB, 4), jnp.bfloat16)),
    collate([_long_pair()], layout="shared", row_length=512),
  )
  assert logps_NS.dtype == jnp.float32
  np.testing.assert_allclose(logps_NS[0, 0], -400 * np.log(tiny.VOCAB), rtol=1e-5)


def _long_pair():
  ids = np.ones(400, np.int32)
  return Example(ids[:3], (ids, ids[:5]))


def _temporaries(logps, vocab, width=64):
  """Measures bytes of temporaries of value and gradient at 4 rows of 512 tokens."""
  rng = np.random.default_rng(0)

  def ids(n):
    return rng.integers(0, vocab, n).astype(np.int32)

  examples = [Example(ids(200), (ids(150), ids(150))) for _ in range(4)]
  batch = collate(examples, layout="shared", row_length=512)

  def loss(hidden, kernel):
    return logps(hidden, Head(kernel), batch).sum()

  shapes = (
    jax.ShapeDtypeStruct((4, 512, width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
  )
  compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_a_fraction_of_the_naive_path_and_flat_in_the_vocabulary():
  naive = _temporaries(logprobs.naive_slot_logps, 50_000)
  again = functools.partial(logprobs.slot_logps, budget=logprobs.LogitBudget(2**22, 0))
  assert _temporaries(again, 50_000) <= naive / 5

  # The rest of the memory is the gradient of the head.
  def beside(vocab):
    return _temporaries(again, vocab) - vocab * 64 * 4

  assert beside(100_000) <= 1.15 * beside(25_000)


def test_logits_that_are_kept_are_what_keeping_costs():
  """The logits of 1,200 scored tokens, 50,000 each, are in memory once and not twice."""
  kept, again = (
    _temporaries(
      functools.partial(logprobs.slot_logps, budget=logprobs.LogitBudget(2**22, kept)), 50_000
    )
    for kept in (2**27, 0)
  )
  assert kept - again <= 1.1 * 1200 * 50_000 * 4


# --- context in completions -----------------------------------------------------------------------


def _with_a_tool(weights=(1, 0, 0, 0.5, 1)):
  """Returns a pair whose first completion has context, by default its second and third token."""
  completions = np.array([3, 4, 5, 6, 7], np.int32), np.array([8, 9], np.int32)
  weights = np.array(weights, np.float32), np.ones(2, np.float32)
  return Example(np.array([1, 2], np.int32), completions, token_weights=weights)


@functools.cache
def _compiled():
  """Returns the log-probs of scored tokens and of slots, compiled once."""
  fns = logprobs.make_token_fn(tiny.MODEL), logprobs.make_logps_fn(tiny.MODEL)
  return tuple(map(jax.jit, fns))


def _logps_of(example):
  """Computes the log-probs of the scored tokens of an example, and those of its completions."""
  sizes = packing.Sizes(rows=1, rows_step=1, scored=8, slots=2)
  batch = collate([example], row_length=16, sizes=sizes)
  token_fn, slot_fn = _compiled()
  logps_x = np.asarray(token_fn(tiny.init(), batch))[batch.scored_GM < batch.ids_NL.size]
  return logps_x, np.asarray(slot_fn(tiny.init(), batch))[0]


def test_a_completion_sums_its_weighted_tokens():
  """Σ w_t log p_t, with the log-probs of the same tokens where all are scored."""
  logps_x, _ = _logps_of(_with_a_tool()._replace(token_weights=()))
  assert len(logps_x) == 7 and (logps_x < -0.5).all()
  scored_x, logps_S = _logps_of(_with_a_tool())
  np.testing.assert_allclose(scored_x, logps_x[[0, 3, 4, 5, 6]], rtol=1e-6)
  expected = [logps_x[0] + 0.5 * logps_x[3] + logps_x[4], logps_x[5] + logps_x[6]]
  np.testing.assert_allclose(logps_S, expected, rtol=1e-6)


def test_context_is_attended_to_and_its_logits_are_not_computed():
  """Another context changes the log-probs after it; no gradient enters the head at its tokens."""
  example = _with_a_tool()
  (before, *after), _ = _logps_of(example)
  completion = example.completions[0].copy()
  completion[1:3] = 20, 21
  changed = example._replace(completions=(completion, example.completions[1]))
  (same, *others), _ = _logps_of(changed)
  np.testing.assert_allclose(same, before, rtol=1e-6)
  assert (np.abs(np.subtract(others, after))[:2] > 1e-3).all()

  batch = collate([example], row_length=16)
  hidden_NLD = np.asarray(tiny.hidden(tiny.init(), batch))

  def total(hidden_NLD):
    head = tiny.MODEL.head(tiny.init())
    return logprobs.slot_logps(hidden_NLD, head, batch).sum()

  slope_NL = np.abs(jax.jit(jax.grad(total))(hidden_NLD)).sum(axis=2)
  assert ((slope_NL > 0) == (batch.weight_NL > 0)).all()


def test_lengths_count_what_is_scored():
  """Three of five tokens against two; beyond the second scored token, α = 0.25 weighs the rest."""
  batch = collate([_with_a_tool()], row_length=16)
  np.testing.assert_allclose(logprobs.slot_tokens(batch), [[2.5, 2]])
  weighted = logprobs.shorter_completion_weights(batch, 0.25)
  #                         prompt | w: 1, 0, 0, ½, ¼ · 1 | l: 1, 1
  expected = [0, 1, 0, 0, 0.5, 0.25, 1, 1, *[0] * 8]
  np.testing.assert_allclose(weighted.weight_NL, [expected])
  # Weights that sum to less than 1 are not rounded up to it, and an empty slot divides by 1.
  slots = logprobs.slots_of(collate([_with_a_tool((0, 0.25, 0, 0, 0.5))], row_length=16))
  slots = slots._replace(tokens_NS=np.array([[0.75, 2, 0, 0]]))
  pairs = logprobs.to_pairs(np.zeros((1, 4)), slots)
  np.testing.assert_allclose(pairs.chosen_tokens_B, [0.75, 1])
  np.testing.assert_allclose(pairs.rejected_tokens_B, [2, 1])
