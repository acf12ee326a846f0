"""Whole runs on other devices: the same metrics, the same model, and a run that moves."""

import shutil
import signal
import subprocess
import time

import pytest

from dpo_jax import train
from dpo_jax.distributed import preemption
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.training.checkpoint import latest_step
from tests.support import small_task
from tests.support.paths import ROOT

ONE = {"parallel.devices": 1}
DIVIDED = {
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
  """Metrics and the exported model of a run."""
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
def test_a_divided_run_is_the_run_of_one_device(task, changes):
  name = "_".join(map(str, changes.values()))
  small_task.alike(
    run_here(task, f"divided{name}", **DIVIDED, **changes),
    run_here(task, f"one{name}", **ONE, **changes),
  )


@pytest.mark.slow
def test_asked_to_stop_a_run_saves_and_goes_on_to_the_bit(task):
  every = {"train.steps": 60, "eval.every": 0, "checkpoint.every": 0}
  straight, told = (small_task.command(task, name, **every) for name in ("undisturbed", "told"))
  assert subprocess.run(straight, cwd=ROOT, capture_output=True).returncode == 0
  lines = task / "told" / "metrics.jsonl"
  with subprocess.Popen(told, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    while not (lines.is_file() and lines.read_text().count("\n") > 3):
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
  assert process.returncode == preemption.AGAIN
  reached = read_metrics(lines)[-1]["step"]
  assert f"saved after step {reached}" in said and reached < 60
  assert latest_step(task / "told" / "checkpoints") == reached
  assert subprocess.run(told, cwd=ROOT, capture_output=True).returncode == 0
  weights = [task / name / "export" / "model.safetensors" for name in ("undisturbed", "told")]
  assert weights[0].read_bytes() == weights[1].read_bytes()
  assert [line["step"] for line in read_metrics(lines)] == list(range(61))


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(task):
  """Step 1 on eight, 2 on four under pmap, 3 on one, 4 on eight otherwise divided."""
  every = {"checkpoint.every": 1, "checkpoint.keep": 4}
  straight = run_here(task, "straight", **ONE, **every)
  places = (
    {"parallel.devices": 8, "parallel.fsdp": 4, "parallel.tensor": 2},
    {"parallel.devices": 4, "parallel.mode": "pmap"},
    ONE,
    DIVIDED,
  )
  folder = task / "moving"
  for done, place in enumerate(places, start=1):
    train.execute(small_task.configured(task, **small_task.GENTLE, **every, **place), folder)
    if done < 4:  # as a kill after step `done` would have left it
      for later in range(done + 1, 5):
        shutil.rmtree(folder / "checkpoints" / str(later))
      shutil.rmtree(folder / "export")
  found = small_task.outcome(folder)
  assert [line["step"] for line in found[0]] == [0, 1, 2, 3, 4]
  small_task.alike(found, straight)
