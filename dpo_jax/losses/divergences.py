"""f-divergences that replace the reverse KL in losses of the margin.

The optimum under an f-divergence penalty satisfies r = β f'(π*/π_ref) + const. So f' of the ratio
takes the place of its logarithm in every loss of the margin. The functions below compute f' at
t = exp(u) from the log-ratio u, in nats, up to a constant that cancels. Wang et al. 2024 (f-DPO).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.losses.ratios import log_ratios, tangent_exp
from dpo_jax.structs import Array, PairLogps


def reverse_kl(u: Array) -> Array:
  """Computes f' of f(t) = t log t: the log-ratio u itself, as in DPO."""
  # f'(t) = log t + 1; the constant cancels in the margin.
  return u


def forward_kl(u: Array) -> Array:
  """Computes f' of f(t) = -log t: -e^{-u}.

  It becomes -inf where the policy gives up a completion that the reference gives.
  """
  # f'(t) = -1/t. tangent_exp, because e^{-u} overflows where the policy has left the completion.
  return -tangent_exp(-u)


def jensen_shannon(u: Array) -> Array:
  """Computes f' of f(t) = t log t - (t+1) log((t+1)/2): log(2e^u/(1+e^u)), at most log 2."""
  # log(e^u/(1+e^u)) is log σ(u), which forms no exponential of u.
  return jnp.log(2.0) + jax.nn.log_sigmoid(u)


def alpha(u: Array, *, link_alpha: float = 0.5) -> Array:
  """Computes f' of the α-divergence: (1-e^{-αu})/α.

  `link_alpha` is α, in (0, 1): α to 0 gives reverse KL, α to 1 gives forward KL.
  f(t) = (t^{1-α} - (1-α) t - α) / (α (α-1)).
  """
  # f'(t) = (1 - t^{-α})/α with t = e^u; α > 0 is checked by `resolve`.
  return (1 - tangent_exp(-link_alpha * u)) / link_alpha


# Names that loss.link accepts; "reverse_kl" is the default and changes nothing.
DIVERGENCES: dict[str, Callable[..., Array]] = {
  "reverse_kl": reverse_kl,
  "forward_kl": forward_kl,
  "jensen_shannon": jensen_shannon,
  "alpha": alpha,
}


def with_divergence(
  policy: PairLogps, reference: PairLogps, divergence: Callable[[Array], Array]
) -> tuple[PairLogps, None]:
  """Returns pairs whose log-probs are f' of the log-ratios, with None as their reference.

  A loss of the margin then reads f' of the ratio as if it were its logarithm.
  """
  # The order is important: 1. log-ratios, 2. f' of each. f' is not linear.
  c_B, r_B = log_ratios(policy, reference)
  return policy._replace(chosen_B=divergence(c_B), rejected_B=divergence(r_B)), None
