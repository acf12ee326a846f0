"""The derivation of DPO on a finite world, step by step in its order, every step a function.

  assumed objective -> rearranged -> target π_ref exp(r/β) -> Z -> π* -> KL form
  -> implicit reward -> Bradley-Terry -> DPO loss

X lists prompts, Y all answers to a prompt, F values of β, T steps of descent. Everything is in nats
or reward units. A policy is its log-probabilities, `log_policy_XY`; an answer it never gives has
-inf, and 0 log 0 is 0. Every logarithm stays one: r/β may be 10^6, where exp(r/β) has no
floating-point number. `weight_X` holds probabilities of the prompts, an array or a list of numbers,
uniform where None.

β is above 0. A Python number that is not is a ValueError; an array, traced or not, is not looked
at, and one that breaks the rule gives whatever the formula gives.

Without `jax.config.update("jax_enable_x64", True)` jax computes in float32 whatever it is given;
float64 below means with it, or within `jax.enable_x64(True)`.

The functions are finite, with their gradients, in float32 and float64 for β from 1e-3 to 1e6 and
rewards to ±1e3. A rounded KL times β is β times as wrong: at β = 1e6 float32 knows the objective at
π* to a tenth of a reward unit.

Rafailov et al. 2023, section 4 and appendix A.1 to A.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array

Real = float | Array
Weights = Array | Sequence[float]

# --- 1. What is assumed to be minimised -----------------------------------------------------------


class Terms(NamedTuple):
  """The two terms of the assumed objective that a sampled answer is charged, reward units."""

  loss_XY: Array
  penalty_XY: Array


def sampled_terms(
  log_policy_XY: Array, log_reference_XY: Array, reward_XY: Array, *, beta: Real
) -> Terms:
  """Loss -r(x,y) and penalty β (log π(y|x) - log π_ref(y|x)), answer by answer."""
  _check_beta(beta)
  return Terms(-reward_XY, beta * _difference(log_policy_XY, log_reference_XY))


def loss_part(log_policy_XY: Array, reward_XY: Array, *, weight_X: Weights | None = None) -> Array:
  """E_x E_{y~π} [-r(x,y)]: a number."""
  return -_mean(_expected(log_policy_XY, reward_XY), weight_X)


def penalty_part(
  log_policy_XY: Array,
  log_reference_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """E_x E_{y~π} [β (log π(y|x) - log π_ref(y|x))] = β E_x KL(π ‖ π_ref): a number."""
  _check_beta(beta)
  return beta * _mean(kl_divergence(log_policy_XY, log_reference_XY), weight_X)


def assumed_objective(
  log_policy_XY: Array,
  log_reference_XY: Array,
  reward_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """E_x E_{y~π} [-r(x,y) + β (log π(y|x) - log π_ref(y|x))]: a number, in reward units.

  Args:
    log_policy_XY: log π(y|x).
    log_reference_XY: log π_ref(y|x).
    reward_XY: r(x,y), the conceptual reward.
    beta: above 0, reward units a nat; larger holds the policy nearer the reference.
    weight_X: probability of each prompt; they sum to 1.
  """
  penalty = penalty_part(log_policy_XY, log_reference_XY, beta=beta, weight_X=weight_X)
  return loss_part(log_policy_XY, reward_XY, weight_X=weight_X) + penalty


# --- 2. The same, rearranged around a fixed target ------------------------------------------------


def unnormalized_target(log_reference_XY: Array, reward_XY: Array, *, beta: Real) -> Array:
  """The logarithm of π_ref(y|x) exp(r(x,y)/β): [X, Y]. No policy is in it."""
  _check_beta(beta)
  return log_reference_XY + reward_XY / beta


def rearranged_objective(
  log_policy_XY: Array,
  log_reference_XY: Array,
  reward_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """E_x E_{y~π} [log π(y|x) - log(π_ref(y|x) exp(r(x,y)/β))], the assumed objective over β."""
  log_target_XY = unnormalized_target(log_reference_XY, reward_XY, beta=beta)
  return _mean(kl_divergence(log_policy_XY, log_target_XY), weight_X)


# --- 3. The target normalised: the optimum --------------------------------------------------------


def partition_function(log_reference_XY: Array, reward_XY: Array, *, beta: Real) -> Array:
  """The logarithm of Z(x) = Σ_y π_ref(y|x) exp(r(x,y)/β): [X]."""
  log_target_XY = unnormalized_target(log_reference_XY, reward_XY, beta=beta)
  return jax.nn.logsumexp(log_target_XY, axis=-1)


def optimal_policy(log_reference_XY: Array, reward_XY: Array, *, beta: Real) -> Array:
  """log π*(y|x), with π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x): [X, Y]."""
  # A function of x alone changes nothing, so the best possible reward is taken away first: a
  # float32 of size 10^6 would round log π* to a sixteenth of a nat.
  possible_XY = jnp.isfinite(log_reference_XY)
  best_X = jnp.max(reward_XY, axis=-1, where=possible_XY, initial=-jnp.inf, keepdims=True)
  behind_XY = reward_XY - jax.lax.stop_gradient(best_X)
  log_z_X = partition_function(log_reference_XY, behind_XY, beta=beta)
  return unnormalized_target(log_reference_XY, behind_XY, beta=beta) - log_z_X[:, None]


def kl_divergence(log_policy_XY: Array, log_other_XY: Array) -> Array:
  """KL(π ‖ q) = E_{y~π} [log π(y|x) - log q(y|x)], nats: [X]; q need not be normalised."""
  return _expected(log_policy_XY, _difference(log_policy_XY, log_other_XY))


def kl_form(
  log_policy_XY: Array,
  log_reference_XY: Array,
  reward_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """E_x [β (KL(π ‖ π*) - log Z(x))]: the assumed objective once more.

  log Z(x) holds no policy, and a KL is least, 0, at equality alone: hence π* is the optimum.
  """
  log_optimal_XY = optimal_policy(log_reference_XY, reward_XY, beta=beta)
  log_z_X = partition_function(log_reference_XY, reward_XY, beta=beta)
  return beta * _mean(kl_divergence(log_policy_XY, log_optimal_XY) - log_z_X, weight_X)


class Frontier(NamedTuple):
  """Means over prompts under π* of each β: no policy has more reward at the same KL."""

  reward_F: Array
  kl_F: Array


def frontier(
  log_reference_XY: Array,
  reward_XY: Array,
  beta_F: Real | Sequence[float],
  *,
  weight_X: Weights | None = None,
) -> Frontier:
  """(E[r], KL(π* ‖ π_ref)) as β runs; β = inf is the reference itself, one number is F = 1."""
  for beta in beta_F if isinstance(beta_F, (list, tuple)) else [beta_F]:
    _check_beta(beta)

  def point(beta: Array) -> Frontier:
    log_optimal_XY = optimal_policy(log_reference_XY, reward_XY, beta=beta)
    kl_X = kl_divergence(log_optimal_XY, log_reference_XY)
    return Frontier(-loss_part(log_optimal_XY, reward_XY, weight_X=weight_X), _mean(kl_X, weight_X))

  return jax.vmap(point)(jnp.atleast_1d(jnp.asarray(beta_F)))


# --- 4. Solved for the reward, and the reward removed ---------------------------------------------


def implicit_reward(log_policy_XY: Array, log_reference_XY: Array, *, beta: Real) -> Array:
  """β log(π(y|x)/π_ref(y|x)): [X, Y], the reward of which π is the optimum, less β log Z(x).

  Solving π* for the reward, r(x,y) = β log(π*(y|x)/π_ref(y|x)) + β log Z(x). Of an answer that
  neither policy nor reference ever gives, nothing is known; it has 0.
  """
  _check_beta(beta)
  return beta * _difference(log_policy_XY, log_reference_XY)


def bradley_terry(reward_XY: Array) -> Array:
  """Pr(y ≻ y' | x) = σ(r(x,y) - r(x,y')): [X, Y, Y'], a probability; a function of x cancels."""
  return jax.nn.sigmoid(_margins(reward_XY))


def expected_dpo_loss(
  log_policy_XY: Array,
  log_reference_XY: Array,
  preference_XYY: Array,
  *,
  beta: Real,
  pair_XYY: Array | None = None,
  weight_X: Weights | None = None,
) -> Array:
  """E_x E_{y,y'} [-Pr(y ≻ y'|x) log σ(z) - Pr(y' ≻ y|x) log σ(-z)], nats: a number.

    z = β [log π(y|x)/π_ref(y|x) - log π(y'|x)/π_ref(y'|x)]

  No reward is in it: the preferences stand where the reward stood, and Z(x) has cancelled. With
  the preferences of `bradley_terry(reward_XY)` it is least at π*, and there alone if the pairs
  connect all answers.

  Args:
    log_policy_XY: log π(y|x).
    log_reference_XY: log π_ref(y|x).
    preference_XYY: Pr(y ≻ y'|x); what stands at (y', y) is 1 less it.
    beta: above 0, reward units a nat.
    pair_XYY: probability that y and y' are compared, which sums to 1 for every prompt. Where
      None, both are drawn from the reference; the same answer twice costs log 2 under any policy.
    weight_X: probability of each prompt.
  """
  if pair_XYY is None:
    pair_XYY = jnp.exp(log_reference_XY[:, :, None] + log_reference_XY[:, None, :])
  z_XYY = _margins(implicit_reward(log_policy_XY, log_reference_XY, beta=beta))
  # Two labels a pair, each with its probability; log_sigmoid is finite at any finite margin.
  wins_XYY = _times(pair_XYY * preference_XYY, jax.nn.log_sigmoid(z_XYY))
  loses_XYY = _times(pair_XYY * (1 - preference_XYY), jax.nn.log_sigmoid(-z_XYY))
  return -_mean((wins_XYY + loses_XYY).sum((1, 2)), weight_X)


# --- Descent, for those who would rather see than believe -----------------------------------------


def descend(
  objective: Callable[[Array], Array], log_start_XY: Array, *, rate: float, steps: int
) -> Array:
  """Plain gradient descent over policies, by their logits: log π after each step, [T, X, Y].

  Args:
    objective: from log_policy_XY to a number.
    log_start_XY: the first policy.
    rate: step size.
    steps: how many.
  """
  slope = jax.grad(lambda logits_XY: objective(jax.nn.log_softmax(logits_XY)))

  def step(logits_XY: Array, _: None) -> tuple[Array, Array]:
    logits_XY = logits_XY - rate * slope(logits_XY)
    return logits_XY, jax.nn.log_softmax(logits_XY)

  return jax.lax.scan(step, log_start_XY, length=steps)[1]


# --- Parts ----------------------------------------------------------------------------------------


def _check_beta(beta: object) -> None:
  """Of a Python number, for an array may be traced."""
  if isinstance(beta, (int, float)) and not beta > 0:
    raise ValueError(f"beta is {beta}; it must be above 0, such as 0.1")


def _times(prob: Array, value: Array) -> Array:
  """prob * value, where what never happens counts nothing, be it infinite; so in the gradient."""
  happens = prob > 0
  # The inner `where` keeps inf away from the product's gradient, which would be 0 * inf.
  return jnp.where(happens, prob * jnp.where(happens, value, 0), 0)


def _difference(log_a: Array, log_b: Array) -> Array:
  """log a - log b, and 0 where both are log 0."""
  neither = jnp.isneginf(log_a) & jnp.isneginf(log_b)
  return jnp.where(neither, 0, log_a - jnp.where(neither, 0, log_b))


def _margins(value_XY: Array) -> Array:
  """value(y) - value(y'): [X, Y, Y']."""
  return _difference(value_XY[:, :, None], value_XY[:, None, :])


def _expected(log_policy_XY: Array, value_XY: Array) -> Array:
  """E_{y~π} [value]: [X]."""
  return _times(jnp.exp(log_policy_XY), value_XY).sum(-1)


def _mean(value_X: Array, weight_X: Weights | None) -> Array:
  """E_x [value]."""
  return value_X.mean() if weight_X is None else (jnp.asarray(weight_X) * value_X).sum()
