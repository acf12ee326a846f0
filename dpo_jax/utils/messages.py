"""Lines on stderr for people: warnings and notes, which wrap between words in a terminal.

A file gets one line for each message, so that it can be searched. In a terminal a line would break
in the middle of a flag or a path, which could then not be copied.
"""

from __future__ import annotations

import shutil
import sys
import textwrap


def warn(text: str) -> None:
  """Prints `warning: …` on stderr."""
  show(f"warning: {text}")


def show(text: str) -> None:
  """Prints lines on stderr."""
  if sys.stderr.isatty():
    text = wrap(text, shutil.get_terminal_size().columns)
  print(text, file=sys.stderr, flush=True)


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
