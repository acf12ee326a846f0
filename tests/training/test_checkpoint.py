"""Checkpoints come back to the bit, keep the latest and the best, and fail in one line."""

import itertools
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from dpo_jax import step
from dpo_jax.distributed import executor
from dpo_jax.structs import UserError
from dpo_jax.training.checkpoint import Best, Checkpoints, SavingTimes, best_of
from tests.support import tiny
from tests.support.paths import ROOT

TX = optax.adamw(1e-3)


def state_at(index):
  """A state whose every number depends on `index`."""
  state = step.init_state(jax.tree.map(lambda x: x * (index + 1), tiny.init()), TX)
  return state._replace(step=np.asarray(index, np.int32))


def test_a_state_comes_back_to_the_bit(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state_at(7))
  checkpoints.close()
  again = Checkpoints(tmp_path)
  assert again.latest() == 7
  restored = again.restore(jax.eval_shape(lambda: state_at(0)))
  assert jax.tree.structure(restored) == jax.tree.structure(state_at(7))
  for found, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state_at(7)), strict=True):
    np.testing.assert_array_equal(found, saved)
  params = again.restore_params()
  for key, value in state_at(7).params.items():
    np.testing.assert_array_equal(params[key], value)
  again.close()


class OldState(NamedTuple):
  """`TrainState` as it was before `memory` became `running_stats`."""

  step: Any
  params: Any
  opt_state: Any
  memory: Any
  reference: Any = None


def test_a_checkpoint_of_before_a_field_was_renamed_is_read(tmp_path):
  state = state_at(2)._replace(running_stats={"delta": np.asarray(0.75, np.float32)})
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, OldState(*state))
  checkpoints.wait()
  restored = checkpoints.restore(jax.eval_shape(lambda: state))
  assert isinstance(restored, step.TrainState)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for found, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(found, saved)
  checkpoints.close()


@pytest.mark.parametrize(("higher", "kept"), [(True, [2, 4, 5]), (False, [3, 4, 5])])
def test_the_latest_two_and_the_best_stay(tmp_path, higher, kept):
  checkpoints = Checkpoints(tmp_path, keep=2, best="accuracy", higher=higher)
  for index, accuracy in [(1, 0.5), (2, 0.9), (3, 0.1), (4, 0.6), (5, 0.7)]:
    checkpoints.save(index, state_at(index), {"accuracy": accuracy})
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == kept


def test_a_checkpoint_without_metrics_is_never_the_best(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy")
  for index, metrics in [(1, {"accuracy": 0.2}), (2, None), (3, {"accuracy": 0.1})]:
    checkpoints.save(index, state_at(index), metrics)
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [1, 3]


@pytest.mark.parametrize(
  ("evaluations", "best"),
  [
    ([(10, {"loss": 0.5}), (20, {"loss": 0.4}), (30, {"loss": 0.6})], (20, "loss", 0.4)),
    # Accuracy comes first where there is one, and the latest of equals counts.
    (
      [
        (10, {"rewards/accuracies": 0.9, "loss": 0.1}),
        (20, {"rewards/accuracies": 0.9, "loss": 0.3}),
        (30, {"rewards/accuracies": 0.8, "loss": 0.2}),
      ],
      (20, "rewards/accuracies", 0.9),
    ),
    ([(10, {}), (20, {"loss": float("nan")}), (30, {"loss": 0.7})], (30, "loss", 0.7)),
    ([(10, {}), (20, {"sampled/kl": 1.0})], None),
  ],
)
def test_the_best_is_told_by_accuracy_or_else_by_loss(evaluations, best):
  assert best_of(evaluations) == best


def test_the_best_checkpoint_is_found_again_and_its_parameters_are_read(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, best="loss", higher=False)
  for index, loss in [(1, 0.5), (2, 0.2), (3, None), (4, 0.3)]:
    checkpoints.save(index, state_at(index), None if loss is None else {"loss": loss})
  checkpoints.close()
  again = Checkpoints(tmp_path)
  assert again.best() == Best(2, "loss", 0.2) and again.steps() == [2, 4]
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_at(2).params)
  for params in (again.restore_params(2), again.restore_params(2, like)):
    for key, value in state_at(2).params.items():
      np.testing.assert_array_equal(params[key], value)
  again.close()


def test_an_absent_checkpoint_is_said_in_one_line(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(UserError, match="holds no checkpoint; train there first"):
    checkpoints.restore_params()
  checkpoints.save(3, state_at(3))
  checkpoints.wait()
  with pytest.raises(UserError, match="no checkpoint of step 4; it has 3"):
    checkpoints.restore(state_at(0), 4)
  checkpoints.close()


def test_a_spoilt_checkpoint_is_named_with_the_one_before(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for index in (3, 5):
    checkpoints.save(index, state_at(index))
  checkpoints.wait()
  spoil = lambda index: [
    file.write_bytes(file.read_bytes()[:100])
    for file in (tmp_path / str(index)).rglob("*")
    if file.is_file()
  ]
  spoil(5)
  said = r"step 5 cannot be read .*; delete .*/5 to go on from step 3"
  for read in (checkpoints.restore_params, lambda: checkpoints.restore(state_at(0))):
    with pytest.raises(UserError, match=said):
      read()
  spoil(3)
  with pytest.raises(UserError, match=r"step 3 cannot be read .*; delete .*/3 to start anew"):
    checkpoints.restore_params(3)
  checkpoints.close()


FULL = """
import resource, sys
import numpy as np
from dpo_jax.distributed import executor
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.structs import UserError

weights = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
more = {str(i): weights for i in range(8)}  # parts that are still being written when one fails
state = {"params": {"w": weights, **more}, "step": np.asarray(1, np.int32)}
checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, state)
checkpoints.wait()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
  checkpoints.save(2, state)
  checkpoints.wait()
except UserError as error:
  print(error)
checkpoints.close()
"""


def test_a_save_that_fails_leaves_the_previous_checkpoint_whole(tmp_path):
  """Files may not grow beyond 100 kB: what a full disk does, without one."""
  done = subprocess.run(
    [sys.executable, "-c", FULL, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert re.search(r"step 2 could not be saved.* step 1 is whole", done.stdout), done.stderr
  assert "Traceback" not in done.stderr
  again = Checkpoints(tmp_path)
  assert again.steps() == [1]
  weights = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
  np.testing.assert_array_equal(again.restore_params()["w"], weights)


def test_a_run_falls_back_to_the_last_checkpoint_that_can_be_read(tmp_path, capfd):
  folder = tmp_path / "checkpoints"
  checkpoints = Checkpoints(folder, keep=3)
  for index in (3, 5, 7):
    checkpoints.save(index, state_at(index))
  checkpoints.close()
  for index in (5, 7):
    for file in (folder / str(index)).rglob("*"):
      if file.is_file():
        file.write_bytes(file.read_bytes()[:100])

  checkpoints = Checkpoints(folder, keep=3)
  found, state = checkpoints.restore_latest(state_at(0))
  assert found == 3
  jax.tree.map(np.testing.assert_array_equal, state, state_at(3))
  said = capfd.readouterr().err
  assert all(f"step {step} cannot be read" in said for step in (5, 7)) and "from step 3" in said
  assert checkpoints.steps() == [3] and (tmp_path / "unreadable-7").is_dir()
  for index in (5, 7):  # the run comes there again
    checkpoints.save(index, state_at(index))
  checkpoints.close()
  assert checkpoints.steps() == [3, 5, 7]
  again = Checkpoints(folder, keep=3)
  assert again.restore_latest(state_at(0))[0] == 7
  again.close()


def test_a_state_is_read_onto_another_mesh_to_the_bit(tmp_path):
  """Divided by eight, by two ways of four, whole under pmap, on one device: the same numbers."""
  host = {
    "query": {"kernel": np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)},
    "step": np.int32(3) + np.zeros((), np.int32),
  }
  places = [
    executor.Executor("mesh", 8, fsdp=8),
    executor.Executor("mesh", 4, fsdp=2, tensor=2),
    executor.Executor("pmap", 4),
    executor.Executor("mesh", 1),
    executor.Executor("mesh", 8, fsdp=2, tensor=2),
  ]
  state = places[0].place(host)
  for index, (here, there) in enumerate(itertools.pairwise(places)):
    checkpoints = Checkpoints(tmp_path / str(index))
    checkpoints.save(1, here.unreplicate(state))
    checkpoints.wait()
    state = there.place(checkpoints.restore(there.abstract(host), 1))
    checkpoints.close()
    found = there.to_host(state)
    jax.tree.map(np.testing.assert_array_equal, found, host)
  assert state["query"]["kernel"].sharding.shard_shape((2, 16, 8)) == (2, 8, 4)


class Clock:
  """Saving times on a clock of its own, and how often the first process was asked."""

  def __init__(self, minutes, answers=None):
    self.seconds, self.asked = 0.0, 0
    self.answers, self.texts = answers, []
    self.times = SavingTimes(minutes, self._from_main_process, lambda: self.seconds)

  def _from_main_process(self, text):
    self.asked += 1
    self.texts.append(text)
    return text if self.answers is None else self.answers[self.asked - 1]

  def steps_saved(self, steps, seconds_per_step):
    found = []
    for index in range(1, steps + 1):
      self.seconds += seconds_per_step
      if self.times.is_due(index):
        found.append(index)
        self.times.saved()
    return found


@pytest.mark.parametrize(("pace", "expected"), [(1.0, 600), (30.0, 20), (700.0, 1)])
def test_a_checkpoint_is_due_after_ten_minutes(pace, expected):
  clock = Clock(10)
  found = clock.steps_saved(3 * expected, pace)
  assert found == [expected, 2 * expected, 3 * expected]
  # Every look halves what is left: some ten of them until each of the three.
  assert clock.asked <= 3 * 15


def test_zero_minutes_are_never_and_nobody_is_asked():
  clock = Clock(0)
  assert clock.steps_saved(100, 1e6) == [] and clock.asked == 0


def test_a_checkpoint_for_another_reason_starts_the_clock_anew():
  clock = Clock(10)
  clock.steps_saved(50, 10)
  clock.times.saved()
  assert clock.steps_saved(59, 10) == []


def test_processes_with_other_clocks_save_after_the_same_steps():
  first, slow = Clock(10), None
  expected = first.steps_saved(40, 45.0)
  slow = Clock(10, first.texts)
  assert slow.steps_saved(40, 7000.0) == expected and len(expected) == 2
  assert slow.asked == first.asked
