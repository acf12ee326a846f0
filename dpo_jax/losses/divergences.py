"""What combines with a loss: f-divergences in place of the reverse KL.

The optimum under an f-divergence penalty is r = β f'(π*/π_ref) + const, so that f' of the ratio
takes the place of its logarithm in every loss of the margin. Wang et al. 2024 (f-DPO).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.losses.paired import log_ratios, tangent_exp
from dpo_jax.structs import Array, PairLogps


def reverse_kl(u: Array) -> Array:
  """f(t) = t log t: the log-ratio u itself, DPO's own."""
  return u


def forward_kl(u: Array) -> Array:
  """f(t) = -log t: -e^{-u}. Mass may leave no answer that the reference gives."""
  return -tangent_exp(-u)


def jensen_shannon(u: Array) -> Array:
  """f(t) = t log t - (t+1) log((t+1)/2): log(2e^u/(1+e^u)), bounded above by log 2."""
  return jnp.log(2.0) + jax.nn.log_sigmoid(u)


def alpha(u: Array, *, link_alpha: float = 0.5) -> Array:
  """The α-divergence, from reverse KL (α to 0) to forward KL (1): (1-e^{-αu})/α.

  f(t) = (t^{1-α} - (1-α) t - α) / (α (α-1)).
  """
  return (1 - tangent_exp(-link_alpha * u)) / link_alpha


DIVERGENCES: dict[str, Callable[..., Array]] = {
  "reverse_kl": reverse_kl,
  "forward_kl": forward_kl,
  "jensen_shannon": jensen_shannon,
  "alpha": alpha,
}


def with_divergence(
  policy: PairLogps, reference: PairLogps, divergence: Callable[[Array], Array]
) -> tuple[PairLogps, None]:
  """Pairs whose log-ratios, against no reference, are f' of the given ones."""
  c_B, r_B = log_ratios(policy, reference)
  return policy._replace(chosen_B=divergence(c_B), rejected_B=divergence(r_B)), None
