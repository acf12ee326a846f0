"""Lines for people: results, notes and warnings, which wrap between words in a terminal.

A file gets one line for each message, so that it can be searched. In a terminal a line would break
in the middle of a flag or a path, which could then not be copied. A line that is one whole command
is printed as it is: wrapped, it could not be copied either.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO


def warn(text: str) -> None:
  """Prints `warning: …` on stderr."""
  show(f"warning: {text}")


def show(text: str) -> None:
  """Prints lines on stderr: what happens."""
  _print(text, sys.stderr)


def say(text: str) -> None:
  """Prints lines on stdout: what came out."""
  _print(text, sys.stdout)


def say_command(label: str, command: str) -> None:
  """Prints `label: command` on stdout; the command on a line of its own where both do not fit.

  It is never wrapped by us: a terminal that breaks it still copies it as one line.
  """
  line = f"{label}: {command}"
  if sys.stdout.isatty() and len(line) > shutil.get_terminal_size().columns:
    line = f"{label}:\n{command}"
  print(line, flush=True)


def _print(text: str, stream: TextIO) -> None:
  if stream.isatty():
    text = wrap(text, shutil.get_terminal_size().columns)
  print(text, file=stream, flush=True)


def wrap(text: str, width: int) -> str:
  """Breaks the lines of a text at spaces alone, so that flags and paths stay whole.

  Lines that begin in the middle of a message are indented by two more spaces.
  """
  return "\n".join(
    part
    for line in text.splitlines()
    for part in _wrap_line(line, width, indent=len(line) - len(line.lstrip()))
  )


def _wrap_line(line: str, width: int, indent: int) -> list[str]:
  if len(line) <= width:
    return [line]
  return textwrap.wrap(
    line.lstrip(),
    width,
    initial_indent=" " * indent,
    subsequent_indent=" " * (indent + 2),
    break_long_words=False,
    break_on_hyphens=False,
  )
