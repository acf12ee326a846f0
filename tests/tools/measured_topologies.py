"""Prints how far runs on several devices end from the run of one, by topology and kind of run.

python tests/tools/measured_topologies.py [STEPS]

Float32, on eight of JAX's CPU devices. Each entry has the largest difference of a parameter,
relative to the largest value of its leaf; of the metrics in `small_task.MEASURED`, relative to the
largest value in the run, or to 1 if that is smaller; and of all other metrics likewise. Shares of
rows are left out, which jump where a margin is zero.
"""

import contextlib
import io
import pathlib
import sys
import tempfile

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dpo_jax import train  # noqa: E402
from tests.support import small_task  # noqa: E402

TOPOLOGIES = {
  "pmap, 2": {"parallel.mode": "pmap", "parallel.devices": 2},
  "pmap, 8": {"parallel.mode": "pmap", "parallel.devices": 8},
  "data 8": {"parallel.devices": 8},
  "fsdp 8": {"parallel.devices": 8, "parallel.fsdp": 8},
  "tensor 2": {"parallel.devices": 2, "parallel.tensor": 2},
  "tensor 8": {"parallel.devices": 8, "parallel.tensor": 8},
  "sequence 4": {"parallel.devices": 4, "parallel.sequence": 4},
  "data 2 x fsdp 2 x tensor 2": {
    "parallel.devices": 8,
    "parallel.fsdp": 2,
    "parallel.tensor": 2,
  },
  "fsdp 4 x sequence 2": {"parallel.devices": 8, "parallel.fsdp": 4, "parallel.sequence": 2},
  "fsdp 2 x sequence 2 x tensor 2, moments on the host": {
    "parallel.devices": 8,
    "parallel.fsdp": 2,
    "parallel.sequence": 2,
    "parallel.tensor": 2,
    "parallel.offload_optimizer": True,
  },
}
TWO = {"train.accumulate": 2, "train.batch_size": 16}
CASES = {
  "sigmoid": {},
  "aot": {"loss.name": "aot"},
  "kto": {"loss.name": "kto"},
  "two micro-batches, packed": TWO | {"data.layout": "packed"},
  "two micro-batches, shared": TWO | {"data.layout": "shared"},
}
SHARES = ("accuracies", "both_fell")


def run(task, name, **changes):
  """Metrics by name, a value a line, and parameters by name."""
  config = small_task.configured(task, **(small_task.TWENTY | changes))
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    train.execute(config, task / name)
  lines, params = small_task.outcome(task / name)
  names = {key for line in lines for key in line if not key.endswith(SHARES)} - small_task.CLOCK
  # None is a mean over no rows.
  metrics = {key: np.array([line[key] or 0.0 for line in lines if key in line]) for key in names}
  return metrics, small_task.flat(params)


def furthest(found, expected, least):
  """The largest difference of any, relative to the array's largest value, and the array's name."""
  assert found.keys() == expected.keys()
  far = lambda x, y: float(np.abs(x - y).max() / max(np.abs(y).max(), least))
  return max((far(found[name], y), name) for name, y in expected.items())


def compared(found, expected):
  """`furthest` of parameters, of the metrics that are measured, and of the others."""
  (metrics, params), (wanted, model) = found, expected
  picked = lambda given, inside: {
    name: x for name, x in given.items() if (name in small_task.MEASURED) == inside
  }
  yield furthest(params, model, np.finfo(np.float32).tiny)
  for inside in (True, False):
    yield furthest(picked(metrics, inside), picked(wanted, inside), 1.0)


def main(steps=20):
  jax.config.update("jax_num_cpu_devices", 8)
  with tempfile.TemporaryDirectory() as folder:
    task = small_task.write(pathlib.Path(folder))
    print(f"| | {' | '.join(CASES)} |\n|{'---|' * (len(CASES) + 1)}", flush=True)
    given = {"train.steps": int(steps)}
    alone = {
      case: run(task, f"{case}, alone", **given, **changes, **{"parallel.devices": 1})
      for case, changes in CASES.items()
    }
    worst = []
    for topology, place in TOPOLOGIES.items():
      row = []
      for case, changes in CASES.items():
        found = run(task, f"{case}, {topology}", **given, **changes, **place)
        ends = list(compared(found, alone[case]))
        row.append(", ".join(f"{far:.1e}" for far, _ in ends))
        worst.append([(*end, topology, case) for end in ends])
      print(f"| {topology} | {' | '.join(row)} |", flush=True)
  for ends in zip(*worst, strict=True):
    print("furthest:", *max(ends))


if __name__ == "__main__":
  main(*sys.argv[1:])
