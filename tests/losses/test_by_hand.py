"""Values of losses that were worked out on paper."""

import functools
import math

import numpy as np
import pytest

from dpo_jax.losses import LOSSES, resolve
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps
from tests.support.small_logps import (
  KTO,
  KTO_REFERENCE,
  POLICY,
  REFERENCE,
  TOKENS,
  ratios,
  softplus,
  zeros_of,
)

LOG_3 = math.log(3)  # σ(log 3) = 3/4, σ(log 9) = 9/10
LOG_9 = math.log(9)

# (loss, arguments, value) at c = 1, r = -1: log π is -1 and -4, of 2 and 4 tokens; that of the
# reference -2 and -3.
PAIRS = [
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
  # Sorting a single pair changes nothing.
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
  ("rpo", {"beta": LOG_3 / 2, "margin_B": LOG_9, "distance": "squared"}, LOG_3**2),
  # KL of (9/10, 1/10) from (3/4, 1/4), and the reverse: ηΔ = log 9
  (
    "rpo",
    {"beta": LOG_3 / 2, "margin_B": 2 * LOG_9, "margin_scale": 0.5, "distance": "backward_kl"},
    0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25),
  ),
  (
    "rpo",
    {"beta": LOG_3 / 2, "margin_B": LOG_9, "distance": "forward_kl"},
    0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1),
  ),
  # e^r = 1/e: the mixture is (1/e + 1)/2 times the reference
  ("bdpo", {"beta": 0.5}, softplus(-(1 - math.log((1 / math.e + 1) / 2)) / 2)),
  ("bdpo", {"beta": 0.5, "mix": 1.0}, softplus(-1)),
  # p^-2 is e and e²: ρ is (1 - e)/2 and (1 - e²)/2
  (
    "alpha_po",
    {"beta": 2.0, "gamma": 0.5, "reward_alpha": 2.0},
    softplus(0.5 - (math.e**2 - math.e)),
  ),
  ("alpha_po", {"beta": 2.0, "gamma": 1.0, "reward_alpha": 0.0}, math.log(2)),
]


@pytest.mark.parametrize(("name", "given", "value"), PAIRS)
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


# A completion to keep, with log π = -4, and one to forget, with -1; the reference gives -3 to it.
UNPAIRED = UnpairedLogps(np.array([-4.0, -1.0]), None, np.array([2.0, 1.0]))
UNPAIRED_REFERENCE = UnpairedLogps(np.array([-4.0, -3.0]), None, np.array([2.0, 1.0]))


@pytest.mark.parametrize(
  ("name", "given", "value"),
  [
    # The log-ratio is 2, β times it log 3: -log σ(-log 3) = log 4
    ("npo", {"beta": LOG_3 / 2, "retain_weight": 0.5}, [0.5 * 2, 4 / LOG_3 * math.log(4)]),
    # -β log π/|y| is log 3, then less γ = log 3
    ("simnpo", {"beta": LOG_3}, [2.0, 2 / LOG_3 * math.log(4 / 3)]),
    ("simnpo", {"beta": LOG_3, "gamma": LOG_3}, [2.0, 2 / LOG_3 * math.log(2)]),
  ],
)
def test_unlearning_by_hand(name, given, value):
  found = LOSSES[name](UNPAIRED, UNPAIRED_REFERENCE, label_B=np.array([1.0, 0.0]), **given)
  np.testing.assert_allclose(found, value, rtol=1e-6)


@pytest.mark.parametrize(
  ("present", "value"),
  [
    # The third of three against the second, 5 nats below it; or the fourth, 2 nats above.
    ([True, True, True, False], softplus(-2.5)),
    ([True, True, True, True], softplus(1)),
  ],
)
def test_tpo_by_hand(present, value):
  policy = RankedLogps(np.array([[-1.0, -4.0, -9.0, -2.0]]), np.array([[2.0, 1.0, 1.0, 1.0]]))
  found = LOSSES["tpo"](policy, None, beta=0.5, gold_weight=3.0, present_BK=np.array([present]))
  np.testing.assert_allclose(found, [value + 3 / 2], rtol=1e-6)


# Losses with tests of their own above.
ELSEWHERE = {"orpo", "kto", "plackett_luce", "policy_gradient", "npo", "simnpo", "tpo"}


def test_every_loss_has_a_value_worked_out_by_hand():
  for name in LOSSES.keys() - {name for name, *_ in PAIRS} - ELSEWHERE:
    pytest.fail(
      f"loss {name} has no value worked out by hand; add to PAIRS in {__file__}:"
      f' ("{name}", {{"beta": 0.5}}, VALUE),'
    )
