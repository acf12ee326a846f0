"""Prints how long a run goes on after SIGTERM: seconds until it says that it saved, and is over.

python tests/tools/measured_stop.py [SHAPE [REPEATS]]

A shape of configs/benchmark.py with random weights, or the model of `small_task`; eight pairs a
step. Each time the run goes on from where it left, and is told at some moment of a step.
"""

import json
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configs import benchmark  # noqa: E402
from dpo_jax.distributed import preemption  # noqa: E402
from dpo_jax.hf import checkpoint as hf_checkpoint  # noqa: E402
from dpo_jax.model import families, transformer  # noqa: E402
from tests.support import small_task  # noqa: E402

SMALL = "small"


def written(folder, shape):
  """The small task in a folder, with a model of the shape."""
  task = small_task.write(folder)
  if shape != SMALL:
    config = families.from_hf(benchmark.get_config(shape).model.scratch.to_dict())
    hf_checkpoint.save(
      task / shape, config, transformer.init_params(config, 0), source=task / "tokenizer"
    )
  return task


def told(command, lines, moment):
  """Seconds from SIGTERM to the line that says what was saved, and to the end."""
  count = lambda: lines.read_text().count("\n") if lines.is_file() else 0
  began = count()
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  ) as process:
    while count() < began + 3:
      time.sleep(0.01)
    time.sleep(moment)
    process.send_signal(signal.SIGTERM)
    since = time.perf_counter()
    saved = next(time.perf_counter() - since for line in process.stdout if "saved at" in line)
    process.wait()
  assert process.returncode == preemption.AGAIN
  return saved, time.perf_counter() - since


def main(shape=SMALL, repeats=5):
  with tempfile.TemporaryDirectory() as folder:
    task = written(pathlib.Path(folder), shape)
    changes = {"train.steps": 100_000, "eval.every": 0, "checkpoint.every": 0}
    model = {} if shape == SMALL else {"model.path": task / shape}
    command = small_task.command(task, "run", **changes, **model)
    moments = random.Random(0)
    found = [
      told(command, task / "run" / "metrics.jsonl", moments.uniform(0, 2))
      for _ in range(int(repeats))
    ]
    held = (path for path in (task / "run" / "checkpoints").rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in held)
  for name, times in zip(("saved", "over"), zip(*found, strict=True), strict=True):
    print(json.dumps({name: statistics.median(times), "from": min(times), "to": max(times)}))
  print(json.dumps({"bytes of the two latest checkpoints": size}))


if __name__ == "__main__":
  main(*sys.argv[1:])
