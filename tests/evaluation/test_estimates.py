"""Tests of estimates against closed forms: intervals, win rates, and the exact frontier."""

import numpy as np
import pytest

from dpo_jax.evaluation import estimates
from dpo_jax.structs import PairLogps, UserError
from tests.support.controlled_rewards import reward_distribution

# --- Intervals ------------------------------------------------------------------------------------


def test_mean_interval_by_hand():
  # Values 0 and 2: mean 1, deviation √2, standard error 1.
  np.testing.assert_allclose(estimates.mean_estimate([0, 2]), [1, 1 - 1.959964, 1 + 1.959964])


def test_mean_of_one_value_has_no_interval():
  mean, low, high = estimates.mean_estimate([3.0])
  assert mean == 3
  assert np.isnan(low)
  assert np.isnan(high)


def test_weight_zero_is_absence():
  with_absent = estimates.mean_estimate([0, 2, 100], [1, 1, 0])
  np.testing.assert_allclose(with_absent, estimates.mean_estimate([0, 2]))
  shares = estimates.share_estimate([0, 1, 0], [1, 1, 0]), estimates.share_estimate([0, 1])
  np.testing.assert_allclose(*shares)


def test_weights_count_up_to_scale():
  value, weight = [0.0, 1.0, 5.0], np.array([1.0, 2.0, 0.5])
  means = estimates.mean_estimate(value, weight), estimates.mean_estimate(value, 10 * weight)
  np.testing.assert_allclose(*means)
  np.testing.assert_allclose(means[0].mean, (0 + 2 + 2.5) / 3.5)


def test_wilson_by_hand():
  # No success in ten: from 0 to z²/(n + z²).
  square = 1.959964**2
  np.testing.assert_allclose(estimates.share_estimate(np.zeros(10)), [0, 0, square / (10 + square)])
  half = estimates.share_estimate([0, 1, 0, 1])
  np.testing.assert_allclose(half.high - 0.5, 0.5 - half.low)


def test_a_share_is_never_past_one():
  weights = np.random.default_rng(0).uniform(0.1, 1, (200, 37))
  assert all(estimates.share_estimate(np.ones(37), x).mean <= 1 for x in weights)
  assert all(estimates.share_estimate(np.ones(n)).mean <= 1 for n in range(1, 300))


def test_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(1000):
    _, low, high = estimates.mean_estimate(rng.normal(1.0, 2.0, 50))
    covered += low < 1.0 < high
  assert 920 <= covered <= 970  # 95% less what t would add at n = 50; 4 deviations either way


def test_nothing_to_evaluate():
  with pytest.raises(UserError, match="nothing to evaluate"):
    estimates.mean_estimate([])


# --- Preferences ----------------------------------------------------------------------------------


def test_policy_equal_to_reference_is_a_coin():
  logps = PairLogps(np.array([-3.0, -90.0]), np.array([-7.0, -2.0]))
  found = estimates.preference_metrics(logps, logps, beta=0.5, loss_B=np.full(2, np.log(2)))
  assert found["accuracy"].mean == 0.5
  assert found["margin"].mean == 0
  np.testing.assert_allclose(found["loss"].mean, np.log(2))


def test_preferences_by_hand():
  # Rewards β (policy - reference): chosen 1, -1; rejected 0, 1. One right, one wrong.
  policy = PairLogps(np.array([-1.0, -5.0]), np.array([-4.0, -1.0]))
  reference = PairLogps(np.array([-3.0, -3.0]), np.array([-4.0, -3.0]))
  found = estimates.preference_metrics(policy, reference, beta=0.5, loss_B=np.zeros(2))
  assert found["accuracy"].mean == 0.5
  assert found["chosen_reward"].mean == 0
  assert found["rejected_reward"].mean == 0.5
  assert found["margin"].mean == -0.5


# --- Samples --------------------------------------------------------------------------------------


def test_wins_count_ties_as_one_half():
  # 1 and 2 against 1 and 0: tie, win, win, win.
  np.testing.assert_allclose(
    estimates.wins(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])), [3.5 / 4]
  )


def test_more_samples_of_a_prompt_are_not_more_prompts():
  rng = np.random.default_rng(0)
  policy_XK, reference_XK, ratio_XS = rng.normal(size=(3, 40, 2))
  once = estimates.sampled_metrics(policy_XK, reference_XK, ratio_XS)

  def repeat(x):
    return np.repeat(x, 5, axis=1)

  again = estimates.sampled_metrics(repeat(policy_XK), repeat(reference_XK), repeat(ratio_XS))
  for name in ("reward_policy", "reward_reference", "win_rate", "kl"):
    np.testing.assert_allclose(once[name], again[name])


# --- The frontier ---------------------------------------------------------------------------------


def test_frontier_of_two_answers():
  # Rewards 0 and 1, equally likely: π* picks the second with p = σ(1/β); KL = log 2 - H(p).
  betas = np.array([4.0, 1.0, 0.25])
  found = estimates.exact_frontier(np.array([[0.0, 1.0]]), betas)
  p = 1 / (1 + np.exp(-1 / betas))
  kl = np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p)
  np.testing.assert_allclose(found.reward_XF[0], [0.5, *p], rtol=1e-12)
  np.testing.assert_allclose(found.kl_XF[0], [0, *kl], atol=1e-12)
  np.testing.assert_allclose(found.effective_XF[0], [2, *(1 / (p**2 + (1 - p) ** 2))], rtol=1e-12)


def test_frontier_of_a_gaussian():
  # N(m, σ²) tilted by exp(r/β) is N(m + σ²/β, σ²), at KL σ²/(2β²): E[r] = m + σ √(2 KL).
  mean, std = 0.7, 2.0
  rewards_XS = np.random.default_rng(0).normal(mean, std, (20, 20_000))
  found = estimates.exact_frontier(rewards_XS)
  for kl in (0.25, 0.5, 1.0, 2.0):
    np.testing.assert_allclose(found.reward_at(kl), mean + std * np.sqrt(2 * kl), rtol=0.01)


@pytest.mark.parametrize("samples", [512, 2048])
def test_frontier_of_the_grammar_is_found_from_its_samples(samples):
  value, prob = reward_distribution("film", True)
  rewards_XS = np.random.default_rng(0).choice(value, (64, samples), p=prob)
  found = estimates.exact_frontier(rewards_XS)
  log_w_FR = np.log(prob + 1e-300) + value / found.beta_F[:, None]
  log_z_F = np.logaddexp.reduce(log_w_FR, axis=1)
  reward_F = np.exp(log_w_FR - log_z_F[:, None]) @ value
  kl_F = reward_F / found.beta_F - log_z_F
  for kl in (0.5, 1.0, 1.5, 2.0, 2.5):
    np.testing.assert_allclose(found.reward_at(kl), np.interp(kl, kl_F, reward_F), rtol=0.02)


def test_a_constant_a_prompt_moves_no_policy():
  rewards_XS = np.random.default_rng(0).normal(size=(3, 50))
  plain = estimates.exact_frontier(rewards_XS)
  moved = estimates.exact_frontier(rewards_XS + np.array([[5.0], [-100.0], [0.3]]))
  np.testing.assert_allclose(plain.kl_XF, moved.kl_XF, atol=1e-9)
  np.testing.assert_allclose(moved.reward_XF[1], plain.reward_XF[1] - 100)


def test_frontier_rises_with_distance():
  found = estimates.exact_frontier(np.random.default_rng(0).normal(size=(5, 300)))
  assert (np.diff(found.kl_XF) > 0).all()
  assert (np.diff(found.reward_XF) > 0).all()
  assert (np.diff(found.effective_XF) < 0).all()


def test_frontier_is_finite_at_extremes():
  found = estimates.exact_frontier(np.array([[1e3, -1e3, 0.0]]), [1e-3, 1e6])
  # At large β the mean moves by variance / β, here 2e6/3 / 1e6.
  np.testing.assert_allclose(found.reward_XF[0], [0, 2 / 3, 1e3], rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(found.kl_XF[0], [0, 0, np.log(3)], atol=1e-6)


def test_frontier_says_how_far_the_samples_reach():
  few = estimates.exact_frontier(np.random.default_rng(0).normal(size=(50, 20)))
  many = estimates.exact_frontier(np.random.default_rng(0).normal(size=(50, 2000)))
  assert 0 < few.reach < 1 < many.reach
  beyond = estimates.exact_frontier(np.random.default_rng(0).normal(size=(50, 5)))
  assert beyond.reach == 0
  assert beyond.reward_at(99.0) == beyond.reward_XF[:, -1].mean()


def test_frontier_refuses_beta_zero():
  with pytest.raises(UserError, match="above 0"):
    estimates.exact_frontier(np.zeros((1, 2)), [1.0, 0.0])


def test_the_best_policy_has_the_whole_gain():
  # π* at β = 1 on rewards (0, 1, 3), seen exactly; half its gain is half.
  frontier = estimates.exact_frontier(np.tile([[0.0, 1.0, 3.0]], (30, 1)), [2.0, 1.0, 0.5])
  reward, kl = frontier.reward_XF[:, 2], frontier.kl_XF[:, 2]
  reference = frontier.reward_XF[:, 0]
  np.testing.assert_allclose(estimates.fraction_of_gain(reward, reference, kl, frontier), 1)
  halfway = (reward + reference) / 2
  np.testing.assert_allclose(estimates.fraction_of_gain(halfway, reference, kl, frontier), 0.5)


def test_no_distance_has_no_fraction():
  frontier = estimates.exact_frontier(np.tile([[0.0, 1.0]], (4, 1)))
  half = np.full(4, 0.5)
  assert np.isnan(estimates.fraction_of_gain(half, half, np.zeros(4), frontier)).all()
