"""Where each loss should end, in plain numpy: closed forms and one-dimensional root finding.

Nothing here calls the package's mathematics. X lists prompts, Y answers; h_XY is what log π/π_ref
would be up to normalisation.
"""

import numpy as np


def walk(table, world):
  """log π(y|x) of a tabular policy, a token at a time: [X, Y]."""
  base = world.ids + 1

  def of(prompt, answer):
    total, seen = 0.0, list(prompt)
    for place, token in enumerate(answer):
      logits = table[sum((t + 1) * base**i for i, t in enumerate(seen))]
      if place < world.longest - 1:  # an answer of the greatest length ends for sure
        total += logits[token] - np.log(np.exp(logits).sum())
      seen.append(token)
    return total

  return np.array(
    [[of(prompt, answer) for answer in world.completions] for prompt in world.prompts]
  )


def unwalk(log_XY, world, like):
  """A table whose policy is `log_XY`; rows that no answer reads are those of `like`."""
  table, base = like.copy(), world.ids + 1
  for prompt, log_Y in zip(world.prompts, log_XY, strict=True):
    mass = {}
    for answer, log_prob in zip(world.completions, log_Y, strict=True):
      for place, token in enumerate(answer):
        row = mass.setdefault(tuple(answer[:place]), np.zeros(world.vocab))
        row[token] += np.exp(log_prob)
    for seen, row in mass.items():
      if len(seen) < world.longest - 1:
        text = sum((t + 1) * base**i for i, t in enumerate((*prompt, *seen)))
        table[text] = np.log(row)
  return table


def kl(log_p_XY, log_q_XY):
  """KL(p ‖ q), nats: [X]."""
  return (np.exp(log_p_XY) * (log_p_XY - log_q_XY)).sum(-1)


def normalised(log_XY):
  """The distribution in proportion: log-probs [X, Y]."""
  top_X1 = log_XY.max(-1, keepdims=True)
  return log_XY - top_X1 - np.log(np.exp(log_XY - top_X1).sum(-1, keepdims=True))


def tilted(log_reference_XY, h_XY):
  """π_ref e^h / Z."""
  return normalised(log_reference_XY + h_XY)


def better_than_mu(log_mu_XY, preference_XYY):
  """p(y ≻ μ|x), the chance to be preferred to a draw from μ: [X, Y]."""
  return np.einsum("xyz,xz->xy", preference_XYY, np.exp(log_mu_XY))


def root(rising, low, high, shape):
  """Where functions that rise cross 0, by bisection, elementwise."""
  low, high = np.full(shape, float(low)), np.full(shape, float(high))
  for _ in range(70):
    middle = (low + high) / 2
    above = rising(middle) > 0
    low, high = np.where(above, low, middle), np.where(above, middle, high)
  return (low + high) / 2


def _sum_to_one(log_reference_XY, h_of, low=-60.0, high=60.0):
  """π_ref e^{h(κ)} with the κ of each prompt, [X, 1], at which it sums to 1; h rises with κ."""
  excess = lambda k_X1: np.exp(log_reference_XY + h_of(k_X1)).sum(-1, keepdims=True) - 1
  return log_reference_XY + h_of(root(excess, low, high, (len(log_reference_XY), 1)))


LINKS = {
  "reverse_kl": lambda u: u,
  "forward_kl": lambda u: -np.exp(-u),
  "jensen_shannon": lambda u: np.log(2) - np.log1p(np.exp(-u)),
  "alpha": lambda u: (1 - np.exp(-0.4 * u)) / 0.4,
  "chi_po": lambda u: np.exp(u) + u,
}


def linked(log_reference_XY, s_XY, link):
  """The policy with f'(π/π_ref) = s + const(x), f'(e^u) = link(u), rising in u."""
  inverse = lambda v_XY: root(lambda u_XY: link(u_XY) - v_XY, -30, 30, v_XY.shape)
  return _sum_to_one(log_reference_XY, lambda k_X1: inverse(s_XY + k_X1))


def averaged(log_reference_XY, s_XY, tokens_Y):
  """The policy with log(π/π_ref)/|y| = s + const(x)."""
  return _sum_to_one(log_reference_XY, lambda k_X1: tokens_Y * (s_XY + k_X1))


def regressed(log_reference_XY, h_XY):
  """Least squares of log π/π_ref to h, answers drawn from π_ref, among policies that sum to 1.

  By Lagrange: u + λ e^u = h with u = log π/π_ref. E h >= 0 under π_ref makes λ >= 0.
  """
  # Falls with λ; κ = -log λ rises.
  of = lambda k_X1: root(lambda u_XY: u_XY + np.exp(u_XY - k_X1) - h_XY, -60, 60, h_XY.shape)
  return _sum_to_one(log_reference_XY, of)
