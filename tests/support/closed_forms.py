"""Computes the optimum of each loss in plain NumPy: closed forms and one-dimensional root finding.

Nothing here calls the package's mathematics. X lists prompts, Y completions; h_XY is log π/π_ref up
to a constant per prompt.
"""

import numpy as np


def walk(table, world):
  """Computes log π(y|x) of a tabular policy, one token at a time: [X, Y], in nats."""
  base = world.ids + 1

  def log_prob(prompt, completion):
    total, seen = 0.0, list(prompt)
    for place, token in enumerate(completion):
      logits = table[sum((t + 1) * base**i for i, t in enumerate(seen))]
      if place < world.longest - 1:  # the end token is certain at the greatest length
        total += logits[token] - np.log(np.exp(logits).sum())
      seen.append(token)
    return total

  return np.array(
    [[log_prob(prompt, completion) for completion in world.completions] for prompt in world.prompts]
  )


def unwalk(log_XY, world, like):
  """Returns a table whose policy is `log_XY`; rows that no completion reads are those of `like`."""
  table, base = like.copy(), world.ids + 1
  for prompt, log_Y in zip(world.prompts, log_XY, strict=True):
    mass = {}
    # A token's conditional probability is in proportion to the mass of all completions through it.
    for completion, log_prob in zip(world.completions, log_Y, strict=True):
      for place, token in enumerate(completion):
        row = mass.setdefault(tuple(completion[:place]), np.zeros(world.vocab))
        row[token] += np.exp(log_prob)
    for seen, row in mass.items():
      if len(seen) < world.longest - 1:
        text = sum((t + 1) * base**i for i, t in enumerate((*prompt, *seen)))
        table[text] = np.log(row)
  return table


def kl(log_p_XY, log_q_XY):
  """Computes KL(p ‖ q) per prompt, in nats: [X]."""
  return (np.exp(log_p_XY) * (log_p_XY - log_q_XY)).sum(-1)


def normalized(log_XY):
  """Returns the log-probs of the distribution proportional to exp(log_XY): [X, Y]."""
  top_X1 = log_XY.max(-1, keepdims=True)
  return log_XY - top_X1 - np.log(np.exp(log_XY - top_X1).sum(-1, keepdims=True))


def tilted(log_reference_XY, h_XY):
  """Returns the log-probs of π_ref e^h / Z: [X, Y]."""
  return normalized(log_reference_XY + h_XY)


def better_than_mu(log_mu_XY, preference_XYY):
  """Computes p(y ≻ μ|x), the probability to be preferred to a sample from μ: [X, Y]."""
  return np.einsum("xyz,xz->xy", preference_XYY, np.exp(log_mu_XY))


def root(increasing, low, high, shape):
  """Finds the zeros of increasing functions by bisection, elementwise."""
  low, high = np.full(shape, float(low)), np.full(shape, float(high))
  for _ in range(70):  # 2^-70 of the interval is below float64's precision
    middle = (low + high) / 2
    above = increasing(middle) > 0
    low, high = np.where(above, low, middle), np.where(above, middle, high)
  return (low + high) / 2


def _sum_to_one(log_reference_XY, h_of, low=-60.0, high=60.0):
  """Returns log π_ref + h(κ) with the κ of each prompt, [X, 1], at which the policy sums to 1.

  h must increase with κ, so that there is one such κ.
  """

  def excess(k_X1):
    return np.exp(log_reference_XY + h_of(k_X1)).sum(-1, keepdims=True) - 1

  return log_reference_XY + h_of(root(excess, low, high, (len(log_reference_XY), 1)))


# f'(e^u) as a function of u = log π/π_ref, up to a constant, by the name of the divergence.
DIVERGENCES = {
  "reverse_kl": lambda u: u,
  "forward_kl": lambda u: -np.exp(-u),
  "jensen_shannon": lambda u: np.log(2) - np.log1p(np.exp(-u)),
  "alpha": lambda u: (1 - np.exp(-0.4 * u)) / 0.4,
  "chi_po": lambda u: np.exp(u) + u,
}


def under_divergence(log_reference_XY, s_XY, derivative):
  """Returns the policy with f'(π/π_ref) = s + const(x), where f'(e^u) = derivative(u) increases."""

  def inverse(v_XY):
    return root(lambda u_XY: derivative(u_XY) - v_XY, -30, 30, v_XY.shape)

  return _sum_to_one(log_reference_XY, lambda k_X1: inverse(s_XY + k_X1))


def reshaped(s_XY, tokens_Y, alpha):
  """Returns the policy with (1 - p^-α)/α = s + const(x), p = π^(1/|y|)."""

  def log_prob(k_X1):
    # At 1/α the power is 0 and p infinite; a little below it, p is as large as it need be.
    return -tokens_Y * np.log(np.maximum(1 - alpha * (s_XY + k_X1), 1e-9)) / alpha

  return _sum_to_one(np.zeros(s_XY.shape), log_prob)


def averaged(log_reference_XY, s_XY, tokens_Y):
  """Returns the policy with log(π/π_ref)/|y| = s + const(x)."""
  return _sum_to_one(log_reference_XY, lambda k_X1: tokens_Y * (s_XY + k_X1))


def regressed(log_reference_XY, h_XY):
  """Fits log π/π_ref to h by least squares over samples of π_ref, among policies that sum to 1.

  By Lagrange: u + λ e^u = h with u = log π/π_ref. E h >= 0 under π_ref makes λ >= 0.
  """

  # u decreases with λ, so κ = -log λ is what it increases with.
  def log_ratio(k_X1):
    return root(lambda u_XY: u_XY + np.exp(u_XY - k_X1) - h_XY, -60, 60, h_XY.shape)

  return _sum_to_one(log_reference_XY, log_ratio)
