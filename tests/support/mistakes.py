"""The mistakes of docs/mistakes.md: reads the page, and makes each of them in a folder.

The page is the only list. Its left column is what was typed, its right column what is printed.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import grain.python  # noqa: F401 (defines flags when it is imported, which are to stay)
import pytest

import dpo_jax
from dpo_jax.hf import safetensors_files
from dpo_jax.structs import UserError
from dpo_jax.training import setup
from tests.support import in_process
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "mistakes.md"
TRAIN = "dpo-jax train --model model --data pairs.jsonl"
# Files that a row's left column is the content of, by the section, and how they are used.
FILES = {
  "Rows": ("rows", "dpo-jax train --model model --data {file}"),
  "YAML": ("my.yaml", "dpo-jax train --config {file}"),
}
HOME = "/home/me"  # stands on the page for the folder in which commands are run


class Mistake(NamedTuple):
  """One row of the page.

  Attributes:
    section: title of its table.
    typed: what was typed, or the content of a file.
    printed: the line, without `error: `.
    line: number of the row's line in the page.
  """

  section: str
  typed: str
  printed: str
  line: int

  @property
  def command(self) -> str:
    """The command, "" where the file or the call of Python is what was typed."""
    if self.section in FILES:
      name, command = FILES[self.section]
      return command.format(file=name if "." in name else f"{name}{self._suffix}")
    return self.typed.replace("…", TRAIN) if self.section != "Python" else ""

  @property
  def file(self) -> str:
    """The file that what was typed is the content of, "" if it is none."""
    return self.command.split()[-1] if self.section in FILES else ""

  @property
  def _suffix(self) -> str:
    return ".jsonl" if self.typed.lstrip()[:1] in "{[(/<" else ".csv"


def read(text: str) -> list[Mistake]:
  """Reads the rows of the page's tables."""
  found, section = [], ""
  for number, line in enumerate(text.splitlines()):
    if line.startswith("## "):
      section = line.removeprefix("## ")
    cells = re.split(r"(?<!\\)\|", line)
    if line.startswith("| `"):
      left, right = (cell.strip().replace("\\|", "|") for cell in cells[1:3])
      typed = "\n".join(map(_code, left.split("<br>")))
      found.append(Mistake(section, typed, _code(right) if right else "", number))
  return found


def _code(span: str) -> str:
  """Returns the content of a code span, which may begin and end with two backticks."""
  return re.sub(r"^(`+) ?(.*?) ?\1$", r"\2", span) if span.startswith("``") else span.strip("`")


def row(mistake: Mistake, printed: str) -> str:
  """Returns a row of the page with another right column."""
  left = "<br>".join(map(_span, mistake.typed.split("\n")))
  return f"| {left} | {_span(printed)} |"


def _span(text: str) -> str:
  text = text.replace("|", "\\|")
  return f"`` {text} ``" if "`" in text else f"`{text}`"


@contextlib.contextmanager
def nothing_expensive() -> Iterator[None]:
  """Fails a command that reads weights or begins to train."""

  def refuse(*given: object, **named: object) -> None:
    raise AssertionError("the mistake was not found before the weights were read")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setup, "construct", refuse)
    patch.setattr(safetensors_files.Weights, "read", refuse)
    yield


def make(mistake: Mistake, folder: pathlib.Path) -> str:
  """Makes a mistake in a folder, and returns the line that it prints, as the page has it.

  Raises:
    AssertionError: it is no mistake, or prints something else than one line at the end.
  """
  if mistake.file:
    (folder / mistake.file).write_text(mistake.typed + "\n", encoding="utf-8")
  with nothing_expensive():
    line = _call(mistake, folder) if mistake.section == "Python" else _run(mistake, folder)
  return line.replace(str(folder), HOME)


def _run(mistake: Mistake, folder: pathlib.Path) -> str:
  ended = in_process.run(mistake.command, folder)
  *before, last = ended.stderr.splitlines() or [""]
  assert ended.status == 1 and not ended.stdout, f"{mistake.typed}: {ended}"
  assert last.startswith("error: "), f"{mistake.typed}: {ended.stderr}"
  # What is known of the rows may precede it, each fact in a line of its own.
  assert not any(line.startswith(("error", "Traceback", " ")) for line in before), ended.stderr
  return last.removeprefix("error: ")


def _call(mistake: Mistake, folder: pathlib.Path) -> str:
  quiet = io.StringIO()
  with (
    contextlib.chdir(folder),
    contextlib.redirect_stderr(quiet),
    pytest.raises(UserError) as error,
  ):
    eval(mistake.typed, {"dpo_jax": dpo_jax})
  return str(error.value)
