"""Tests of references that are a moving average of the policy."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import step
from dpo_jax.utils import following
from dpo_jax.utils.following import Average, Averaged, Sync

START = {"w": np.array([1.0, -2.0], np.float32)}


def run(sync, path):
  """Follows a path of policies; returns the reference after every step."""
  reference = following.init_average(START, START)
  found = []
  for steps, policy in enumerate(path, 1):
    reference = following.follow(reference, policy, START, jnp.int32(steps), sync)
    found.append(reference)
  return found


def path(steps=6):
  rng = np.random.default_rng(0)
  return [{"w": np.float32(START["w"] + rng.normal(size=2))} for _ in range(steps)]


def test_the_average_by_hand():
  """One step at ρ = 3, κ = 1/2, η = 1: share 1/√4 = 1/2, correction 1/4."""
  policy = {"w": np.array([3.0, 2.0], np.float32)}
  (found,) = run(Sync(1, average=Average(power=0.5, bias_power=1.0, lag=3.0)), [policy])
  np.testing.assert_allclose(found.mean["w"], [2.0, 0.0])  # halfway
  np.testing.assert_allclose(found.params["w"], [2.5, 1.0])  # and a quarter of (2, 4) more


def test_the_average_follows_the_algorithm_and_moves_only_when_due():
  sync = Sync(2, average=Average(power=0.4, bias_power=0.3, lag=5.0))
  mean = params = np.float64(START["w"])
  for steps, (policy, found) in enumerate(zip(path(), run(sync, path()), strict=True), 1):
    if steps % 2 == 0:
      share, correction = (5.0 + steps) ** -0.4, (5.0 + steps) ** -0.3
      mean = (1 - share) * mean + share * policy["w"]
      params = mean + correction * (policy["w"] - START["w"])
    np.testing.assert_allclose(found.mean["w"], mean, rtol=1e-5)
    np.testing.assert_allclose(found.params["w"], params, rtol=1e-5)


def test_limits_of_the_average():
  """At κ = 0 the mean is the policy; at a large η there is no correction."""
  for policy, found in zip(path(), run(Sync(1, average=Average(power=0.0)), path()), strict=True):
    np.testing.assert_allclose(found.mean["w"], policy["w"], rtol=1e-6)
  for found in run(Sync(1, average=Average(bias_power=50.0)), path()):
    np.testing.assert_allclose(found.params["w"], found.mean["w"], rtol=1e-6)


def test_a_policy_that_moves_at_one_pace_is_followed_without_lag():
  """The mean lags by v (ρ+t)^κ, and the correction is v t (ρ+t)^-η: they cancel at η = 1 - κ."""
  straight = [{"w": np.float32(START["w"] + 0.01 * steps)} for steps in range(1, 201)]
  found = run(Sync(1, average=Average(power=0.5, bias_power=0.5)), straight)[-1]
  lag = (straight[-1]["w"] - found.mean["w"]).min()
  np.testing.assert_allclose(lag, 0.01 * 210**0.5, rtol=0.15)
  assert np.abs(straight[-1]["w"] - found.params["w"]).max() < 0.1 * lag


def test_parts_of_an_average_share_no_buffer():
  """The state is donated: a shared buffer would be gone with the policy's parameters."""
  params = {"w": jnp.zeros(8)}
  for init in (following.init_average, jax.jit(following.init_average)):
    made = init(params, params)
    parts = (made.params["w"], made.mean["w"], params["w"])
    assert len({x.unsafe_buffer_pointer() for x in parts}) == 3


def test_which_parameters_the_reference_has():
  averaged = Averaged("now", "mean")
  assert following.current(None, "frozen") == "frozen"
  assert following.current("mixed", None) == "mixed"
  assert following.current(averaged, "start") == "now"
  assert step.Sync is Sync
