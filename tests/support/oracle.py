"""Implements every loss in NumPy, from its paper: values in float64, slopes by the complex step.

Nothing of the implementation is used here, and no jax. A pair has three tuples of arrays, each
(chosen, rejected): p log-probs under the policy, q under the reference, n completion tokens.

The slope of f at x is Im f(x + ih) / h with h = 1e-30 (Squire and Trapp 1998). Nothing is
subtracted, so the slope is as exact as f. Two conditions hold: f is built from analytic functions,
and every choice (a maximum, a clip, the order of a sort) looks at the real part alone. Where a
paper takes no gradient through a quantity, its real part is used.
"""

import itertools

import numpy as np

STEP = 1e-30
# From here on exponentials are replaced by their tangent, as in the losses: e^20 is 5e8.
TANGENT_FROM = 20.0


def log_sigmoid(z):
  """Computes log σ(z) = -log(1 + e^-z) without raising e to a positive power."""
  far = np.where(np.real(z) < 0, z, -z)  # -|z|
  return np.where(np.real(z) < 0, z, 0) - np.log1p(np.exp(far))


def sigmoid_of(z):
  return np.exp(log_sigmoid(z))


def positive_part(x):
  return np.where(np.real(x) > 0, x, 0)


def exponential(u):
  """Computes e^u, and above 20 the tangent at 20."""
  # The unused branch is evaluated too; at 0 it cannot overflow.
  near = np.exp(np.where(np.real(u) > TANGENT_FROM, 0, u))
  return np.where(np.real(u) > TANGENT_FROM, np.exp(TANGENT_FROM) * (1 + u - TANGENT_FROM), near)


def log_one_minus_exp(a):
  """Computes log(1 - e^a) for a < 0."""
  return np.log(-np.expm1(a))


# --- divergences: f'(e^u) replaces u = log π/π_ref of one completion ------------------------------


def derivative_reverse_kl(u):
  """f(x) = x log x, f' = log x + 1."""
  return u


def derivative_forward_kl(u):
  """f(x) = -log x, f' = -1/x."""
  return -exponential(-u)


def derivative_jensen_shannon(u):
  """f(x) = x log x - (x + 1) log((x + 1)/2), f' = log(2x/(1 + x))."""
  return np.log(2) + log_sigmoid(u)


def derivative_alpha(u, alpha):
  """f' = (1 - x^-α)/α."""
  return (1 - exponential(-alpha * u)) / alpha


def derivative_of(name, alpha=None):
  """Returns f'(e^u) as a function of u, by the name of the divergence."""
  return {
    None: lambda u: u,
    "reverse_kl": derivative_reverse_kl,
    "forward_kl": derivative_forward_kl,
    "jensen_shannon": derivative_jensen_shannon,
    "alpha": lambda u: derivative_alpha(u, alpha),
  }[name]


# --- losses of pairs, one at a time ---------------------------------------------------------------


def ratios(p, q, link=lambda u: u):
  return link(p[0] - q[0]), link(p[1] - q[1])


def margin(p, q, link=lambda u: u):
  c, r = ratios(p, q, link)
  return c - r


def sigmoid(p, q, n, beta, link=lambda u: u):
  return -log_sigmoid(beta * margin(p, q, link))


def cdpo(p, q, n, beta, label_smoothing, link=lambda u: u):
  z, e = beta * margin(p, q, link), label_smoothing
  return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def robust(p, q, n, beta, label_smoothing, link=lambda u: u):
  z, e = beta * margin(p, q, link), label_smoothing
  return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def ipo(p, q, n, beta, link=lambda u: u):
  return (margin(p, q, link) - 1 / (2 * beta)) ** 2


def ipo_mean(p, q, n, beta):
  c, r = ratios(p, q)
  return (c / n[0] - r / n[1] - 1 / (2 * beta)) ** 2


def hinge(p, q, n, beta, link=lambda u: u):
  return positive_part(1 - beta * margin(p, q, link))


def exo_pair(p, q, n, beta, label_smoothing, link=lambda u: u):
  """Computes the KL of (σ(z), σ(-z)) from the smoothed label (1-ε, ε)."""
  z, e = beta * margin(p, q, link), label_smoothing
  right = sigmoid_of(z) * (log_sigmoid(z) - np.log1p(-e))
  return right + sigmoid_of(-z) * (log_sigmoid(-z) - np.log(e))


def nca_pair(p, q, n, beta):
  c, r = ratios(p, q)
  return -log_sigmoid(beta * c) - log_sigmoid(-beta * c) / 2 - log_sigmoid(-beta * r) / 2


def bco_pair(p, q, n, beta, delta):
  c, r = ratios(p, q)
  return -log_sigmoid(beta * c - delta) - log_sigmoid(delta - beta * r)


def sppo_hard(p, q, n, beta):
  c, r = ratios(p, q)
  return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2


def apo_zero(p, q, n, beta):
  c, r = ratios(p, q)
  return sigmoid_of(-beta * c) + sigmoid_of(beta * r)  # 1 - σ(x) = σ(-x)


def apo_down(p, q, n, beta):
  c, r = ratios(p, q)
  return sigmoid_of(beta * c) + sigmoid_of(-beta * (c - r))


def discopop(p, q, n, beta, tau, link=lambda u: u):
  """Computes e^-z σ(z/τ) as one exponential, which stays finite for z far below 0."""
  z = beta * margin(p, q, link)
  return -log_sigmoid(z) * sigmoid_of(-z / tau) + np.exp(log_sigmoid(z / tau) - z)


def sigmoid_norm(p, q, n, beta):
  c, r = ratios(p, q)
  return -log_sigmoid(beta * (c / n[0] - r / n[1]))


def dpop(p, q, n, beta, penalty):
  c, r = ratios(p, q)
  return -log_sigmoid(beta * (c - r - penalty * positive_part(-c)))


def odpo(p, q, n, beta, margin_B, margin_scale, link=lambda u: u):
  return -log_sigmoid(beta * margin(p, q, link) - margin_scale * margin_B)


def rpo(p, q, n, beta, margin_B, margin_scale, distance, link=lambda u: u):
  """Computes a distance of the rewards' margin from the scaled gap of the scores."""
  z, gap = beta * margin(p, q, link), margin_scale * np.float64(margin_B)
  if distance == "squared":
    return (z - gap) ** 2
  a, b = (gap, z) if distance == "backward_kl" else (z, gap)
  return sum(
    sigmoid_of(sign * a) * (log_sigmoid(sign * a) - log_sigmoid(sign * b)) for sign in (1, -1)
  )


def bdpo(p, q, n, beta, mix):
  """Computes DPO's loss with the mixture mix π + (1-mix) π_ref for the rejected completion."""
  c, r = ratios(p, q)
  top = np.maximum(np.real(r), 0)
  mixture = top + np.log(mix * np.exp(r - top) + (1 - mix) * np.exp(-top))
  return -log_sigmoid(beta * (c - mixture))


def alpha_po(p, q, n, beta, gamma, reward_alpha):
  """Computes SimPO's loss with the reward (1 - p^-α)/α of the geometric mean p of a completion."""
  won, lost = (
    (1 - exponential(-reward_alpha * x / y)) / reward_alpha for x, y in zip(p, n, strict=True)
  )
  return -log_sigmoid(beta * (won - lost) - gamma)


def chi_po(p, q, n, beta, clip):
  c, r = ratios(p, q)
  z = beta * ((exponential(c) + c) - (exponential(r) + r))
  inside = np.abs(np.real(z)) < clip
  return -log_sigmoid(np.where(inside, z, np.clip(np.real(z), -clip, clip)))


def simpo(p, q, n, beta, gamma):
  return -log_sigmoid(beta * (p[0] / n[0] - p[1] / n[1]) - gamma)


def cpo(p, q, n, beta, sft_weight):
  return -log_sigmoid(beta * (p[0] - p[1])) - sft_weight * p[0]


def orpo(p, q, n, odds_weight):
  """Computes ORPO with odds(p) = p / (1 - p) of the geometric mean p = exp(log π / n)."""
  a, b = p[0] / n[0], p[1] / n[1]
  log_odds = (a - log_one_minus_exp(a)) - (b - log_one_minus_exp(b))
  return -a - odds_weight * log_sigmoid(log_odds)


def sft(p, q, n):
  return -p[0]


PAIRS = {
  f.__name__: f
  for f in (
    sigmoid,
    cdpo,
    robust,
    ipo,
    ipo_mean,
    hinge,
    exo_pair,
    nca_pair,
    bco_pair,
    sppo_hard,
    apo_zero,
    apo_down,
    discopop,
    sigmoid_norm,
    dpop,
    odpo,
    rpo,
    bdpo,
    chi_po,
    simpo,
    alpha_po,
    cpo,
    orpo,
    sft,
  )
}


def combined(
  terms, p, q, n, *, sft_weight=0.0, link=None, link_alpha=None, reference_free=False, **options
):
  """Computes Σ weight loss + sft_weight (-log π(y_w)/|y_w|).

  `terms` is ((weight, name), ...). Each loss gets those of `options` that are among its
  arguments. `sft` as a term is a mean over tokens.
  """
  if reference_free:
    q = (0.0, 0.0)
  total = -sft_weight * p[0] / n[0]
  for weight, name in terms:
    if name == "sft":
      total = total - weight * p[0] / n[0]
      continue
    loss = PAIRS[name]
    known = loss.__code__.co_varnames[3 : loss.__code__.co_argcount]
    own = {k: v for k, v in options.items() if k in known}
    if link is not None:
      own["link"] = derivative_of(link, link_alpha)
    total = total + weight * loss(p, q, n, **own)
  return total


# --- losses of a whole batch ----------------------------------------------------------------------


def _cdpo_of_sorted(first, second, beta, e, weight):
  """Computes cDPO on differences of equal ranks; each loss is put where the first quantity was."""
  # Pairs of weight 0 are padding and must not take a rank.
  there = np.flatnonzero(weight > 0)
  up = there[np.argsort(np.real(first[there]), kind="stable")]
  down = there[np.argsort(np.real(second[there]), kind="stable")]
  out = np.zeros(len(weight), np.result_type(first, second))
  z = beta * (first[up] - second[down])
  out[up] = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
  return out


def aot(p, q, n, beta, label_smoothing, weight):
  """Compares sorted log π(y_w)/π(y_l) of the policy with the sorted ones of the reference."""
  return _cdpo_of_sorted(p[0] - p[1], q[0] - q[1], beta, label_smoothing, weight)


def aot_unpaired(p, q, n, beta, label_smoothing, weight):
  """Compares sorted log-ratios of chosen completions with sorted ones of rejected completions."""
  c, r = ratios(p, q)
  return _cdpo_of_sorted(c, r, beta, label_smoothing, weight)


def kto(p, q, *, beta, desirable_weight, undesirable_weight, label, weight, kl=None):
  """Computes λ_y - v; here p and q are (labeled completion, mismatched completion).

  The KL z0 is estimated from the whole batch, kept at or above 0, and takes no gradient.
  """
  if kl is None:
    mismatched = np.real(p[1]) - q[1]
    kl = max(0.0, float((weight * mismatched).sum() / weight.sum()))
  a = p[0] - q[0]
  good = desirable_weight * (1 - sigmoid_of(beta * (a - kl)))
  bad = undesirable_weight * (1 - sigmoid_of(beta * (kl - a)))
  return np.where(label > 0, good, bad)


def _kept_or_forgotten(p, forgotten, label, tokens, retain_weight):
  return np.where(label > 0, -retain_weight * p[0] / tokens, forgotten)


def npo(p, q, *, beta, retain_weight, label, tokens):
  """Computes NPO's loss of completions to forget, and the likelihood of those to keep."""
  forgotten = 2 / beta * -log_sigmoid(-beta * (p[0] - q[0]))
  return _kept_or_forgotten(p, forgotten, label, tokens, retain_weight)


def simnpo(p, q, *, beta, gamma, retain_weight, label, tokens):
  """Computes SimNPO's loss of completions to forget, and the likelihood of those to keep."""
  forgotten = 2 / beta * -log_sigmoid(-beta / tokens * p[0] - gamma)
  return _kept_or_forgotten(p, forgotten, label, tokens, retain_weight)


# --- losses of K completions ----------------------------------------------------------------------


def plackett_luce(p, q, *, beta, present):
  """Computes minus the log-probability of the ranking, one choice after the other."""
  out = []
  for p_K, q_K, present_K in zip(p, q, present, strict=True):
    z = [beta * (x - y) for x, y, here in zip(p_K, q_K, present_K, strict=True) if here]
    total = 0.0
    for rank in range(len(z)):
      top = max(np.real(z[rank:]))
      total = total - (z[rank] - top - np.log(sum(np.exp(x - top) for x in z[rank:])))
    out.append(total)
  return np.array(out)


def ranking_probability(z, ranking):
  """Computes Pr(ranking) under Plackett-Luce: choices without replacement, proportional to e^z."""
  left, total = list(ranking), 1.0
  for chosen in ranking:
    total *= np.exp(z[chosen]) / sum(np.exp(z[k]) for k in left)
    left.remove(chosen)
  return total


def all_rankings(count):
  return list(itertools.permutations(range(count)))


def policy_gradient(p, q, *, beta, reward, present):
  """Computes -1/K Σ_k (R_k - mean of the others' R) log π(y_k) with R = r - β log π/π_ref.

  R gets no gradient.
  """
  out = []
  for p_K, q_K, r_K, present_K in zip(p, q, reward, present, strict=True):
    at = np.flatnonzero(present_K)
    worth = r_K[at] - beta * (np.real(p_K[at]) - q_K[at])
    total = 0.0
    for k in range(len(at)):
      total = total - (worth[k] - np.delete(worth, k).mean()) * p_K[at[k]]
    out.append(total / len(at))
  return np.array(out)


def tpo(p, q, *, beta, gold_weight, present, tokens):
  """Computes a pair's loss of the second and the last completion, and the first's likelihood."""
  out = []
  for p_K, n_K, present_K in zip(p, tokens, present, strict=True):
    last = np.flatnonzero(present_K)[-1]
    out.append(-log_sigmoid(beta * (p_K[1] - p_K[last])) - gold_weight * p_K[0] / n_K[0])
  return np.array(out)


# --- slopes ---------------------------------------------------------------------------------------


def slopes(loss, p):
  """Computes d loss_B / d p for each array of `p`; a pair's loss reads its own log-probs only."""
  found = []
  for which in range(len(p)):
    moved = [x + (1j * STEP if k == which else 0) for k, x in enumerate(p)]
    found.append(np.imag(loss(tuple(moved))) / STEP)
  return found


def slopes_of_batch(loss, p, cotangent):
  """Computes d Σ cotangent loss / d p, one input at a time: any input may change any loss."""
  found = []
  for which in range(len(p)):
    slope = np.zeros(p[which].shape)
    for at in np.ndindex(p[which].shape):
      moved = [np.array(x, complex) for x in p]
      moved[which][at] += 1j * STEP
      slope[at] = np.imag(np.sum(cotangent * loss(tuple(moved)))) / STEP
    found.append(slope)
  return found


# --- completions as tokens ------------------------------------------------------------------------


def log_softmax(logits_TV):
  top_T1 = logits_TV.max(-1, keepdims=True)
  return logits_TV - top_T1 - np.log(np.exp(logits_TV - top_T1).sum(-1, keepdims=True))


def desensitised(logits_TV, targets_T, shorter, alpha):
  """Computes LD-DPO's log-prob of a completion, and its slope with respect to the logits.

  Liu et al. 2024: log π(y_1..y_s) + α log π(y_s+1.. | y_1..y_s), s = `shorter` tokens in the
  shorter completion.
  """
  logps_TV, every = log_softmax(logits_TV), np.arange(len(targets_T))
  weight_T = np.where(every < shorter, 1.0, alpha)
  one_hot_TV = np.eye(logits_TV.shape[1])[targets_T]
  slope_TV = weight_T[:, None] * (one_hot_TV - np.exp(logps_TV))
  return (weight_T * logps_TV[every, targets_T]).sum(), slope_TV


def alignment(logits_TV, targets_T):
  """Computes WPO's mean over tokens of log π(y_t) - log Σ_v π(v)².

  Zhou et al. 2024, section 3.3.
  """
  logps_TV = log_softmax(logits_TV)
  found_T = logps_TV[np.arange(len(targets_T)), targets_T] - np.log(np.exp(2 * logps_TV).sum(-1))
  return found_T.mean()
