"""Whole runs on other devices: the same metrics, the same model, and a run that moves."""

import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_task

from dpo_jax import preemption, train
from dpo_jax.checkpoint import latest_step
from dpo_jax.loggers import read_metrics
from dpo_jax.model import adapters

ROOT = pathlib.Path(__file__).resolve().parent.parent
ONE = {"parallel.devices": 1}
DIVIDED = {"parallel.devices": 8, "parallel.fsdp": 2, "parallel.tensor": 2}
# A learning rate at which rounding does not grow beyond what is looked for in four steps.
GENTLE = {"optimizer.learning_rate": 1e-3, "optimizer.eps": 1e-4}
MEASURED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "eval/loss")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return small_task.write(tmp_path_factory.mktemp("task"))


def run(task, name, **changes):
  """Metrics and the exported model of a run."""
  train.execute(small_task.configured(task, **GENTLE, **changes), task / name)
  return outcome(task / name)


def outcome(folder):
  return read_metrics(folder / "metrics.jsonl"), adapters.load_model(folder / "export")[1]


def alike(found, expected):
  """As far as float32 sums in another order allow."""
  (lines, params), (wanted, model) = found, expected
  for line, other in zip(lines, wanted, strict=True):
    for key in set(MEASURED) & line.keys() & other.keys():
      np.testing.assert_allclose(line[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
  leaves = zip(*(sorted(flat(tree).items()) for tree in (params, model)), strict=True)
  for (name, x), (_, y) in leaves:
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max(), err_msg=name)


def flat(tree, prefix=""):
  found = {}
  for name, node in tree.items():
    inside = flat(node, f"{prefix}{name}.") if isinstance(node, dict) else {prefix + name: node}
    found |= {key: np.asarray(value) for key, value in inside.items()}
  return found


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
  alike(
    run(task, f"divided{name}", **DIVIDED, **changes), run(task, f"one{name}", **ONE, **changes)
  )


def command(task, name, steps):
  """A run of its own process, saving at the end alone."""
  given = {
    "model.path": task / "base",
    "data.path": task / "pairs.jsonl",
    "train.steps": steps,
    "train.batch_size": 8,
    "eval.every": 0,
    "checkpoint.every": 0,
  }
  flags = [f"--config.{key}={value}" for key, value in given.items()]
  module = [sys.executable, "-m", "dpo_jax.train", "--config=configs/preferences.py"]
  return [*module, f"--workdir={task / name}", *flags]


@pytest.mark.slow
def test_asked_to_stop_a_run_saves_and_goes_on_to_the_bit(task):
  straight, told = command(task, "undisturbed", 60), command(task, "told", 60)
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
  straight = run(task, "straight", **ONE, **every)
  places = (
    {"parallel.devices": 8, "parallel.fsdp": 4, "parallel.tensor": 2},
    {"parallel.devices": 4, "parallel.mode": "pmap"},
    ONE,
    DIVIDED,
  )
  folder = task / "moving"
  for done, place in enumerate(places, start=1):
    train.execute(small_task.configured(task, **GENTLE, **every, **place), folder)
    if done < 4:  # as a kill after step `done` would have left it
      for later in range(done + 1, 5):
        shutil.rmtree(folder / "checkpoints" / str(later))
      shutil.rmtree(folder / "export")
  found = outcome(folder)
  assert [line["step"] for line in found[0]] == [0, 1, 2, 3, 4]
  alike(found, straight)
