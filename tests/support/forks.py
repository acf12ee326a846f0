"""Starts Python programs as copies of a process that has imported what training imports.

A new interpreter reads modules for three seconds of processor time before a run does anything; a
copy has them. `start` takes the place of `subprocess.Popen` where the start is not what is tested.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from tests.support.paths import ROOT


class Started:
  """A program that was started, with the methods of `subprocess.Popen` that tests call.

  Attributes:
    pid: of the process.
    returncode: None until the program was found to have ended.
  """

  def __init__(self, folder: pathlib.Path, pid: int):
    self._folder, self.pid = folder, pid
    self.returncode: int | None = None

  def poll(self) -> int | None:
    """Returns the exit status, minus the signal where one ended it; None while it runs."""
    ended = self._folder / "status"
    if self.returncode is None and ended.is_file():
      self.returncode = int(ended.read_text())
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal, unless the program has ended."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    """Ends the program at once."""
    self.send_signal(signal.SIGKILL)

  def communicate(self, timeout: float = 240) -> tuple[str, str]:
    """Waits for the end of the program; returns what it wrote to stdout and to stderr."""
    until = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > until:
        raise subprocess.TimeoutExpired(str(self._folder), timeout)
      time.sleep(0.01)
    out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
    return out, err


def start(command: Sequence[object], env: Mapping[str, str] = os.environ) -> Started:
  """Starts `PYTHON -m MODULE ARGUMENTS` or `PYTHON -c CODE ARGUMENTS` in the project's root."""
  folder = pathlib.Path(tempfile.mkdtemp(dir=_outputs()))
  request = {"words": [*map(str, command[1:])], "env": dict(env), "folder": str(folder)}
  server = _server()
  assert server.stdout is not None  # a pipe
  print(json.dumps(request), file=server.stdin, flush=True)
  return Started(folder, int(server.stdout.readline()))


@functools.cache
def _outputs() -> str:
  """Makes a folder for what programs write, which is removed at the end of this process."""
  folder = tempfile.mkdtemp(prefix="forks")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


@functools.cache
def _server() -> subprocess.Popen:
  """Starts the process that is copied; it ends with this one."""
  server = subprocess.Popen(
    [sys.executable, "-m", "tests.support.forks"],
    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  atexit.register(server.communicate)  # closes stdin
  return server


def _serve() -> list[str] | None:
  """Makes a copy for every request; returns in a copy, with the words of its program."""
  while line := sys.stdin.readline():
    request = json.loads(line)
    if os.fork() == 0:
      # A process between waits for the program, whose parent alone learns how it ended.
      program = os.fork()
      if program == 0:
        _become(request)
        return request["words"]
      print(program, flush=True)
      status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
      part = pathlib.Path(request["folder"], "part")
      part.write_text(str(status))
      part.rename(part.with_name("status"))
      os._exit(0)
    _forget_ended()
  _forget_ended()  # so that their processor time counts as that of this process
  return None


def _forget_ended() -> None:
  """Takes note of every child that has ended, as a parent must."""
  try:
    while os.waitpid(-1, os.WNOHANG)[0] != 0:
      pass
  except ChildProcessError:
    pass


def _become(request: dict) -> None:
  """Gives a copy its own environment, files and handling of Ctrl-C."""
  folder, env = pathlib.Path(request["folder"]), request["env"]
  names = (os.devnull, folder / "out", folder / "err")
  for number, name in enumerate(names):
    file = os.open(name, os.O_RDWR | os.O_CREAT)
    os.dup2(file, number)
    os.close(file)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  # JAX read its settings when it was imported; XLA reads its flags at the first computation.
  changed = {
    name: value
    for name, value in env.items()
    if os.environ.get(name) != value and name.lower() in jax.config.values
  }
  os.environ.clear()
  os.environ.update(env)
  for name, value in changed.items():
    kind = type(jax.config.values[name.lower()])
    jax.config.update(name.lower(), kind(value) if kind in (int, float) else value)


if __name__ == "__main__":
  import jax

  from dpo_jax import train  # noqa: F401 (what follows is imported for the copies)
  from dpo_jax.monitoring import plots  # noqa: F401
  from dpo_jax.utils import cli  # noqa: F401

  if (words := _serve()) is not None:
    kind, program, *arguments = words
    sys.argv = [program, *arguments]
    if kind == "-c":
      exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
      runpy.run_module(program, run_name="__main__", alter_sys=True)
