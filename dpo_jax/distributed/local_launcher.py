"""Runs several processes of one command on this machine, each bound to some of its processors.

For a small model, XLA loses more by spreading its small operations over threads than it gains.
Processes of one processor each, with a part of every batch, avoid that; each of them stores a copy
of all parameters.
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


def divide_cores(processes: int, cores: Sequence[int]) -> list[list[int]]:
  """Returns the processors of each process, divided as evenly as possible.

  Raises:
    UserError: `processes` is less than 1 or more than there are processors.
  """
  if not 1 <= processes <= len(cores):
    raise UserError(
      f"{processes} processes: this machine lends {len(cores)} processors; give 1 to {len(cores)}"
    )
  at = [len(cores) * i // processes for i in range(processes + 1)]
  return [list(cores[start:stop]) for start, stop in itertools.pairwise(at)]


def commands(command: Sequence[str], processes: int, port: int) -> list[list[str]]:
  """Returns the command of each process, with the flags by which the processes find each other.

  Args:
    command: program and flags. A last word that starts with "{" is the pace of a benchmark (see
      `benchmarking.pacing`), which has to stay last.
    processes: how many.
    port: the port of process 0.
  """
  words, pace = list(command), []
  if words[-1].startswith("{"):
    pace = [words.pop()]

  def flags(process: int) -> list[str]:
    settings = {"coordinator": f"127.0.0.1:{port}", "processes": processes, "process": process}
    return [f"--config.parallel.{name}={value}" for name, value in settings.items()]

  return [[*words, *flags(i), *pace] for i in range(processes)]


def run(command: Sequence[str], processes: int) -> int:
  """Runs the processes to their end, and passes SIGTERM on to all of them.

  Every process gets a copy of this process's standard input. Only process 0 prints. The error
  output of all is collected, and printed at the end for a process whose exit status differs from
  that of process 0, or that ended with a trace.

  Raises:
    OSError: the command cannot be started.

  Returns:
    The first exit status other than 0, in the order of the processes, or 0. A process that signal N
    ended counts as 128 + N, as in shells.
  """
  # macOS cannot bind a process to processors; there only NPROC limits its threads.
  bound = hasattr(os, "sched_setaffinity")
  cores = sorted(os.sched_getaffinity(0)) if bound else range(os.cpu_count() or 1)
  owned = divide_cores(processes, cores)
  started: list[subprocess.Popen[bytes]] = []

  def forward_signal(number: int, frame: object) -> None:
    del frame
    for process in started:
      if process.poll() is None:
        process.send_signal(number)

  signal.signal(signal.SIGTERM, forward_signal)
  # A terminal sends Ctrl-C to the children too. A second one from here would interrupt them while
  # they save and end. This process ignores it and waits for them.
  signal.signal(signal.SIGINT, lambda *_: None)
  with contextlib.ExitStack() as stack:
    errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in owned]
    for i, words in enumerate(commands(command, processes, _free_port())):
      process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if i else None,
        stderr=errors[i] if i else None,
        env={**os.environ, "NPROC": str(len(owned[i]))},
      )
      if bound:
        os.sched_setaffinity(process.pid, owned[i])
      started.append(process)
    inputs = [process.stdin for process in started if process.stdin is not None]
    # A daemon: it may still wait for input that never comes when all processes have ended.
    threading.Thread(target=_copy_stdin, args=(inputs,), daemon=True).start()
    codes = [process.wait() for process in started]
    killed = [f"signal {-code} ended process {i}" for i, code in enumerate(codes) if code < 0]
    if killed:
      print(f"error: {', '.join(killed)}", file=sys.stderr)
    for code, file in zip(codes, errors, strict=True):
      file.seek(0)
      output = file.read()
      # An error that all processes have is printed once, by process 0.
      if code != codes[0] or b"Traceback" in output:
        sys.stderr.write(output.decode(errors="replace"))
  failed = next((code for code in codes if code), 0)
  return 128 - failed if failed < 0 else failed  # Popen reports signal N as -N


def _copy_stdin(inputs: Sequence[IO[bytes]]) -> None:
  """Copies standard input to every process that still reads, then closes their inputs."""
  # os.read and not sys.stdin, whose lock this thread would still own when the interpreter ends.
  while data := os.read(0, 2**16):
    for file in inputs:
      try:
        file.write(data)
        file.flush()
      except (BrokenPipeError, ValueError):  # this process has ended; the others still read
        continue
  for file in inputs:
    try:
      file.close()
    except BrokenPipeError:
      continue


def _free_port() -> int:
  # Another program could still take the port before process 0 opens it; there is no way to keep it.
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
