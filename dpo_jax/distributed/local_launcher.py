"""Several processes of one command on this machine, each with a share of its processors.

XLA spreads the small operations of a small model over threads at more cost than gain. Processes of
one processor each, which take a part of every batch, do not; each holds a copy of everything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from dpo_jax.structs import UserError


def shares(processes: int, cores: Sequence[int]) -> list[list[int]]:
  """Processors of each process, as even as they can be.

  Raises:
    UserError: more processes than processors, or none.
  """
  if not 1 <= processes <= len(cores):
    raise UserError(
      f"{processes} processes: this machine lends {len(cores)} processors; give 1 to {len(cores)}"
    )
  at = [len(cores) * i // processes for i in range(processes + 1)]
  return [list(cores[start:stop]) for start, stop in itertools.pairwise(at)]


def commands(command: Sequence[str], processes: int, port: int) -> list[list[str]]:
  """The command with the flags by which they find each other, before a pace that ends it."""
  words, pace = list(command), []
  if words[-1].startswith("{"):
    pace = [words.pop()]
  place = {"coordinator": f"127.0.0.1:{port}", "processes": processes}
  flags = lambda i: [f"--config.parallel.{k}={v}" for k, v in {**place, "process": i}.items()]
  return [[*words, *flags(i), *pace] for i in range(processes)]


def run(command: Sequence[str], processes: int) -> int:
  """Runs all of them to their end; what asks one to stop asks all.

  Each reads what this process reads. The first alone prints; what others say of errors is told
  at the end, unless the first failed likewise.

  Raises:
    OSError: the command cannot be started.

  Returns:
    The first exit status that is not 0, of the processes in turn, 128 + N of one that signal N
    ended; 0 if there is none.
  """
  # macOS binds no process to processors; each then has as many threads as its share.
  bound = hasattr(os, "sched_setaffinity")
  cores = sorted(os.sched_getaffinity(0)) if bound else range(os.cpu_count() or 1)
  owned = shares(processes, cores)
  started: list[subprocess.Popen[bytes]] = []

  def stop(number: int, frame: object) -> None:
    del frame
    for one in started:
      if one.poll() is None:
        one.send_signal(number)

  signal.signal(signal.SIGTERM, stop)
  # A terminal sends Ctrl-C to all of them itself; twice, it would cut short how they end.
  signal.signal(signal.SIGINT, lambda *_: None)
  with contextlib.ExitStack() as stack:
    errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in owned]
    for i, words in enumerate(commands(command, processes, _free_port())):
      one = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if i else None,
        stderr=errors[i] if i else None,
        env={**os.environ, "NPROC": str(len(owned[i]))},
      )
      if bound:
        os.sched_setaffinity(one.pid, owned[i])
      started.append(one)
    inputs = [one.stdin for one in started if one.stdin is not None]
    threading.Thread(target=_copy, args=(inputs,), daemon=True).start()
    codes = [one.wait() for one in started]
    killed = [f"signal {-code} ended process {i}" for i, code in enumerate(codes) if code < 0]
    if killed:
      print(f"error: {', '.join(killed)}", file=sys.stderr)
    for code, file in zip(codes, errors, strict=True):
      file.seek(0)
      said = file.read()
      if code != codes[0] or b"Traceback" in said:
        sys.stderr.write(said.decode(errors="replace"))
  first = next((code for code in codes if code), 0)
  return 128 - first if first < 0 else first


def _copy(inputs: Sequence[IO[bytes]]) -> None:
  """What this process is given, to all that still read; then their inputs end."""
  # Past Python's buffer, whose lock would be held when the interpreter ends.
  while data := os.read(0, 2**16):
    for one in inputs:
      try:
        one.write(data)
        one.flush()
      except (BrokenPipeError, ValueError):
        continue
  for one in inputs:
    try:
      one.close()
    except BrokenPipeError:
      continue


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
