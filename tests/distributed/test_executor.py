"""Executor: pmap, jit over a mesh and one device take the same steps."""

import functools
import types

import jax
import numpy as np
import optax
import pytest

from dpo_jax import logprobs, step
from dpo_jax.data import collate
from dpo_jax.distributed import executor as executors
from dpo_jax.distributed import memory
from dpo_jax.distributed.executor import MODES, Executor, assert_separate
from dpo_jax.structs import UserError
from dpo_jax.training import optimizer
from tests.support import tiny
from tests.support.small_steps import close, objective


def trajectory(mode, devices, *, accumulate=1, steps=4, name="sigmoid", offload=False):
  """Returns parameters and losses after a few steps on weighted pairs of unequal lengths."""
  executor = Executor(mode, devices, offload_optimizer=offload)
  tx = optimizer.from_host(optax.adamw(1e-2)) if offload else optax.adamw(1e-2)
  state = executor.compile_init(functools.partial(step.init_state, tx=tx))(
    executor.place(tiny.init())
  )
  reference = executor.place(tiny.init())
  assert_separate(state, reference)
  train_step_fn = executor.compile_step(
    functools.partial(step.train_step, objective=objective(name, beta=0.5), tx=tx)
  )
  reports = []
  for batch in tiny.batches(steps, executor.groups, accumulate):
    state, report = train_step_fn(state, reference, executor.place_batch(batch))
    reports.append(executor.metrics_to_host(report))
  unchanged = executor.to_host(reference)
  for key, value in tiny.init().items():
    np.testing.assert_array_equal(unchanged[key], value)
  return executor.to_host(state.params), reports


@functools.cache
def one_device(name):
  return trajectory("mesh", 1, name=name)


@pytest.mark.parametrize(
  ("mode", "devices", "accumulate", "name"),
  [
    ("pmap", 4, 2, "aot"),  # sorted over the global batch
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("pmap", 1, 1, "sigmoid"),
        ("pmap", 8, 1, "sigmoid"),
        ("mesh", 8, 1, "sigmoid"),
        ("mesh", 4, 2, "sigmoid"),
        ("pmap", 4, 2, "sigmoid"),
        ("mesh", 4, 2, "aot"),
        ("mesh", 4, 2, "kto"),
        ("pmap", 4, 1, "kto"),
      )
    ),
  ],
)
def test_every_topology_takes_the_steps_of_one_device(mode, devices, accumulate, name):
  params, reports = trajectory(mode, devices, accumulate=accumulate, name=name)
  expected, expected_reports = one_device(name)
  close(params, expected)
  keys = {"loss", "grad_norm", "kl", "rewards/accuracies", "rewards/margins", "logps/rejected"}
  for found, wanted in zip(reports, expected_reports, strict=True):
    for key in keys & wanted.keys():
      np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert (found["nonfinite_row_ANS"] == -1).all()
    assert (found["rows"], found["tokens"]) == (wanted["rows"], wanted["tokens"])


def test_an_optimizer_whose_state_is_stored_on_the_host_takes_the_same_steps():
  params, reports = trajectory("mesh", 1, offload=True, name="aot")
  expected, wanted = one_device("aot")
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert [report["loss"] for report in reports] == [report["loss"] for report in wanted]


def test_only_the_moments_are_stored_on_the_host():
  executor = Executor("mesh", 4, fsdp=4, offload_optimizer=True)
  init = functools.partial(step.init_state, tx=optimizer.from_host(optax.adamw(1e-2)))
  state = executor.compile_init(init)(executor.place(tiny.init()))
  moments = (state.opt_state[0].mu, state.opt_state[0].nu)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(moments)} == {memory.HOST}
  others = state._replace(opt_state=None)
  assert memory.HOST not in {x.sharding.memory_kind for x in jax.tree.leaves(others)}
  assert memory.device_bytes(moments) == 0 < memory.host_bytes(state)


@pytest.mark.parametrize("mode", MODES)
def test_forward_gives_every_slot_in_the_order_of_the_batch(mode):
  executor = Executor(mode, 8)
  batch = collate.collate(tiny.pairs(16), row_length=48, groups=8)
  logps_fn = logprobs.make_logps_fn(tiny.MODEL)
  alone = jax.jit(logps_fn)(tiny.init(), batch)
  forward = executor.compile_forward(logps_fn)
  together = forward(executor.place(tiny.init()), jax.tree.map(lambda x: x[None], batch))
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_stand_for_what_is_placed(mode):
  executor = Executor(mode, jax.devices()[2:6])
  assert set(executor.devices) == {*jax.devices()[2:6]}
  (batch,) = tiny.batches(1, executor.groups, 2)
  for placed, shapes in (
    (executor.place(tiny.init()), executor.abstract_placed(tiny.init())),
    (executor.place_batch(batch), executor.abstract_batch(batch)),
  ):
    for x, shape in zip(jax.tree.leaves(placed), jax.tree.leaves(shapes), strict=True):
      assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, shape.sharding)


@pytest.mark.parametrize("mode", MODES)
def test_trees_placed_twice_share_no_buffer_and_one_placed_once_does(mode):
  executor = Executor(mode, 2)
  host = tiny.init()
  first, second = executor.place(host), executor.place(host)
  assert_separate(first, second)
  with pytest.raises(ValueError, match="shares its buffer"):
    assert_separate(first, {"w": first["head"]})


@pytest.mark.parametrize("mode", MODES)
def test_a_single_copy_leaves_and_comes_back(mode):
  executor = Executor(mode, 4)
  host = tiny.init()
  there = executor.place(host)
  for key, value in executor.to_host(there).items():
    np.testing.assert_array_equal(value, host[key])
    assert executor.unreplicate(there)[key].shape == value.shape


@pytest.mark.parametrize(
  ("mode", "devices", "more", "words"),
  [
    ("spmd", 0, {}, "known: mesh, pmap"),
    ("mesh", 9, {}, "devices of this machine: 8"),
    ("pmap", -1, {}, "0 for all"),
    ("mesh", 8, {"sequence": 3, "fsdp": 2}, "fsdp 2 x parallel.sequence 3 does not divide the 8"),
    ("mesh", 8, {"sequence": 0}, "parallel.sequence is 0; it must be 1 or more"),
    ("pmap", 8, {"sequence": 2}, "under pmap every device holds everything"),
    ("pmap", 8, {"offload_optimizer": True}, "needs parallel.mode=mesh"),
  ],
)
def test_impossible_settings_are_refused_in_one_line(mode, devices, more, words):
  with pytest.raises(UserError, match=words):
    Executor(mode, devices, **more)


def tpus(x, y, slices=1):
  """Returns stand-ins for the chips of v6e slices, with what JAX reads of them."""
  return [
    types.SimpleNamespace(
      id=number,
      platform="tpu",
      device_kind="TPU v6 lite",
      coords=(number % x, number // x % y, 0),
      core_on_chip=0,
      process_index=0,
      slice_index=number // (x * y),
    )
    for number in range(x * y * slices)
  ]


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 8, 1, 1), (2, 2, 1, 4), (1, 4, 2, 2)])
def test_axes_of_a_slice_of_tpus_are_split_where_sizes_need_it(shape):
  # A slice of 4 x 4 has axes of 4: neither 8 nor 2 is a product of these.
  placed = executors._arrange(shape, tpus(4, 4))
  assert placed.shape == shape
  assert {device.id for device in placed.flat} == set(range(16))


def test_several_slices_are_refused_in_one_line():
  with pytest.raises(UserError, match=r"the 8 devices are in 2 TPU slices, .* hosts of one"):
    executors._arrange((8, 1, 1, 1), tpus(2, 2, slices=2))


def test_rows_that_do_not_divide_are_refused():
  executor = Executor("mesh", 8, sequence=8)
  rows = collate.collate_many([tiny.pairs(4)], row_length=36)
  with pytest.raises(
    UserError, match=r"rows of 36 tokens do not divide among parallel\.sequence 8"
  ):
    executor.place_batch(rows)
