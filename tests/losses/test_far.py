"""Tests that losses and their gradients stay finite at extreme log-probs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES, MARGIN_LOSSES, arguments, kind_of, resolve
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps
from tests.support.small_logps import DIVERGENCES, PAIRED

# Every log-prob of chosen and rejected, policy and reference, at -1e4, -3 or 1e4: 81 pairs.
FAR = np.array(list(itertools.product([-1e4, -3.0, 1e4], repeat=4)), np.float32).T


def _assert_finite(loss, *arrays):
  """Asserts finite value and gradients with respect to every array, in float32 under jit."""

  def total(arrays):
    loss_B = loss(*arrays)
    return loss_B.sum(), loss_B

  (_, loss_B), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(
    tuple(jnp.asarray(x, jnp.float32) for x in arrays)
  )
  assert loss_B.dtype == jnp.float32
  assert np.isfinite(loss_B).all()
  for slope in slopes:
    assert np.isfinite(slope).all()


def _far_pairs(loss):
  tokens = (jnp.full(81, 7.0), jnp.full(81, 5.0))
  _assert_finite(lambda p, q, s, t: loss(PairLogps(p, q, *tokens), PairLogps(s, t, *tokens)), *FAR)


@pytest.mark.parametrize("name", [*PAIRED, "sft"])
def test_value_and_slope_stay_finite(name):
  if "beta" not in arguments(name):
    _far_pairs(LOSSES[name])
    return

  def at(pair):
    return jax.vmap(lambda beta: LOSSES[name](*pair, beta=beta))

  _far_pairs(lambda *pair: at(pair)(jnp.array([0.1, 1.0])).sum(0))


@pytest.mark.parametrize("link", DIVERGENCES)
@pytest.mark.parametrize("name", sorted(MARGIN_LOSSES))
def test_value_and_slope_stay_finite_with_every_divergence(name, link):
  _far_pairs(resolve(name, beta=1.0, link=link))


def test_value_and_slope_of_a_sum_stay_finite():
  _far_pairs(resolve("0.8*sigmoid + 0.2*bco_pair + 1*sft", beta=1.0))
  _far_pairs(resolve("chi_po", beta=1.0, clip=1e6, sft_weight=1.0))


@pytest.mark.parametrize("given", [{}, {"kl": 1e4}])
def test_value_and_slope_of_kto_stay_finite(given):
  for label in (0.0, 1.0):
    _assert_finite(
      lambda p, q, s, t, label=label: LOSSES["kto"](
        UnpairedLogps(p, q), UnpairedLogps(s, t), beta=1.0, label_B=jnp.full(81, label), **given
      ),
      *FAR,
    )


@pytest.mark.parametrize("distance", ["squared", "backward_kl", "forward_kl"])
def test_value_and_slope_of_rpo_stay_finite(distance):
  _far_pairs(
    lambda p, q: LOSSES["rpo"](
      p, q, beta=1.0, distance=distance, margin_B=np.linspace(-9e3, 9e3, 81)
    )
  )


@pytest.mark.parametrize("name", sorted(n for n in LOSSES if kind_of(n) == "unpaired"))
def test_value_and_slope_of_unpaired_losses_stay_finite(name):
  tokens = jnp.full(81, 7.0)
  for label in (0.0, 1.0):
    _assert_finite(
      lambda p, q, s, t, label=label: LOSSES[name](
        UnpairedLogps(p, q, tokens), UnpairedLogps(s, t, tokens), label_B=jnp.full(81, label)
      ),
      *FAR,
    )


@pytest.mark.parametrize("name", sorted(n for n in LOSSES if kind_of(n) == "ranked"))
def test_value_and_slope_of_ranked_losses_stay_finite(name):
  given = {"reward_BK": FAR.T} if name == "policy_gradient" else {}
  _assert_finite(
    lambda p, q: LOSSES[name](
      RankedLogps(p, jnp.full((81, 4), 7.0)), RankedLogps(q, jnp.full((81, 4), 7.0)), **given
    ),
    *(FAR.T, FAR.T[::-1]),
  )


@pytest.mark.parametrize("present", [None, np.arange(81 * 4).reshape(81, 4) % 3 > 0])
def test_value_and_slope_of_rankings_stay_finite(present):
  _assert_finite(
    lambda p, q: LOSSES["plackett_luce"](
      RankedLogps(p), RankedLogps(q), beta=1.0, present_BK=present
    ),
    *(FAR.T, FAR.T[::-1]),
  )
  _assert_finite(
    lambda p, q: LOSSES["policy_gradient"](
      RankedLogps(p), RankedLogps(q), beta=1.0, reward_BK=FAR.T, present_BK=present
    ),
    *(FAR.T, FAR.T[::-1]),
  )


def test_nobody_present_is_finite():
  """An empty slot has no tokens and weight 0; its loss must be finite, for 0 times inf is nan."""
  nobody = np.zeros((1, 4), bool)
  logps = jnp.full((1, 4), -3.0)
  rewards = {"reward_BK": np.ones((1, 4))}
  for name, known in (("plackett_luce", {}), ("policy_gradient", rewards), ("tpo", {})):
    _assert_finite(
      lambda p, name=name, known=known: LOSSES[name](
        RankedLogps(p, jnp.ones((1, 4))), RankedLogps(logps), present_BK=nobody, **known
      ),
      logps,
    )


def test_orpo_is_finite_at_probability_one():
  ones = jnp.ones(1)
  for chosen, rejected in ((0.0, 0.0), (0.0, -1.0), (-1.0, 0.0), (-1e-8, -1e-8)):
    _assert_finite(
      lambda p, q: LOSSES["orpo"](PairLogps(p, q, ones, ones), None), chosen * ones, rejected * ones
    )
