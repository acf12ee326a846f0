"""docs/mistakes.md: each mistake prints the line that the page has, before anything expensive."""

import contextlib

import pytest

from tests.support import in_process, mistakes, newcomer

TEXT = mistakes.PAGE.read_text(encoding="utf-8")
ALL = mistakes.read(TEXT)
# ml_collections loads files in a way that Python 3.12 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The folder that the page describes."""
  folder = tmp_path_factory.mktemp("newcomer")
  with contextlib.chdir(folder):
    newcomer.write()
  return folder


def contents(folder):
  """Every file below a folder with its size and time, except mistakes themselves and locks."""
  own = {mistake.file for mistake in ALL} | {".lock"}
  return {
    path: (path.stat().st_size, path.stat().st_mtime_ns)
    for path in folder.rglob("*")
    if path.is_file() and path.name not in own
  }


@pytest.mark.parametrize("mistake", ALL, ids=[f"{m.section}-{m.typed[:60]}" for m in ALL])
def test_the_line_is_the_one_of_the_page(folder, mistake):
  before = contents(folder)
  line = mistakes.make(mistake, folder)
  assert line == mistake.printed, "run python -m tests.tools.mistakes_page, and read the change"
  assert contents(folder) == before


def test_there_are_sixty_of_them_and_no_two_alike():
  assert len({(mistake.section, mistake.typed) for mistake in ALL}) == len(ALL) >= 60


def test_rows_are_written_as_they_are_read():
  """What the tool writes is what this test reads, also `|` and backticks in a line."""
  lines = TEXT.splitlines()
  for mistake in ALL:
    assert lines[mistake.line] == mistakes.row(mistake, mistake.printed)
  (odd,) = mistakes.read("## Rows\n| `a`<br>`b` | x |")
  assert (odd.typed, odd.file) == ("a\nb", "rows.csv")
  (read,) = mistakes.read(mistakes.row(odd, "name `a|b`"))
  assert read.printed == "name `a|b`"


def test_what_is_no_mistake_is_not_passed_over(folder):
  right = mistakes.Mistake("Options", "…", "", 0)
  with pytest.raises(AssertionError, match="before the weights were read"):
    mistakes.make(right, folder)
  with pytest.raises(AssertionError, match="status=0"):
    mistakes.make(right._replace(typed="dpo-jax train --help"), folder)


def test_a_command_leaves_the_process_as_it_was(folder):
  first = in_process.run("dpo-jax train --loss sigmod --model model --data pairs.jsonl", folder)
  assert "did you mean 'sigmoid'?" in first.stderr
  assert "--num: no such flag" in in_process.run("dpo-jax score --num 1", folder).stderr
