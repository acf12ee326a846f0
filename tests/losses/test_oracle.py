"""Tests that losses with all options equal the oracle in value and gradient, in both float types.

In float64 the two agree to 1e-9. What float32 allows is derived in `_agree`.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from dpo_jax.losses import LOSSES, REFERENCE_FREE, arguments, resolve
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps
from tests.support import oracle

PAIRS = 48
BETAS = (0.01, 0.1, 1.0)
FLIPS = (0.0, 0.1, 0.4)
DISTANCES = ("squared", "backward_kl", "forward_kl")
PRECISIONS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def _grid(**values):
  return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


OFFSETS = np.random.default_rng(20).uniform(-2, 3, PAIRS).astype(np.float32)

# Losses of pairs, with the values of their own arguments that are tested. For a loss that is not
# listed, these are three β and the defaults.
OPTIONS = {
  "sigmoid": _grid(beta=BETAS),
  "cdpo": _grid(beta=BETAS, label_smoothing=FLIPS),
  "robust": _grid(beta=BETAS, label_smoothing=FLIPS),
  "ipo": _grid(beta=BETAS),
  "ipo_mean": _grid(beta=BETAS),
  "hinge": _grid(beta=BETAS),
  "exo_pair": _grid(beta=BETAS, label_smoothing=(1e-3, 0.1, 0.4)),
  "nca_pair": _grid(beta=BETAS),
  "bco_pair": _grid(beta=BETAS, delta=(0.0, 0.7, -2.0)),
  "sppo_hard": _grid(beta=BETAS),
  "apo_zero": _grid(beta=BETAS),
  "apo_down": _grid(beta=BETAS),
  "discopop": _grid(beta=BETAS, tau=(0.05, 0.5)),
  "sigmoid_norm": _grid(beta=(0.1, 2.0, 10.0)),
  "dpop": _grid(beta=BETAS, penalty=(0.0, 1.0, 50.0)),
  "odpo": _grid(beta=BETAS, margin_B=(OFFSETS,), margin_scale=(0.0, 0.5, 1.0)),
  "rpo": _grid(distance=DISTANCES, beta=BETAS, margin_B=(OFFSETS,), margin_scale=(0.5, 1.0)),
  "bdpo": _grid(beta=BETAS, mix=(0.1, 0.5)),
  "alpha_po": _grid(beta=(2.5, 10.0), gamma=(0.0, 0.1), reward_alpha=(0.25, 1.0, -0.5)),
  "chi_po": _grid(beta=BETAS, clip=(0.5, 10.0, 1e4)),
  "simpo": _grid(beta=(2.0, 10.0), gamma=(0.0, 1.0, 1.6)),
  "cpo": _grid(beta=BETAS, sft_weight=(0.0, 1.0)),
  "orpo": _grid(odds_weight=(0.1, 1.0)),
  "sft": [{}],
}
WHOLE_BATCH = {"aot", "aot_unpaired"}
OTHER_DATA = {"kto", "npo", "simnpo", "plackett_luce", "policy_gradient", "tpo"}
for _name in LOSSES.keys() - OPTIONS.keys() - WHOLE_BATCH - OTHER_DATA:
  _own = {key: (value,) for key, value in arguments(_name).items()}
  OPTIONS[_name] = _grid(**_own | ({"beta": BETAS} if "beta" in _own else {})) if _own else [{}]
# Losses that read the pair only through m = c - r, and so accept a divergence.
OF_THE_MARGIN = ("sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "odpo", "rpo")
DIVERGENCES = (
  {"link": "reverse_kl"},
  {"link": "forward_kl"},
  {"link": "jensen_shannon"},
  {"link": "alpha", "link_alpha": 0.3},
  {"link": "alpha", "link_alpha": 0.8},
)


def _draw(seed, dtype, shape=(2, PAIRS)):
  """Samples log-probs of 1 to 300 nats under policy and reference, with ragged lengths.

  Rounded to float32 first, so that both precisions and the oracle see the same numbers exactly.
  """
  rng = np.random.default_rng(seed)

  def exact(x):
    return np.asarray(x, np.float32).astype(dtype)

  q = exact(-rng.uniform(1, 300, shape))
  p = exact(np.minimum(q + rng.uniform(-8, 8, shape), -rng.uniform(0.3, 1.3, shape)))
  n = exact(np.ceil(-q / rng.uniform(0.4, 6, shape)))
  return p, q, n


def _wide(*arrays):
  return tuple(np.asarray(x, np.float64) for x in arrays)


def _agree(found, function, p, sizes, floor, what):
  """Asserts that `found`, from an implementation, equals `function(p)`, from the oracle.

  float64: to 1e-9. float32: an operation errs by at most u = 2^-24 of its result. The first
  differences are of the size of a log-ratio, or of a log-prob where no reference is subtracted
  (`sizes`, an input each); so a sound implementation returns the exact answer for inputs that are
  a few u of their size away, and the pieces it adds up in the end err by a few u of the largest
  (`floor`: 1 for values; for slopes the largest by any input of the batch). "A few" is 16.
  """
  expected = function(p)
  top = max(floor, np.abs(expected).max())
  if found.dtype == np.float64:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * top, err_msg=what)
    return
  few, spread = 16 * 2.0**-24, 0.0
  for which, sign in itertools.product(range(len(p)), (-1, 1)):
    moved = [
      x + (k == which) * sign * few * size for k, (x, size) in enumerate(zip(p, sizes, strict=True))
    ]
    spread = spread + np.abs(function(tuple(moved)) - expected)
  allowed = spread + few * (np.abs(expected) + top)
  worst = (np.abs(found - expected) / allowed).max()
  assert worst <= 1, f"{what}: {worst:.2g} times what float32 allows"


def _of_a_pair(loss, p, q, n):
  """Returns value and gradients of an implementation on pairs; a loss reads only its own pair."""

  def total(chosen_B, rejected_B):
    reference = None if q is None else PairLogps(q[0], q[1], n[0], n[1])
    loss_B = loss(PairLogps(chosen_B, rejected_B, n[0], n[1]), reference)
    return loss_B.sum(), loss_B

  slopes, loss_B = jax.grad(total, (0, 1), has_aux=True)(p[0], p[1])
  return loss_B, slopes


def _compare_pairs(cases, p, q, n):
  """Compares `cases`: (name, implementation, oracle of (p, q, n), whether it reads the reference).

  Run operation by operation: compiling so many small functions would take longer than all else.
  """
  with jax.enable_x64(p.dtype == np.float64):
    found = [_of_a_pair(loss, p, q if reads else None, n) for _, loss, _, reads in cases]
    found = jax.tree.map(np.asarray, found)
  _check_pairs([(what, expected, reads) for what, _, expected, reads in cases], found, p, q, n)


def _each_option(one, options, dtype, *arrays):
  """Returns [one(own, *arrays) for own in options], compiled once: options are traced arrays."""
  texts = [key for key in options[0] if isinstance(options[0][key], str)]
  if texts:  # which cannot be traced: one compiled function for each
    found = []
    for given, some in itertools.groupby(options, lambda own: {key: own[key] for key in texts}):
      numbers = [{k: own[k] for k in own if k not in texts} for own in some]
      with_texts = functools.partial(lambda given, own, *rest: one(own | given, *rest), given)
      found += _each_option(with_texts, numbers, dtype, *arrays)
    return found
  stacked = {key: np.array([own[key] for own in options], dtype) for key in options[0]}
  with jax.enable_x64(dtype is np.float64):
    if not stacked:
      return [jax.tree.map(np.asarray, jax.jit(one)({}, *arrays))]
    every = jax.vmap(one, (0, *(None for _ in arrays)))
    found = jax.tree.map(np.asarray, jax.jit(every)(stacked, *arrays))
  return [jax.tree.map(lambda x, k=k: x[k], found) for k in range(len(options))]


def _check_pairs(cases, found, p, q, n):
  dtype, (p, q, n) = p.dtype, _wide(p, q, n)
  for (what, expected, reads), (loss_B, slopes) in zip(cases, found, strict=True):
    assert loss_B.dtype == dtype and loss_B.shape == (PAIRS,), what

    def value(p, expected=expected):
      return expected(p, q, n)

    sizes = tuple(np.abs(p - q)) if reads else tuple(np.abs(p))
    _agree(loss_B, value, tuple(p), sizes, 1.0, what)
    top = np.abs(oracle.slopes(value, p)).max()
    for k in range(2):

      def slope(p, k=k, value=value):
        return oracle.slopes(value, p)[k]

      _agree(slopes[k], slope, tuple(p), sizes, top, f"{what}, slope {k}")


def test_every_loss_has_an_oracle():
  for name in OPTIONS.keys() - oracle.PAIRS.keys():
    own = ", ".join(["p", "q", "n", *arguments(name)])
    pytest.fail(
      f"loss {name} has no version in NumPy; add to {oracle.__file__}, from its paper, def"
      f" {name}({own}): ..., and name it in PAIRS"
    )


@PRECISIONS
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_loss_of_a_pair(name, dtype):
  p, q, n = _draw(1, dtype)
  reads = name not in REFERENCE_FREE

  def one(own, p, q, n):
    return _of_a_pair(lambda *logps: LOSSES[name](*logps, **own), p, q if reads else None, n)

  found = _each_option(one, OPTIONS[name], dtype, p, q, n)
  cases = [
    (f"{name} {own}", lambda p, q, n, own=own: oracle.PAIRS[name](p, q, n, **own), reads)
    for own in OPTIONS[name]
  ]
  _check_pairs(cases, found, p, q, n)


@PRECISIONS
def test_orpo_near_probability_one(dtype):
  """Computed from p itself, log(1 - p) would have no correct digit at probability 0.99999."""
  p, q, n = _draw(15, dtype)
  p = np.float32(-(10 ** np.random.default_rng(16).uniform(-5, 0.5, p.shape))).astype(dtype)

  def loss(*pair):
    return LOSSES["orpo"](*pair, odds_weight=1.0)

  def expected(p, q, n):
    return oracle.orpo(p, q, n, odds_weight=1.0)

  _compare_pairs([("orpo", loss, expected, False)], p, q, np.ones_like(n))


def _resolved(name, terms, given, supplied=None):
  supplied = supplied or {}
  loss = resolve(name, **given)
  return (
    f"{name} {given}",
    lambda policy, reference: loss(policy, reference, **supplied),
    lambda p, q, n: oracle.combined(terms, p, q, n, **given, **supplied),
    not given.get("reference_free", False),
  )


def _first(name):
  """Splits options of a loss into those for `resolve` and those that come with the batch."""
  own = dict(OPTIONS[name][-1])
  supplied = {k: own.pop(k) for k in ("margin_B", "delta") if k in own}
  return own, supplied


@PRECISIONS
def test_sft_weight_adds_the_mean_log_prob_of_a_chosen_token(dtype):
  cases = []
  for name in sorted(set(OPTIONS) - {"sft", "cpo", "orpo"}):
    own, supplied = _first(name)
    case = _resolved(name, ((1.0, name),), own | {"sft_weight": 0.7}, supplied)
    cases.append((*case[:3], name not in REFERENCE_FREE))
  _compare_pairs(cases, *_draw(2, dtype))


@PRECISIONS
def test_links(dtype):
  cases = []
  for name, link in itertools.product(OF_THE_MARGIN, DIVERGENCES):
    own, supplied = _first(name)
    # A small β: e^8 is 3000, and β e^8 must stay within the range where the sigmoid is not flat.
    cases.append(_resolved(name, ((1.0, name),), own | {"beta": 0.01} | link, supplied))
  _compare_pairs(cases, *_draw(3, dtype))


@PRECISIONS
def test_exponentials_go_on_as_their_tangent(dtype):
  """Beyond 20 nats the loss follows the tangent; log-ratios go up to ±60 nats."""
  _, q, n = _draw(17, dtype)
  away = np.random.default_rng(18).uniform(-60, 60, q.shape).astype(np.float32)
  given = [("sigmoid", {"beta": 1e-3} | link) for link in DIVERGENCES]
  given.append(("chi_po", {"beta": 1e-3, "clip": 1e9}))
  cases = [_resolved(name, ((1.0, name),), own) for name, own in given]
  _compare_pairs(cases, q + away, q, n)


@PRECISIONS
def test_without_the_reference(dtype):
  cases = []
  for name in OF_THE_MARGIN:
    own, supplied = _first(name)
    given = own | {"beta": 0.05, "reference_free": True}
    cases.append(_resolved(name, ((1.0, name),), given, supplied))
  _compare_pairs(cases, *_draw(4, dtype))


@PRECISIONS
def test_weighted_sums_of_losses(dtype):
  mpo = ((0.8, "sigmoid"), (0.2, "bco_pair"), (1.0, "sft"))
  cases = [
    _resolved("0.8*sigmoid+0.2*bco_pair+1*sft", mpo, {"beta": 0.1}, {"delta": 0.3}),
    _resolved(
      "sigmoid + 0.5*cdpo", ((1.0, "sigmoid"), (0.5, "cdpo")), {"beta": 0.3, "label_smoothing": 0.2}
    ),
    _resolved("0.5*ipo+2*hinge", ((0.5, "ipo"), (2.0, "hinge")), {"beta": 0.2, "sft_weight": 0.3}),
    _resolved(
      "sigmoid", ((1.0, "sigmoid"),), {"link": "forward_kl", "sft_weight": 0.5, "beta": 0.1}
    ),
    _resolved(
      "0.5*sigmoid+2*hinge",
      ((0.5, "sigmoid"), (2.0, "hinge")),
      {"beta": 0.01, "link": "jensen_shannon"},
    ),
  ]
  _compare_pairs(cases, *_draw(5, dtype))


# --- losses of a whole batch, and of other kinds of examples --------------------------------------


def _compare_batch(loss, expected, options, p, q, cotangent, *, record, sizes):
  """Like `test_loss_of_a_pair`, but any input may change any loss.

  Gradients are compared where the cotangent is not 0.
  `loss` takes (policy, reference, **own) and `expected` (p, **own). Where every sigmoid of the
  batch is saturated, 1 - σ is still a piece of size 1 in a slope of size β.
  """

  def one(own, p, q):
    def total(p):
      loss_B = loss(record(*p), record(*q), **own)
      return (loss_B * cotangent.astype(p[0].dtype)).sum(), loss_B

    slopes, loss_B = jax.grad(total, has_aux=True)(p)
    return loss_B, slopes

  dtype = p[0].dtype.type
  found = _each_option(one, options, dtype, tuple(p), tuple(q))
  p, counts = _wide(*p), cotangent != 0
  for own, (loss_B, slopes) in zip(options, found, strict=True):
    assert loss_B.dtype == dtype and np.isfinite(loss_B).all(), own

    def value(p, own=own):
      return expected(p, **own)

    _agree(loss_B[counts], lambda p, f=value: f(p)[counts], p, sizes, 1.0, str(own))

    def slopes_of(p, f=value):
      return oracle.slopes_of_batch(f, p, cotangent)

    top = max(own["beta"], *(np.abs(slope).max() for slope in slopes_of(p)))
    for k in range(len(p)):

      def slope(p, k=k, f=slopes_of):
        return f(p)[k]

      _agree(slopes[k], slope, p, sizes, top, f"{own}, slope {k}")


def _weights(seed, count):
  """Samples weights of pairs, a third of them 0."""
  rng = np.random.default_rng(seed)
  return (rng.uniform(0.5, 2, count) * (np.arange(count) % 3 > 0)).astype(np.float32)


@PRECISIONS
@pytest.mark.parametrize("name", sorted(WHOLE_BATCH))
def test_sorted_losses(name, dtype):
  count = 12
  p, q, _ = _draw(6, dtype, (2, count))
  weight, wide = _weights(7, count), _wide(*q)
  sizes = np.abs(np.float64(p) if name == "aot" else np.float64(p) - wide)
  _compare_batch(
    functools.partial(LOSSES[name], weight_B=weight),
    lambda p, **own: getattr(oracle, name)(p, wide, None, weight=weight, **own),
    _grid(beta=BETAS, label_smoothing=FLIPS),
    *(p, q, weight),
    record=PairLogps,
    sizes=tuple(sizes),
  )


@PRECISIONS
@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_kto(shift, dtype):
  count = 12
  p, q, _ = _draw(8, dtype, (2, count))
  p[1] += shift  # the estimate of the distance is above 0, or below
  weight, label = _weights(9, count), (np.arange(count) % 2).astype(np.float32)
  assert np.sign((weight * (p[1] - q[1])).sum()) == np.sign(shift)
  weights = {"desirable_weight": (1.0, 1.3), "undesirable_weight": (0.7,)}
  for given in ({}, {"kl": (0.0, 2.5)}):
    _compare_batch(
      functools.partial(LOSSES["kto"], label_B=label, weight_B=weight),
      lambda p, **own: oracle.kto(p, _wide(*q), label=label, weight=weight, **own),
      _grid(beta=BETAS, **weights, **given),
      *(p, q, weight),
      record=UnpairedLogps,
      sizes=tuple(np.abs(np.float64(p) - np.float64(q))),
    )


PRESENT = np.arange(4) < np.array([4, 2, 3, 4, 2, 3])[:, None]
RAGGED = pytest.mark.parametrize("present", [None, PRESENT], ids=["full", "ragged"])


@PRECISIONS
@RAGGED
def test_plackett_luce(present, dtype):
  p, q, _ = _draw(10, dtype, (1, *PRESENT.shape))
  here = np.ones_like(PRESENT) if present is None else present
  _compare_batch(
    functools.partial(LOSSES["plackett_luce"], present_BK=present),
    lambda p, **own: oracle.plackett_luce(p[0], _wide(*q)[0], present=here, **own),
    _grid(beta=BETAS),
    *(p, q, np.random.default_rng(11).uniform(0.5, 2, len(PRESENT))),
    record=RankedLogps,
    sizes=tuple(np.abs(np.float64(p) - np.float64(q))),
  )


@PRECISIONS
@RAGGED
def test_policy_gradient(present, dtype):
  p, q, _ = _draw(12, dtype, (1, *PRESENT.shape))
  reward = np.random.default_rng(13).normal(0, 3, PRESENT.shape).astype(np.float32)
  here = np.ones_like(PRESENT) if present is None else present
  _compare_batch(
    functools.partial(LOSSES["policy_gradient"], reward_BK=reward, present_BK=present),
    lambda p, **own: oracle.policy_gradient(
      p[0], _wide(*q)[0], reward=np.float64(reward), present=here, **own
    ),
    _grid(beta=BETAS),
    *(p, q, np.random.default_rng(14).uniform(0.5, 2, len(PRESENT))),
    record=RankedLogps,
    sizes=tuple(np.abs(np.float64(p))),
  )


@PRECISIONS
@pytest.mark.parametrize("name", ["npo", "simnpo"])
def test_unlearning(name, dtype):
  count = 12
  p, q, n = _draw(18, dtype, (1, count))
  label = (np.arange(count) % 2).astype(np.float32)
  reads = name == "npo"
  given = {"beta": (0.1, 1.0, 2.5), "retain_weight": (0.5, 1.0)}
  _compare_batch(
    functools.partial(LOSSES[name], label_B=label),
    lambda p, **own: getattr(oracle, name)(
      p, _wide(*q), label=label, tokens=np.float64(n[0]), **own
    ),
    _grid(**given | ({} if reads else {"gamma": (0.0, 0.7)})),
    *(p, q, np.ones(count, np.float32)),
    record=lambda x: UnpairedLogps(x, None, n[0]),
    sizes=tuple(np.abs(np.float64(p) - np.float64(q) * reads)),
  )


@PRECISIONS
@pytest.mark.parametrize("present", [None, np.arange(4) < np.array([4, 3, 3, 4, 3, 4])[:, None]])
def test_tpo(present, dtype):
  p, q, n = _draw(19, dtype, (1, *PRESENT.shape))
  here = np.ones_like(PRESENT) if present is None else present
  _compare_batch(
    functools.partial(LOSSES["tpo"], present_BK=present),
    lambda p, **own: oracle.tpo(p[0], None, present=here, tokens=np.float64(n[0]), **own),
    _grid(beta=BETAS, gold_weight=(0.0, 1.0)),
    *(p, q, np.random.default_rng(14).uniform(0.5, 2, len(PRESENT))),
    record=lambda x: RankedLogps(x, n[0]),
    sizes=tuple(np.abs(np.float64(p))),
  )
