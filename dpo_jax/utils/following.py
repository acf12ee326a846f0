"""References that follow the policy: mixed with it (TR-DPO), or a moving average of it (BEMA)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PyTree


class Average(NamedTuple):
  """The rule of a reference that is a moving average of the policy, corrected for its lag (BEMA).

    reference = (ρ+t)^-η (policy - start) + mean,   mean = (ρ+t)^-κ policy + (1 - (ρ+t)^-κ) mean

  t is the number of steps, start the policy at step 0, where the mean begins too. The mean lags
  behind the policy; the first term makes up for it, ever less.
  Block and Zhang 2025 (BEMA, arXiv 2508.00180), algorithm 1, with γ = 1 and no burn-in.

  Attributes:
    power: κ; with 0 the mean is the policy itself.
    bias_power: η; a large one turns the correction off.
    lag: ρ.
  """

  power: float = 0.5
  bias_power: float = 0.2
  lag: float = 10.0


class Averaged(NamedTuple):
  """A reference that is an average, as the state has it: its parameters, and the mean so far."""

  params: PyTree
  mean: PyTree


class Sync(NamedTuple):
  """The rule by which a reference follows the policy (TR-DPO).

  Every `every` steps the reference's parameters become α policy + (1-α) reference. α = 1 is the
  hard update of the paper, α < 1 the soft one. Gorbatovski et al. 2024, eq. 4 and 5. With an
  `average` they become that instead; the argument `reference_params` of the step is then the
  policy at step 0.
  """

  every: int
  alpha: float = 1.0
  average: Average | None = None


def is_in_state(sync: Sync | None) -> bool:
  """Returns whether the training state alone has the reference, and no argument of the step.

  That is where it follows the policy, unless it is an average, which reads the policy at step 0.
  """
  return sync is not None and sync.average is None


def init_average(params: PyTree, like: PyTree) -> Averaged:
  """Returns the state of a reference that is an average, at step 0: both parts are the policy.

  Args:
    params: the policy's parameters.
    like: parameters in the type that the reference has.
  """

  def start() -> PyTree:
    # A copy each, since the state is donated: none may share its buffer with another.
    return jax.tree.map(lambda x, y: jnp.copy(x.astype(y.dtype)), params, like)

  return Averaged(start(), start())


def current(reference: PyTree | None, reference_params: PyTree | None) -> PyTree | None:
  """Returns the reference's parameters at a step.

  Args:
    reference: the reference in the training state; None where it does not follow the policy.
    reference_params: the frozen reference.
  """
  if reference is None:
    return reference_params
  return reference.params if isinstance(reference, Averaged) else reference


def follow(
  reference: PyTree | None,
  params: PyTree,
  start: PyTree | None,
  steps: Array,
  sync: Sync | None,
) -> PyTree | None:
  """Returns the reference after a step: unchanged, or brought up to the policy if that is due.

  Args:
    reference: the reference in the training state; None where it does not follow the policy.
    params: the policy's parameters after the step.
    start: the policy at step 0, which only an average reads.
    steps: number of steps so far, with this one.
    sync: the rule; None for a reference that does not follow.
  """
  if sync is None:
    return reference
  # Selected instead of a branch, so that one compiled program serves all steps.
  is_due = steps % sync.every == 0

  def mix(share: Array | float, new: PyTree, old: PyTree) -> PyTree:
    """Returns share · new + (1 - share) · old where a sync is due, and otherwise `old`."""
    share = jnp.where(is_due, share, 0.0)
    return jax.tree.map(lambda x, y: (share * x + (1 - share) * y).astype(y.dtype), new, old)

  if sync.average is None:
    return mix(sync.alpha, params, reference)
  assert isinstance(reference, Averaged)
  age = sync.average.lag + steps.astype(jnp.float32)
  mean = mix(age**-sync.average.power, params, reference.mean)
  correction = age**-sync.average.bias_power
  corrected = jax.tree.map(lambda x, x0, m: m + correction * (x - x0), params, start, mean)
  return Averaged(mix(1.0, corrected, reference.params), mean)
