"""Provides log-probs of a few pairs, and the slopes of losses on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import LOSSES, kind_of
from dpo_jax.structs import PairLogps, UnpairedLogps

PAIRED = sorted(name for name in LOSSES if kind_of(name) == "pairs")
DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
# c = -1 - -2 = 1, r = -4 - -3 = -1, m = 2; c/|y_w| = 1/2, r/|y_l| = -1/4.
TOKENS = (np.array([2.0]), np.array([4.0]))
POLICY = PairLogps(np.array([-1.0]), np.array([-4.0]), *TOKENS)
REFERENCE = PairLogps(np.array([-2.0]), np.array([-3.0]), *TOKENS)
# a = 3 and -1; mismatched ratios 3 and -1, whose mean is 1: a - z0 = 2 and -2.
KTO = UnpairedLogps(np.array([3.0, -1.0]), np.array([3.0, -1.0]))
KTO_REFERENCE = UnpairedLogps(np.zeros(2), np.zeros(2))


def softplus(x):
  """Computes -log σ(-x)."""
  return math.log1p(math.exp(x))


def ratios(c, r, tokens=(1.0, 1.0)):
  """Makes a policy with log-ratios c and r to a reference of zeros."""
  ones = jnp.ones(np.shape(c))
  return PairLogps(jnp.asarray(c), jnp.asarray(r), tokens[0] * ones, tokens[1] * ones)


def zeros_of(count):
  """Makes a reference of zeros, of one token each."""
  return PairLogps(*(jnp.zeros(count),) * 2, *(jnp.ones(count),) * 2)


def random_logps(seed=0, count=6):
  """Samples log-probs of pairs under a policy and a reference."""
  rng = np.random.default_rng(seed)
  q = -rng.uniform(5, 50, (2, count))
  p = np.minimum(q + rng.normal(0, 3, (2, count)), -0.5)
  tokens = rng.integers(2, 20, (2, count)).astype(float)
  return PairLogps(*p, *tokens), PairLogps(*q, *tokens)


def slopes_of(loss, policy, reference):
  """Computes d Σ loss / d log π of the chosen and of the rejected completions."""

  def total(p):
    return loss(policy._replace(chosen_B=p[0], rejected_B=p[1]), reference).sum()

  return jax.jit(jax.grad(total))((jnp.asarray(policy.chosen_B), jnp.asarray(policy.rejected_B)))
