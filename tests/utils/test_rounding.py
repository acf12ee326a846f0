"""Stochastic rounding: right in expectation, exact where it can be, the same on all devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.utils import rounding

COUNT = 4096
ULP = 2.0**-7  # from 1 to the next bfloat16


def rounded(value, seed=0):
  """Rounds COUNT copies of a value; returns float32."""
  found = rounding.stochastic(jnp.full(COUNT, value, jnp.float32), jax.random.key(seed))
  assert found.dtype == jnp.bfloat16
  return np.asarray(found.astype(jnp.float32))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [1 / 8, 1 / 2, 7 / 8])
def test_a_share_of_the_way_moves_that_share_of_the_weights(sign, share):
  found = rounded(sign * (1 + share * ULP))
  assert set(np.abs(found)) == {1.0, 1 + ULP}
  moved = (np.abs(found) > 1).mean()
  # Three standard errors of a mean of COUNT independent weights.
  np.testing.assert_allclose(moved, share, atol=3 * np.sqrt(share * (1 - share) / COUNT))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 2.0**-126, 1e38, np.inf, -np.inf])
def test_what_bfloat16_can_represent_stays(value):
  exact = float(jnp.bfloat16(value))
  np.testing.assert_array_equal(rounded(exact), np.float32(exact))
  assert np.signbit(rounded(exact)).all() == np.signbit(exact)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_no_carry_makes_a_number_of_a_nan(bits):
  value = np.array([bits], np.uint32).view(np.float32)[0]
  assert np.isnan(rounded(value)).all()


def test_every_sharding_rounds_alike():
  x = jnp.linspace(-3, 3, 8 * 64, dtype=jnp.float32).reshape(8, 64)
  mesh = jax.make_mesh((4, 2), ("a", "b"))
  key = jax.random.key(7)
  alone = jax.jit(rounding.stochastic)(x, key)
  places = NamedSharding(mesh, PartitionSpec("a", "b"))
  divided = jax.jit(rounding.stochastic, out_shardings=places)(jax.device_put(x, places), key)
  np.testing.assert_array_equal(alone.astype(jnp.float32), divided.astype(jnp.float32))
  copied = jax.pmap(functools.partial(rounding.stochastic, key=key))(jnp.stack([x] * 2))
  np.testing.assert_array_equal(copied[1].astype(jnp.float32), alone.astype(jnp.float32))


def test_leaves_and_keys_round_apart():
  half = jnp.full(64, 1 + ULP / 2, jnp.float32)
  like = {"a": half.astype(jnp.bfloat16), "b": half.astype(jnp.bfloat16), "c": half}
  one, again, other = (
    rounding.round_as(dict.fromkeys("abc", half), like, jax.random.key(seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one["a"], again["a"])
  assert (one["a"] != one["b"]).any() and (one["a"] != other["a"]).any()
  np.testing.assert_array_equal(one["c"], half)  # float32 stays what it is


def test_an_update_of_an_eighth_arrives_or_is_lost():
  """To nearest, an eighth of an ulp changes no weight; stochastically it changes one in eight."""
  params = {"w": jnp.ones(COUNT, jnp.bfloat16)}
  updates = {"w": jnp.full(COUNT, ULP / 8, jnp.float32)}
  kept, facts = rounding.apply_updates(params, updates, None)
  np.testing.assert_array_equal(kept["w"], params["w"])
  assert (facts["update/changed"], facts["update/kept"]) == (0, 0)
  kept, facts = rounding.apply_updates(params, updates, jax.random.key(0))
  assert kept["w"].dtype == jnp.bfloat16
  np.testing.assert_allclose(facts["update/changed"], 1 / 8, atol=0.02)
  np.testing.assert_allclose(facts["update/kept"], 1.0, atol=0.15)


def test_float32_is_added_and_nothing_is_measured():
  params, facts = rounding.apply_updates({"w": jnp.ones(2)}, {"w": jnp.full(2, 1e-6)}, None)
  np.testing.assert_array_equal(params["w"], np.float32(1) + np.float32(1e-6))
  assert facts == {}


def test_an_update_of_nothing_is_kept():
  one = {"w": jnp.ones(2, jnp.bfloat16)}
  _, facts = rounding.apply_updates(one, {"w": jnp.zeros(2)}, jax.random.key(0))
  assert (facts["update/changed"], facts["update/kept"]) == (0, 1)
