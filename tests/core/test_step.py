"""The step: exact under accumulation, deaf to padding, and never writing the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import logprobs, losses, metrics, step
from dpo_jax.data import collate, packing
from dpo_jax.data.examples import Example, fill_up
from tests.support import tiny
from tests.support.small_steps import close, objective

# Of rows: eight pairs and fewer make batches of one shape, which compiles once.
SIZES = collate.Sizes(rows=5, rows_step=1, scored=30, slots=16)


def stack(micro_batches, **kwargs):
  return collate.collate_many(micro_batches, row_length=48, **kwargs)


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


def test_the_first_loss_is_log_2_and_its_gradient_is_half_beta_times_the_logps_gradient():
  # d/dθ -log σ(βm) at m = 0 is -β/2 dm/dθ.
  examples, beta = tiny.pairs(3), 0.3
  batch = stack([examples])
  after, (report,) = run([batch], beta=beta, tx=optax.sgd(1.0))
  np.testing.assert_allclose(report["loss"], np.log(2), rtol=1e-6)
  assert report["rewards/accuracies"] == 0.5  # every margin is exactly zero

  one = jax.tree.map(lambda x: x[0], batch)
  weight_B = one.weight_NS.reshape(-1, 2)[:, 0]

  def mean_margin(params):
    pairs = logprobs.to_pairs(
      logprobs.make_logps_fn(tiny.MODEL)(params, one), logprobs.slots_of(one)
    )
    return ((pairs.chosen_B - pairs.rejected_B) * weight_B).sum() / weight_B.sum()

  slope = jax.jit(jax.grad(mean_margin))(tiny.init())
  by_hand = jax.tree.map(lambda g: -beta / 2 * g, slope)
  moved = {key: after[key] - tiny.init()[key] for key in after}
  close(moved, {key: -np.asarray(by_hand[key]) for key in after}, rtol=1e-4)


def test_a_step_by_sgd_raises_the_margin():
  batch = stack([tiny.pairs(4)])
  _, reports = run([batch] * 5, tx=optax.sgd(1.0), beta=1.0)
  margins = [float(report["rewards/margins"]) for report in reports]
  assert margins == sorted(margins) and margins[-1] > 0.1
  assert reports[-1]["loss"] < np.log(2)


@pytest.mark.parametrize("name", ["sigmoid", "sft"])
def test_k_micro_batches_are_one_large_batch(name):
  """Ragged lengths and ragged weights: a mean of means would differ."""
  completions = 1 if name == "sft" else 2
  sets = [tiny.pairs(8, seed, completions=completions) for seed in range(3)]
  cut = lambda s: [s[:2], s[2:4], s[4:6], s[6:]]
  whole, whole_reports = run([stack([s], sizes=SIZES) for s in sets], name=name)
  parts, part_reports = run([stack(cut(s), sizes=SIZES) for s in sets], name=name)
  close(parts, whole)
  for key in ("loss", "grad_norm", "logps/chosen"):
    for part, full in zip(part_reports, whole_reports, strict=True):
      np.testing.assert_allclose(part[key], full[key], rtol=1e-5)


def test_layout_and_padding_change_nothing():
  examples = tiny.pairs(6)
  expected, _ = run([stack([examples])] * 2)
  for name in ("packed", "padded"):
    close(run([stack([examples], layout=name)] * 2)[0], expected, rtol=2e-5)
  roomy = collate.Sizes(rows=9, rows_step=1, scored=40, slots=16)
  close(run([stack([examples], sizes=roomy)] * 2)[0], expected)


def ragged(completions, size=6):
  """Rows of so many answers, with weights and scores that every objective can read."""
  rng = np.random.default_rng(completions)
  text = lambda most: rng.integers(1, tiny.VOCAB, rng.integers(1, most)).astype(np.int32)
  return [
    Example(
      text(9),
      tuple(text(7) for _ in range(completions)),
      row=i,
      weight=0.5 + i % 3,
      # Alike in judged answers, which are two: the answer and a mismatched one.
      scores=(float(i % 2),) * 2 if completions == 2 else tuple(rng.normal(size=completions)),
    )
    for i in range(size)
  ]


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in ("ipo", "kto", "plackett_luce") else pytest.mark.slow)
    for name in losses.LOSSES
  ],
)
def test_loss_and_gradient_of_every_objective_know_no_layout(name):
  made, tx = objective(name), optax.trace(decay=0.0)  # its state is the gradient

  @jax.jit
  def take(policy, reference, batch):
    state = step.init_state(policy, tx, made.loss)
    following, report = step.train_step(state, reference, batch, objective=made, tx=tx)
    return following.opt_state.trace, report["loss"]

  batch = lambda way: stack([ragged(made.completions)], layout=way)
  found = {way: take(tiny.init(1), tiny.init(0), batch(way)) for way in packing.LAYOUTS}
  expected, loss = found.pop("padded")
  assert max(np.abs(x).max() for x in expected.values()) > 1e-3
  for gradient, other in found.values():
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    close(gradient, expected)


def test_pair_weights_weigh():
  """A pair of weight 3 counts as three copies; a pair of weight 0 as none."""
  a, b, c = (example._replace(weight=1.0) for example in tiny.pairs(3))
  weighted, (report,) = run([stack([[a._replace(weight=3.0), b, c._replace(weight=0.0)]])])
  copied, (expected,) = run([stack([[a, a, a, b]])])
  close(weighted, copied)
  np.testing.assert_allclose(report["logps/chosen"], expected["logps/chosen"], rtol=1e-6)


def test_sft_is_a_mean_over_tokens_of_the_whole_batch():
  examples = [e._replace(weight=1.0) for e in tiny.pairs(4, completions=1)]
  batch = stack([examples[:1], examples[1:]])
  _, (report,) = run([batch], name="sft")
  logps_fn = jax.jit(logprobs.make_logps_fn(tiny.MODEL))
  logps = [np.asarray(logps_fn(tiny.init(), collate.collate([e], row_length=48))) for e in examples]
  tokens = sum(len(e.completions[0]) for e in examples)
  np.testing.assert_allclose(report["loss"], -sum(x.sum() for x in logps) / tokens, rtol=1e-5)


def test_the_reference_receives_no_gradient_and_is_not_in_the_state():
  batch = stack([tiny.pairs(3)])
  tx = optax.sgd(1.0)
  state = step.init_state(tiny.init(), tx)

  def loss_after(reference):
    return step.train_step(state, reference, batch, objective=objective(), tx=tx)[1]["loss"]

  grads = jax.jit(jax.grad(loss_after))(tiny.init())
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
  row_ANS = np.asarray(report["nonfinite_row_ANS"])
  assert row_ANS[row_ANS >= 0].tolist() == [1, 1]
  assert np.array_equal(row_ANS >= 0, np.asarray(batch.row_NS) == 1)


# --- what evolves beside the parameters, and losses that see the whole batch ----------------------


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "kto"])
def test_a_batch_wide_loss_sees_all_micro_batches(name):
  """Sorted or pooled over the global batch: micro-batches change nothing."""
  scores = lambda i: (float(i % 2),) * 2
  sets = [
    [e._replace(weight=1.0, scores=scores(i)) for i, e in enumerate(tiny.pairs(8, seed))]
    for seed in range(2)
  ]
  given = {"name": name, "beta": 2.0, "tx": optax.sgd(0.5)}
  cut = lambda s: [s[:1], s[1:4], s[4:6], s[6:]]
  whole, whole_reports = run([stack([s], sizes=SIZES) for s in sets], **given)
  parts, part_reports = run([stack(cut(s), sizes=SIZES) for s in sets], **given)
  close(parts, whole)
  for key in ("loss", "grad_norm"):
    for part, full in zip(part_reports, whole_reports, strict=True):
      np.testing.assert_allclose(part[key], full[key], rtol=1e-5)


def state_after(batches, name, *, sync=None, tx=None, **given):
  """The state after some steps on one device; a synced reference starts as the policy does."""
  tx = tx or optax.sgd(0.5)
  made = objective(name, sync, **given)
  state = step.init_state(tiny.init(), tx, made.loss)
  if sync:
    state = state._replace(reference=jax.tree.map(jnp.asarray, tiny.init()))
  take = jax.jit(functools.partial(step.train_step, objective=made, tx=tx))
  states, reports = [state], []
  for batch in batches:
    state, report = take(state, None if sync else tiny.init(), batch)
    states.append(state)
    reports.append(report)
  return states, reports


def test_delta_is_the_running_mean_of_the_rewards_before():
  """δ starts at 0, where it belongs while policy and reference agree, and lags the step by one."""
  batches = [stack([tiny.pairs(4)])] * 3
  states, reports = state_after(batches, "bco_pair", running_decay=0.75, beta=2.0)
  expected = 0.0
  for state, report in zip(states[1:], reports, strict=True):
    mean = (report["rewards/chosen"] + report["rewards/rejected"]) / 2
    expected = 0.75 * expected + 0.25 * mean
    np.testing.assert_allclose(state.running_stats["delta"], expected, rtol=1e-6)
  assert abs(float(states[-1].running_stats["delta"])) > 1e-3


def test_a_running_kl_replaces_the_estimate_of_the_batch():
  examples = [e._replace(scores=(1.0, 1.0)) for e in tiny.pairs(4)]
  batch = stack([examples])
  states, reports = state_after([batch] * 3, "kto", beta=1.0, running_decay=0.5, tx=optax.sgd(2.0))
  kl = 0.0
  for state, report in zip(states[1:], reports, strict=True):
    kl = 0.5 * kl + 0.5 * max(0.0, float(report["kl"]))
    np.testing.assert_allclose(state.running_stats["kl"], kl, rtol=1e-6)
  assert state_after([batch], "kto")[0][-1].running_stats == {}


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_the_reference_follows_the_policy_when_it_is_due(alpha):
  """TR-DPO: on steps 2 and 4 π_ref becomes α π + (1-α) π_ref; between them it stands still."""
  batches = [stack([tiny.pairs(4)])] * 4
  states, reports = state_after(batches, "sigmoid", sync=step.Sync(2, alpha), beta=0.5)
  reference = tiny.init()
  for index, state in enumerate(states[1:], 1):
    if index % 2 == 0:
      reference = {k: alpha * state.params[k] + (1 - alpha) * reference[k] for k in reference}
    close(state.reference, reference, rtol=1e-6)
  if alpha == 1:  # the policy has just become its own reference
    np.testing.assert_allclose(reports[2]["loss"], np.log(2), rtol=1e-6)
  assert reports[1]["loss"] != pytest.approx(np.log(2), rel=1e-4)


def test_a_loss_without_reference_runs_no_reference():
  """No parameters are needed for it, and rewards are told of the policy alone."""
  batch = stack([tiny.pairs(4)])
  tx = optax.sgd(0.1)
  for name, given in (("simpo", {}), ("sigmoid", {"reference_free": True})):
    made = objective(name, **given)
    take = jax.jit(functools.partial(step.train_step, objective=made, tx=tx))
    _, report = take(step.init_state(tiny.init(), tx, made.loss), None, batch)
    np.testing.assert_allclose(
      report["rewards/chosen"], made.loss.beta * report["logps/chosen"], rtol=1e-6
    )


def test_wpo_weighs_pairs_by_what_the_policy_would_say():
  """The loss at the reference is log 2 times the mean weight, below 1; the metrics stay."""
  batch = stack([[e._replace(weight=1.0) for e in tiny.pairs(5)]])
  _, (plain,) = run([batch])
  _, (weighed,) = run([batch], wpo=True)
  one = jax.tree.map(lambda x: x[0], batch)
  scored = jax.jit(logprobs.make_scored_fn(tiny.MODEL, aligned=True))
  align_NS = scored(tiny.init(), one).alignment_NS
  pairs = np.asarray(align_NS).reshape(-1, 2)[one.weight_NS.reshape(-1, 2)[:, 0] > 0]
  weights = np.exp(np.minimum(pairs.sum(1), 0))
  assert (weights < 1).all()
  np.testing.assert_allclose(weighed["loss"], np.log(2) * weights.mean(), rtol=1e-5)
  np.testing.assert_allclose(weighed["rewards/margins"], plain["rewards/margins"])


def test_ld_alpha_weighs_tokens_beyond_the_shorter_answer():
  """α = 0 is the log-prob of answers cut to the shorter length, in every layout; α = ½ half-way."""
  examples = tiny.pairs(6)
  shorter = [min(map(len, e.completions)) for e in examples]
  cut = [
    e._replace(completions=tuple(a[:n] for a in e.completions))
    for e, n in zip(examples, shorter, strict=True)
  ]

  def logps(some, name, beyond):
    batch = collate.collate(some, layout=name, row_length=48)
    logps_fn = jax.jit(logprobs.make_logps_fn(tiny.MODEL, beyond_shorter=beyond))
    found_NS = logps_fn(tiny.init(), batch)
    rows = batch.row_NS.reshape(-1, 2)[:, 0]
    return np.asarray(found_NS).reshape(-1, 2)[np.argsort(rows)][-len(some) :]

  expected, whole = logps(cut, "shared", 1.0), logps(examples, "shared", 1.0)
  for name in ("shared", "padded"):
    np.testing.assert_allclose(logps(examples, name, 0.0), expected, rtol=1e-5)
  np.testing.assert_allclose(
    logps(examples, "shared", 0.5), (expected + whole) / 2, rtol=1e-5, atol=1e-6
  )
  assert (np.abs(expected - whole).max(axis=1) > 0).any()
  _, (report,) = run([stack([examples])], ld_alpha=0.0)
  weight_B = np.array([e.weight for e in examples])
  np.testing.assert_allclose(
    report["logps/chosen"], weight_B @ expected[:, 0] / weight_B.sum(), rtol=1e-5
  )


def test_a_length_is_what_is_scored():
  """Of five tokens two count whole and one half: sft is 5 / 2.5 nats, SimPO compares -2 and -3."""
  ids, weights = np.arange(5, dtype=np.int32), np.float32([1, 0, 0, 0.5, 1])
  text = Example(ids[:2], (ids,), token_weights=(weights,))
  pair = Example(ids[:2], (ids, ids[:2]), token_weights=(weights, np.ones(2, np.float32)))
  for name, example, logps, expected in (
    ("sft", text, [-5.0], 2.0),
    ("simpo", pair, [-5.0, -6.0], np.log1p(np.exp(-1))),  # 2 (-2 - -3) - 1 = 1
  ):
    batch = collate.collate([example], row_length=16)
    slots, logps_NS = logprobs.slots_of(batch), np.array([logps])
    about = objective(name)
    sums, _ = step.batch_sums(about, logps_NS, None, slots, None)
    np.testing.assert_allclose(metrics.divide(sums)["loss"], expected, rtol=1e-6)
  assert step.loss_count(objective("sft"), logprobs.slots_of(stack([[text]]))) == 2.5


def test_rankings_of_different_length_train_together():
  """Two answers in a set of three are Plackett-Luce of two: sigmoid."""
  three = [e._replace(weight=1.0) for e in tiny.pairs(4, completions=3)]
  two = [e._replace(completions=e.completions[:2]) for e in three]
  _, (report,) = run([stack([fill_up(two, 3)])], name="plackett_luce", beta=0.5)
  np.testing.assert_allclose(report["loss"], np.log(2), rtol=1e-6)
  filled, _ = run([stack([fill_up(two, 3)])] * 3, name="plackett_luce", beta=0.5)
  pairs, _ = run([stack([two])] * 3, name="sigmoid", beta=0.5)
  close(filled, pairs)
