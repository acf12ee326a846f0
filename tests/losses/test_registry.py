"""Tests of `resolve`: names, sums, arguments, and the reasons of refusals."""

import inspect
import re

import numpy as np
import pytest

from dpo_jax.losses import LOSSES, resolve
from dpo_jax.structs import UserError
from tests.support.small_logps import POLICY, REFERENCE


def test_resolve_binds_arguments():
  bound = resolve("sigmoid", beta=0.5)
  np.testing.assert_allclose(bound(POLICY, REFERENCE), [np.log1p(np.exp(-1))], rtol=1e-6)
  assert bound.beta == 0.5


@pytest.mark.parametrize(
  ("name", "kind", "reference", "wide"),
  [
    ("sigmoid", "pairs", True, False),
    ("simpo", "pairs", False, False),
    ("cpo + sft", "pairs", False, False),
    ("sigmoid + aot", "pairs", True, True),
    ("aot_unpaired", "pairs", True, True),
    ("kto", "unpaired", True, True),
    ("plackett_luce", "ranked", True, False),
    ("policy_gradient", "ranked", True, False),
    ("sft", "text", False, False),
  ],
)
def test_resolve_says_what_a_loss_needs(name, kind, reference, wide):
  loss = resolve(name)
  assert (loss.kind, loss.needs_reference, loss.batch_wide) == (kind, reference, wide)


def test_only_losses_with_a_running_mean_remember():
  assert resolve("bco_pair").running_stats == {"delta": 0.0}
  assert resolve("0.5*bco_pair + sigmoid").running_stats == {"delta": 0.0}
  assert resolve("sigmoid").running_stats == resolve("kto").running_stats == {}


def test_a_loss_ignores_what_it_is_supplied_but_does_not_read():
  extra = {"weight_B": np.ones(1), "margin_B": np.ones(1), "delta": 3.0}
  np.testing.assert_array_equal(
    resolve("sigmoid")(POLICY, REFERENCE, **extra), LOSSES["sigmoid"](POLICY, REFERENCE)
  )


@pytest.mark.parametrize(
  ("name", "given", "words"),
  [
    ("sigmoyd", {}, "did you mean 'sigmoid'"),
    ("nonsense", {}, "known: sigmoid"),
    ("", {}, "known: sigmoid"),
    ("sigmoid+", {}, r"loss.name is 'sigmoid\+': a term of the sum names no loss"),
    ("0.5*", {}, r"loss.name is '0.5\*': a term"),
    ("0.5*sigmoid+nonsense", {}, "known: sigmoid"),
    ("much*sigmoid", {}, "'much' is no weight"),
    ("0*sigmoid+hinge", {}, "above 0"),
    ("-1*sigmoid", {}, "above 0"),
    ("nan*sigmoid", {}, "above 0"),
    ("sigmoid+sigmoid", {}, "twice"),
    # losses of other examples, or with other rewards
    ("sigmoid+kto", {}, "'kto' .* cannot be a term"),
    ("sigmoid+plackett_luce", {}, "'plackett_luce' .* cannot be a term"),
    ("sigmoid+policy_gradient", {}, "'policy_gradient' .* cannot be a term"),
    ("sigmoid+simpo", {}, "with and without a reference"),
    # arguments that no loss reads
    ("sigmoid", {"label_smoothing": 0.1}, "does not read label_smoothing"),
    ("sigmoid+hinge", {"label_smoothing": 0.1}, "does not read label_smoothing"),
    ("sft", {"beta": 0.1}, "it reads no argument. Leave beta out"),
    ("orpo", {"beta": 0.1}, "does not read beta"),
    ("sigmoid", {"betta": 0.1}, "does not read betta"),
    ("sigmoid", {"weight_B": 1.0}, "does not read weight_B"),
    # ranges
    ("sigmoid", {"beta": 0.0}, "above 0"),
    ("sigmoid", {"beta": -0.1}, "above 0"),
    ("sigmoid", {"beta": float("nan")}, "above 0"),
    ("sigmoid", {"beta": float("inf")}, "above 0"),
    ("sigmoid", {"beta": "much"}, "above 0"),
    ("sigmoid+hinge", {"beta": 0.0}, "above 0"),
    ("cdpo", {"label_smoothing": 0.5}, "below 0.5"),
    ("robust", {"label_smoothing": 0.5}, "below 0.5"),
    ("robust", {"label_smoothing": -0.1}, "below 0.5"),
    ("aot", {"label_smoothing": 0.5}, "below 0.5"),
    ("exo_pair", {"label_smoothing": 0.0}, "above 0 and below 0.5"),
    ("exo_pair", {"label_smoothing": 0.5}, "above 0 and below 0.5"),
    ("discopop", {"tau": 0.0}, "above 0"),
    # with τ > 1, e^-z g grows without bound below z = 0
    ("discopop", {"tau": 1.5}, "at most 1"),
    ("dpop", {"penalty": -1.0}, "0 or above"),
    ("chi_po", {"clip": 0.0}, "above 0"),
    ("orpo", {"odds_weight": -0.1}, "0 or above"),
    ("kto", {"desirable_weight": 0.0}, "above 0"),
    ("sigmoid", {"sft_weight": -1.0}, "0 or above"),
    ("sigmoid", {"ld_alpha": 1.5}, "from 0 to 1"),
    ("sigmoid", {"ld_alpha": -0.5}, "from 0 to 1"),
    ("sigmoid", {"link": "alpha", "link_alpha": 0.0}, "above 0 and below 1"),
    ("sigmoid", {"link": "hellinger"}, "known: reverse_kl"),
    # modifiers that do not combine
    *[(name, {"reference_free": True}, "does not combine") for name in ("simpo", "cpo", "orpo")],
    *[(name, {"reference_free": True}, "does not combine") for name in ("kto", "plackett_luce")],
    *[(name, {"reference_free": True}, "does not combine") for name in ("nca_pair", "dpop", "aot")],
    *[(name, {"link": "forward_kl"}, "does not combine") for name in ("nca_pair", "sppo_hard")],
    *[
      (name, {"link": "forward_kl"}, "does not combine") for name in ("simpo", "aot", "kto", "sft")
    ],
    ("sigmoid+bco_pair", {"link": "forward_kl"}, "does not combine"),
    ("sigmoid", {"link": "forward_kl", "reference_free": True}, "does not combine"),
    ("sigmoid", {"link_alpha": 0.5}, "does not combine"),
    ("sigmoid", {"link": "forward_kl", "link_alpha": 0.5}, "does not combine"),
    *[
      (name, {"ld_alpha": 0.5}, "does not combine")
      for name in ("ipo_mean", "sigmoid_norm", "simpo", "orpo")
    ],
    *[
      (name, {"ld_alpha": alpha}, "does not combine")
      for name in ("sft", "kto", "plackett_luce")
      for alpha in (0.0, 0.5)
    ],
    *[(name, {"wpo": True}, "does not combine") for name in ("aot", "aot_unpaired", "kto", "sft")],
    ("sigmoid+aot", {"wpo": True}, "does not combine"),
    *[
      (name, {"sft_weight": 0.5}, "does not combine")
      for name in ("sft", "kto", "plackett_luce", "policy_gradient", "sigmoid+sft")
    ],
  ],
)
def test_what_makes_no_sense_is_refused_in_one_line(name, given, words):
  with pytest.raises(UserError, match=words) as error:
    resolve(name, **given)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_gives_its_formula_and_source(name):
  text = inspect.getdoc(LOSSES[name])
  assert "loss = " in text
  assert name == "sft" or re.search(r"\b20(19|2\d)\b", text)
