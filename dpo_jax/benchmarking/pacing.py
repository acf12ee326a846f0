"""How a benchmark is paced: alone, or in turns with others on one machine.

In turns, a driver starts every program and waits until it says `@{"ready": true}`. From then on one
line `go` on its standard input runs one block, which it reports as `@{"block": {…}}`; meanwhile the
others wait. A program ends when it has run its blocks or its input is closed.

Imports the standard library alone: programs of other libraries take their turns by it too.
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
  """How many steps are taken, and when.

  Attributes:
    blocks: timed blocks.
    block_steps: steps of a block.
    warmup: steps before the first, not timed, besides those that compile every shape.
    lockstep: whether each block waits to be asked for.
  """

  blocks: int
  block_steps: int
  warmup: int = 0
  lockstep: bool = False

  @property
  def steps(self) -> int:
    """All there are, at most."""
    return self.warmup + self.blocks * self.block_steps


def read(text: str, usual: Pace) -> Pace:
  """A pace from a JSON object of its fields; those not given are as in `usual`.

  Raises:
    UserError: no object, a field that is not known, or a value that it cannot have.
  """
  from dpo_jax.structs import UserError  # which loads jax

  known = ", ".join(Pace._fields)
  try:
    given = json.loads(text)
  except json.JSONDecodeError as error:
    given = None
    if text.startswith("{"):
      raise UserError(f"{text!r} is no JSON: {error}") from None
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
      right = isinstance(value, int) and not isinstance(value, bool) and value >= least
      what = f"a whole number, {least} or more"
    if not right:
      raise UserError(f"{name} is {value!r} in {text!r}; it must be {what}")
  return usual._replace(**given)


def turns(
  pace: Pace, source: TextIO | None = None, say: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Yields once for every block, when it is to run: what takes the block's report.

  Args:
    pace: of which `blocks` and `lockstep` are read.
    source: of the lines `go`; standard input unless given.
    say: sends a message; to standard output unless given.
  """
  source = sys.stdin if source is None else source
  say = _say if say is None else say
  if pace.lockstep:
    say({"ready": True})
  for _ in range(pace.blocks):
    if pace.lockstep and source.readline().strip() != "go":
      return
    yield (lambda block: say({"block": block})) if pace.lockstep else (lambda block: None)


def _say(message: dict[str, Any]) -> None:
  print("@" + json.dumps(message), flush=True)


class Meter:
  """What a block of work took of this machine, inside `with`.

  Attributes:
    wall_s: seconds.
    cpu_s: of processor time, this process's and its threads'.
    other_cores: mean number of cores that all other programs used; 0 where there is no /proc.
  """

  def __enter__(self) -> Meter:
    self._busy, self._own, self._began = _busy_seconds(), _own_seconds(), time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    self.wall_s = time.perf_counter() - self._began
    self.cpu_s = _own_seconds() - self._own
    others = _busy_seconds() - self._busy - self.cpu_s
    self.other_cores = max(0.0, others) / max(self.wall_s, 1e-9)

  def report(self) -> dict[str, float]:
    """Its figures, and the memory that the process holds and has held at most, MB of 2^20 bytes."""
    return {
      "wall_s": self.wall_s,
      "cpu_s": self.cpu_s,
      "other_cores": round(self.other_cores, 3),
      "rss_mb": round(held_mb()),
      "peak_rss_mb": round(most_held_mb()),
    }


def _own_seconds() -> float:
  times = os.times()
  return times.user + times.system


def _busy_seconds() -> float:
  """Of processor time, spent on this machine by whatever was not idle or waiting for a disk."""
  try:
    first = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0]
  except OSError:
    return 0.0
  # user, nice, system, idle, iowait, irq, softirq, steal
  ticks = [int(x) for x in first.split()[1:9]]
  return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def held_mb() -> float:
  """Memory of this process now; the most so far where there is no /proc."""
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  except OSError:
    return most_held_mb()
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def most_held_mb() -> float:
  """The most memory that this process has held."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
