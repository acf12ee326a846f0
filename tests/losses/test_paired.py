"""Losses by hand, at the reference, and against what their papers promise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES, OF_MARGIN, resolve
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps
from tests.support.small_logps import (
  DIVERGENCES,
  KTO,
  KTO_REFERENCE,
  PAIRED,
  POLICY,
  REFERENCE,
  TOKENS,
  random_logps,
  slopes_of,
)

WITH_REFERENCE = sorted(set(PAIRED) - {"simpo", "cpo", "orpo"})

ZEROS = PairLogps(np.zeros(1), np.zeros(1), np.ones(1), np.ones(1))
LOG_3 = math.log(3)  # σ(log 3) = 3/4, σ(log 9) = 9/10


def softplus(x):
  """-log σ(-x)."""
  return math.log1p(math.exp(x))


def ratios(c, r, tokens=(1.0, 1.0)):
  """Log-ratios c and r against a reference of zeros."""
  ones = jnp.ones(np.shape(c))
  return PairLogps(jnp.asarray(c), jnp.asarray(r), tokens[0] * ones, tokens[1] * ones)


def zeros_of(count):
  return PairLogps(*(jnp.zeros(count),) * 2, *(jnp.ones(count),) * 2)


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "given", "value"),
  [
    # z = βm = 1: -log σ(1) = log(1 + 1/e), -log σ(-1) = log(1 + e)
    ("sigmoid", {"beta": 0.5}, softplus(-1)),
    ("cdpo", {"beta": 0.5, "label_smoothing": 0.2}, 0.8 * softplus(-1) + 0.2 * softplus(1)),
    (
      "robust",
      {"beta": 0.5, "label_smoothing": 0.2},
      (0.8 * softplus(-1) - 0.2 * softplus(1)) / 0.6,
    ),
    ("ipo", {"beta": 0.5}, (2 - 1) ** 2),
    ("ipo", {"beta": 0.25}, 0.0),
    ("ipo_mean", {"beta": 1.0}, (0.75 - 0.5) ** 2),
    ("hinge", {"beta": 0.25}, 0.5),
    ("hinge", {"beta": 1.0}, 0.0),
    # z = log 3
    (
      "exo_pair",
      {"beta": LOG_3 / 2, "label_smoothing": 0.2},
      0.75 * math.log(0.75 / 0.8) + 0.25 * math.log(0.25 / 0.2),
    ),
    ("discopop", {"beta": LOG_3 / 2, "tau": 1.0}, -math.log(0.75) / 4 + 0.75 / 3),
    ("discopop", {"beta": LOG_3 / 2, "tau": 0.5}, -math.log(0.75) / 10 + 0.9 / 3),
    # βc = log 3, βr = -log 3, z = log 9
    ("nca_pair", {"beta": LOG_3}, -math.log(0.75) - math.log(0.25) / 2 - math.log(0.75) / 2),
    ("bco_pair", {"beta": LOG_3}, -2 * math.log(0.75)),
    ("bco_pair", {"beta": LOG_3, "delta": LOG_3}, math.log(2) - math.log(0.9)),
    ("apo_zero", {"beta": LOG_3}, 1 - 0.75 + 0.25),
    ("apo_down", {"beta": LOG_3}, 0.75 + 1 - 0.9),
    ("sppo_hard", {"beta": 0.25}, (1 - 2) ** 2 + (-1 + 2) ** 2),
    # Of one pair, sorting changes nothing.
    ("aot", {"beta": 0.5}, softplus(-1)),
    ("aot_unpaired", {"beta": 0.5, "label_smoothing": 0.2}, 0.8 * softplus(-1) + 0.2 * softplus(1)),
    ("sigmoid_norm", {"beta": LOG_3 / 0.75}, -math.log(0.75)),
    ("dpop", {"beta": 0.5, "penalty": 7.0}, softplus(-1)),
    ("odpo", {"beta": 0.5, "margin_B": np.array([2.0]), "margin_scale": 0.5}, math.log(2)),
    ("odpo", {"beta": 0.5, "margin_B": np.array([2.0])}, softplus(1)),
    # φ(1) - φ(-1) = (e + 1) - (1/e - 1)
    ("chi_po", {"beta": 0.5}, softplus(-(math.e - 1 / math.e + 2) / 2)),
    ("chi_po", {"beta": 0.5, "clip": 1.0}, softplus(-1)),
    # log π(y_w)/|y_w| = -1/2, log π(y_l)/|y_l| = -1
    ("simpo", {"beta": 2.0, "gamma": 1.0}, math.log(2)),
    ("simpo", {"beta": 2.0, "gamma": 0.0}, softplus(-1)),
    ("cpo", {"beta": 1 / 3, "sft_weight": 0.5}, softplus(-1) + 0.5),
    ("sft", {}, 1.0),
  ],
)
def test_by_hand(name, given, value):
  found = LOSSES[name](POLICY, REFERENCE, **given)
  np.testing.assert_allclose(found, [value], rtol=1e-6, atol=1e-7)


def test_dpop_by_hand_where_the_chosen_answer_fell():
  # c = -1, r = 1, m = -2; m - 3·1 = -5
  found = LOSSES["dpop"](REFERENCE, POLICY, beta=0.2, penalty=3.0)
  np.testing.assert_allclose(found, [softplus(1)], rtol=1e-6)


def test_orpo_by_hand():
  # A chosen token has probability 3/4 and odds 3, a rejected one 1/4 and 1/3.
  policy = PairLogps(np.array([2 * math.log(0.75)]), np.array([4 * math.log(0.25)]), *TOKENS)
  found = LOSSES["orpo"](policy, None, odds_weight=0.5)
  np.testing.assert_allclose(found, [-math.log(0.75) - 0.5 * math.log(0.9)], rtol=1e-6)


def test_aot_by_hand():
  # Margins of the policy 5 and 1, of the reference 0 and 2: ranks meet as 1 - 0 and 5 - 2.
  policy = PairLogps(np.array([-1.0, -2.0]), np.array([-6.0, -3.0]))
  reference = PairLogps(np.array([-4.0, -3.0]), np.array([-4.0, -5.0]))
  found = LOSSES["aot"](policy, reference, beta=1.0)
  np.testing.assert_allclose(found, [softplus(-3), softplus(-1)], rtol=1e-6)


def test_aot_unpaired_by_hand():
  # c = 5 and 1, r = 0 and 2.
  found = LOSSES["aot_unpaired"](
    ratios(np.array([5.0, 1.0]), np.array([0.0, 2.0])), zeros_of(2), beta=1.0
  )
  np.testing.assert_allclose(found, [softplus(-3), softplus(-1)], rtol=1e-6)


@pytest.mark.parametrize(
  ("given", "value"),
  [
    # λ_D (1 - σ(β·2)) = 2/10, and λ_U (1 - σ(β·2)) = 3/10, at β·2 = log 9
    ({"label_B": np.array([1.0, 0.0])}, [2 * 0.1, 3 * 0.1]),
    ({"label_B": np.array([0.0, 1.0])}, [3 * 0.9, 2 * 0.9]),
    # z0 = 3 · 1/4 - 1 · 3/4 = 0; a - z0 = 3 and -1
    (
      {"label_B": np.array([1.0, 0.0]), "weight_B": np.array([1.0, 3.0])},
      [2 / (1 + 27), 3 * 0.25],
    ),
    # a given estimate of -4 counts as 0, one of 1 as 1
    ({"label_B": np.array([1.0, 0.0]), "kl": -4.0}, [2 / (1 + 27), 3 * 0.25]),
    ({"label_B": np.array([1.0, 0.0]), "kl": 1.0}, [2 * 0.1, 3 * 0.1]),
  ],
)
def test_kto_by_hand(given, value):
  found = LOSSES["kto"](
    KTO, KTO_REFERENCE, beta=LOG_3, desirable_weight=2.0, undesirable_weight=3.0, **given
  )
  np.testing.assert_allclose(found, value, rtol=1e-5)


def test_plackett_luce_by_hand():
  # e^z = 2, 3, 5: Pr = 2/10 · 3/8 · 1
  policy = RankedLogps(2 * np.log([[2.0, 3.0, 5.0]]))
  reference = RankedLogps(np.zeros((1, 3)))
  found = LOSSES["plackett_luce"](policy, reference, beta=0.5)
  np.testing.assert_allclose(found, [-math.log(0.2 * 3 / 8)], rtol=1e-6)


def test_policy_gradient_by_hand():
  # R = 3 - 0.5·2 = 2 and 1 - 0.5·(-2) = 2.  Then r = 5: R = 4 and 2, leads 2 and -2.
  policy = RankedLogps(np.array([[-1.0, -5.0]]))
  reference = RankedLogps(np.array([[-3.0, -3.0]]))
  loss = functools.partial(LOSSES["policy_gradient"], policy, reference, beta=0.5)
  np.testing.assert_allclose(loss(reward_BK=np.array([[3.0, 1.0]])), [0.0], atol=1e-6)
  # -(2·(-1) + (-2)·(-5))/2
  np.testing.assert_allclose(loss(reward_BK=np.array([[5.0, 1.0]])), [-4.0], rtol=1e-6)


def test_divergences_by_hand():
  # c = log 2, r = -log 2, β = 1; f' of the ratios 2 and 1/2.
  policy, reference = ratios(np.array([math.log(2)]), np.array([-math.log(2)])), zeros_of(1)
  for link, chosen, rejected in (
    ({"link": "reverse_kl"}, math.log(2), -math.log(2)),
    ({"link": "forward_kl"}, -1 / 2, -2.0),
    ({"link": "jensen_shannon"}, math.log(4 / 3), math.log(2 / 3)),
    ({"link": "alpha", "link_alpha": 0.5}, 2 - 2**0.5, 2 - 2 * 2**0.5),
  ):
    found = resolve("sigmoid", beta=1.0, **link)(policy, reference)
    np.testing.assert_allclose(found, [softplus(rejected - chosen)], rtol=1e-6, err_msg=str(link))


# --- at the reference -----------------------------------------------------------------------------


def _exo_at_reference(beta, label_smoothing=1e-3):
  return -math.log(2) - math.log(label_smoothing * (1 - label_smoothing)) / 2


# Value of every loss that reads a reference, at π = π_ref, as a function of β.
AT_REFERENCE = {
  "sigmoid": lambda beta: math.log(2),
  "cdpo": lambda beta: math.log(2),
  "robust": lambda beta: math.log(2),
  "ipo": lambda beta: 1 / (4 * beta**2),
  "ipo_mean": lambda beta: 1 / (4 * beta**2),
  "hinge": lambda beta: 1.0,
  "exo_pair": _exo_at_reference,
  "nca_pair": lambda beta: 2 * math.log(2),
  "bco_pair": lambda beta: 2 * math.log(2),
  "sppo_hard": lambda beta: 1 / (2 * beta**2),
  "apo_zero": lambda beta: 1.0,
  "apo_down": lambda beta: 1.0,
  "aot": lambda beta: math.log(2),
  "aot_unpaired": lambda beta: math.log(2),
  "discopop": lambda beta: (math.log(2) + 1) / 2,
  "sigmoid_norm": lambda beta: math.log(2),
  "dpop": lambda beta: math.log(2),
  "odpo": lambda beta: math.log(2),
  "chi_po": lambda beta: math.log(2),
}


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_policy_equal_to_reference(name, beta):
  tokens = (np.array([3.0, 40.0]), np.array([2.0, 1.0]))
  logps = PairLogps(np.array([-3.0, -90.0]), np.array([-7.0, -2.0]), *tokens)
  found = LOSSES[name](logps, logps, beta=beta)
  np.testing.assert_allclose(found, np.full(2, AT_REFERENCE[name](beta)), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_values_at_the_reference_that_depend_on_more_than_beta(epsilon):
  at = lambda name, **given: LOSSES[name](POLICY, POLICY, **given)[0]
  for name in ("cdpo", "robust", "aot", "aot_unpaired"):
    np.testing.assert_allclose(at(name, label_smoothing=epsilon), math.log(2), rtol=1e-6)
  expected = _exo_at_reference(0.1, epsilon)
  np.testing.assert_allclose(at("exo_pair", label_smoothing=epsilon), expected, rtol=1e-6)
  expected = softplus(epsilon) + softplus(-epsilon)
  np.testing.assert_allclose(at("bco_pair", delta=epsilon), expected, rtol=1e-6)
  np.testing.assert_allclose(at("odpo", margin_B=epsilon), softplus(epsilon), rtol=1e-6)


@pytest.mark.parametrize("completions", [2, 3, 5])
def test_ranking_at_the_reference_is_log_of_the_number_of_rankings(completions):
  logps = RankedLogps(-np.arange(3.0 * completions).reshape(3, completions))
  found = LOSSES["plackett_luce"](logps, logps)
  np.testing.assert_allclose(found, math.log(math.factorial(completions)), rtol=1e-6)


def test_kto_at_the_reference_is_half_the_weight():
  logps = UnpairedLogps(np.array([-3.0, -9.0]), np.array([-40.0, -7.0]))
  found = LOSSES["kto"](
    logps, logps, desirable_weight=1.2, undesirable_weight=0.5, label_B=np.array([1.0, 0.0])
  )
  np.testing.assert_allclose(found, [0.6, 0.25], rtol=1e-6)


@pytest.mark.parametrize("link", DIVERGENCES)
@pytest.mark.parametrize("name", sorted(OF_MARGIN))
def test_a_divergence_changes_nothing_at_the_reference(name, link):
  linked = resolve(name, link=link)(POLICY, POLICY)
  np.testing.assert_allclose(linked, LOSSES[name](POLICY, POLICY), rtol=1e-6)


# --- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted(OF_MARGIN), "ipo", "aot"])
def test_only_margins_count(name):
  """Adding f(x) to both answers of a prompt changes no loss of the margin: Z(x) cancels."""
  policy, reference = random_logps()
  shift = np.linspace(-9, 9, 6)
  moved = policy._replace(chosen_B=policy.chosen_B + shift, rejected_B=policy.rejected_B + shift)
  np.testing.assert_allclose(
    LOSSES[name](moved, reference), LOSSES[name](policy, reference), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("name", sorted(set(PAIRED) - {"discopop"}))
def test_the_first_step_from_the_reference_prefers_the_chosen_answer(name):
  _, logps = random_logps()
  up, down = slopes_of(LOSSES[name], logps, logps)
  assert (np.asarray(down - up) > 0).all()  # a step down the slope raises c - r
  if name == "apo_down":  # σ'(βc) - σ'(z) = 0: the chosen answer stands, the rejected one falls
    np.testing.assert_allclose(up, 0, atol=1e-7)
  else:
    assert (np.asarray(up) < 0).all()


@pytest.mark.parametrize(("tau", "sign"), [(0.05, 1), (0.1, 1), (0.11, -1), (1.0, -1)])
def test_discopop_starts_the_wrong_way_if_tau_is_small(tau, sign):
  """d loss/dz at 0 is (1 - log 2)/(4τ) - 3/4: above 0 for τ < 0.102, and so at the paper's 0.05."""
  up, down = slopes_of(functools.partial(LOSSES["discopop"], beta=1.0, tau=tau), ZEROS, ZEROS)
  expected = (1 - math.log(2)) / (4 * tau) - 0.75
  np.testing.assert_allclose((up[0], down[0]), (expected, -expected), rtol=1e-5)
  assert np.sign(up[0]) == sign


def test_what_apo_does_to_each_answer():
  """At the reference apo_zero raises chosen as much as it lowers rejected; apo_down lowers both."""
  up, down = slopes_of(functools.partial(LOSSES["apo_zero"], beta=1.0), ZEROS, ZEROS)
  np.testing.assert_allclose((up[0], down[0]), (-0.25, 0.25))
  chosen, rejected = np.array([1.0]), np.array([-1.0])
  up, down = slopes_of(
    functools.partial(LOSSES["apo_down"], beta=1.0), ratios(chosen, rejected), zeros_of(1)
  )
  assert up[0] > 0 and down[0] > 0


def test_robust_is_unbiased_under_flipped_labels():
  """(1-ε) robust(m) + ε robust(-m) is the clean loss: Chowdhury et al. 2024, lemma 3.1."""
  swap = lambda p: PairLogps(p.rejected_B, p.chosen_B)
  clean = LOSSES["sigmoid"](POLICY, REFERENCE, beta=0.7)
  kept = LOSSES["robust"](POLICY, REFERENCE, beta=0.7, label_smoothing=0.3)
  flipped = LOSSES["robust"](swap(POLICY), swap(REFERENCE), beta=0.7, label_smoothing=0.3)
  np.testing.assert_allclose(0.7 * kept + 0.3 * flipped, clean, rtol=1e-6)


@pytest.mark.parametrize("name", ["cdpo", "exo_pair"])
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_smoothed_losses_are_least_at_the_log_odds_of_the_label(name, epsilon):
  z = np.log((1 - epsilon) / epsilon)
  loss = functools.partial(LOSSES[name], beta=1.0, label_smoothing=epsilon)
  policy = ratios(np.array([z]), np.array([0.0]))
  np.testing.assert_allclose(slopes_of(loss, policy, zeros_of(1)), 0, atol=1e-6)
  for away in (-0.5, 0.5):
    assert (
      loss(ratios(np.array([z + away]), np.zeros(1)), zeros_of(1)) > loss(policy, zeros_of(1))
    )[0]
  if name == "exo_pair":  # a KL, so nothing at its least
    np.testing.assert_allclose(loss(policy, zeros_of(1)), 0, atol=1e-6)


def test_sppo_is_least_where_each_answer_has_its_own_target():
  policy = ratios(np.array([5.0]), np.array([-5.0]))
  np.testing.assert_allclose(LOSSES["sppo_hard"](policy, zeros_of(1), beta=0.1), 0, atol=1e-6)
  np.testing.assert_allclose(LOSSES["ipo"](policy, zeros_of(1), beta=0.05), 0, atol=1e-6)


def test_nca_holds_the_chosen_answer_where_its_reward_is_log_2():
  """-log σ(x) - ½ log σ(-x) is least at e^x = 2."""
  loss = functools.partial(LOSSES["nca_pair"], beta=1.0)
  up, _ = slopes_of(loss, ratios(np.array([math.log(2)]), np.array([0.0])), zeros_of(1))
  np.testing.assert_allclose(up, 0, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "given"),
  [
    ("cdpo", {"label_smoothing": 0.0}),
    ("robust", {"label_smoothing": 0.0}),
    ("odpo", {"margin_B": 0.0}),
    ("odpo", {"margin_B": np.linspace(0, 3, 6), "margin_scale": 0.0}),
    ("dpop", {"penalty": 0.0}),
  ],
)
def test_what_becomes_sigmoid(name, given):
  policy, reference = random_logps()
  expected = LOSSES["sigmoid"](policy, reference, beta=0.3)
  found = LOSSES[name](policy, reference, beta=0.3, **given)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dpop_is_sigmoid_where_the_chosen_answer_did_not_fall():
  policy, reference = ratios(np.array([-2.0, -0.1, 0.0, 0.1, 2.0]), np.ones(5)), zeros_of(5)
  fell = np.array([True, True, False, False, False])
  found = LOSSES["dpop"](policy, reference, beta=0.3, penalty=5.0)
  plain = LOSSES["sigmoid"](policy, reference, beta=0.3)
  np.testing.assert_array_equal(found[~fell], plain[~fell])
  assert (found[fell] > plain[fell]).all()


def test_odpo_asks_for_a_larger_margin_where_one_answer_is_much_better():
  """-log σ(z - Δ): the slope is that of sigmoid at a margin smaller by Δ/β."""
  policy, reference = random_logps()
  offset = np.linspace(0, 3, 6)
  smaller = policy._replace(chosen_B=policy.chosen_B - offset / 0.3)
  found = LOSSES["odpo"](policy, reference, beta=0.3, margin_B=offset)
  np.testing.assert_allclose(found, LOSSES["sigmoid"](smaller, reference, beta=0.3), rtol=1e-5)


def test_averages_over_one_token_are_sums():
  policy, reference = (
    logps._replace(chosen_tokens_B=np.ones(6), rejected_tokens_B=np.ones(6))
    for logps in random_logps()
  )
  for mean, whole in (("ipo_mean", "ipo"), ("sigmoid_norm", "sigmoid")):
    np.testing.assert_allclose(
      LOSSES[mean](policy, reference, beta=0.3), LOSSES[whole](policy, reference, beta=0.3)
    )


@pytest.mark.parametrize("name", ["ipo_mean", "sigmoid_norm", "simpo", "orpo"])
def test_an_average_needs_token_counts(name):
  policy, reference = (PairLogps(x.chosen_B, x.rejected_B) for x in random_logps())
  with pytest.raises(ValueError, match="token"):
    LOSSES[name](policy, reference)


def test_three_losses_without_a_reference_that_are_one():
  policy, reference = random_logps()
  single = policy._replace(chosen_tokens_B=np.ones(6), rejected_tokens_B=np.ones(6))
  free = resolve("sigmoid", beta=0.3, reference_free=True)
  assert not free.needs_reference
  np.testing.assert_array_equal(free(policy), free(policy, reference))
  np.testing.assert_allclose(free(policy), LOSSES["cpo"](policy, None, beta=0.3, sft_weight=0.0))
  np.testing.assert_allclose(free(policy), LOSSES["simpo"](single, None, beta=0.3, gamma=0.0))


def test_delta_shifts_both_rewards():
  """bco at δ is bco at 0 on log-ratios lower by δ/β, and δ gets no gradient."""
  policy, reference = random_logps()
  lower = policy._replace(chosen_B=policy.chosen_B - 2, rejected_B=policy.rejected_B - 2)
  found = LOSSES["bco_pair"](policy, reference, beta=0.3, delta=0.6)
  np.testing.assert_allclose(found, LOSSES["bco_pair"](lower, reference, beta=0.3), rtol=1e-5)
  total = lambda delta: LOSSES["bco_pair"](policy, reference, beta=0.3, delta=delta).sum()
  assert jax.grad(total)(0.6) == 0


def test_chi_po_near_the_reference_is_sigmoid_at_twice_the_margin():
  """φ(u) = e^u + u = 1 + 2u + O(u²)."""
  small = ratios(np.array([1e-3]), np.array([-1e-3]))
  double = ratios(np.array([2e-3]), np.array([-2e-3]))
  np.testing.assert_allclose(
    LOSSES["chi_po"](small, zeros_of(1), beta=1.0),
    LOSSES["sigmoid"](double, zeros_of(1), beta=1.0),
    rtol=1e-6,
  )


def test_chi_po_has_no_slope_beyond_its_clip():
  loss = functools.partial(LOSSES["chi_po"], beta=1.0, clip=2.0)
  np.testing.assert_array_equal(
    slopes_of(loss, ratios(np.array([3.0, -3.0]), np.zeros(2)), zeros_of(2)), 0
  )


def test_limits_of_discopop():
  """Below z = 0 it is the logistic loss, above it the exponential one, mixed within some τ of 0."""
  z = np.array([-5.0, -1.0, 1.0, 5.0])
  found = LOSSES["discopop"](ratios(z, np.zeros(4)), zeros_of(4), beta=1.0, tau=0.01)
  np.testing.assert_allclose(found, [softplus(5), softplus(1), np.exp(-1), np.exp(-5)], rtol=1e-5)


def test_a_sum_is_the_weighted_sum_of_its_terms():
  policy, reference = random_logps()
  found = resolve("0.8*sigmoid+0.2*bco_pair+1*sft", beta=0.3)(policy, reference, delta=0.5)
  expected = (
    0.8 * LOSSES["sigmoid"](policy, reference, beta=0.3)
    + 0.2 * LOSSES["bco_pair"](policy, reference, beta=0.3, delta=0.5)
    - policy.chosen_B / policy.chosen_tokens_B
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_arguments_of_a_sum_reach_the_terms_that_read_them():
  policy, reference = random_logps()
  found = resolve("sigmoid + 2*cdpo", beta=0.3, label_smoothing=0.2)(policy, reference)
  expected = LOSSES["sigmoid"](policy, reference, beta=0.3)
  expected += 2 * LOSSES["cdpo"](policy, reference, beta=0.3, label_smoothing=0.2)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sft_weight_reads_log_probs_even_under_a_divergence():
  policy, reference = random_logps()
  plain = resolve("sigmoid", link="forward_kl")(policy, reference)
  found = resolve("sigmoid", link="forward_kl", sft_weight=2.0)(policy, reference)
  expected = plain - 2 * policy.chosen_B / policy.chosen_tokens_B
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_reverse_kl_is_the_log_ratio():
  policy, reference = random_logps()
  np.testing.assert_array_equal(
    resolve("sigmoid", link="reverse_kl")(policy, reference), LOSSES["sigmoid"](policy, reference)
  )


def test_alpha_runs_from_reverse_to_forward_kl():
  policy, reference = random_logps()
  ends = ((1e-4, "reverse_kl"), (1 - 1e-6, "forward_kl"))
  for alpha, link in ends:
    near = resolve("sigmoid", link="alpha", link_alpha=alpha)(policy, reference)
    np.testing.assert_allclose(near, resolve("sigmoid", link=link)(policy, reference), rtol=5e-3)


def test_jensen_shannon_is_bounded_for_the_chosen_answer():
  """log(2t/(1+t)) < log 2: no chosen answer, however likely, is worth more than β log 2."""
  loss = resolve("sigmoid", beta=1.0, link="jensen_shannon")
  found = loss(ratios(np.array([1e4]), np.zeros(1)), zeros_of(1))
  np.testing.assert_allclose(found, [-math.log(2 / 3)], rtol=1e-6)
