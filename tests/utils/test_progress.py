"""Progress: silent for what is quick, whole lines in a log, one line that fits in a terminal."""

import time

import pytest

from dpo_jax.utils import progress
from dpo_jax.utils.progress import Pace, Progress, State


class Clock:
  """A clock that a test sets."""

  now = 0.0

  def __call__(self) -> float:
    return self.now


def state(done=512.0, total=2048.0, unit="completions", elapsed=5.0, left=15.0, label="sampling"):
  return State(label, done, total, unit, elapsed, left)


def test_the_time_left_is_a_median_that_compilation_and_pauses_do_not_move():
  clock = Clock()
  pace = Pace(clock)
  assert pace.left(10) is None
  clock.now = 90.0  # compilation, before the first step
  pace.at(1)
  # Steps of half a second, and one with an evaluation of a minute.
  for step, seconds in ((2, 0.5), (3, 0.5), (4, 60.0), (5, 0.5)):
    clock.now += seconds
    pace.at(step)
  assert pace.left(10) == pytest.approx(5.0)


def test_parts_that_end_together_count_as_one_interval():
  clock = Clock()
  pace = Pace(clock)
  pace.at(0)
  # Three batches of 8 end every three seconds: a second for 8, though most intervals are empty.
  for done in range(8, 160, 24):
    clock.now += 3.0
    for more in (0, 8, 16):
      pace.at(done + more)
  assert pace.left(8) == pytest.approx(1.0)


def test_lines():
  assert progress.plain_line(state()) == "sampling: 512 of 2,048 completions, 0:15 left"
  assert progress.plain_line(state(total=0, left=None)) == (
    "sampling: 512 completions, 0:05 so far"
  )
  assert progress.plain_line(state(unit="", label="loading")) == "loading: 25%, 0:15 left"
  assert progress.plain_line(state(0, 0, "", left=None)) == "sampling: 0:05 so far"
  assert progress.closing_line(state(done=2048)) == "sampling: 2,048 completions in 0:05"
  assert progress.closing_line(state(done=1)) == "sampling: 1 completion in 0:05"
  assert progress.closing_line(state(done=1, unit="batches")) == "sampling: 1 batch in 0:05"
  assert progress.closing_line(state(done=1, unit="")) == "sampling: done in 0:05"
  assert progress.short_line(state()) == "sampling 512/2,048"
  assert [progress.clock(x) for x in (59.4, 61, 3661)] == ["0:59", "1:01", "1:01:01"]


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_line_of_a_terminal_is_never_wider(columns):
  line = progress.bar_line(state(), columns)
  assert len(line) < columns and line.startswith("sampling")
  if columns >= 80:
    assert line == f"sampling  {'━' * 6}{'╌' * 18}  0:15 left  512/2,048 completions"


@pytest.fixture
def at_once(monkeypatch):
  """Shows progress after a moment, not after seconds."""
  monkeypatch.setattr(progress, "AFTER", 0.01)
  monkeypatch.setattr(progress, "REDRAW", 0.01)
  monkeypatch.setattr(progress, "LINES", (0.01, 0.01))


def until_shown(one: Progress):
  """Waits for the thread that shows it."""
  for _ in range(1000):
    if one._shown:
      return
    time.sleep(0.01)
  pytest.fail("progress showed nothing in ten seconds")


def test_what_is_quick_says_nothing(capsys):
  with Progress("sampling", 2) as shown:
    shown.advance(2)
  assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("at_once")
def test_what_takes_time_is_counted_on_stderr_and_closes_with_a_line(capsys):
  with Progress("sampling", 4, "completions") as shown:
    for _ in shown.of(range(4)):
      until_shown(shown)
  out, err = capsys.readouterr()
  assert out == "" and err.splitlines()[-1] == "sampling: 4 completions in 0:00"
  assert all(line.startswith("sampling: ") for line in err.splitlines())


@pytest.mark.usefixtures("at_once")
def test_an_error_has_no_closing_line_and_nothing_is_shown_after_it(capsys):
  with pytest.raises(KeyError), Progress("sampling", 4, "completions") as shown:
    until_shown(shown)
    raise KeyError
  before = capsys.readouterr().err
  assert " in " not in before
  time.sleep(0.03)
  assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_only_the_inner_of_two_has_the_line(capsys):
  with Progress("outer"), Progress("inner") as inner:
    until_shown(inner)
  assert "outer:" not in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_within_training_its_bar_shows_it(capsys):
  shown = []
  with progress.shown_by(shown.append), Progress("evaluating", 8, "batches") as one:
    one.advance(3)
    until_shown(one)
    shown.clear()
    while not shown:  # redrawn
      time.sleep(0.01)
  assert shown[-2:] == ["evaluating 3/8", ""]
  assert capsys.readouterr() == ("", "")


def test_the_first_part_tells_nothing_of_the_time_left():
  """It takes a minute, most of which compiles; each of the others takes half a second."""
  seconds = [0.0]
  with progress.Progress("sampling", 100, "completions", now=lambda: seconds[0]) as shown:
    for passed, left in ((60.0, None), (0.5, 49.0), (0.5, 48.5)):
      seconds[0] += passed
      shown.advance()
      assert shown._state().left == left
