"""Losses that see a whole batch, or several answers of a prompt."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps
from tests.support import oracle
from tests.support.small_logps import KTO, KTO_REFERENCE, random_logps, slopes_of

# --- whole batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_follow_a_permutation_of_the_pairs(name):
  policy, reference = random_logps()
  order = np.random.default_rng(1).permutation(6)
  moved = [PairLogps(*(x[order] for x in logps)) for logps in (policy, reference)]
  found = LOSSES[name](*moved, weight_B=np.ones(6))
  np.testing.assert_allclose(found, LOSSES[name](policy, reference)[order], rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "first", "second"),
  [
    ("aot", lambda p, q: p.chosen_B - p.rejected_B, lambda p, q: q.chosen_B - q.rejected_B),
    (
      "aot_unpaired",
      lambda p, q: p.chosen_B - q.chosen_B,
      lambda p, q: p.rejected_B - q.rejected_B,
    ),
  ],
)
def test_the_mean_of_a_sorted_loss_needs_no_order(name, first, second):
  policy, reference = random_logps()
  gap = np.sort(first(policy, reference)) - np.sort(second(policy, reference))
  expected = np.log1p(np.exp(-0.3 * gap)).mean()
  found = LOSSES[name](policy, reference, beta=0.3).mean()
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_pairs_of_weight_zero_change_no_sorted_loss(name):
  policy, reference = random_logps()
  weight = np.array([1.0, 0.0, 2.0, 0.0, 1.0, 0.5])
  here = np.flatnonzero(weight)
  alone = [PairLogps(*(x[here] for x in logps)) for logps in (policy, reference)]
  loss = functools.partial(LOSSES[name], weight_B=weight)
  np.testing.assert_allclose(loss(policy, reference)[here], LOSSES[name](*alone), rtol=1e-6)
  slopes = slopes_of(lambda p, q: weight * loss(p, q), policy, reference)
  for slope in slopes:
    np.testing.assert_array_equal(np.delete(slope, here), 0)


def test_the_estimate_behind_kto_gets_no_gradient():
  label = np.array([1.0, 0.0])
  loss = lambda p, **given: LOSSES["kto"](p, KTO_REFERENCE, label_B=label, **given).sum()
  found = jax.grad(loss)(jax.tree.map(jnp.asarray, KTO))
  np.testing.assert_array_equal(found.mismatched_B, 0)
  fixed = jax.grad(lambda p: loss(p, kl=1.0))(jax.tree.map(jnp.asarray, KTO))  # the mean is 1
  np.testing.assert_allclose(found.completion_B, fixed.completion_B, rtol=1e-6)
  assert jax.grad(lambda kl: loss(KTO, kl=kl))(1.0) == 0


def test_rows_of_weight_zero_leave_the_estimate_behind_kto_alone():
  far = UnpairedLogps(np.append(KTO.completion_B, 50.0), np.append(KTO.mismatched_B, 50.0))
  zeros = UnpairedLogps(np.zeros(3), np.zeros(3))
  label, weight = np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0])
  found = LOSSES["kto"](far, zeros, label_B=label, weight_B=weight)
  expected = LOSSES["kto"](KTO, KTO_REFERENCE, label_B=label[:2])
  np.testing.assert_allclose(found[:2], expected, rtol=1e-6)


# --- several answers ------------------------------------------------------------------------------


def test_a_ranking_of_two_is_a_pair():
  policy, reference = random_logps()
  stack = lambda p: RankedLogps(jnp.stack([p.chosen_B, p.rejected_B], axis=1))
  pair = lambda p, q: LOSSES["sigmoid"](p, q, beta=0.3)
  ranked = lambda p, q: LOSSES["plackett_luce"](stack(p), stack(q), beta=0.3)
  np.testing.assert_allclose(ranked(policy, reference), pair(policy, reference), rtol=1e-5)
  for found, expected in zip(
    slopes_of(ranked, policy, reference), slopes_of(pair, policy, reference), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_probabilities_of_all_rankings_sum_to_one():
  z = np.random.default_rng(0).normal(size=4)
  every = np.array(oracle.all_rankings(4))
  policy = RankedLogps(z[every] / 0.3)
  found = LOSSES["plackett_luce"](policy, RankedLogps(np.zeros(every.shape)), beta=0.3)
  np.testing.assert_allclose(np.exp(-found).sum(), 1, rtol=1e-5)
  expected = [oracle.ranking_probability(z, ranking) for ranking in every]
  np.testing.assert_allclose(np.exp(-found), expected, rtol=1e-5)


def test_absent_answers_change_no_ranking():
  logps = np.random.default_rng(0).normal(0, 5, (2, 4))
  present = np.array([[True, True, True, False]] * 2)
  loss = jax.jit(
    lambda p, **given: LOSSES["plackett_luce"](
      RankedLogps(p), RankedLogps(np.zeros(p.shape)), beta=0.3, **given
    )
  )
  for filling in (0.0, 1e4):
    filled = np.where(present, logps, filling)
    found, slope = (
      loss(filled, present_BK=present),
      jax.grad(lambda p: loss(p, present_BK=present).sum())(jnp.asarray(filled)),
    )
    np.testing.assert_allclose(found, loss(logps[:, :3]), rtol=1e-6)
    np.testing.assert_array_equal(slope[:, 3], 0)


def test_equal_returns_give_no_gradient():
  policy = RankedLogps(jnp.array([[-1.0, -5.0, -9.0]]))
  reference = RankedLogps(jnp.array([[-3.0, -3.0, -3.0]]))
  # r = β log π/π_ref + 7: the policy is optimal already
  reward = 0.5 * (policy.completions_BK - reference.completions_BK) + 7
  loss = lambda p: LOSSES["policy_gradient"](p, reference, beta=0.5, reward_BK=reward).sum()
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(policy).completions_BK, 0, atol=1e-6)


def test_a_lone_sample_gives_no_gradient():
  """Without another sample there is no baseline, and so nothing to compare with."""
  loss = lambda p: LOSSES["policy_gradient"](
    RankedLogps(p),
    RankedLogps(jnp.zeros((1, 3))),
    reward_BK=jnp.ones((1, 3)),
    present_BK=np.array([[True, False, False]]),
  ).sum()
  slope = jax.jit(jax.grad(loss))(jnp.array([[-1.0, -2.0, -3.0]]))
  np.testing.assert_array_equal(slope[:, 1:], 0)
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("completions", [2, 3])
def test_policy_gradient_is_unbiased(completions):
  """Its mean over all K-tuples of samples is the gradient of E[-r + β log π/π_ref], exactly."""
  rng = np.random.default_rng(0)
  scores, ref_scores, reward = rng.normal(size=(3, 4)).astype(np.float32)
  reference, beta = jax.nn.log_softmax(ref_scores), 0.7
  tuples = np.array(list(itertools.product(range(4), repeat=completions)))

  def objective(scores):
    logps = jax.nn.log_softmax(scores)
    return (jnp.exp(logps) * (-reward + beta * (logps - reference))).sum()

  def estimate(scores):
    logps = jax.nn.log_softmax(scores)
    chance_B = jax.lax.stop_gradient(jnp.exp(logps[tuples].sum(axis=1)))
    policy, frozen = RankedLogps(logps[tuples]), RankedLogps(reference[tuples])
    loss_B = LOSSES["policy_gradient"](policy, frozen, beta=beta, reward_BK=reward[tuples])
    return (chance_B * loss_B).sum()

  found, expected = (jax.jit(jax.grad(f))(scores) for f in (estimate, objective))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
