"""Times programs in turns on one machine, and compares each with the fastest peer.

A contestant follows the protocol of `pacing`; its last argument is a pace. On shared machines rates
vary by more than the differences of interest. So the result is the ratio of two programs in the
same round, and its median over rounds. Rates are measured in tokens, since blocks differ in the
lengths of their rows, and reported in pairs of mean length. A contestant that fails gets a row with
the reason.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.benchmarking import pacing
from dpo_jax.benchmarking.pacing import Pace

# Words that programs print when they run out of memory.
_NO_MEMORY = ("out of memory", "outofmemory", "resource_exhausted", "bad_alloc", "cannot allocate")


class Contestant(NamedTuple):
  """A program that takes part.

  Attributes:
    name: name in tables, and of its log file.
    command: its command, without the pace.
    peer: True if others may be compared with it.
    prepare: True if it runs once beforehand, for one step, untimed.
    environment: environment variables in addition to those of this process.
  """

  name: str
  command: tuple[str, ...]
  peer: bool = False
  prepare: bool = False
  environment: Mapping[str, str] = {}


class Rules(NamedTuple):
  """The rules by which rounds are run.

  Attributes:
    rounds: number of rounds that count.
    pace: pace of a contestant in one round.
    loaded: True if all stay loaded and alternate block by block; False if each round starts each
      program afresh, one at a time.
    spare: number of rounds that may be repeated because other programs were running.
    max_other: cores that other programs may use in a round that counts.
    quiet_s: seconds that a block waits at most for other programs to stop.
  """

  rounds: int
  pace: Pace
  loaded: bool = True
  spare: int = 4
  max_other: float = 0.12
  quiet_s: float = 60.0


class StoppedError(Exception):
  """A contestant ended early; the message is the reason for its row."""


class Program:
  """A running contestant."""

  def __init__(self, contestant: Contestant, pace: Pace, log: pathlib.Path):
    self.log = log
    self.result: dict[str, Any] = {}
    # A file, since a pipe that nobody reads fills up and stops the program. Appended to, since a
    # program may be started in every round.
    with log.open("ab") as errors:
      self.process = subprocess.Popen(
        [*contestant.command, json.dumps(pace._asdict())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **contestant.environment},
      )
    # Both are pipes, as requested above.
    assert self.process.stdin is not None and self.process.stdout is not None
    self._stdin, self._stdout = self.process.stdin, self.process.stdout

  def receive(self, wanted: str) -> Any:
    """Waits for the next message of a kind.

    Raises:
      StoppedError: the program ended without it.
    """
    for line in self._stdout:
      if line.startswith("@"):
        message = json.loads(line[1:])
        if wanted in message:
          return message[wanted]
      elif line.startswith("{"):
        self.result = json.loads(line)
    raise StoppedError(self.reason())

  def block(self) -> dict[str, Any]:
    """Runs one block and returns its report."""
    try:
      self._stdin.write("go\n")
      self._stdin.flush()
    # It ended between two blocks.
    except BrokenPipeError:
      raise StoppedError(self.reason()) from None
    return self.receive("block")

  def close(self, patience_s: float = 300.0) -> None:
    """Closes its input, waits for its end, and keeps the JSON object that it prints last."""
    try:
      # It closes the input, at which a program in lockstep ends, and reads what is left of the
      # output, which would block the program when full.
      rest, _ = self.process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
      self.process.kill()
      rest, _ = self.process.communicate()
    for line in rest.splitlines():
      if line.startswith("{"):
        self.result = json.loads(line)

  def end(self) -> None:
    """Kills it, if it has not ended."""
    self.process.kill()
    self.process.communicate()

  def reason(self) -> str:
    """Returns the reason why it ended, from its exit status and its log."""
    # Its output has ended, so it is about to exit.
    code = self.process.wait()
    # A program that was killed may have left half a character.
    lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    text = "\n".join(lines[-200:]).lower()
    # Linux ends a program that uses up the memory by SIGKILL; through a shell that is status 137.
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or any(x in text for x in _NO_MEMORY):
      return "out of memory"
    return f"failed ({code}): {lines[-1].strip()[:200] if lines else 'no output'}"


def wait_for_quiet(limit_s: float, window_s: float = 0.4, cores: float = 0.1) -> bool:
  """Waits until other programs use almost no processor time; returns False if the limit passes."""
  until = time.monotonic() + limit_s
  while time.monotonic() < until:
    with pacing.Meter() as meter:
      time.sleep(window_s)
    if meter.other_cores < cores:
      return True
  return False


def compete(
  contestants: Sequence[Contestant],
  rules: Rules,
  logs: pathlib.Path,
  say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
  """Runs all rounds.

  Args:
    contestants: the programs.
    rules: the rules.
    logs: folder for their standard errors.
    say: prints a line of progress.

  Returns:
    `rounds`, each with `clean` (no other programs ran) and the `blocks` of every contestant by its
    name; `failed`, reasons by name; `results`, the last JSON object of each.
  """
  logs.mkdir(parents=True, exist_ok=True)
  for contestant in contestants:
    # A line of an earlier comparison must not pass for the reason of a failure.
    (logs / f"{contestant.name}.log").unlink(missing_ok=True)
  field = _Field(rules, logs, say)
  rounds: list[dict[str, Any]] = []
  try:
    for contestant in contestants:
      field.enter(contestant)
    for number in range(field.most):
      # Rounds that other programs disturbed are repeated, as far as spare ones go.
      if sum(one["clean"] for one in rounds) >= rules.rounds:
        break
      # The order rotates, so that no contestant always runs first.
      first = number % len(contestants)
      blocks = field.round([*contestants[first:], *contestants[:first]])
      if not blocks:
        break
      # The worst block decides: one that was disturbed spoils the ratios of its round.
      others = max(block["other_cores"] for some in blocks.values() for block in some)
      rounds.append({"clean": others <= rules.max_other, "blocks": blocks})
      rates = ", ".join(f"{name} {_rate(some):,.0f}" for name, some in blocks.items())
      say(f"round {number + 1}, other programs at most {others:.2f} cores; tokens/s: {rates}")
    for name in list(field.programs):
      field.stop(name)
  finally:
    # Also after an interrupt: a program that went on would disturb all that is measured next.
    for program in field.programs.values():
      program.end()
  return {"rounds": rounds, "failed": field.failed, "results": field.results}


class _Field:
  """The running programs; one that fails is removed, with the reason in `failed`."""

  def __init__(self, rules: Rules, logs: pathlib.Path, say: Callable[[str], None]):
    self.rules, self.logs, self.say = rules, logs, say
    self.most = rules.rounds + (rules.spare if rules.loaded else 0)
    turns = self.most if rules.loaded else 1
    # A loaded program is told at its start how many blocks there may be: spare rounds included.
    self.pace = rules.pace._replace(lockstep=True, blocks=rules.pace.blocks * turns)
    self.programs: dict[str, Program] = {}
    self.failed: dict[str, str] = {}
    self.results: dict[str, Any] = {}

  def enter(self, contestant: Contestant) -> None:
    """Prepares a contestant, and starts it if programs stay loaded."""
    if contestant.prepare:
      self._attempt(contestant, self._prepare)
    if self.rules.loaded and contestant.name not in self.failed:
      self._attempt(contestant, self._start)

  def round(self, order: Sequence[Contestant]) -> dict[str, list[dict[str, Any]]]:
    """Runs a round; returns the blocks of every contestant that has not failed, by name."""
    playing = [each for each in order if each.name not in self.failed]
    blocks = {each.name: self._attempt(each, self._turn) for each in playing}
    return {name: some for name, some in blocks.items() if some}

  def stop(self, name: str) -> None:
    """Ends a program that has run all its blocks, and keeps its result."""
    program = self.programs.pop(name)
    program.close()
    self.results[name] = program.result

  def _attempt(self, contestant: Contestant, do: Callable[[Contestant], Any]) -> Any:
    """Returns what `do` returns; if the contestant fails, notes the reason and returns None."""
    try:
      return do(contestant)
    except StoppedError as reason:
      self.failed[contestant.name] = str(reason)
      self.programs.pop(contestant.name).end()
      self.say(f"{contestant.name}: {reason}")

  def _launch(self, contestant: Contestant, pace: Pace) -> Program:
    program = Program(contestant, pace, self.logs / f"{contestant.name}.log")
    # Known before it is waited for, so that it is ended if it fails meanwhile.
    self.programs[contestant.name] = program
    return program

  def _prepare(self, contestant: Contestant) -> None:
    # Not in lockstep, so that it runs through and ends by itself.
    program = self._launch(contestant, Pace(1, 1, 1))
    # To fill a reference store takes a forward pass over all rows, perhaps for hours.
    program.close(patience_s=24 * 3600)
    if program.process.returncode:
      raise StoppedError(program.reason())
    del self.programs[contestant.name]

  def _start(self, contestant: Contestant) -> None:
    self._launch(contestant, self.pace).receive("ready")

  def _turn(self, contestant: Contestant) -> list[dict[str, Any]]:
    if not self.rules.loaded:
      self._start(contestant)
    blocks = []
    for _ in range(self.rules.pace.blocks):
      wait_for_quiet(self.rules.quiet_s)
      blocks.append(self.programs[contestant.name].block())
    if not self.rules.loaded:
      self.stop(contestant.name)
    return blocks


def _rate(blocks: Sequence[dict[str, Any]]) -> float:
  """Returns the median tokens per second of a round; a prompt counts with each completion."""
  return statistics.median(block["tokens"] / block["wall_s"] for block in blocks)


def summary(
  contestants: Sequence[Contestant], found: dict[str, Any], tokens_per_pair: float
) -> tuple[str | None, dict[str, dict[str, Any]]]:
  """Summarizes the rounds of a comparison.

  Clean rounds count; if there are none, all do.

  Args:
    contestants: the programs.
    found: what `compete` returned.
    tokens_per_pair: mean tokens of a pair, the prompt counted with each completion.

  Returns:
    The name of the fastest peer, which ratios are taken to, and a row for each contestant:
    `failed`, a reason or None; medians `pairs_per_s` (pairs of mean length) and `tokens_per_s`;
    `ratio`, `ratio_min` and `ratio_max` within a round, None without a block of the peer;
    `peak_memory_mb`; the number of `rounds` used, and of `clean` ones; `command`; `result`, its
    last JSON object.
  """
  used = [one for one in found["rounds"] if one["clean"]] or found["rounds"]
  rates = {
    c.name: [_rate(one["blocks"][c.name]) for one in used if c.name in one["blocks"]]
    for c in contestants
  }
  peers = [c.name for c in contestants if c.peer and rates[c.name]]
  # The fastest peer: a ratio to a slow setting of it would flatter.
  base = max(peers, key=lambda name: statistics.median(rates[name]), default=None)
  return base, {c.name: _row(c, found, used, base, tokens_per_pair) for c in contestants}


def _row(
  contestant: Contestant,
  found: dict[str, Any],
  used: list[dict[str, Any]],
  base: str | None,
  tokens_per_pair: float,
) -> dict[str, Any]:
  name = contestant.name
  mine = [one["blocks"] for one in used if name in one["blocks"]]
  # Within a round, where both met the same machine: what drifts between rounds cancels.
  ratios = [_rate(one[name]) / _rate(one[base]) for one in mine if base in one]
  # Of all rounds: other programs change the speed of this one, not its memory.
  blocks = [block for one in found["rounds"] for block in one["blocks"].get(name, ())]
  rate = statistics.median(_rate(one[name]) for one in mine) if mine else None
  return {
    "failed": found["failed"].get(name),
    "pairs_per_s": rate and rate / tokens_per_pair,
    "tokens_per_s": rate,
    "ratio": statistics.median(ratios) if ratios else None,
    "ratio_min": min(ratios, default=None),
    "ratio_max": max(ratios, default=None),
    "peak_memory_mb": max((block["peak_memory_mb"] for block in blocks), default=None),
    "rounds": len(mine),
    "clean": sum(one["clean"] for one in found["rounds"] if name in one["blocks"]),
    "command": list(contestant.command),
    "result": found["results"].get(name),
  }


def table(base: str | None, rows: dict[str, dict[str, Any]]) -> str:
  """Formats the rows of `summary` as a table in Markdown."""

  def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

  lines = [
    f"| program | pairs/s | times {base or 'the peer'} (least to most) | peak MB | rounds |",
    "|---|---|---|---|---|",
  ]
  for name, row in rows.items():
    if row["pairs_per_s"] is None:
      lines.append(f"| {name} | {row['failed'] or 'not run'} | – | – | – |")
      continue
    spread = f" ({number(row['ratio_min'], '.2f')}–{number(row['ratio_max'], '.2f')})"
    lines.append(
      f"| {name} | {row['pairs_per_s']:.3g} | {number(row['ratio'], '.2f')}"
      f"{spread if row['ratio'] is not None else ''} | {number(row['peak_memory_mb'], ',.0f')}"
      f" | {row['rounds']}{'; then ' + row['failed'] if row['failed'] else ''} |"
    )
  return "\n".join(lines) + "\n"
