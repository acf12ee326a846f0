"""Measures how time and memory of the training step grow with one quantity, on this CPU.

The step is that of training, on synthetic rows of equal lengths, compiled as in the planner. Memory
is given twice: as the compiler's account, and as the measured peak of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpo_jax import defaults
from dpo_jax.benchmarking import planner
from dpo_jax.structs import UserError
from dpo_jax.utils import files


class Axis(NamedTuple):
  """A quantity that is varied: its label in the figure, and its values."""

  label: str
  values: tuple[int, ...]


def _doubled(first: int, last: int, times: int = 2) -> tuple[int, ...]:
  """Returns first, first · times, … up to `last`."""
  return (first,) if first * times > last else (first, *_doubled(first * times, last, times))


AXES = {
  "length": Axis("tokens of a prompt and one completion", _doubled(256, 32768)),
  "vocabulary": Axis("vocabulary", _doubled(1024, 262144, 4)),
  "pairs": Axis("pairs per row", _doubled(1, 32)),
  "answers": Axis("ranked completions per prompt", _doubled(2, 32)),
  "width": Axis("width of the model", _doubled(64, 512)),
  "depth": Axis("layers", _doubled(1, 16)),
  "devices": Axis("devices, the model divided among them", _doubled(1, 8)),
}


def configured(axis: str, value: int) -> tuple[ConfigDict, planner.Lengths]:
  """Returns the configuration of a small Llama with one quantity set, and the lengths of its rows.

  Raises:
    UserError: the axis is unknown.
  """
  if axis not in AXES:
    raise UserError(f"{axis!r} does not grow; known are {', '.join(AXES)}")
  # All else stays small and constant, so that the growth of one quantity is what is seen.
  width = value if axis == "width" else 64
  length = {"length": value, "pairs": 128, "answers": 128}.get(axis, 256)
  config = defaults.get_config()
  config.model.scratch = ConfigDict(
    {
      "model_type": "llama",
      "vocab_size": value if axis == "vocabulary" else 1024,
      "hidden_size": width,
      "num_hidden_layers": value if axis == "depth" else 2,
      # Heads of constant size: a wider model has more of them, as real ones do.
      "num_attention_heads": max(1, width // 64),
      "intermediate_size": 3 * width,
      "max_position_embeddings": 65536,
    }
  )
  config.data.max_length = length
  config.train.batch_size = {"length": 1, "answers": 1, "pairs": value, "devices": 8}.get(axis, 4)
  config.parallel.devices = config.parallel.fsdp = value if axis == "devices" else 1
  if axis == "answers":
    config.loss = defaults.loss("plackett_luce")
    config.on_policy.num = value
  if axis == "pairs":
    # A prompt of 64 tokens and two completions of 64, once each: exactly that many pairs fit.
    config.data.row_length = value * 192
  # All of one length: padding would otherwise vary along with the quantity.
  return config, planner.Lengths(length, prompt_fraction=0.5, sigma=0.0)


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the points of an earlier run; returns none if there is no file.

  Raises:
    UserError: the file is something else.
  """
  if not file.exists():
    return []
  try:
    points = json.loads(file.read_text())["points"]
    whole = all({"axis", "value", "seconds", "planned_mb", "measured_mb"} <= {*x} for x in points)
  except (OSError, ValueError, KeyError, TypeError):
    whole = False
  if not whole:
    raise UserError(f"{file} contains no points of an earlier run; move it away")
  return points


def write(file: pathlib.Path, points: Sequence[dict[str, Any]]) -> None:
  """Writes them all, in place of what is there, or leaves that."""
  files.write_text(file, json.dumps({"points": points}, indent=1) + "\n")


def measure(axis: str, value: int) -> dict[str, Any]:
  """Measures one point, in a process that has measured no other.

  Returns:
    `planned_mb`, the compiler's sum of arguments and temporaries over all devices; `seconds` of the
    fastest of several steps; `measured_mb`, the peak memory beyond that before the step, None
    without /proc; `tokens` of the rows; `compile_seconds`. A step that needs more than a third of
    the free memory is not run: its `seconds` and `measured_mb` are None.
  """
  run = planner.outline(*configured(axis, value))
  began = time.perf_counter()
  compiled = run.compile()
  compile_seconds = time.perf_counter() - began
  about = compiled.memory_analysis()
  assert about is not None, "the compiler of this platform reports no memory"
  planned = about.argument_size_in_bytes + about.temp_size_in_bytes
  # Donated arguments are also outputs; they count once.
  planned += about.output_size_in_bytes - about.alias_size_in_bytes
  # The compiler's account is of one device; this process has all of them.
  planned *= len(run.executor.devices)
  found: dict[str, Any] = {
    "axis": axis,
    "value": value,
    "seconds": None,
    "planned_mb": planned / 2**20,
    "measured_mb": None,
    "tokens": int((run.batch.pair_NL >= 0).sum()),
    "compile_seconds": compile_seconds,
  }
  # Better left out than ended by the system in the middle of a figure.
  free = _field("/proc/meminfo", "MemAvailable")
  if free is None or planned < free / 3:
    found["seconds"], found["measured_mb"] = _run(run, compiled)
  return found


def check_axes(names: Sequence[str], flag: str) -> None:
  """Checks the names of quantities that a flag gives.

  Raises:
    UserError: one is not known.
  """
  for name in names:
    if name not in AXES:
      raise UserError(f"{flag}: {name!r} does not grow; known are {', '.join(AXES)}")


def missing(points: Sequence[dict[str, Any]], axis: str, most: int | None) -> list[int]:
  """Returns the values of a quantity, up to `most`, that have not been measured."""
  known = {one["value"] for one in points if one["axis"] == axis}
  most = most or max(AXES[axis].values)
  return [x for x in AXES[axis].values if x <= most and x not in known]


def measure_apart(
  command: Sequence[str], axis: str, value: int, limit_s: float
) -> dict[str, Any] | None:
  """Measures a point in a process of its own and prints a line about it.

  Args:
    command: prints what `measure` returns as JSON, given `--point=AXIS=VALUE`.
    axis, value: the point.
    limit_s: seconds after which it is given up.

  Returns:
    The point; None where its process fails or takes too long.
  """
  # A process of its own: memory that an earlier point has freed may stay with the process, and
  # would hide what this point needs.
  words = [*command, f"--point={axis}={value}"]
  try:
    # Standard error is left to the terminal, where a failure is seen as it happens.
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=limit_s)
  except subprocess.TimeoutExpired:
    why = f"took more than --limit={limit_s} seconds"
  except subprocess.CalledProcessError as error:
    why = f"failed ({error.returncode})"
  else:
    found = json.loads(done.stdout)
    took = "not run" if found["seconds"] is None else f"{found['seconds']:.3f} s"
    planned = f"{found['planned_mb']:,.0f} MB by the compiler"
    print(f"{axis} {value}: {took}, {planned}", file=sys.stderr)
    return found
  print(f"{axis} {value}: left out; its process {why}", file=sys.stderr)
  return None


def _run(run: planner.Outline, compiled: jax.stages.Compiled) -> tuple[float, float | None]:
  """Returns the seconds of the fastest step, all values being zeros, and the peak memory in MB."""
  batch = run.executor.place_batch(run.batch)
  zeros = lambda x: jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
  gc.collect()
  if sys.platform.startswith("linux"):
    ctypes.CDLL(None).malloc_trim(0)  # returns what compilation had used to the system
  before = _field("/proc/self/status", "VmRSS")
  state, reference = jax.tree.map(zeros, (run.state, run.reference))
  # Two steps or more: the first touches its memory for the first time.
  times: list[float] = []
  while len(times) < 2 or (len(times) < 8 and sum(times) < 8):
    # At each step, so that the peak is that of a step, not of compilation.
    _forget_most_held()
    began = time.perf_counter()
    state, _ = compiled(state, reference, batch)
    # A call returns before its work is done; without this only the launch is timed.
    jax.block_until_ready(state)
    times.append(time.perf_counter() - began)
  most = _field("/proc/self/status", "VmHWM")
  held = None if most is None or before is None else (most - before) / 2**20
  return min(times), held


def _field(path: str, name: str) -> int | None:
  """Reads a size in bytes from a file of /proc; returns None without that file."""
  try:
    lines = pathlib.Path(path).read_text().splitlines()
  except OSError:
    return None
  return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)


def _forget_most_held() -> None:
  """Resets the peak memory that the system has recorded for this process."""
  with contextlib.suppress(OSError):
    # Writing 5 resets VmHWM alone: proc(5).
    pathlib.Path("/proc/self/clear_refs").write_text("5")
