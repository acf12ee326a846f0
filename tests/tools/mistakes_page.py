"""Writes the right column of docs/mistakes.md: makes every mistake, and puts there what is printed.

  python -m tests.tools.mistakes_page

The left column and all else is written by hand. What was printed before is compared by
tests/docs/test_mistakes.py, so that no line changes unseen.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile

import jax

from tests.support import mistakes, newcomer


def page(text: str, folder: pathlib.Path) -> str:
  """Returns the page with the lines that are printed in a folder."""
  lines = text.splitlines()
  for mistake in mistakes.read(text):
    lines[mistake.line] = mistakes.row(mistake, mistakes.make(mistake, folder))
  return "\n".join(lines) + "\n"


def main() -> None:
  """Rewrites the page."""
  jax.config.update("jax_num_cpu_devices", 8)  # as in the tests
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name).resolve()
    with contextlib.chdir(folder):
      newcomer.write()
    written = page(mistakes.PAGE.read_text(encoding="utf-8"), folder)
  mistakes.PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
  main()
