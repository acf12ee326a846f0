"""Compares whole runs on different devices: equal metrics and weights, also when a run moves."""

import shutil
import signal
import time

import pytest

from dpo_jax import train
from dpo_jax.distributed import preemption
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.training.checkpoint import latest_step
from tests.support import forks, small_task

pytestmark = pytest.mark.usefixtures("one_picture")

ONE = {"parallel.devices": 1}
SHARDED = {
  "parallel.devices": 8,
  "parallel.fsdp": 2,
  "parallel.sequence": 2,
  "parallel.tensor": 2,
  "parallel.offload_optimizer": True,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return small_task.write(tmp_path_factory.mktemp("task"))


def run_here(task, name, **changes):
  """Trains in this process and returns the metrics and the exported weights."""
  train.execute(small_task.configured(task, **small_task.GENTLE, **changes), task / name)
  return small_task.outcome(task / name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"lora.rank": 4},
    {"reference.sync_every": 2},
    {"loss.name": "kto"},
    {"train.accumulate": 2, "loss.name": "aot"},
  ],
  ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "sigmoid",
)
def test_a_sharded_run_equals_the_run_of_one_device(task, changes):
  name = "_".join(map(str, changes.values()))
  small_task.assert_close(
    run_here(task, f"sharded{name}", **SHARDED, **changes),
    run_here(task, f"one{name}", **ONE, **changes),
  )


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_continues_bit_identically(task):
  every = {"train.steps": 60, "eval.every": 0, "checkpoint.every": 0}
  undisturbed, stopped = (
    small_task.command(task, name, **every) for name in ("undisturbed", "stopped")
  )
  ((status, said),) = small_task.end([forks.start(undisturbed)])
  assert status == 0, said
  lines = task / "stopped" / "metrics.jsonl"
  process = forks.start(stopped)
  # A few steps are logged first, so that the signal arrives inside the training loop.
  while not (lines.is_file() and lines.read_text().count("\n") > 3):
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate()
  assert process.returncode == preemption.AGAIN
  reached = read_metrics(lines)[-1]["step"]
  assert f"saved at step {reached}" in output and reached < 60
  assert latest_step(task / "stopped" / "checkpoints") == reached
  assert small_task.end([forks.start(stopped)])[0][0] == 0
  weights = [task / name / "export" / "model.safetensors" for name in ("undisturbed", "stopped")]
  assert weights[0].read_bytes() == weights[1].read_bytes()
  assert [line["step"] for line in read_metrics(lines)] == list(range(61))


@pytest.mark.slow
def test_a_run_continues_on_other_devices(task):
  """Runs step 1 on eight devices, 2 on four under pmap, 3 on one, 4 on eight sharded otherwise."""
  every = {"checkpoint.every": 1, "checkpoint.keep": 4}
  undisturbed = run_here(task, "staying", **ONE, **every)
  topologies = (
    {"parallel.devices": 8, "parallel.fsdp": 4, "parallel.tensor": 2},
    {"parallel.devices": 4, "parallel.mode": "pmap"},
    ONE,
    SHARDED,
  )
  folder = task / "moving"
  for done, topology in enumerate(topologies, start=1):
    train.execute(small_task.configured(task, **small_task.GENTLE, **every, **topology), folder)
    if done < 4:  # deletes what came after step `done`, as if the run had been killed there
      for later in range(done + 1, 5):
        shutil.rmtree(folder / "checkpoints" / str(later))
      shutil.rmtree(folder / "export")
  found = small_task.outcome(folder)
  assert [line["step"] for line in found[0]] == [0, 1, 2, 3, 4]
  small_task.assert_close(found, undisturbed)
