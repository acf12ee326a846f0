"""Schedules at the steps one can check by hand, decay and clipping on the right leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.structs import UserError
from dpo_jax.training import optimizer


def schedule(name, **changes):
  given = {
    "learning_rate": 1.0,
    "schedule": name,
    "warmup_steps": 4,
    "total_steps": 14,
    "final_fraction": 0.0,
  }
  return optimizer.make_schedule(**(given | changes))


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_warm_up_is_linear_and_the_first_step_already_moves(name):
  rates = [float(schedule(name)(i)) for i in range(5)]
  np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


@pytest.mark.parametrize(("steps", "warm"), [(3, 0), (45, 4), (100, 10), (9000, 10)])
def test_without_a_number_the_warm_up_is_a_tenth_and_10_at_most(steps, warm):
  rate = schedule("constant", warmup_steps=None, total_steps=steps)
  rates = [float(rate(i)) for i in range(12)]
  expected = [min((i + 1) / (warm + 1), 1) for i in range(12)]
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)]
)
def test_half_way_and_at_the_end(name, middle, end):
  np.testing.assert_allclose(schedule(name)(9), middle, atol=1e-6)
  np.testing.assert_allclose(schedule(name)(14), end, atol=1e-6)


def test_final_fraction_is_where_it_ends():
  for name in ("linear", "cosine"):
    np.testing.assert_allclose(schedule(name, final_fraction=0.1)(14), 0.1, rtol=1e-5)


def test_weight_decay_spares_norms_biases_and_embeddings():
  params = {
    "params": {
      "embed": {"embedding": jnp.ones((3, 2))},
      "layers": {"q": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
      "norm": {"scale": jnp.ones(2)},
    }
  }
  tx = optimizer.make_optimizer(optax.constant_schedule(1.0), weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  inner = updates["params"]
  np.testing.assert_allclose(inner["layers"]["q"]["kernel"], -0.1)
  for untouched in (
    inner["embed"]["embedding"],
    inner["layers"]["q"]["bias"],
    inner["norm"]["scale"],
  ):
    np.testing.assert_array_equal(untouched, np.zeros_like(untouched))


def test_clipping_scales_the_whole_gradient():
  """Two steps of Adam: a gradient of norm 50 clipped to 1 moves as the same direction at norm 1."""
  params = {"kernel": jnp.zeros(2)}
  small, large = {"kernel": jnp.array([0.6, 0.8])}, {"kernel": jnp.array([30.0, 40.0])}
  tx = optimizer.make_optimizer(optax.constant_schedule(0.1), clip_norm=1.0)
  _, after_small = tx.update(small, tx.init(params), params)
  _, after_large = tx.update(large, tx.init(params), params)
  found = [s for s in jax.tree.leaves(after_large) if np.ndim(s)]
  wanted = [s for s in jax.tree.leaves(after_small) if np.ndim(s)]
  for x, y in zip(found, wanted, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6)


def test_moments_in_bfloat16_forget_as_those_in_float32_do():
  """0.999 is 1 in bfloat16: gradients of 1, then of 0, must leave 0.999^100 (1 - 0.999^300)."""
  tx = optimizer.make_optimizer(optax.constant_schedule(0.0), clip_norm=0.0)
  params = {"kernel": jnp.ones(4096, jnp.bfloat16)}

  def update(state, gradient):
    updates, state = tx.update({"kernel": jnp.full(4096, gradient, jnp.bfloat16)}, state, params)
    assert updates["kernel"].dtype == jnp.float32  # rounded by whoever adds it
    return state, None

  gradients = jnp.concatenate([jnp.ones(300), jnp.zeros(100)]).astype(jnp.bfloat16)
  state, _ = jax.jit(lambda state: jax.lax.scan(update, state, gradients))(tx.init(params))
  (_, nu), *_ = optax.tree.get_all_with_path(state, "nu")
  assert nu["kernel"].dtype == jnp.bfloat16  # what it takes on the device has not grown
  mean = nu["kernel"].astype(jnp.float32).mean()
  np.testing.assert_allclose(mean, 0.999**100 * (1 - 0.999**300), rtol=0.01)


def test_float32_is_what_optax_makes_of_it():
  params = {"kernel": jnp.array([1.0, -2.0])}
  ours = optimizer.make_optimizer(optax.constant_schedule(0.1), clip_norm=0.0)
  theirs = optax.adamw(optax.constant_schedule(0.1), weight_decay=0.0)
  for one, other in zip(
    *(jax.tree.leaves(tx.update(params, tx.init(params), params)) for tx in (ours, theirs)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"name": "cosin"}, "known: constant, linear, cosine"),
    ({"learning_rate": -1.0}, "0 or above"),
    ({"learning_rate": float("nan")}, "0 or above"),
    ({"warmup_steps": 15}, "between 0 and the 14 steps"),
    ({"final_fraction": -2.0}, "final_fraction"),
  ],
)
def test_bad_settings_are_said_in_one_line(changes, words):
  with pytest.raises(UserError, match=words):
    schedule(**({"name": "cosine"} | changes))


@pytest.mark.parametrize(
  "given",
  [
    {"clip_norm": -1.0},
    {"weight_decay": -1.0},
    {"eps": -1.0},
    {"eps": 0.0},
    {"b1": 1.5},
    {"b2": float("nan")},
  ],
)
def test_values_that_would_not_go_downhill_are_refused(given):
  (name,) = given
  with pytest.raises(UserError, match=f"optimizer.{name} is"):
    optimizer.make_optimizer(optax.constant_schedule(1.0), **given)
