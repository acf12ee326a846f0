"""Tests of paired losses: facts on paper, and from their papers."""

import functools
import math

import jax
import numpy as np
import pytest

from dpo_jax.losses import LOSSES, MARGIN_LOSSES, resolve
from dpo_jax.structs import PairLogps
from tests.support.small_logps import (
  DIVERGENCES,
  PAIRED,
  POLICY,
  REFERENCE,
  random_logps,
  ratios,
  slopes_of,
  softplus,
  zeros_of,
)

ZEROS = PairLogps(np.zeros(1), np.zeros(1), np.ones(1), np.ones(1))


# --- at the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_values_at_the_reference_that_depend_on_more_than_beta(epsilon):
  def at(name, **given):
    return LOSSES[name](POLICY, POLICY, **given)[0]

  for name in ("cdpo", "robust", "aot", "aot_unpaired"):
    np.testing.assert_allclose(at(name, label_smoothing=epsilon), math.log(2), rtol=1e-6)
  expected = -math.log(2) - math.log(epsilon * (1 - epsilon)) / 2
  np.testing.assert_allclose(at("exo_pair", label_smoothing=epsilon), expected, rtol=1e-6)
  expected = softplus(epsilon) + softplus(-epsilon)
  np.testing.assert_allclose(at("bco_pair", delta=epsilon), expected, rtol=1e-6)
  np.testing.assert_allclose(at("odpo", margin_B=epsilon), softplus(epsilon), rtol=1e-6)


@pytest.mark.parametrize("link", DIVERGENCES)
@pytest.mark.parametrize("name", sorted(MARGIN_LOSSES))
def test_a_divergence_changes_nothing_at_the_reference(name, link):
  linked = resolve(name, link=link)(POLICY, POLICY)
  np.testing.assert_allclose(linked, LOSSES[name](POLICY, POLICY), rtol=1e-6)


# --- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted(MARGIN_LOSSES), "ipo", "aot"])
def test_only_margins_count(name):
  """Adding f(x) to both completions of a prompt changes no loss of the margin: Z(x) cancels."""
  policy, reference = random_logps()
  shift = np.linspace(-9, 9, 6)
  moved = policy._replace(chosen_B=policy.chosen_B + shift, rejected_B=policy.rejected_B + shift)
  np.testing.assert_allclose(
    LOSSES[name](moved, reference), LOSSES[name](policy, reference), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("name", sorted(set(PAIRED) - {"discopop"}))
def test_the_first_step_from_the_reference_prefers_the_chosen_answer(name):
  _, logps = random_logps()
  # Without a gap of scores, rpo is already at its optimum.
  given = {"margin_B": 1.0} if name == "rpo" else {}
  up, down = slopes_of(functools.partial(LOSSES[name], **given), logps, logps)
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

  def swap(p):
    return PairLogps(p.rejected_B, p.chosen_B)

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


@pytest.mark.parametrize("distance", ["squared", "backward_kl", "forward_kl"])
def test_rpo_is_least_where_the_margin_is_the_gap(distance):
  """Each is 0 at z = ηΔ, and convex enough to be above 0 at both sides."""
  gap = np.array([-2.0, 0.5, 3.0])
  loss = functools.partial(
    LOSSES["rpo"], beta=0.5, margin_scale=0.7, distance=distance, margin_B=gap
  )
  policy = ratios(0.7 * gap / 0.5, np.zeros(3))
  np.testing.assert_allclose(loss(policy, zeros_of(3)), 0, atol=1e-6)
  np.testing.assert_allclose(slopes_of(loss, policy, zeros_of(3)), 0, atol=1e-6)
  for away in (-0.5, 0.5):
    assert (np.asarray(loss(ratios(0.7 * gap / 0.5 + away, np.zeros(3)), zeros_of(3))) > 1e-3).all()


def test_rpo_with_certain_scores_is_sigmoid():
  """At Δ to infinity the target is probability 1, and the KL from it the cross-entropy."""
  policy, reference = random_logps()
  found = LOSSES["rpo"](policy, reference, beta=0.3, margin_B=1e4)
  np.testing.assert_allclose(found, LOSSES["sigmoid"](policy, reference, beta=0.3), rtol=1e-5)


def test_what_bdpo_bounds():
  """Lowering y_l gains at most -β log(1-λ); raising it is punished as in DPO, short of log λ."""
  c = np.zeros(2)
  loss = functools.partial(LOSSES["bdpo"], beta=1.0, mix=0.25)
  found = loss(ratios(c, np.array([-50.0, 50.0])), zeros_of(2))
  expected = [softplus(math.log(0.75)), 50 + math.log(0.25)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  up, down = slopes_of(loss, ratios(c, np.array([-50.0, 50.0])), zeros_of(2))
  assert up[0] < -0.4 and abs(down[0]) < 1e-6  # only the chosen completion can improve
  np.testing.assert_allclose((up[1], down[1]), (-1, 1), rtol=1e-6)


def test_alpha_po_near_zero_is_simpo():
  policy, _ = random_logps()
  near = LOSSES["alpha_po"](policy, None, beta=2.0, gamma=1.0, reward_alpha=1e-5)
  np.testing.assert_allclose(near, LOSSES["simpo"](policy, None, beta=2.0, gamma=1.0), rtol=1e-3)


def test_averages_over_one_token_are_sums():
  policy, reference = (
    logps._replace(chosen_tokens_B=np.ones(6), rejected_tokens_B=np.ones(6))
    for logps in random_logps()
  )
  for mean, whole in (("ipo_mean", "ipo"), ("sigmoid_norm", "sigmoid")):
    np.testing.assert_allclose(
      LOSSES[mean](policy, reference, beta=0.3), LOSSES[whole](policy, reference, beta=0.3)
    )


@pytest.mark.parametrize("name", ["ipo_mean", "sigmoid_norm", "simpo", "alpha_po", "orpo"])
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

  def total(delta):
    return LOSSES["bco_pair"](policy, reference, beta=0.3, delta=delta).sum()

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
  """log(2t/(1+t)) < log 2: no chosen completion has a reward above β log 2."""
  loss = resolve("sigmoid", beta=1.0, link="jensen_shannon")
  found = loss(ratios(np.array([1e4]), np.zeros(1)), zeros_of(1))
  np.testing.assert_allclose(found, [-math.log(2 / 3)], rtol=1e-6)
