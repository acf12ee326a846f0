"""A run killed at any moment goes on as if nothing had happened: to the bit, each step once."""

import functools
import json
import random
import shutil
import time

import jax
import numpy as np
import pytest

from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.training.checkpoint import Checkpoints, latest_step
from tests.support import forks, small_task

EVERY = {"checkpoint.every": 6, "eval.every": 4}
CASES = {
  "follows": {"reference.sync_every": 5, "train.accumulate": 2, "data.layout": "packed"},
  "samples": {
    "on_policy.reward": "controlled",
    "on_policy.max_tokens": 8,
    "data.row_length": 0,
    "optimizer.learning_rate": 1e-4,
  },
  "stored": {"loss.name": "ipo"},
}
# When a kill comes, in turn: what is waited for, and then up to a moment longer. One more comes in
# the export.
MOMENTS = ("steps", "saving", "evaluation", "building")


def lines_of(folder):
  file = folder / "metrics.jsonl"
  return file.read_text().count("\n") if file.is_file() else 0


def has_come(moment, folder, began):
  """Whether what the kill waits for is there, in a run that had `began` so many lines."""
  if moment == "building":
    return True
  if moment == "saving":
    saving = folder / "checkpoints"
    return saving.is_dir() and any(not path.name.isdigit() for path in saving.iterdir())
  if moment == "exporting":
    return any(folder.glob(".export.*"))
  if moment == "evaluation":  # of the coming step
    return lines_of(folder) > began and lines_of(folder) % EVERY["eval.every"] == 0
  return lines_of(folder) > began + 2


def killed(command, folder, env, moment, rng):
  """Starts a run and kills it; whether it was still there for that."""
  began = lines_of(folder)
  process = forks.start(command, env)
  while process.poll() is None and not has_come(moment, folder, began):
    time.sleep(0.001)
  time.sleep(rng.uniform(0, {"building": 3.0, "exporting": 0.01}.get(moment, 0.05)))
  process.kill()
  process.communicate()
  return process.returncode != 0


def outcome(folder):
  """Metrics but for the clock, and all that the last checkpoint holds."""
  lines = read_metrics(folder / "metrics.jsonl")
  records = [{k: v for k, v in line.items() if k not in small_task.CLOCK} for line in lines]
  checkpoints = Checkpoints(folder / "checkpoints")
  like = checkpoints._orbax.metadata(latest_step(folder / "checkpoints")).metadata
  held = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like))
  checkpoints.close()
  return records, held


def survives(folder, case, seed, steps=64):
  """Compares a run killed at each of the moments, and in the export, with one left alone."""
  small_task.write(folder)
  rows = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
  prompts = [json.dumps({"prompt": row["prompt"]}) for row in rows]
  (folder / "prompts.jsonl").write_text("\n".join(prompts))
  changes = EVERY | {"train.steps": steps} | CASES[case]
  if case == "samples":
    changes["data.path"] = folder / "prompts.jsonl"
  commands = {}
  for name in ("straight", "killed"):
    store = {"reference.store": folder / f"store_{name}"} if case == "stored" else {}
    commands[name] = small_task.command(folder, name, **changes, **store)
  rng, env = random.Random(seed), small_task.own_programs(folder)
  stop = functools.partial(killed, commands["killed"], folder / "killed", env)
  for moment in MOMENTS:
    assert stop(moment, rng)
  # An export that was too quick is removed, and made again by another start.
  for _ in range(5):
    if stop("exporting", rng):
      break
    shutil.rmtree(folder / "killed" / "export")
  else:
    raise AssertionError("every export was too quick")
  for command in commands.values():
    ((status, said),) = small_task.end([forks.start(command, env)])
    assert status == 0, said
  (found, held), (expected, wanted) = (outcome(folder / name) for name in ("killed", "straight"))
  first = expected[0]["step"]  # 0 where there is something to judge by before training
  assert [record["step"] for record in found] == list(range(first, steps + 1))
  assert found == expected
  jax.tree.map(np.testing.assert_array_equal, held, wanted)
  exports = [folder / name / "export" / "model.safetensors" for name in commands]
  assert exports[0].read_bytes() == exports[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_every_moment(tmp_path, case):
  survives(tmp_path, case, seed=1)
