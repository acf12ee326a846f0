"""Tests of metrics: every value by hand, and equal values however the batch is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import metrics
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps


def means(sums):
  return {name: float(value) for name, value in metrics.divide(sums).items()}


def close(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def array(*values):
  return np.array(values, np.float32)


# Log-ratios: (2, -1), (-1, -3), (0, 0); tokens of chosen and rejected: (4, 2), (5, 10), (3, 3).
POLICY = PairLogps(array(-8, -21, -5), array(-6, -43, -6), array(4, 5, 3), array(2, 10, 3))
REFERENCE = PairLogps(array(-10, -20, -5), array(-5, -40, -6))
LOSS, ONES = array(0.1, 0.2, 0.6), array(1, 1, 1)


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_by_hand():
  found = means(metrics.pair_sums(POLICY, REFERENCE, LOSS, ONES, beta=0.5))
  # Odds of chosen to rejected under the reference: e^-5, e^20, e^1.
  masses = [
    np.log((np.exp(-8) + np.exp(-6)) / (np.exp(-10) + np.exp(-5))),
    -1.0,  # the rejected answer is e^20 times less likely than the chosen one
    0.0,
  ]
  close(
    found,
    {
      "loss": 0.3,
      "rewards/chosen": 0.5 * (2 - 1 + 0) / 3,
      "rewards/rejected": 0.5 * (-1 - 3 + 0) / 3,
      "rewards/accuracies": 2.5 / 3,  # margins 3, 2 and a tie
      "rewards/margins": 0.5 * (3 + 2 + 0) / 3,
      "logps/chosen": -34 / 3,
      "logps/rejected": -55 / 3,
      "drift/both_fell": 1 / 3,
      "drift/pair_mass": sum(masses) / 3,
      "margins/chosen_longer": 1.5,
      "margins/chosen_shorter": 1.0,
      "drift/chosen": (2 - 1 + 0) / (4 + 5 + 3),
      "drift/rejected": (-1 - 3 + 0) / (2 + 10 + 3),
    },
  )


def test_without_a_reference_rewards_are_beta_log_pi_and_nothing_drifts():
  found = means(metrics.pair_sums(POLICY, None, LOSS, ONES, beta=0.5))
  np.testing.assert_allclose(found["rewards/chosen"], 0.5 * found["logps/chosen"], rtol=1e-6)
  np.testing.assert_allclose(found["rewards/margins"], 0.5 * (-2 + 22 + 1) / 3, rtol=1e-6)
  assert not [name for name in found if name.startswith("drift/")]
  assert found["margins/chosen_longer"] == -1.0


def test_without_token_counts_what_depends_on_lengths_is_left_out():
  policy = PairLogps(POLICY.chosen_B, POLICY.rejected_B)
  found = means(metrics.pair_sums(policy, REFERENCE, LOSS, ONES, beta=0.5))
  assert {name for name in found if name.startswith(("drift/", "margins/"))} == {
    "drift/both_fell", "drift/pair_mass",
  }  # fmt: skip


def test_at_the_reference_nothing_has_drifted():
  """Pair mass is exact even where a sum of log-probs would round it away."""
  at = PairLogps(array(-1e4, -3), array(-1.0001e4, -900), array(9, 2), array(8, 7))
  found = means(metrics.pair_sums(at, at, array(0, 0), array(1, 1), beta=0.1))
  for name in ("drift/chosen", "drift/rejected", "drift/both_fell", "drift/pair_mass"):
    np.testing.assert_allclose(found[name], 0, atol=1e-7, err_msg=name)
  assert found["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("kind", ["pairs", "ranked"])
def test_a_margin_that_float32_rounds_to_is_a_tie(kind):
  """One unit in the last place of 125 nats is 2^-17: four margins of some of these, two real."""
  unit = 2.0**-17
  chosen_B = array(-125, -125 + unit, -125 + 4 * unit, -125 + 0.01, -125 - 0.01)
  rejected_B, ones = array(*[-125] * 5), array(*[1] * 5)
  if kind == "pairs":
    policy, reference = PairLogps(chosen_B, rejected_B), PairLogps(rejected_B, rejected_B)
    found = means(metrics.pair_sums(policy, reference, ones, ones, beta=0.1))
    # Without a reference, rewards are β log π.
    alone = means(metrics.pair_sums(policy, None, ones, ones, beta=0.1))
    assert alone["rewards/accuracies"] == found["rewards/accuracies"]
    assert metrics.pairs_in_order(policy, reference).tolist() == [0.5, 0.5, 0.5, 1, 0]
  else:
    policy = RankedLogps(jnp.stack([chosen_B, rejected_B], 1))
    reference = RankedLogps(jnp.stack([rejected_B] * 2, 1))
    present_BK = jnp.ones((5, 2))
    found = means(metrics.ranked_sums(policy, reference, ones, ones, present_BK, beta=0.1))
  assert found["rewards/accuracies"] == 0.5
  assert found["rewards/margins"] != 0


def test_pair_mass_lies_between_the_two_log_ratios_and_stays_finite():
  rng = np.random.default_rng(0)

  def draw(scale):
    return rng.normal(0, scale, 100).astype(np.float32)

  for scale in (1.0, 1e4):
    policy, reference = PairLogps(draw(scale), draw(scale)), PairLogps(draw(scale), draw(scale))
    for i in range(100):

      def one(logps, i=i):
        return PairLogps(logps.chosen_B[i : i + 1], logps.rejected_B[i : i + 1])

      sums = metrics.pair_sums(one(policy), one(reference), array(0), array(1), beta=1.0)
      found = means(sums)
      low, high = sorted((found["rewards/chosen"], found["rewards/rejected"]))
      slack = 1e-6 * scale + 1e-6
      assert low - slack <= found["drift/pair_mass"] <= high + slack


def test_a_weight_is_so_many_copies_and_zero_is_none():
  weighted = metrics.pair_sums(POLICY, REFERENCE, LOSS, array(3, 1, 0), beta=0.5)
  copies = np.array([0, 0, 0, 1])

  def take(logps):
    return jax.tree.map(lambda x: x[copies], logps)

  copied = metrics.pair_sums(take(POLICY), take(REFERENCE), LOSS[copies], np.ones(4), beta=0.5)
  close(means(weighted), means(copied))


def test_no_pair_of_a_kind_is_not_a_number():
  equal = POLICY._replace(rejected_tokens_B=POLICY.chosen_tokens_B)
  found = means(metrics.pair_sums(equal, REFERENCE, LOSS, ONES, beta=0.5))
  assert np.isnan(found["margins/chosen_longer"]) and np.isnan(found["margins/chosen_shorter"])
  assert all(np.isfinite(v) for k, v in found.items() if not k.startswith("margins/"))


# --- unpaired completions -------------------------------------------------------------------------


def test_unpaired_by_hand():
  policy = UnpairedLogps(array(-1, -5, -9), array(-20, -20, -20))
  reference = UnpairedLogps(array(-3, -4, -4), array(-21, -22, -17))
  label, weight = array(1, 0, 0), array(1, 1, 2)
  found = means(metrics.unpaired_sums(policy, reference, LOSS, weight, label, beta=0.5))
  close(
    found,
    {
      "loss": (0.1 + 0.2 + 2 * 0.6) / 4,
      "kl": (1 + 2 + 2 * -3) / 4,
      "rewards/desirable": 0.5 * 2,
      "logps/desirable": -1.0,
      "rewards/undesirable": 0.5 * (-1 + 2 * -5) / 3,
      "logps/undesirable": (-5 + 2 * -9) / 3,
    },
  )


def test_a_batch_of_one_label_has_no_mean_of_the_other():
  logps = UnpairedLogps(array(-1, -2), array(-3, -4))
  found = means(metrics.unpaired_sums(logps, logps, array(1, 1), array(1, 1), array(1, 1), 0.1))
  assert found["rewards/desirable"] == 0 and np.isnan(found["rewards/undesirable"])


# --- K completions --------------------------------------------------------------------------------

RANKED = RankedLogps(np.array([[-3, -4, -5], [-3, -2, 0]], np.float32))
RANKED_REFERENCE = RankedLogps(np.array([[-4, -4, -2], [-4, -5, 0]], np.float32))
PRESENT = np.array([[1, 1, 1], [1, 1, 0]], np.float32)


def test_ranked_by_hand():
  # Log-ratios: (1, 0, -3) and (1, 3).
  sums = metrics.ranked_sums(RANKED, RANKED_REFERENCE, array(1, 3), array(1, 1), PRESENT, 0.5)
  close(
    means(sums),
    {
      "loss": 2.0,
      "rewards/best": 0.5,
      "rewards/rest": 0.5 * (0 - 3 + 3) / 3,
      "logps/best": -3.0,
      "logps/rest": -11 / 3,
      "rewards/accuracies": 2 / 3,
      "rewards/margins": 0.5 * (1 + 4 - 2) / 3,
    },
  )


def test_samples_and_their_rewards_by_hand():
  reward = np.array([[1, 2, 3], [4, 5, 99]], np.float32)  # 99 is of an answer that is not there
  sums = metrics.ranked_sums(
    RANKED, RANKED_REFERENCE, array(1, 3), array(1, 1), PRESENT, 0.5, reward_BK=reward
  )
  close(means(sums), {"loss": 2.0, "reward": 3.0, "kl": 0.4, "objective": -3.0 + 0.5 * 0.4})


def test_two_ranked_answers_are_a_pair():
  def stack(logps):
    return RankedLogps(np.stack([logps.chosen_B, logps.rejected_B], axis=1))

  ranked = metrics.ranked_sums(
    stack(POLICY), stack(REFERENCE), LOSS, ONES, np.ones((3, 2), np.float32), beta=0.5
  )
  pairs = means(metrics.pair_sums(POLICY, REFERENCE, LOSS, ONES, beta=0.5))
  found = means(ranked)
  for name, other in (
    ("loss", "loss"),
    ("rewards/best", "rewards/chosen"),
    ("rewards/rest", "rewards/rejected"),
    ("rewards/accuracies", "rewards/accuracies"),
    ("rewards/margins", "rewards/margins"),
  ):
    np.testing.assert_allclose(found[name], pairs[other], rtol=1e-6)


# --- supervised examples, and facts of all sums ---------------------------------------------------


def test_text_loss_is_a_mean_over_tokens_and_log_probs_over_texts():
  logps, tokens = array(-10, -2, -7), array(5, 2, 3)
  sums = metrics.text_sums(logps, tokens, -logps, array(1, 2, 0))
  close(means(sums), {"loss": 14 / 9, "logps/chosen": -14 / 3})


def _all_kinds(part):
  """Computes sums of every kind over a slice of a batch of eight."""
  rng = np.random.default_rng(1)

  def draw(*shape):
    return rng.normal(-20, 3, shape).astype(np.float32)[part]

  def count(*shape):
    return rng.integers(1, 9, shape).astype(np.float32)[part]

  weight, loss = rng.uniform(0.1, 2, 8).astype(np.float32)[part], draw(8)
  pairs = PairLogps(draw(8), draw(8), count(8), count(8))
  single, label = UnpairedLogps(draw(8), draw(8)), (np.arange(8) % 2)[part]
  ranked, present = RankedLogps(draw(8, 3)), (np.arange(24).reshape(8, 3) % 5 > 0)[part]
  return {
    "pairs": metrics.pair_sums(pairs, PairLogps(draw(8), draw(8)), loss, weight, 0.3),
    "bare": metrics.pair_sums(pairs, None, loss, weight, 0.3),
    "unpaired": metrics.unpaired_sums(
      single, UnpairedLogps(draw(8), draw(8)), loss, weight, label, 0.3
    ),
    "ranked": metrics.ranked_sums(ranked, RankedLogps(draw(8, 3)), loss, weight, present, 0.3),
    "samples": metrics.ranked_sums(
      ranked, RankedLogps(draw(8, 3)), loss, weight, present, 0.3, reward_BK=draw(8, 3)
    ),
    "text": metrics.text_sums(pairs.chosen_B, pairs.chosen_tokens_B, loss, weight),
  }


@pytest.mark.parametrize("kind", sorted(_all_kinds(slice(None))))
def test_sums_of_parts_add_up_to_the_whole(kind):
  whole = _all_kinds(slice(None))[kind]
  parts = [_all_kinds(slice(a, b))[kind] for a, b in ((0, 1), (1, 6), (6, 8))]
  close(means(jax.tree.map(lambda *x: sum(x), *parts)), means(whole))


@pytest.mark.parametrize("kind", sorted(_all_kinds(slice(None))))
def test_an_empty_batch_is_not_a_number_and_never_an_error(kind):
  sums = jax.tree.map(jnp.zeros_like, _all_kinds(slice(None))[kind])
  assert all(np.isnan(value) for value in means(sums).values())
