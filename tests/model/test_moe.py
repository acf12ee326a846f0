"""A mixture of experts in training: its balance by hand, its gradient, and every topology alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import logprobs, losses, step
from dpo_jax.data.collate import collate_many
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import families, transformer
from tests.golden import cases
from tests.support import tiny

CONFIG = dataclasses.replace(families.from_hf(cases.CASES["mixtral"]), layers=2, init_std=0.3)
MODEL = transformer.build(CONFIG)
LOSS = losses.resolve("sigmoid", beta=0.1)
EXAMPLES = tiny.pairs(8, vocab=CONFIG.vocab, longest=6)


@functools.cache
def params():
  return jax.tree.map(np.asarray, transformer.init_params(CONFIG, 0))


def batch_of(micro, groups=1):
  size = len(EXAMPLES) // micro
  parts = [EXAMPLES[i * size : (i + 1) * size] for i in range(micro)]
  return collate_many(parts, layout="padded", row_length=16, groups=groups)


def objective(balance):
  return step.Objective(
    logprobs.make_logps_fn(MODEL), LOSS, scored_fn=logprobs.make_scored_fn(MODEL), balance=balance
  )


def one_step(batch, balance, mode="mesh", devices=1):
  """Parameters after one step of plain descent, and metrics."""
  executor, tx = Executor(mode, devices), optax.sgd(1.0)
  state = executor.compile_init(functools.partial(step.init_state, tx=tx, loss=LOSS))(
    executor.place(params())
  )
  take = executor.compile_step(
    functools.partial(step.train_step, objective=objective(balance), tx=tx)
  )
  state, metrics = take(state, executor.place(params()), executor.place_batch(batch))
  return executor.to_host(state.params), executor.metrics_to_host(metrics)


def test_the_balance_by_hand():
  """Two of three experts, four tokens: chosen 4, 3, 1 times, given 2, 1.5, 0.5 in all."""
  chosen, probs = jnp.array([4.0, 3.0, 1.0]), jnp.array([2.0, 1.5, 0.5])
  routing = step.Routing(chosen, probs, jnp.asarray(4))
  slope_E, sums = step._balance(routing, 0.1)
  # 3 (4/4 2/4 + 3/4 1.5/4 + 1/4 0.5/4) = 3 (0.5 + 0.28125 + 0.03125)
  np.testing.assert_allclose(sums["router/balance"][0], 2.4375)
  np.testing.assert_allclose(slope_E, 0.1 * 3 * chosen / 16)


def test_every_expert_alike_gives_the_number_chosen():
  routing = step.Routing(jnp.full(5, 8.0), jnp.full(5, 4.0), jnp.asarray(20))
  np.testing.assert_allclose(step._balance(routing, 1.0)[1]["router/balance"][0], 2.0)


def test_padding_is_routed_nowhere():
  """Rows twice as long hold the same tokens: the same sums."""
  routed = jax.jit(MODEL.routed)
  sums = [
    routed(params(), jax.tree.map(lambda x: x[0], collate_many([EXAMPLES], row_length=length)))[1]
    for length in (32, 64)
  ]
  for left, right in zip(*sums, strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-5)
  layers, tokens = CONFIG.layers, int(sums[0].tokens)
  assert int(sums[0].chosen_E.sum()) == CONFIG.experts.chosen * tokens
  np.testing.assert_allclose(sums[0].probs_E.sum(), tokens, rtol=1e-5)
  assert tokens % layers == 0


@pytest.mark.slow
def test_the_step_descends_the_loss_and_the_balance():
  """The two-part gradient of the step is that of loss + weight x balance, formed at once."""
  batch = batch_of(1)
  micro = jax.tree.map(lambda x: x[0], batch)
  reference_NS = logprobs.make_logps_fn(MODEL)(params(), micro)
  slots = logprobs.slots_of(micro)

  def plain(tree):
    scored = logprobs.make_scored_fn(MODEL)(tree, micro)
    sums, _ = step.batch_sums(objective(0.0), scored.logps_NS, reference_NS, slots)
    chosen_E, probs_E, tokens = scored.routing
    return (
      sums["loss"][0] / sums["loss"][1]
      + 0.5 * CONFIG.experts.count * (chosen_E / tokens * probs_E / tokens).sum()
    )

  expected = jax.tree.map(lambda x, g: x - g, params(), jax.jit(jax.grad(plain))(params()))
  found, metrics = one_step(batch, 0.5)
  difference = jax.tree.map(lambda a, b: abs(a - b).max(), found, expected)
  assert max(jax.tree.leaves(difference)) < 1e-5
  without, _ = one_step(batch, 0.0)
  router = lambda tree: tree["params"]["layers"]["experts"]["router"]["kernel"]
  assert abs(router(found) - router(without)).max() > 1e-3
  assert CONFIG.experts.chosen < metrics["router/balance"] < CONFIG.experts.count


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "devices"), [("mesh", 4), ("pmap", 4)])
def test_every_topology_takes_the_same_step(mode, devices):
  expected, metrics = one_step(batch_of(2, 4), 0.5)
  found, others = one_step(batch_of(2, 4), 0.5, mode, devices)
  difference = jax.tree.map(lambda a, b: abs(a - b).max(), found, expected)
  assert max(jax.tree.leaves(difference)) < 1e-5
  np.testing.assert_allclose(metrics["router/balance"], others["router/balance"], rtol=1e-5)
