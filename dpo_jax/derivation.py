"""The derivation of DPO on a finite world: one function per step, in the order of the paper.

  assumed objective (RLHF's) -> the same, rearranged -> target π_ref exp(r/β) -> its sum Z
  -> optimal policy π* -> KL form -> implicit reward -> Bradley-Terry -> DPO loss

A finite world has X prompts and Y completions to each; F is the number of values of β. All
quantities are in nats or reward units. A policy is an array of log-probabilities, `log_policy_XY`.
A completion of probability 0 has log-probability -inf, and 0 log 0 counts as 0. `weight_X` contains
the probabilities of the prompts, as an array or a list of numbers; None means uniform.

exp(r/β) is never computed, only its logarithm: r/β may be 10^6, and exp(10^6) overflows.

β must be above 0. A Python number that is not raises ValueError. The value of an array is not
checked, because jax may be tracing it; with a wrong one the result has no meaning.

jax computes in float32 unless `jax.config.update("jax_enable_x64", True)` is set. Where float64 is
mentioned below, it is set, or the code runs within `jax.enable_x64(True)`.

All functions and their gradients are finite in float32 and float64 for β from 1e-3 to 1e6 and
rewards up to ±1e3. Multiplying a rounded KL by β multiplies its error by β: at β = 1e6 in float32,
the error of the objective at π* is about a tenth of a reward unit.

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

# --- 1. The assumed objective ---------------------------------------------------------------------


class Terms(NamedTuple):
  """The two terms of the assumed objective for each completion, in reward units."""

  loss_XY: Array
  penalty_XY: Array


def sampled_terms(
  log_policy_XY: Array, log_reference_XY: Array, reward_XY: Array, *, beta: Real
) -> Terms:
  """Computes -r(x,y) and β (log π(y|x) - log π_ref(y|x)) of every completion.

  The assumed objective is the expectation of their sum under the policy.
  """
  _check_beta(beta)
  return Terms(-reward_XY, beta * _log_ratio(log_policy_XY, log_reference_XY))


def loss_part(log_policy_XY: Array, reward_XY: Array, *, weight_X: Weights | None = None) -> Array:
  """Computes E_x E_{y~π} [-r(x,y)], a scalar in reward units."""
  return -_mean_over_prompts(_expectation(log_policy_XY, reward_XY), weight_X)


def penalty_part(
  log_policy_XY: Array,
  log_reference_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """Computes E_x E_{y~π} [β (log π(y|x) - log π_ref(y|x))] = β E_x KL(π ‖ π_ref), a scalar."""
  _check_beta(beta)
  return beta * _mean_over_prompts(kl_divergence(log_policy_XY, log_reference_XY), weight_X)


def assumed_objective(
  log_policy_XY: Array,
  log_reference_XY: Array,
  reward_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """Computes E_x E_{y~π} [-r(x,y) + β (log π(y|x) - log π_ref(y|x))].

  Args:
    log_policy_XY: log π(y|x), in nats.
    log_reference_XY: log π_ref(y|x), in nats.
    reward_XY: r(x,y), in reward units. DPO never needs its value, only preferences.
    beta: β > 0, in reward units per nat; a larger β keeps the policy nearer the reference.
    weight_X: probability of each prompt; they sum to 1. None means uniform.

  Returns:
    A scalar in reward units. DPO minimizes it without ever computing it.

  Rafailov et al. 2023, eq. 3, with the sign of a loss.
  """
  penalty = penalty_part(log_policy_XY, log_reference_XY, beta=beta, weight_X=weight_X)
  return loss_part(log_policy_XY, reward_XY, weight_X=weight_X) + penalty


# --- 2. The objective rearranged around a fixed target --------------------------------------------


def unnormalized_target(log_reference_XY: Array, reward_XY: Array, *, beta: Real) -> Array:
  """Computes log (π_ref(y|x) exp(r(x,y)/β)): [X, Y]. It does not depend on the policy."""
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
  """Computes E_x E_{y~π} [log π(y|x) - log(π_ref(y|x) exp(r(x,y)/β))], a scalar in nats.

  It equals the assumed objective divided by β. Rafailov et al. 2023, appendix A.1.
  """
  # The target does not sum to 1, so this KL may be negative: it is KL(π ‖ π*) - log Z.
  log_target_XY = unnormalized_target(log_reference_XY, reward_XY, beta=beta)
  return _mean_over_prompts(kl_divergence(log_policy_XY, log_target_XY), weight_X)


# --- 3. The normalized target is the optimal policy -----------------------------------------------


def partition_function(log_reference_XY: Array, reward_XY: Array, *, beta: Real) -> Array:
  """Computes log Z(x), where Z(x) = Σ_y π_ref(y|x) exp(r(x,y)/β): [X]."""
  log_target_XY = unnormalized_target(log_reference_XY, reward_XY, beta=beta)
  return jax.nn.logsumexp(log_target_XY, axis=-1)


def optimal_policy(log_reference_XY: Array, reward_XY: Array, *, beta: Real) -> Array:
  """Computes log π*(y|x), where π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x): [X, Y].

  Rafailov et al. 2023, eq. 4.
  """
  # Adding a function of x alone to the reward does not change π*, so the best reward is subtracted
  # first: at r/β = 10^6, float32 would round log π* to a sixteenth of a nat.
  possible_XY = jnp.isfinite(log_reference_XY)
  # Only completions with π_ref > 0 count: one that is impossible may have a larger reward.
  best_X = jnp.max(reward_XY, axis=-1, where=possible_XY, initial=-jnp.inf, keepdims=True)
  # The shift cancels, so its gradient is zero; without stop_gradient it would be computed twice
  # and cancel only up to rounding.
  shifted_XY = reward_XY - jax.lax.stop_gradient(best_X)
  log_z_X = partition_function(log_reference_XY, shifted_XY, beta=beta)
  return unnormalized_target(log_reference_XY, shifted_XY, beta=beta) - log_z_X[:, None]


def kl_divergence(log_policy_XY: Array, log_other_XY: Array) -> Array:
  """Computes KL(π ‖ q) = E_{y~π} [log π(y|x) - log q(y|x)], in nats: [X].

  q need not be normalized: `rearranged_objective` passes the unnormalized target.
  """
  return _expectation(log_policy_XY, _log_ratio(log_policy_XY, log_other_XY))


def kl_form(
  log_policy_XY: Array,
  log_reference_XY: Array,
  reward_XY: Array,
  *,
  beta: Real,
  weight_X: Weights | None = None,
) -> Array:
  """Computes E_x [β (KL(π ‖ π*) - log Z(x))], which equals the assumed objective.

  log Z(x) does not depend on the policy. The KL is 0 where π = π* and positive elsewhere, so π* is
  the only optimum. Rafailov et al. 2023, appendix A.1.
  """
  # The only term that depends on the policy is the KL: minimizing the objective and minimizing this
  # KL are the same problem.
  log_optimal_XY = optimal_policy(log_reference_XY, reward_XY, beta=beta)
  log_z_X = partition_function(log_reference_XY, reward_XY, beta=beta)
  return beta * _mean_over_prompts(kl_divergence(log_policy_XY, log_optimal_XY) - log_z_X, weight_X)


class Frontier(NamedTuple):
  """Mean reward and KL of the optimal policy of each β: the best reward that this KL allows.

  Attributes:
    reward_F: E[r] under π*, in reward units, a mean over prompts.
    kl_F: KL(π* ‖ π_ref), in nats, a mean over prompts.
  """

  reward_F: Array
  kl_F: Array


def frontier(
  log_reference_XY: Array,
  reward_XY: Array,
  beta_F: Real | Sequence[float],
  *,
  weight_X: Weights | None = None,
) -> Frontier:
  """Computes E[r] and KL(π* ‖ π_ref) of the optimal policy of every given β.

  Args:
    log_reference_XY: log π_ref(y|x), in nats.
    reward_XY: r(x,y), in reward units.
    beta_F: values of β > 0, in reward units per nat; one number counts as an array of one, and inf
      gives the reference itself.
    weight_X: probability of each prompt.
  """
  for beta in beta_F if isinstance(beta_F, (list, tuple)) else [beta_F]:
    _check_beta(beta)

  def point(beta: Array) -> Frontier:
    log_optimal_XY = optimal_policy(log_reference_XY, reward_XY, beta=beta)
    kl_X = kl_divergence(log_optimal_XY, log_reference_XY)
    return Frontier(
      -loss_part(log_optimal_XY, reward_XY, weight_X=weight_X), _mean_over_prompts(kl_X, weight_X)
    )

  # vmap over β: each point is independent, and one program serves all of them.
  return jax.vmap(point)(jnp.atleast_1d(jnp.asarray(beta_F)))


# --- 4. The reward as a function of the policy, then eliminated -----------------------------------


def implicit_reward(log_policy_XY: Array, log_reference_XY: Array, *, beta: Real) -> Array:
  """Computes β log(π(y|x)/π_ref(y|x)): [X, Y], in reward units.

  Solving the formula of π* for the reward gives r(x,y) = β log(π*(y|x)/π_ref(y|x)) + β log Z(x).
  The implicit reward is that reward without β log Z(x). It is 0 for a completion that has
  probability 0 under both policy and reference. Rafailov et al. 2023, eq. 5.
  """
  _check_beta(beta)
  return beta * _log_ratio(log_policy_XY, log_reference_XY)


def bradley_terry(reward_XY: Array) -> Array:
  """Computes the probability Pr(y ≻ y' | x) = σ(r(x,y) - r(x,y')): [X, Y, Y'].

  A term of the reward that depends on x alone cancels. Rafailov et al. 2023, eq. 1.
  """
  return jax.nn.sigmoid(_differences(reward_XY))


def expected_dpo_loss(
  log_policy_XY: Array,
  log_reference_XY: Array,
  preference_XYY: Array,
  *,
  beta: Real,
  pair_XYY: Array | None = None,
  weight_X: Weights | None = None,
) -> Array:
  """Computes E_x E_{y,y'} [-Pr(y ≻ y'|x) log σ(z) - Pr(y' ≻ y|x) log σ(-z)], a scalar in nats.

    z = β [log π(y|x)/π_ref(y|x) - log π(y'|x)/π_ref(y'|x)]

  It contains no reward: preferences replace it, and Z(x) cancels. With the preferences of
  `bradley_terry(reward_XY)` its minimum is at π*. The minimum is unique if the pairs connect all
  completions of a prompt.

  Args:
    log_policy_XY: log π(y|x), in nats.
    log_reference_XY: log π_ref(y|x), in nats.
    preference_XYY: Pr(y ≻ y'|x) at (y, y'); the entry at (y', y) must be 1 minus that.
    beta: β > 0, in reward units per nat.
    pair_XYY: probability that y and y' are compared; sums to 1 for every prompt. None means that
      both are sampled from the reference, independently; a completion paired with itself adds log 2
      under any policy.
    weight_X: probability of each prompt.

  Rafailov et al. 2023, eq. 7, as an expectation over all pairs.
  """
  if pair_XYY is None:
    pair_XYY = jnp.exp(log_reference_XY[:, :, None] + log_reference_XY[:, None, :])
  z_XYY = _differences(implicit_reward(log_policy_XY, log_reference_XY, beta=beta))
  # y is chosen with probability Pr(y ≻ y'|x), otherwise y' is. log_sigmoid, unlike log(sigmoid), is
  # finite at any finite margin.
  wins_XYY = _safe_product(pair_XYY * preference_XYY, jax.nn.log_sigmoid(z_XYY))
  loses_XYY = _safe_product(pair_XYY * (1 - preference_XYY), jax.nn.log_sigmoid(-z_XYY))
  return -_mean_over_prompts((wins_XYY + loses_XYY).sum((1, 2)), weight_X)


# --- Gradient descent, which shows that the optimum is reached ------------------------------------


def descend(
  objective: Callable[[Array], Array], log_start_XY: Array, *, rate: float, steps: int
) -> Array:
  """Runs plain gradient descent on the logits of a policy.

  Args:
    objective: maps log_policy_XY to a scalar.
    log_start_XY: log-probabilities of the first policy, in nats.
    rate: learning rate.
    steps: number of steps.

  Returns:
    log π after each step, in nats: [steps, X, Y].
  """
  # The softmax is inside the differentiated function: a step on logits stays on the simplex, while
  # a step on log-probabilities would leave it.
  gradient = jax.grad(lambda logits_XY: objective(jax.nn.log_softmax(logits_XY)))

  def step(logits_XY: Array, _: None) -> tuple[Array, Array]:
    logits_XY = logits_XY - rate * gradient(logits_XY)
    return logits_XY, jax.nn.log_softmax(logits_XY)

  return jax.lax.scan(step, log_start_XY, length=steps)[1]


# --- Helpers --------------------------------------------------------------------------------------


def _check_beta(beta: object) -> None:
  """Raises ValueError if a Python number is not above 0; arrays, possibly traced, pass."""
  # `not beta > 0` also catches nan, for which `beta <= 0` is false.
  if isinstance(beta, (int, float)) and not beta > 0:
    raise ValueError(f"beta is {beta}; it must be above 0, such as 0.1")


def _safe_product(prob: Array, value: Array) -> Array:
  """Computes prob * value, with 0 where prob is 0 even if the value is infinite."""
  possible = prob > 0
  # The inner `where` is for the gradient: the outer one sends a cotangent of 0 into the product,
  # where 0 * inf would be nan.
  return jnp.where(possible, prob * jnp.where(possible, value, 0), 0)


def _log_ratio(log_a: Array, log_b: Array) -> Array:
  """Computes log a - log b, with 0 where both are log 0."""
  neither = jnp.isneginf(log_a) & jnp.isneginf(log_b)
  # The inner `where` avoids -inf - -inf: jax_debug_nans reports a nan even if it is not selected.
  return jnp.where(neither, 0, log_a - jnp.where(neither, 0, log_b))


def _differences(value_XY: Array) -> Array:
  """Computes value(y) - value(y') for all pairs of completions: [X, Y, Y']."""
  return _log_ratio(value_XY[:, :, None], value_XY[:, None, :])


def _expectation(log_policy_XY: Array, value_XY: Array) -> Array:
  """Computes E_{y~π} [value]: [X]."""
  return _safe_product(jnp.exp(log_policy_XY), value_XY).sum(-1)


def _mean_over_prompts(value_X: Array, weight_X: Weights | None) -> Array:
  """Computes E_x [value], a scalar."""
  return value_X.mean() if weight_X is None else (jnp.asarray(weight_X) * value_X).sum()
