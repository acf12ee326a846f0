"""Log-ratios of pairs, and functions that losses are made of.

The symbols c, r, m, z and β are those of `paired`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, Array]:
  """Computes the log-ratios c and r, in nats: [B] each."""
  if reference is None:
    return jnp.asarray(policy.chosen_B), jnp.asarray(policy.rejected_B)
  return policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B


def margins(policy: PairLogps, reference: PairLogps | None) -> Array:
  """Computes the margin m = c - r, in nats: [B]."""
  # The order is important: 1. policy minus reference, 2. chosen minus rejected. Policy and
  # reference are close, so the first difference is exact in floating point. Chosen minus rejected
  # may be hundreds of nats; computed first, it would round away digits that the margin needs.
  c_B, r_B = log_ratios(policy, reference)
  return c_B - r_B


def mean_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Array, Array]:
  """Computes c/|y_w| and r/|y_l|, in nats per token: [B] each.

  Raises:
    ValueError: `policy` has no token counts.
  """
  if policy.chosen_tokens_B is None or policy.rejected_tokens_B is None:
    raise ValueError("this loss averages over tokens; give PairLogps both token counts")
  c_B, r_B = log_ratios(policy, reference)
  return c_B / policy.chosen_tokens_B, r_B / policy.rejected_tokens_B


def smoothed_sigmoid(z_B: Array, epsilon: float) -> Array:
  """Computes the cross-entropy of σ(z) against labels that are wrong with probability ε: [B]."""
  return -(1 - epsilon) * jax.nn.log_sigmoid(z_B) - epsilon * jax.nn.log_sigmoid(-z_B)


# Nats above which `tangent_exp` is linear. exp(20) is 5e8, so that its products stay well within
# float32.
EXP_CAP = 20.0


def tangent_exp(u: Array) -> Array:
  """Computes exp(u), continued by its tangent above `EXP_CAP`.

  It is finite and increasing everywhere, and its gradient is never 0 in that region, unlike that of
  a clipped exponential.
  """
  # The minimum keeps inf out of both value and gradient: exp sees at most the cap. Above it, the
  # factor 1 + u - low is the tangent.
  low = jnp.minimum(u, EXP_CAP)
  return jnp.exp(low) * (1 + u - low)


def tangent_expm1(u: Array) -> Array:
  """Computes exp(u) - 1, continued by its tangent above `EXP_CAP`, with all digits near u = 0."""
  low = jnp.minimum(u, EXP_CAP)
  return jnp.expm1(low) + jnp.exp(low) * (u - low)
