"""The protocol by which benchmarks take turns on one machine, and the measurement of one block.

A driver starts every program and waits for its message `@{"ready": true}`. Then each line `go` on a
program's standard input runs one block, which the program reports as `@{"block": {…}}`; the others
wait meanwhile. A program ends after its last block, or when its input is closed.

This module imports the standard library alone, since programs without JAX use it too.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO


class Pace(NamedTuple):
  """The number of steps of a benchmark, and their division into blocks.

  Attributes:
    blocks: number of timed blocks.
    block_steps: steps per block.
    warmup: untimed steps before the first block, besides those that compile every shape.
    lockstep: True if each block waits for its line `go`.
  """

  blocks: int
  block_steps: int
  warmup: int = 0
  lockstep: bool = False

  @property
  def steps(self) -> int:
    """Total number of steps, at most."""
    return self.warmup + self.blocks * self.block_steps


def read(text: str, usual: Pace) -> Pace:
  """Reads a pace from a JSON object of its fields; missing ones are taken from `usual`.

  Raises:
    UserError: not a JSON object, an unknown field, or a value out of range.
  """
  from dpo_jax.structs import UserError  # imported here, since it loads jax

  known = ", ".join(Pace._fields)
  try:
    given = json.loads(text)
  except json.JSONDecodeError as error:
    given = None
    if text.startswith("{"):
      raise UserError(f"{text!r} is not JSON: {error}") from None
  if not isinstance(given, dict):
    raise UserError(
      f"unexpected argument {text!r}; beside --name=value only one JSON object of {known} is taken"
    )
  for name, value in given.items():
    if name not in Pace._fields:
      raise UserError(f"{name!r} in {text!r} is not known; known are {known}")
    if name == "lockstep":
      right, what = isinstance(value, bool), "true or false"
    else:
      least = 0 if name == "warmup" else 1
      # True is an int in Python.
      right = isinstance(value, int) and not isinstance(value, bool) and value >= least
      what = f"a whole number, {least} or more"
    if not right:
      raise UserError(f"{name} is {value!r} in {text!r}; it must be {what}")
  return usual._replace(**given)


def turns(
  pace: Pace, source: TextIO | None = None, say: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Yields once per block, when it should run, a function that takes the block's report.

  Args:
    pace: `blocks` and `lockstep` are read.
    source: stream of the lines `go`; by default standard input.
    say: sends a message; by default to standard output.
  """
  stream: TextIO = sys.stdin if source is None else source
  say = _say if say is None else say
  if pace.lockstep:
    say({"ready": True})
  for _ in range(pace.blocks):
    # At the end of the input `readline` returns "": a driver that is gone ends the program.
    if pace.lockstep and stream.readline().strip() != "go":
      return
    yield (lambda block: say({"block": block})) if pace.lockstep else (lambda block: None)


def _say(message: dict[str, Any]) -> None:
  # Flushed, since the driver waits for it; "@" tells messages from other output.
  print("@" + json.dumps(message), flush=True)


class Meter:
  """Context manager that measures the time of a block, and the load by other programs meanwhile.

  Attributes:
    wall_s: seconds.
    cpu_s: seconds of processor time of this process, all threads together.
    other_cores: mean number of cores that all other programs used; 0 without /proc.
  """

  def __enter__(self) -> Meter:
    self._busy, self._own, self._began = _busy_seconds(), _own_seconds(), time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    self.wall_s = time.perf_counter() - self._began
    self.cpu_s = _own_seconds() - self._own
    others = _busy_seconds() - self._busy - self.cpu_s
    # The system counts in ticks: for an idle machine the difference may come out below 0.
    self.other_cores = max(0.0, others) / max(self.wall_s, 1e-9)

  def report(self) -> dict[str, float]:
    """Returns the figures, with present and peak memory of the process in MB of 2^20 bytes."""
    return {
      "wall_s": self.wall_s,
      "cpu_s": self.cpu_s,
      "other_cores": round(self.other_cores, 3),
      "rss_mb": round(held_mb()),
      "peak_rss_mb": round(most_held_mb()),
    }


def _own_seconds() -> float:
  """Returns the processor time of this process so far."""
  # All threads of this process, and no child's.
  times = os.times()
  return times.user + times.system


def _busy_seconds() -> float:
  """Returns processor time spent on this machine so far, without idle time and disk waits."""
  try:
    first = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0]
  except OSError:
    return 0.0
  # user, nice, system, idle, iowait, irq, softirq, steal
  # The two fields behind these, guest and guest_nice, are contained in user and nice.
  ticks = [int(x) for x in first.split()[1:9]]
  return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def held_mb() -> float:
  """Returns the memory of this process now, in MB; without /proc the peak so far."""
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  except OSError:
    return most_held_mb()
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def most_held_mb() -> float:
  """Returns the peak memory of this process, in MB."""
  # ru_maxrss is in bytes on macOS, in units of 1,024 bytes elsewhere.
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
