"""Runs a command in this process, where what `dpo-jax` imports is imported already."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from absl import app, flags

from dpo_jax.commands import console
from dpo_jax.utils import cli, interrupts

FLAGS = flags.FLAGS


class Ended(NamedTuple):
  """What a command left: its exit status, and what it printed."""

  status: int
  stdout: str
  stderr: str


def run(line: str, folder: pathlib.Path) -> Ended:
  """Runs a command line in a folder; an exception that is no exit is raised to the caller.

  Args:
    line: as it is typed in a shell, from `dpo-jax` on.
    folder: the working directory.
  """
  out, err = io.StringIO(), io.StringIO()
  status = 0
  with _process(shlex.split(line), folder), pytest.MonkeyPatch.context() as patch:
    patch.setattr(interrupts, "install", _nothing)
    patch.setattr(cli, "keep_freed_memory", _nothing)
    patch.setattr(app.logging, "use_absl_handler", _nothing)
    patch.setattr(app, "faulthandler", None)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        console.main()
      except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
  return Ended(status, out.getvalue(), err.getvalue())


def _nothing() -> None:
  """Does nothing, in place of what changes the whole process."""


@contextlib.contextmanager
def _process(words: list[str], folder: pathlib.Path) -> Iterator[None]:
  """Gives the process a command line, a folder and no flags but absl's, and takes them back."""
  argv, before, here = sys.argv, {*FLAGS}, pathlib.Path.cwd()
  environment = dict(os.environ)
  values = {name: FLAGS[name].value for name in before}
  sys.argv = words
  os.chdir(folder)
  try:
    yield
  finally:
    os.chdir(here)
    sys.argv = argv
    os.environ.clear()
    os.environ.update(environment)
    for name in {*FLAGS} - before:
      delattr(FLAGS, name)
    FLAGS.unparse_flags()
    for name, value in values.items():
      FLAGS[name].value = value
