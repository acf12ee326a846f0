"""Tests of `declare`: what it asks for, what a probe finds, and losses of the user's own."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags as library

from dpo_jax import defaults
from dpo_jax.losses import (
  LOSSES,
  PairLogps,
  RankedLogps,
  UnpairedLogps,
  arguments,
  canonical,
  declare,
  kind_of,
  resolve,
  types,
)
from dpo_jax.losses.declaration import contains, declaration_of, in_words
from dpo_jax.losses.probing import probe
from dpo_jax.structs import UserError
from dpo_jax.utils import config_flags
from tests.support.paths import ROOT
from tests.support.small_logps import POLICY, REFERENCE, random_logps

# --- the losses of the package --------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_declared_as_it_computes(name):
  declared = declaration_of(LOSSES[name])
  assert declared is not None
  probe(declared)


def test_every_file_with_a_loss_is_known_to_the_registry():
  files = (ROOT / "dpo_jax" / "losses").glob("*.py")
  declared = [x for file in files for x in re.findall(r"^@declare\(", file.read_text(), re.M)]
  assert len(declared) == len(LOSSES)


def equal_logps(kind):
  """Returns log-probs of one kind of example, and what a batch supplies with them."""
  tokens = np.array([[3.0, 40.0], [2.0, 1.0]])
  logps = np.array([[-3.0, -90.0], [-7.0, -2.0]])
  weight = {"weight_B": np.array([1.0, 0.5])}
  if kind == "ranked":
    present = np.array([[True, True, True], [True, True, False]])
    known = {"present_BK": present, "reward_BK": np.arange(6.0).reshape(2, 3)}
    return RankedLogps(-np.arange(1.0, 7).reshape(2, 3), np.full((2, 3), 2.0)), weight | known
  if kind == "unpaired":
    return UnpairedLogps(logps[0], logps[1], tokens[0]), weight | {"label_B": np.array([1.0, 0.0])}
  return PairLogps(*logps, *tokens), weight | {"margin_B": np.array([0.3, 2.0]), "delta": 0.2}


@pytest.mark.parametrize(
  ("name", "given"),
  [
    *[(name, {}) for name in LOSSES if kind_of(name) != "text"],
    *[(name, {"beta": beta}) for beta in (0.01, 1.0) for name in ("ipo", "ipo_mean", "sppo_hard")],
    *[("npo", {"beta": 1.0, "retain_weight": 0.3}), ("kto", {"desirable_weight": 1.2})],
    *[("exo_pair", {"label_smoothing": 0.2}), ("odpo", {"margin_scale": 0.3})],
    *[("rpo", {"distance": x, "margin_scale": 0.3}) for x in ("squared", "forward_kl")],
    ("sigmoid", {"link": "forward_kl", "sft_weight": 0.7}),
    ("0.8*sigmoid + 0.2*bco_pair + 2*sft", {}),
  ],
)
def test_the_declared_value_is_that_of_a_policy_equal_to_the_reference(name, given):
  loss = resolve(name, **given)
  declared = loss.at_reference()
  if name == "policy_gradient":  # the one loss that declares none
    assert declared is None
    return
  assert declared is not None
  logps, known = equal_logps(loss.kind)
  np.testing.assert_allclose(
    declared(logps, logps, **known), loss(logps, logps, **known), rtol=1e-5
  )


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("sigmoid", math.log(2)),
    ("ipo", 25.0),  # 1/(4 β²) at β = 1/10
    ("bdpo", math.log(2)),
    ("nca_pair", 2 * math.log(2)),
    ("discopop", (math.log(2) + 1) / 2),
    ("rpo", 0.0),  # without a gap, from the margin 0
  ],
)
def test_declared_values_by_hand(name, value):
  declared = resolve(name).at_reference()
  assert declared is not None
  np.testing.assert_allclose(declared(POLICY, POLICY), [value], rtol=1e-6, atol=1e-7)


def test_dpo_is_another_name_of_sigmoid():
  assert resolve("dpo").name == "sigmoid"
  assert resolve("0.5*dpo + sft").name == "0.5*sigmoid + sft"
  assert canonical("0.5*dpo + 0.5*dpop+odpo") == "0.5*sigmoid + 0.5*dpop+odpo"
  assert arguments("dpo") == {"beta": 0.1}
  np.testing.assert_array_equal(
    resolve("dpo", beta=0.5)(POLICY, REFERENCE), resolve("sigmoid", beta=0.5)(POLICY, REFERENCE)
  )
  config = defaults.get_config().lock()
  config.loss.name = "dpo"
  defaults.replace_aliases(config)
  assert config.loss.name == "sigmoid"


# --- what declare asks for ------------------------------------------------------------------------


def plain(policy, reference, *, beta=0.1):
  return jnp.square(policy.chosen_B - reference.chosen_B) * beta


def with_tau(policy, reference, *, tau=2.0):
  return plain(policy, reference) * tau


def with_word(policy, reference, *, how="a"):
  return plain(policy, reference)


def with_name(policy, reference, *, name="a"):
  return plain(policy, reference)


def without_default(policy, reference, *, tau):
  return plain(policy, reference) * tau


def with_margin(policy, reference, *, margin_B=0.0):
  return plain(policy, reference) - margin_B


def without_reference(policy, *, beta=0.1):
  return policy.chosen_B * beta


@pytest.mark.parametrize(
  ("fn", "declared", "words"),
  [
    (plain, {"reference": True}, r"@declare\(reference=True, at_reference=\.\.\.\)"),
    (plain, {"reference": False, "kind": "triples"}, "kind is 'triples'; known: pairs, text"),
    (plain, {"reference": False, "ranges": {"bta": "(0, 1)"}}, "'bta', which is no argument"),
    (with_tau, {"reference": False}, r'ranges=\{"tau": "\(0, inf\)"\}'),
    (with_tau, {"reference": False, "ranges": {"tau": "0..1"}}, "'0..1' is no interval"),
    (
      with_tau,
      {"reference": False, "ranges": {"tau": "(0, 1]"}},
      "the default tau=2.0 is not a number above 0, at most 1",
    ),
    (
      with_tau,
      {"reference": False, "ranges": {"tau": (0, 9)}},
      r"tau is \(0, 9\); write an interval",
    ),
    (with_word, {"reference": False, "ranges": {"how": ("a")}}, r"a tuple of words, \('a',\)"),
    (with_word, {"reference": False, "ranges": {"how": ["a"]}}, r"a tuple of words, \('a',\)"),
    (with_name, {"reference": False}, "would be the field loss.name"),
    (plain, {"reference": True, "at_reference": "0"}, "at_reference is '0'; it must be a number"),
    (without_default, {"reference": False}, "tau needs a default .* tau=1.0 .*margin_B"),
    (with_margin, {"reference": False, "kind": "ranked"}, "reads margin_B, which ranked examples"),
    (without_reference, {"reference": False}, r"def without_reference\(policy, reference, \*"),
  ],
)
def test_a_declaration_that_lacks_something_says_what_to_write(fn, declared, words):
  with pytest.raises(UserError, match=words) as error:
    declare(**declared)(fn)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("interval", "inside", "outside", "words"),
  [
    ("(0, inf)", [1e-9, 1e9], [0.0, -1.0, math.inf, math.nan, "1", None], "a number above 0"),
    ("[0, inf)", [0, 3], [-1e-9], "a number of 0 or above"),
    ("[0, 0.5)", [0.0, 0.49], [0.5], "a number from 0 to below 0.5"),
    ("(0, 1]", [1.0], [0.0, 1.1], "a number above 0, at most 1"),
    ("(0, 1)", [0.5], [0.0, 1.0], "a number above 0 and below 1"),
    ("(-inf, inf)", [-3.0, 0.0], [math.inf], "a finite number"),
    (("squared", "absolute"), ["squared"], ["cubed", 1.0], "one of squared, absolute"),
  ],
)
def test_ranges(interval, inside, outside, words):
  assert all(contains(interval, value) for value in inside)
  assert not any(contains(interval, value) for value in outside)
  assert in_words(interval) == words


# --- losses of the user's own ---------------------------------------------------------------------

OWN = """
import math
import jax, jax.numpy as jnp
import numpy as np
from dpo_jax.losses import declare

@declare(reference=True, at_reference=lambda policy, gain: gain * math.log(2), margin=True,
         ranges={"gain": "(0, inf)", "shape": ("plain", "doubled")})
def gained(policy, reference, *, beta=0.1, gain=1.0, shape="plain"):
  z = policy.chosen_B - policy.rejected_B
  if reference is not None:
    z = z - (reference.chosen_B - reference.rejected_B)
  return -gain * jax.nn.log_sigmoid(beta * z) * (2 if shape == "doubled" else 1)

def bare(policy, reference, *, beta=0.1):
  return policy.chosen_B

@declare(reference=True, at_reference=1.0)
def needless(policy, reference, *, beta=0.1):
  return jnp.ones(policy.chosen_B.shape)

@declare(reference=True, at_reference=math.log(2))
def wrong_value(policy, reference, *, beta=0.1):
  return jnp.square(policy.chosen_B - reference.chosen_B) + 1

@declare(reference=False)
def mean_of_all(policy, reference, *, beta=0.1):
  return -policy.chosen_B.mean()

@declare(reference=False)
def centered(policy, reference, *, beta=0.1):
  return policy.chosen_B - policy.chosen_B.mean()

@declare(reference=False)
def per_token(policy, reference, *, beta=0.1):
  return -policy.chosen_B / policy.chosen_tokens_B

@declare(reference=False)
def reads_it(policy, reference, *, beta=0.1):
  return policy.chosen_B - reference.chosen_B

@declare(reference=True, at_reference=0.0, margin=True)
def no_margin(policy, reference, *, beta=0.1):
  return policy.chosen_B - reference.chosen_B

@declare(reference=False)
def in_numpy(policy, reference, *, beta=0.1):
  return np.square(np.asarray(policy.chosen_B))

@declare(reference=False)
def with_if(policy, reference, *, beta=0.1):
  return policy.chosen_B if policy.chosen_B.sum() < 0 else -policy.chosen_B

@declare(reference=True, at_reference=0.0)
def root(policy, reference, *, beta=0.1):
  return jnp.sqrt(jnp.abs(policy.chosen_B - reference.chosen_B))

@declare(reference=False, batch_wide=True)
def of_the_whole_batch(policy, reference, *, beta=0.1):
  return policy.chosen_B - policy.chosen_B.mean()

@declare(reference=False, batch_wide=True)
def weighted(policy, reference, *, beta=0.1, weight_B):
  return policy.chosen_B - (policy.chosen_B * weight_B).sum() / weight_B.sum()

@declare(kind="ranked", reference=False)
def last(policy, reference, *, beta=0.1):
  return policy.completions_BK[:, -1] - policy.completions_BK[:, 0]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
  """Returns the name of a module with losses in the current folder; each test has another."""
  name = f"own_losses_{tmp_path.name.replace('-', '_')}"
  (tmp_path / f"{name}.py").write_text(OWN)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return name


def test_a_loss_of_ones_own_is_resolved_with_its_arguments(own):
  policy, reference = random_logps()
  loss = resolve(f"{own}:gained", beta=0.3, gain=2.0)
  assert (loss.kind, loss.needs_reference, loss.beta) == ("pairs", True, 0.3)
  expected = resolve("sigmoid", beta=0.3)(policy, reference)
  np.testing.assert_allclose(loss(policy, reference), 2 * expected, rtol=1e-6)
  declared = loss.at_reference()
  assert declared is not None
  np.testing.assert_allclose(declared(policy, policy), np.full(6, 2 * math.log(2)), rtol=1e-6)
  # It is a term of sums and takes modifiers like any other; other names are left alone.
  total = resolve(f"0.5*{own}:gained + sigmoid", beta=0.3, link="forward_kl")
  assert total.needs_reference and f"{own}:gained" not in LOSSES
  with pytest.raises(UserError, match="gain is 0; it must be a number above 0"):
    resolve(f"{own}:gained", gain=0)
  with pytest.raises(UserError, match="shape is 'odd'; it must be one of plain, doubled"):
    resolve(f"{own}:gained", shape="odd")


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("absent:f", "no module named 'absent' is in the current folder"),
    ("OWN:absent", "has no 'absent'; name a function of that module"),
    ("OWN:", "names no function"),
    ("OWN.py:gained", r"names a file; name its module: own_losses_\w+:gained"),
    ("lib/OWN.py:gained", r"name its module, in the folder lib: own_losses_\w+:gained"),
    ("OWN:bare", r"write above def bare: @dpo_jax\.losses\.declare\(reference=True, at_reference="),
    ("OWN:needless", r"does not depend on log-probs of the reference; write reference=False"),
    ("OWN:wrong_value", r"declared to be 0\.693147, .* and is 1, 1, 1, 1 there"),
    ("OWN:mean_of_all", r"shape \[\] for 4 examples; it must give one number per example"),
    ("OWN:centered", "depends on the other examples of the batch; write batch_wide=True"),
    ("OWN:per_token", "depends on the numbers of tokens; write averages=True"),
    ("OWN:reads_it", "AttributeError: .* reference=False, it is given None as reference"),
    (
      "OWN:in_numpy",
      "JAX differentiates it, with TracerArrayConversionError: .*with jax.numpy alone",
    ),
    ("OWN:with_if", "with TracerBoolConversionError: .*jnp.where instead of an if"),
    ("OWN:root", "no finite gradient where the policy is the reference: that of chosen_B is inf"),
    ("OWN:of_the_whole_batch", "reads examples of weight 0, .*add the argument weight_B"),
    ("OWN:last", "reads completions that are absent, .*add the argument present_BK"),
    ("OWN:no_margin", "only through their difference; write margin=False"),
  ],
)
def test_a_function_that_is_no_loss_is_refused_in_one_line(own, name, words):
  with pytest.raises(UserError, match=words) as error:
    resolve(name.replace("OWN", own))
  assert "\n" not in str(error.value)


def test_a_loss_of_the_whole_batch_that_leaves_out_padding_is_taken(own):
  assert resolve(f"{own}:weighted").batch_wide


def test_arguments_of_ones_own_loss_are_fields_of_the_configuration(own, monkeypatch):
  assert types(f"{own}:gained")["gain"] is float
  assert types(f"{own}:gained")["shape"] is str
  assert "gain" not in defaults.loss("sigmoid")
  assert defaults.loss(f"{own}:gained", gain=2.0).gain == 2.0
  # The command line names the loss after the configuration was made with another.
  monkeypatch.setattr(config_flags, "requested", lambda field: f"{own}:gained")
  assert "gain" in defaults.get_config().loss


@pytest.mark.parametrize(
  ("argv", "value"),
  [
    (["--config.loss.name=a:b"], "a:b"),
    (["--config.loss.name", "a:b"], "a:b"),
    (["--config.loss.name=a:b", "--config.loss.name=c"], "c"),
    (["--config.loss.name"], ""),
    (["--config.loss.beta=1", "--other.loss.name=x"], None),
  ],
)
def test_what_the_command_line_asks_for(monkeypatch, argv, value):
  monkeypatch.setattr(config_flags, "names", lambda: ["config"])
  monkeypatch.setattr("sys.argv", ["train", *argv])
  assert config_flags.requested("loss.name") == value


# ml_collections loads files in a way that Python 3.12 gives up.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_line_sets_an_argument_of_ones_own_loss(own, monkeypatch):
  values = flags.FlagValues()
  library.DEFINE_config_file("config", None, flag_values=values)
  argv = ["train", f"--config={ROOT / 'configs' / 'preferences.py'}"]
  argv += [f"--config.loss.name={own}:gained", "--config.loss.gain=2.5"]
  monkeypatch.setattr("sys.argv", argv)
  monkeypatch.setattr(config_flags, "names", lambda: ["config"])
  values(argv)
  assert values.config.loss.gain == 2.5 and values.config.is_locked
  given = {k: v for k, v in values.config.loss.items() if k != "name" and v is not None}
  assert resolve(values.config.loss.name, **given).terms[0][2].keywords["gain"] == 2.5
