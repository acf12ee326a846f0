"""Tests the derivation of DPO: each step is an identity, and π* is the only optimum."""

import inspect
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import derivation, losses
from dpo_jax.structs import PairLogps

# Every function is compiled once for all tests, which also shows that it can be traced.
chain = types.SimpleNamespace(
  **{
    name: jax.jit(function)
    for name, function in inspect.getmembers(derivation, inspect.isfunction)
    if function.__module__ == derivation.__name__ and name[0] != "_" and name != "descend"
  }
)

BETAS = [0.05, 0.5, 5.0, 500.0]
EXTREMES = [1e-3, 1.0, 1e6]


class World(NamedTuple):
  """Three prompts of unequal weight, with five completions each."""

  reference: jax.Array
  reward: jax.Array
  weight: jax.Array
  policy: jax.Array


def make_world(seed=0, size=(3, 5), scale=1.0):
  rng = np.random.default_rng(seed)

  def draw():
    return jax.nn.log_softmax(jnp.asarray(rng.normal(size=size)))

  reward = jnp.asarray(scale * rng.normal(size=size))
  return World(draw(), reward, jnp.asarray(rng.dirichlet(np.ones(size[0]))), draw())


@pytest.fixture
def world():
  """Yields a world in float64, with float64 enabled for the test."""
  with jax.enable_x64(True):
    yield make_world()


def policies(shape, count, seed=1):
  """Samples policies from nearly uniform to nearly deterministic: [count, X, Y]."""
  rng = np.random.default_rng(seed)
  return jax.nn.log_softmax(rng.uniform(0.1, 8, (count, 1, 1)) * rng.normal(size=(count, *shape)))


def beside(policy, count, seed=3):
  """Samples neighbours of a policy, with logits changed by 0.001 to 5 nats: [count, X, Y]."""
  rng = np.random.default_rng(seed)
  scale = np.geomspace(1e-3, 5, count)[:, None, None]
  return jax.nn.log_softmax(policy + scale * rng.normal(size=(count, *policy.shape)))


# --- By hand --------------------------------------------------------------------------------------


@pytest.fixture
def coin():
  """One prompt, 2 completions: π_ref = (1/2, 1/2), r = (log 3, 0), so π* = (3/4, 1/4) at β = 1."""
  with jax.enable_x64(True):
    yield jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[np.log(3.0), 0.0]])


def test_chain_by_hand(coin):
  reference, reward = coin
  optimal = np.log([[0.75, 0.25]])
  target = chain.unnormalized_target(reference, reward, beta=1.0)
  np.testing.assert_allclose(np.exp(target), [[1.5, 0.5]])
  log_z = chain.partition_function(reference, reward, beta=1.0)
  np.testing.assert_allclose(np.exp(log_z), [2.0])
  np.testing.assert_allclose(chain.optimal_policy(reference, reward, beta=1.0), optimal)
  preference = chain.bradley_terry(reward)
  np.testing.assert_allclose(preference, [[[0.5, 0.75], [0.25, 0.5]]])
  implicit = chain.implicit_reward(jnp.asarray(optimal), reference, beta=1.0)
  np.testing.assert_allclose(implicit, [[np.log(1.5), np.log(0.5)]])


def test_objectives_by_hand(coin):
  reference, reward = coin
  policy = jnp.log(jnp.array([[0.9, 0.1]]))
  kl = 0.9 * np.log(1.8) + 0.1 * np.log(0.2)

  def near(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-12)

  near(chain.kl_divergence(policy, reference), [kl])
  near(chain.loss_part(policy, reward), -0.9 * np.log(3))
  near(chain.penalty_part(policy, reference, beta=2.0), 2 * kl)
  near(
    chain.assumed_objective(policy, reference, reward, beta=2.0),
    -0.9 * np.log(3) + 2 * kl,
  )
  # At the reference the penalty is 0; at π* the objective is -β log Z.
  near(chain.assumed_objective(reference, reference, reward, beta=1.0), -np.log(3) / 2)
  near(
    chain.assumed_objective(jnp.log(jnp.array([[0.75, 0.25]])), reference, reward, beta=1.0),
    -np.log(2),
  )


def test_expected_dpo_loss_by_hand(coin):
  reference, reward = coin
  preference = chain.bradley_terry(reward)

  def loss(policy):
    return chain.expected_dpo_loss(policy, reference, preference, beta=1.0)

  np.testing.assert_allclose(loss(reference), np.log(2))
  # Half of the pairs compare a completion with itself: log 2. The others have the entropy of 3/4.
  entropy = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
  optimal = jnp.log(jnp.array([[0.75, 0.25]]))
  np.testing.assert_allclose(loss(optimal), (np.log(2) + entropy) / 2)


def test_sampled_answer_by_hand(coin):
  reference, reward = coin
  terms = chain.sampled_terms(jnp.log(jnp.array([[0.9, 0.1]])), reference, reward, beta=2.0)
  np.testing.assert_allclose(terms.loss_XY, [[-np.log(3), 0]])
  np.testing.assert_allclose(terms.penalty_XY, [[2 * np.log(1.8), 2 * np.log(0.2)]])


def test_frontier_of_two_answers_by_hand(coin):
  # With r = (a, 0) and an even reference, π*(first) = σ(a/β).
  reference, reward = coin
  betas = np.array([1e6, 3.0, 1.0, 0.1, 1e-3])
  found = chain.frontier(reference, reward, betas)
  p = 1 / (1 + np.exp(-np.log(3) / betas))
  entropy = -p * np.log(p) - (1 - p) * np.log(np.maximum(1 - p, 1e-300))
  np.testing.assert_allclose(found.reward_F, p * np.log(3), rtol=1e-12)
  np.testing.assert_allclose(found.kl_F, np.log(2) - entropy, rtol=1e-9, atol=1e-15)


# --- The identities -------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_rearranged_is_assumed_over_beta(world, beta):
  ends, given = (world.reference, world.reward), {"beta": beta, "weight_X": world.weight}
  many = policies(world.reward.shape, 20)
  assumed = jax.vmap(lambda p: chain.assumed_objective(p, *ends, **given))(many)
  rearranged = jax.vmap(lambda p: chain.rearranged_objective(p, *ends, **given))(many)
  np.testing.assert_allclose(rearranged, assumed / beta, rtol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_assumed_is_beta_times_kl_less_log_z(world, beta):
  ends, given = (world.reference, world.reward), {"beta": beta, "weight_X": world.weight}
  many = policies(world.reward.shape, 20)
  assumed = jax.vmap(lambda p: chain.assumed_objective(p, *ends, **given))(many)
  optimal = chain.optimal_policy(*ends, beta=beta)
  kl = jax.vmap(lambda p: chain.kl_divergence(p, optimal))(many)
  log_z = chain.partition_function(*ends, beta=beta)
  np.testing.assert_allclose(assumed, beta * (kl - log_z) @ world.weight, rtol=1e-10)
  form = jax.vmap(lambda p: chain.kl_form(p, *ends, **given))(many)
  np.testing.assert_allclose(form, assumed, rtol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_assumed_is_the_mean_of_its_sampled_terms(world, beta):
  given = {"beta": beta, "weight_X": world.weight}
  loss, penalty = chain.sampled_terms(world.policy, world.reference, world.reward, beta=beta)

  def mean(value):
    return world.weight @ (np.exp(world.policy) * value).sum(1)

  parts = (
    chain.loss_part(world.policy, world.reward, weight_X=world.weight),
    chain.penalty_part(world.policy, world.reference, **given),
  )
  np.testing.assert_allclose(parts, (mean(loss), mean(penalty)), rtol=1e-12)
  assumed = chain.assumed_objective(world.policy, world.reference, world.reward, **given)
  np.testing.assert_allclose(assumed, sum(parts), rtol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_optimum_is_the_target_over_z(world, beta):
  target = chain.unnormalized_target(world.reference, world.reward, beta=beta)
  log_z = chain.partition_function(world.reference, world.reward, beta=beta)
  optimal = chain.optimal_policy(world.reference, world.reward, beta=beta)
  np.testing.assert_allclose(optimal, target - log_z[:, None], rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(np.exp(optimal).sum(1), 1)


@pytest.mark.parametrize("beta", BETAS)
def test_implicit_reward_of_the_optimum_is_the_reward_less_a_function_of_x(world, beta):
  optimal = chain.optimal_policy(world.reference, world.reward, beta=beta)
  log_z = chain.partition_function(world.reference, world.reward, beta=beta)
  implicit = chain.implicit_reward(optimal, world.reference, beta=beta)
  np.testing.assert_allclose(implicit + beta * log_z[:, None], world.reward, atol=1e-11)
  np.testing.assert_allclose(
    chain.bradley_terry(implicit), chain.bradley_terry(world.reward), atol=1e-12
  )


@pytest.mark.parametrize("beta", BETAS)
def test_a_function_of_x_changes_neither_optimum_nor_preferences(world, beta):
  moved = world.reward + jnp.array([[5.0], [-100.0], [1e3]])

  def optimal(reward):
    return chain.optimal_policy(world.reference, reward, beta=beta)

  np.testing.assert_allclose(optimal(moved), optimal(world.reward), rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(
    chain.bradley_terry(moved), chain.bradley_terry(world.reward), atol=1e-12
  )


def test_preferences_of_a_pair_sum_to_one(world):
  preference = chain.bradley_terry(world.reward)
  np.testing.assert_allclose(preference + preference.swapaxes(1, 2), 1)


def test_expected_dpo_loss_is_the_mean_of_the_loss_that_trains(world):
  preference = chain.bradley_terry(world.reward)
  ref, policy, total = np.asarray(world.reference), np.asarray(world.policy), 0.0
  for x, weight in enumerate(world.weight):
    for y in range(5):
      for z in range(5):
        pairs = [PairLogps(logp[x, y], logp[x, z]) for logp in (policy, ref)]
        loss = losses.LOSSES["sigmoid"](*pairs, beta=0.7)
        # Each ordered pair occurs once as (winner, loser), from both orders in which it is sampled.
        total += weight * np.exp(ref[x, y] + ref[x, z]) * 2 * preference[x, y, z] * loss
  found = chain.expected_dpo_loss(
    world.policy, world.reference, preference, beta=0.7, weight_X=world.weight
  )
  np.testing.assert_allclose(found, total, rtol=1e-12)


def test_weights_default_to_uniform(world):
  even = jnp.full(3, 1 / 3)
  args = (world.policy, world.reference, world.reward)
  preference = chain.bradley_terry(world.reward)
  for function, given in [
    (chain.assumed_objective, args),
    (chain.rearranged_objective, args),
    (chain.kl_form, args),
    (chain.expected_dpo_loss, (*args[:2], preference)),
  ]:
    plain, weighted = function(*given, beta=0.3), function(*given, beta=0.3, weight_X=even)
    np.testing.assert_allclose(plain, weighted, rtol=1e-12)


# --- The optimum, and nothing else ----------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_no_other_policy_does_better(world, beta):
  def cost(policy):
    return chain.assumed_objective(policy, world.reference, world.reward, beta=beta)

  optimal = chain.optimal_policy(world.reference, world.reward, beta=beta)
  for others in (policies(world.reward.shape, 200), beside(optimal, 200)):
    assert (jax.vmap(cost)(others) > cost(optimal)).all()


def random_search(cost, start, seed=0, rounds=100, width=200):
  """Keeps the best of many random neighbours, and halves the steps when none is better."""
  rng, policy, scale, many = np.random.default_rng(seed), start, 1.0, jax.jit(jax.vmap(cost))
  for _ in range(rounds):
    noise = scale * rng.normal(size=(width, *start.shape))
    tried = jnp.concatenate([policy[None], jax.nn.log_softmax(policy + noise)])
    best = int(jnp.argmin(many(tried)))
    policy, scale = tried[best], scale if best else scale / 2
  return policy


@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_random_search_ends_at_the_optimum(world, beta):
  reference, reward = world.reference[:1], world.reward[:1]

  def cost(policy):
    return chain.assumed_objective(policy, reference, reward, beta=beta)

  found = random_search(cost, reference)
  optimal = chain.optimal_policy(reference, reward, beta=beta)
  assert chain.kl_divergence(found, optimal)[0] < 1e-6
  assert chain.kl_divergence(reference, optimal)[0] > 1e-3


@pytest.mark.parametrize("beta", [0.5, 5.0])
@pytest.mark.parametrize("which", ["assumed", "rearranged", "kl_form", "dpo"])
def test_descent_ends_at_the_optimum_of_every_form(world, which, beta):
  ends = world.reference, world.reward
  objective = {
    "assumed": lambda p: chain.assumed_objective(p, *ends, beta=beta) / beta,
    "rearranged": lambda p: chain.rearranged_objective(p, *ends, beta=beta),
    "kl_form": lambda p: chain.kl_form(p, *ends, beta=beta) / beta,
    "dpo": lambda p: (
      chain.expected_dpo_loss(p, world.reference, chain.bradley_terry(world.reward), beta=beta)
      / beta**2
    ),
  }[which]
  steps = derivation.descend(objective, world.policy, rate=5.0, steps=8000)
  optimal = chain.optimal_policy(*ends, beta=beta)
  assert chain.kl_divergence(steps[-1], optimal).max() < 1e-9
  assert objective(steps[-1]) < objective(steps[0])


@pytest.mark.parametrize("beta", BETAS)
def test_expected_dpo_loss_is_least_at_the_optimum_alone(world, beta):
  preference = chain.bradley_terry(world.reward)

  def loss(policy):
    return chain.expected_dpo_loss(policy, world.reference, preference, beta=beta)

  optimal = chain.optimal_policy(world.reference, world.reward, beta=beta)
  slope = jax.grad(lambda logits: loss(jax.nn.log_softmax(logits)))(optimal)
  np.testing.assert_allclose(slope / beta, 0, atol=1e-12)
  assert (jax.vmap(loss)(beside(optimal, 200)) > loss(optimal)).all()


def test_the_optimum_of_dpo_does_not_depend_on_which_pairs_are_compared(world):
  # A ring of comparisons connects all five completions; most pairs never occur.
  ring = jnp.zeros((3, 5, 5)).at[:, jnp.arange(5), (jnp.arange(5) + 1) % 5].set(0.2)
  preference = chain.bradley_terry(world.reward)

  def loss(policy):
    return chain.expected_dpo_loss(policy, world.reference, preference, beta=0.5, pair_XYY=ring)

  optimal = chain.optimal_policy(world.reference, world.reward, beta=0.5)
  slope = jax.grad(lambda logits: loss(jax.nn.log_softmax(logits)))(optimal)
  np.testing.assert_allclose(slope, 0, atol=1e-12)
  assert loss(world.policy) > loss(optimal)


def test_frontier_is_monotone_and_no_policy_is_beyond_it(world):
  betas = np.geomspace(1e3, 0.05, 60)
  found = chain.frontier(world.reference, world.reward, betas, weight_X=world.weight)
  assert (np.diff(found.kl_F) > 0).all()
  assert (np.diff(found.reward_F) > 0).all()
  slope = np.diff(found.reward_F) / np.diff(found.kl_F)
  assert (np.diff(slope) < 0).all()  # each nat gains less reward: the slope is β
  inner = slice(5, 40)
  np.testing.assert_allclose(slope[inner], np.sqrt(betas[1:] * betas[:-1])[inner], rtol=1e-2)
  many = policies(world.reward.shape, 500)
  kl = jax.vmap(lambda p: chain.kl_divergence(p, world.reference))(many) @ world.weight
  loss = jax.vmap(lambda p: chain.loss_part(p, world.reward, weight_X=world.weight))(many)
  within = kl < found.kl_F[-1]
  assert within.sum() > 100
  # The interpolation is a chord, which lies below the curve by less than 1e-3.
  assert (-loss < np.interp(kl, found.kl_F, found.reward_F) + 1e-3)[within].all()


def test_limits_of_beta(world):
  optimal = chain.optimal_policy(world.reference, world.reward, beta=1e-3)
  np.testing.assert_array_equal(np.exp(optimal).argmax(1), world.reward.argmax(1))
  np.testing.assert_allclose(np.exp(optimal).max(1), 1)
  far = chain.optimal_policy(world.reference, world.reward, beta=1e6)
  np.testing.assert_allclose(far, world.reference, atol=1e-5)
  held = chain.frontier(world.reference, world.reward, [np.inf])
  np.testing.assert_allclose(held.kl_F, 0, atol=1e-15)


# --- Numbers that would overflow ------------------------------------------------------------------


def every_function(reference, reward, beta):
  """Returns every function of the chain as a function of (policy or reference, reward), by name."""
  d = chain
  preference = d.bradley_terry(reward)
  return {
    "assumed": lambda p, r: d.assumed_objective(p, reference, r, beta=beta),
    "rearranged": lambda p, r: d.rearranged_objective(p, reference, r, beta=beta),
    "kl_form": lambda p, r: d.kl_form(p, reference, r, beta=beta),
    "target": lambda p, r: d.unnormalized_target(p, r, beta=beta),
    "partition": lambda p, r: d.partition_function(p, r, beta=beta),
    "optimal": lambda p, r: d.optimal_policy(p, r, beta=beta),
    "implicit": lambda p, r: d.implicit_reward(p, reference, beta=beta) + 0 * r,
    "bradley_terry": lambda p, r: d.bradley_terry(r) + 0 * p.sum(),
    "terms": lambda p, r: sum(d.sampled_terms(p, reference, r, beta=beta)),
    "dpo": lambda p, r: d.expected_dpo_loss(p, reference, preference, beta=beta) + 0 * r.sum(),
    "frontier": lambda p, r: jnp.stack(d.frontier(p, r, beta[None])),
  }


@jax.jit
def values_and_slopes(policy, reference, reward, beta):
  """Returns name -> (value, gradients of its sum with respect to policy and reward)."""
  return {
    name: (f(policy, reward), *jax.grad(lambda p, r, f=f: f(p, r).sum(), (0, 1))(policy, reward))
    for name, f in every_function(reference, reward, beta).items()
  }


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("beta", EXTREMES)
def test_extremes_are_finite_with_their_gradients(beta, double):
  with jax.enable_x64(double):
    reference = jnp.log(jnp.array([[0.2, 0.3, 0.1, 0.1, 0.3], [0.6, 0.1, 0.1, 0.1, 0.1]]))
    reward = jnp.array([[1e3, -1e3, 0, 1e3, 1], [-1e3, -1e3, 999, 1e3, 0]])
    certain = jax.nn.log_softmax(jnp.array([[60.0, 0, 0, 0, 0], [0, 0, 0, 1e3, 0]]))
    optimal = chain.optimal_policy(reference, reward, beta=beta)
    for policy in (reference, certain, optimal):
      found = values_and_slopes(policy, reference, reward, jnp.asarray(beta))
      for name, arrays in found.items():
        for array in arrays:
          assert array.dtype == (jnp.float64 if double else jnp.float32), name
          assert np.isfinite(array).all(), name


def test_float32_keeps_its_digits_where_the_rewards_are_far_from_zero():
  # r/β = 10^6 would be rounded to a sixteenth of a nat unless the best reward is subtracted first.
  reference = jnp.log(jnp.array([[0.3, 0.7, 1e-9]]))
  optimal = chain.optimal_policy(reference, jnp.full((1, 3), 1e3), beta=1e-3)
  assert optimal.dtype == jnp.float32
  np.testing.assert_allclose(optimal, reference, rtol=1e-6)
  # The reward of a completion of probability 0 does not take the digits of the others either.
  reference = jnp.log(jnp.array([[0.3, 0.7, 0.0]]))
  optimal = chain.optimal_policy(reference, jnp.array([[0.0, 0.0, 1e3]]), beta=1e-3)
  np.testing.assert_allclose(optimal, reference, rtol=1e-6)


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
def test_float32_agrees_with_float64(beta):
  def every(double):
    with jax.enable_x64(double):
      policy, reference, reward = np.random.default_rng(0).normal(size=(3, 2, 5))
      args = (jax.nn.log_softmax(policy), jax.nn.log_softmax(reference), jnp.asarray(reward))
      return jax.device_get(values_and_slopes(*args, jnp.asarray(beta)))

  single, double = every(False), every(True)
  for name, (value, *_) in double.items():
    # Terms of a few nats, multiplied by β or divided by it, are rounded to 24 bits.
    given = {"rtol": 1e-6} if name == "optimal" else {"atol": 2e-6 * max(beta, 1 / beta)}
    np.testing.assert_allclose(single[name][0], value, err_msg=name, **given)


# --- Completions of probability 0 -----------------------------------------------------------------


@pytest.fixture
def holes():
  """The reference gives the last completion probability 0; the policy also the one before it."""
  with jax.enable_x64(True):
    reference = jnp.log(jnp.array([[0.5, 0.3, 0.2, 0.0]]))
    policy = jnp.log(jnp.array([[0.4, 0.6, 0.0, 0.0]]))
    yield policy, reference, jnp.array([[1.0, -2.0, 3.0, 1e3]])


def test_what_never_comes_counts_nothing(holes):
  policy, reference, reward = holes
  kl = 0.4 * np.log(0.4 / 0.5) + 0.6 * np.log(0.6 / 0.3)
  np.testing.assert_allclose(chain.kl_divergence(policy, reference), [kl])
  np.testing.assert_allclose(chain.loss_part(policy, reward), -0.4 + 1.2)
  # Not even a reward of 1000 gives probability to a completion that has none under the reference.
  optimal = chain.optimal_policy(reference, reward, beta=0.5)
  bare = chain.optimal_policy(reference[:, :3], reward[:, :3], beta=0.5)
  np.testing.assert_allclose(optimal[:, :3], bare)
  assert optimal[0, 3] == -np.inf
  implicit = chain.implicit_reward(optimal, reference, beta=0.5)
  assert implicit[0, 3] == 0
  np.testing.assert_allclose(np.diff(implicit[0, :3]), np.diff(reward[0, :3]))


def test_gradients_are_finite_where_answers_never_come(holes):
  policy, reference, reward = holes
  optimal = chain.optimal_policy(reference, reward, beta=0.5)
  for function in (chain.assumed_objective, chain.rearranged_objective):
    slope = jax.jit(jax.grad(lambda p, f=function: f(p, reference, reward, beta=0.5)))
    for at in (policy, optimal, reference):
      assert np.isfinite(slope(at)).all()
      assert slope(at)[0, 3] == 0
  preference = chain.bradley_terry(reward)

  def loss(p):
    return chain.expected_dpo_loss(p, reference, preference, beta=0.5)

  assert np.isfinite(loss(optimal))
  assert np.isfinite(jax.grad(loss)(optimal)).all()
  assert loss(policy) == np.inf  # a completion that wins comparisons has probability 0


def test_a_policy_with_answers_the_reference_lacks_is_infinitely_far(holes):
  _, reference, reward = holes
  policy = jnp.log(jnp.full((1, 4), 0.25))
  assert chain.assumed_objective(policy, reference, reward, beta=0.5) == np.inf


# --- Types of the arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.asarray])
def test_weights_are_any_sequence_of_numbers(world, kind):
  reference, reward, weight, policy = world

  def of(weight):
    return derivation.assumed_objective(policy, reference, reward, beta=0.5, weight_X=weight)

  np.testing.assert_allclose(of(kind(weight.tolist())), of(weight))


def test_one_beta_is_a_frontier_of_one_point(world):
  reference, reward, *_ = world
  found = derivation.frontier(reference, reward, 0.5)
  assert found.reward_F.shape == found.kl_F.shape == (1,)
  np.testing.assert_allclose(found, derivation.frontier(reference, reward, jnp.array([0.5])))


@pytest.mark.parametrize("beta", [0, -0.5, float("nan")])
def test_a_beta_that_is_not_above_0_is_refused(world, beta):
  reference, reward, _, policy = world
  preference = derivation.bradley_terry(reward)
  for call in (
    lambda: derivation.sampled_terms(policy, reference, reward, beta=beta),
    lambda: derivation.assumed_objective(policy, reference, reward, beta=beta),
    lambda: derivation.rearranged_objective(policy, reference, reward, beta=beta),
    lambda: derivation.optimal_policy(reference, reward, beta=beta),
    lambda: derivation.kl_form(policy, reference, reward, beta=beta),
    lambda: derivation.frontier(reference, reward, [1.0, beta]),
    lambda: derivation.implicit_reward(policy, reference, beta=beta),
    lambda: derivation.expected_dpo_loss(policy, reference, preference, beta=beta),
  ):
    with pytest.raises(ValueError, match="it must be above 0"):
      call()
