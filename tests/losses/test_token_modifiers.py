"""Tests of modifiers that act on tokens, `ld_alpha` and `wpo`, against the oracle."""

import functools

import jax
import numpy as np
import optax
import pytest

from dpo_jax import step
from dpo_jax.data.collate import collate
from dpo_jax.logprobs import make_logps_fn, make_scored_fn
from dpo_jax.losses import resolve
from dpo_jax.structs import Head, Model
from tests.support import oracle, tiny


def _hidden_of_the_last_token(params, batch):
  return params["embed"][batch.ids_NL]


# It sees only the previous token, so a completion's logits need no layout.
BIGRAM = Model(_hidden_of_the_last_token, lambda p: Head(p["head"], p["bias"]), tiny.VOCAB)


def _answers(params, examples):
  """Returns (logits_TV, targets_T) of both completions of every example, in float64."""
  wide = {key: np.float64(params[key]) for key in ("embed", "head", "bias")}
  texts = [[(np.append(e.prompt[-1:], ids[:-1]), ids) for ids in e.completions] for e in examples]

  def logits(ids):
    return wide["embed"][ids] @ wide["head"].T + wide["bias"]

  return [[(logits(before), ids) for before, ids in text] for text in texts]


def _in_order(x_NS, batch):
  """Returns log-probs [B, 2] in the order of the examples."""
  row_X = np.asarray(batch.row_NS).reshape(-1)
  order = np.argsort(row_X, kind="stable")
  return np.asarray(x_NS).reshape(-1)[order][row_X[order] >= 0].reshape(-1, 2)


@pytest.mark.parametrize(
  ("layout", "alpha"),
  [("shared", 0.0), ("shared", 0.3), ("shared", 1.0), ("packed", 0.3), ("padded", 0.3)],
)
def test_tokens_beyond_the_shorter_answer(layout, alpha):
  params, examples = jax.device_put(tiny.init()), tiny.pairs(8)
  batch = collate(examples, layout=layout, row_length=48)
  logps_fn = make_logps_fn(BIGRAM, beyond_shorter=alpha)
  expected, slope = np.zeros((8, 2)), np.zeros(tiny.VOCAB)
  for at, completions in enumerate(_answers(params, examples)):
    shorter = min(len(targets) for _, targets in completions)
    for which, (logits, targets) in enumerate(completions):
      expected[at, which], by_logits = oracle.desensitised(logits, targets, shorter, alpha)
      slope += (1 + which) * by_logits.sum(0)
  lengths = np.array([[len(ids) for ids in e.completions] for e in examples])
  assert (lengths[:, 0] < lengths[:, 1]).any() and (lengths[:, 0] > lengths[:, 1]).any()
  # Chosen completions count once, rejected ones twice, empty slots not at all.
  factor_NS = np.resize([1.0, 2.0], batch.row_NS.shape) * (batch.row_NS >= 0)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def slope_and_logps(params):
    logps_NS = logps_fn(params, batch)
    return (factor_NS * logps_NS).sum(), logps_NS

  grads, logps_NS = slope_and_logps(params)
  np.testing.assert_allclose(_in_order(logps_NS, batch), expected, rtol=1e-5)
  np.testing.assert_allclose(grads["bias"], slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_alignment(layout):
  params, examples = jax.device_put(tiny.init()), tiny.pairs(8)
  batch = collate(examples, layout=layout, row_length=48)
  expected = [[oracle.alignment(*text) for text in texts] for texts in _answers(params, examples)]
  # The weight of tokens beyond the shorter completion does not matter: alignment averages over all.
  scored_fn = make_scored_fn(BIGRAM, beyond_shorter=0.3, aligned=True)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def slope_and_alignment(params):
    alignment_NS = scored_fn(params, batch).alignment_NS
    return alignment_NS.sum(), alignment_NS

  grads, alignment_NS = slope_and_alignment(params)
  np.testing.assert_allclose(_in_order(alignment_NS, batch), expected, rtol=1e-4, atol=1e-5)
  for grad in jax.tree.leaves(grads):
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(("wpo", "alpha"), [(False, 0.3), (True, 1.0), (True, 0.3)])
def test_one_step_with_modifiers_of_tokens(wpo, alpha):
  """Returns the bias after one step of gradient descent, with WPO's weights as constants."""
  given = (
    {"beta": 0.5} | ({"wpo": True} if wpo else {}) | ({"ld_alpha": alpha} if alpha < 1 else {})
  )
  loss = resolve("sigmoid", **given)
  assert (loss.wpo, loss.ld_alpha) == (wpo, alpha)
  examples = tiny.pairs(8)
  policy, reference = tiny.init(1), tiny.init(2)
  objective = step.Objective(
    make_scored_fn(BIGRAM, beyond_shorter=loss.ld_alpha, aligned=wpo),
    loss,
  )
  micro = collate(examples, layout="shared", row_length=48)
  batch = jax.tree.map(lambda x: x[None], micro)
  tx = optax.sgd(1.0)
  state = step.init_state(jax.device_put(policy), tx, loss)
  after, means = jax.jit(functools.partial(step.train_step, objective=objective, tx=tx))(
    state, reference, batch
  )

  total, slope, count = 0.0, np.zeros(tiny.VOCAB), sum(e.weight for e in examples)
  texts = zip(_answers(policy, examples), _answers(reference, examples), strict=True)
  for example, (own, frozen) in zip(examples, texts, strict=True):
    shorter = min(len(targets) for _, targets in own)
    p, by_logits = zip(*(oracle.desensitised(*text, shorter, alpha) for text in own), strict=True)
    q = [oracle.desensitised(*text, shorter, alpha)[0] for text in frozen]
    weight = example.weight / count
    if wpo:
      weight *= np.exp(min(0, sum(oracle.alignment(*text) for text in own)))

    def value(p, q=q):
      return oracle.sigmoid(p, q, None, 0.5)

    total += weight * value(p)
    for by_logp, by_logit in zip(oracle.slopes(value, p), by_logits, strict=True):
      slope += weight * by_logp * by_logit.sum(0)
  np.testing.assert_allclose(means["loss"], total, rtol=1e-5)
  moved = np.asarray(after.params["bias"]) - policy["bias"]
  np.testing.assert_allclose(moved, -slope, rtol=1e-3, atol=1e-5 * np.abs(slope).max())
