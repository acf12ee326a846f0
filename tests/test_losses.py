"""Losses by hand, at the reference, far out, and against what their papers promise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import LOSSES, resolve
from dpo_jax.structs import PairLogps, UserError

PAIRED = sorted(set(LOSSES) - losses.SUPERVISED)

# m = (-1 - -2) - (-4 - -3) = 2
POLICY = PairLogps(np.array([-1.0]), np.array([-4.0]))
REFERENCE = PairLogps(np.array([-2.0]), np.array([-3.0]))


@pytest.mark.parametrize(
  ("name", "given", "value"),
  [
    # z = βm = 1: -log σ(1) = log(1 + 1/e), -log σ(-1) = log(1 + e)
    ("sigmoid", {"beta": 0.5}, np.log1p(np.exp(-1))),
    (
      "cdpo",
      {"beta": 0.5, "label_smoothing": 0.2},
      0.8 * np.log1p(np.exp(-1)) + 0.2 * np.log1p(np.e),
    ),
    (
      "robust",
      {"beta": 0.5, "label_smoothing": 0.2},
      (0.8 * np.log1p(np.exp(-1)) - 0.2 * np.log1p(np.e)) / 0.6,
    ),
    ("ipo", {"beta": 0.5}, (2 - 1) ** 2),
    ("hinge", {"beta": 0.25}, 0.5),
    ("hinge", {"beta": 1.0}, 0.0),
  ],
)
def test_by_hand(name, given, value):
  np.testing.assert_allclose(LOSSES[name](POLICY, REFERENCE, **given), [value], rtol=1e-6)


def test_sft_is_minus_the_log_prob_of_the_chosen_answer():
  np.testing.assert_allclose(LOSSES["sft"](POLICY, None), [1.0])


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("sigmoid", lambda beta: np.log(2)),
    ("cdpo", lambda beta: np.log(2)),
    ("robust", lambda beta: np.log(2)),
    ("ipo", lambda beta: 1 / (4 * beta**2)),
    ("hinge", lambda beta: 1.0),
  ],
)
def test_policy_equal_to_reference(name, value, beta):
  logps = PairLogps(np.array([-3.0, -90.0]), np.array([-7.0, -2.0]))
  found = LOSSES[name](logps, logps, beta=beta)
  np.testing.assert_allclose(found, np.full(2, value(beta)), rtol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_value_and_gradient_stay_finite(name, size, sign):
  def loss(chosen_B):
    policy = PairLogps(chosen_B, jnp.zeros(1, jnp.float32))
    reference = PairLogps(jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.float32))
    return LOSSES[name](policy, reference, beta=1.0).sum()

  value, slope = jax.jit(jax.value_and_grad(loss))(jnp.array([sign * size], jnp.float32))
  assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("name", PAIRED)
def test_only_margins_count(name):
  """Adding f(x) to both answers of a prompt changes no paired loss: Z(x) cancels."""
  shifted = PairLogps(POLICY.chosen_B + 5.0, POLICY.rejected_B + 5.0)
  np.testing.assert_allclose(
    LOSSES[name](shifted, REFERENCE), LOSSES[name](POLICY, REFERENCE), rtol=1e-5
  )


def test_robust_is_unbiased_under_flipped_labels():
  """(1-ε) robust(m) + ε robust(-m) is the clean loss: Chowdhury et al. 2024, lemma 3.1."""
  swap = lambda p: PairLogps(p.rejected_B, p.chosen_B)
  clean = LOSSES["sigmoid"](POLICY, REFERENCE, beta=0.7)
  kept = LOSSES["robust"](POLICY, REFERENCE, beta=0.7, label_smoothing=0.3)
  flipped = LOSSES["robust"](swap(POLICY), swap(REFERENCE), beta=0.7, label_smoothing=0.3)
  np.testing.assert_allclose(0.7 * kept + 0.3 * flipped, clean, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_cdpo_is_least_at_the_log_odds_of_the_label(epsilon):
  z = np.log((1 - epsilon) / epsilon)
  at = lambda z: LOSSES["cdpo"](
    PairLogps(jnp.array([z]), jnp.zeros(1)),
    PairLogps(jnp.zeros(1), jnp.zeros(1)),
    beta=1.0,
    label_smoothing=epsilon,
  )[0]
  np.testing.assert_allclose(jax.grad(at)(z), 0, atol=1e-6)


def test_resolve_binds_arguments():
  bound = resolve("sigmoid", beta=0.5)
  np.testing.assert_allclose(bound(POLICY, REFERENCE), [np.log1p(np.exp(-1))], rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "given", "words"),
  [
    ("sigmoyd", {}, "did you mean 'sigmoid'"),
    ("nonsense", {}, "known: sigmoid"),
    ("sigmoid", {"label_smoothing": 0.1}, "does not read label_smoothing"),
    ("sft", {"beta": 0.1}, "takes no argument"),
    ("sigmoid", {"beta": 0.0}, "above 0"),
    ("sigmoid", {"beta": float("nan")}, "above 0"),
    ("robust", {"label_smoothing": 0.5}, "below 0.5"),
  ],
)
def test_bad_names_and_arguments_are_said_in_one_line(name, given, words):
  with pytest.raises(UserError, match=words) as error:
    resolve(name, **given)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_gives_its_formula_and_source(name):
  text = inspect.getdoc(LOSSES[name])
  assert "loss = " in text
  assert name == "sft" or any(year in text for year in ("2023", "2024"))
