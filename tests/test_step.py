"""The step: exact under accumulation, deaf to padding, and never writing the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dpo_jax import logprobs, losses, step
from dpo_jax.data import layout


def objective(name="sigmoid", **given):
  return step.Objective(
    logprobs.make_logps_fn(tiny.MODEL),
    losses.resolve(name, **given),
    name in losses.SUPERVISED,
    beta=given.get("beta", 0.1),
  )


def stack(micro_batches, **kwargs):
  return layout.collate_many(micro_batches, row_length=48, **kwargs)


def run(batches, *, name="sigmoid", tx=None, **given):
  """The steps over `batches` on one device: final parameters and the metrics of each."""
  tx = tx or optax.adam(1e-2)
  take = jax.jit(functools.partial(step.train_step, objective=objective(name, **given), tx=tx))
  reference, reports = tiny.init(), []
  state = step.init_state(tiny.init(), tx)
  for batch in batches:
    state, report = take(state, reference, batch)
    reports.append(jax.tree.map(np.asarray, report))
  return state.params, reports


def close(found, expected, rtol=1e-5):
  for key in expected:
    scale = np.abs(expected[key]).max()
    np.testing.assert_allclose(found[key], expected[key], rtol=rtol, atol=rtol * scale, err_msg=key)


def test_the_first_loss_is_log_2_and_its_gradient_is_half_beta_times_the_logps_gradient():
  # d/dθ -log σ(βm) at m = 0 is -β/2 dm/dθ.
  examples, beta = tiny.pairs(3), 0.3
  batch = stack([examples])
  _, (report,) = run([batch], beta=beta, tx=optax.sgd(1.0))
  np.testing.assert_allclose(report["loss"], np.log(2), rtol=1e-6)
  assert report["rewards/accuracies"] == 0.5  # every margin is exactly zero

  one = jax.tree.map(lambda x: x[0], batch)
  weight_B = one.weight_NS.reshape(-1, 2)[:, 0]

  def mean_margin(params):
    pairs = logprobs.to_pairs(logprobs.make_logps_fn(tiny.MODEL)(params, one), one)
    return ((pairs.chosen_B - pairs.rejected_B) * weight_B).sum() / weight_B.sum()

  by_hand = jax.tree.map(lambda g: -beta / 2 * g, jax.grad(mean_margin)(tiny.init()))
  after, _ = run([batch], beta=beta, tx=optax.sgd(1.0))
  moved = {key: after[key] - tiny.init()[key] for key in after}
  close(moved, {key: -np.asarray(by_hand[key]) for key in after}, rtol=1e-4)


def test_a_step_by_sgd_raises_the_margin():
  batch = stack([tiny.pairs(4)])
  _, reports = run([batch] * 5, tx=optax.sgd(1.0), beta=1.0)
  margins = [float(report["rewards/margins"]) for report in reports]
  assert margins == sorted(margins) and margins[-1] > 0.1
  assert reports[-1]["loss"] < np.log(2)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sft"])
def test_k_micro_batches_are_one_large_batch(name):
  """Ragged lengths and ragged weights: a mean of means would differ."""
  answers = 1 if name == "sft" else 2
  sets = [tiny.pairs(8, seed, answers=answers) for seed in range(3)]
  whole, whole_reports = run([stack([s]) for s in sets], name=name)
  parts, part_reports = run([stack([s[:2], s[2:4], s[4:6], s[6:]]) for s in sets], name=name)
  close(parts, whole)
  for key in ("loss", "grad_norm", "logps/chosen"):
    for part, full in zip(part_reports, whole_reports, strict=True):
      np.testing.assert_allclose(part[key], full[key], rtol=1e-5)


def test_layout_and_padding_change_nothing():
  examples = tiny.pairs(6)
  expected, _ = run([stack([examples])] * 2)
  for name in ("packed", "padded"):
    close(run([stack([examples], layout=name)] * 2)[0], expected, rtol=2e-5)
  roomy = layout.Sizes(rows=9, rows_step=1, scored=40, slots=16)
  close(run([stack([examples], sizes=roomy)] * 2)[0], expected)


def test_pair_weights_weigh():
  """A pair of weight 3 counts as three copies; a pair of weight 0 as none."""
  a, b, c = (example._replace(weight=1.0) for example in tiny.pairs(3))
  weighted, (report,) = run([stack([[a._replace(weight=3.0), b, c._replace(weight=0.0)]])])
  copied, (expected,) = run([stack([[a, a, a, b]])])
  close(weighted, copied)
  np.testing.assert_allclose(report["logps/chosen"], expected["logps/chosen"], rtol=1e-6)


def test_sft_is_a_mean_over_tokens_of_the_whole_batch():
  examples = [e._replace(weight=1.0) for e in tiny.pairs(4, answers=1)]
  batch = stack([examples[:1], examples[1:]])
  _, (report,) = run([batch], name="sft")
  logps = [
    np.asarray(logprobs.make_logps_fn(tiny.MODEL)(tiny.init(), layout.collate([e], row_length=48)))
    for e in examples
  ]
  tokens = sum(len(e.answers[0]) for e in examples)
  np.testing.assert_allclose(report["loss"], -sum(x.sum() for x in logps) / tokens, rtol=1e-5)


def test_the_reference_receives_no_gradient_and_is_not_in_the_state():
  batch = stack([tiny.pairs(3)])
  tx = optax.sgd(1.0)
  state = step.init_state(tiny.init(), tx)

  def loss_after(reference):
    return step.train_step(state, reference, batch, objective=objective(), tx=tx)[1]["loss"]

  grads = jax.grad(loss_after)(tiny.init())
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))
  leaves = sum(x.size for x in jax.tree.leaves(state))
  assert leaves == sum(x.size for x in tiny.init().values()) + 1  # the parameters and the step


def test_slots_whose_loss_is_not_finite_are_named():
  """An infinite log-prob in one pair flags that pair's two slots and no other."""
  examples = tiny.pairs(3)
  batch = stack([examples])
  base = logprobs.make_logps_fn(tiny.MODEL)
  broken = lambda params, b: jnp.where(b.row_NS == 1, jnp.nan, base(params, b))
  tx = optax.sgd(0.1)
  take = functools.partial(step.train_step, objective=objective()._replace(logps_fn=broken), tx=tx)
  _, report = jax.jit(take)(step.init_state(tiny.init(), tx), tiny.init(), batch)
  assert not np.isfinite(report["loss"])
  flagged = np.asarray(batch.row_NS)[np.asarray(report["nonfinite_ANS"])]
  assert flagged.tolist() == [1, 1]
