"""Progress of what takes more than a few seconds: a line that is redrawn, or counted lines.

Nothing is shown for what takes less than three seconds. In a terminal one line on stderr is redrawn
with a bar and the time left; elsewhere lines are printed at growing intervals. While training shows
a bar of its own, the text goes there (`shown_by`).
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

AFTER = 3.0  # seconds without a word
REDRAW = 0.5  # seconds between redraws in a terminal
LINES = 10.0, 60.0  # seconds between the first lines elsewhere, and the longest between later ones
SHORTEST = 0.2  # seconds of an interval; parts that end together are one
RECENT = 25  # intervals whose median is the pace
BAR = 24

_T = TypeVar("_T")
# Called with a text, or with "" when it is over, in place of printing; None prints.
Display = Callable[[str], object]
_display: list[Display] = []
_running: list[Progress] = []  # the innermost last
_lock = threading.Lock()


class Pace:
  """The time that is left, by the median of recent intervals.

  The median leaves out what happens now and then: compilation, an evaluation, a checkpoint.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic):
    self._now = now
    self._last: tuple[float, float] | None = None  # what was done, and when
    self._seconds: deque[float] = deque(maxlen=RECENT)  # per unit of work

  def at(self, done: float) -> None:
    """Takes how much is done; the first call only starts the clock."""
    now = self._now()
    if self._last is None:
      self._last = done, now
    elif done > self._last[0] and now - self._last[1] >= SHORTEST:
      self._seconds.append((now - self._last[1]) / (done - self._last[0]))
      self._last = done, now

  def left(self, remaining: float) -> float | None:
    """Returns the seconds that so much more work takes; None while nothing is known."""
    return statistics.median(self._seconds) * remaining if self._seconds else None


class State(NamedTuple):
  """The state of a task.

  Attributes:
    label: what is done, such as "sampling".
    done: how much is done.
    total: how much there is to do; 0 if that is not known.
    unit: what is counted, such as "completions"; "" to show a share alone.
    elapsed: seconds since it began.
    left: seconds that are left; None if that is not known.
  """

  label: str
  done: float
  total: float
  unit: str
  elapsed: float
  left: float | None


class Progress:
  """Shows how far a task is, as a context manager.

  with Progress("sampling", len(prompts), "completions") as progress:
    for …:
      progress.advance(count)
  """

  def __init__(
    self, label: str, total: float = 0, unit: str = "", *, now: Callable[[], float] = time.monotonic
  ):
    """Prepares the task.

    Args:
      label: what is done; "" shows nothing.
      total: how much there is to do; 0 if that is not known.
      unit: what is counted; "" shows a share alone.
      now: the clock, in seconds.
    """
    self._label, self._total, self._unit = label, total, unit
    self._now, self._done, self._pace = now, 0.0, Pace(now)
    self._ended = threading.Event()
    self._shown, self._thread = False, None
    self._terminal = False

  def __enter__(self) -> Progress:
    self._began = self._now()
    if self._label:
      _running.append(self)
      self._terminal = sys.stderr.isatty()
      # A thread, because a batch that compiles may take longer than all the others.
      self._thread = threading.Thread(target=self._show, daemon=True)
      self._thread.start()
    return self

  def advance(self, count: float = 1) -> None:
    """Adds to what is done."""
    self.reach(self._done + count)

  def reach(self, done: float) -> None:
    """Sets what is done."""
    self._done = done
    # The first part only starts the clock: it often compiles, and would give hours.
    self._pace.at(done)

  def of(self, items: Iterable[_T]) -> Iterator[_T]:
    """Yields the items, and counts each when the next one is asked for."""
    for item in items:
      yield item
      self.advance()

  def __exit__(self, *error: object) -> None:
    self._ended.set()
    if self._thread is not None:
      self._thread.join()
      _running.remove(self)
    if not self._shown:
      return
    if _display:
      _display[-1]("")
    elif self._terminal:
      _write("\r\x1b[K")
    if not _display and error[0] is None:
      _write(closing_line(self._state()) + "\n")

  def _state(self) -> State:
    left = self._pace.left(self._total - self._done) if self._total else None
    elapsed = self._now() - self._began
    return State(self._label, self._done, self._total, self._unit, elapsed, left)

  def _show(self) -> None:
    """Shows the task until it ends."""
    # In a bar that is there already, it is no line more, and may come sooner.
    wait, between = min(AFTER, REDRAW) if _display else AFTER, LINES[0]
    while not self._ended.wait(wait):
      if _running[-1:] != [self]:  # what runs within it has the line
        continue
      self._shown = True
      state = self._state()
      if displays := _display[-1:]:
        displays[0](short_line(state))
        wait = REDRAW
      elif self._terminal:
        columns = shutil.get_terminal_size().columns
        # Back to the first column, where anything else that is printed begins.
        _write("\r" + bar_line(state, columns) + "\x1b[K\r")
        wait = REDRAW
      else:
        _write(plain_line(state) + "\n")
        wait, between = between, min(2 * between, LINES[1])


@contextlib.contextmanager
def shown_by(display: Display) -> Iterator[None]:
  """Gives all progress within to `display`, such as the bar of training, and prints none."""
  _display.append(display)
  try:
    yield
  finally:
    _display.remove(display)


def clock(seconds: float) -> str:
  """Formats seconds as `1:05` or `2:01:05`."""
  minutes, seconds = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def short_line(state: State) -> str:
  """Returns what a bar of training has room for: `evaluating 64/512`."""
  return f"{state.label} {_count(state)}".rstrip()


def plain_line(state: State) -> str:
  """Returns a line of a log: `sampling: 512 of 2,048 completions, 0:20 left`."""
  count = _count(state, " of ")
  known = ", ".join(filter(None, [f"{count} {state.unit}".strip(), _time(state)]))
  return f"{state.label}: {known}"


def closing_line(state: State) -> str:
  """Returns the line that stays: `sampling: 2,048 completions in 0:27`."""
  unit = state.unit
  if state.done == 1:
    unit = unit.removesuffix("es" if unit.endswith("ches") else "s")
  count = f"{state.done:,.0f} {unit}" if unit and state.done else "done"
  return f"{state.label}: {count} in {clock(state.elapsed)}"


def bar_line(state: State, columns: int) -> str:
  """Returns the line of a terminal, which is never wider than that."""
  count = f"{_count(state)} {state.unit}".strip()
  tail = "  ".join(filter(None, [_time(state), count]))
  bar, room = "", columns - 1 - len(state.label) - len(tail) - 4
  if state.total and room >= 4:
    width = min(BAR, room)
    full = int(width * min(1.0, state.done / state.total))
    bar = "━" * full + "╌" * (width - full)
  return "  ".join(filter(None, [state.label, bar, tail]))[: columns - 1]


def _count(state: State, of: str = "/") -> str:
  """Returns how much is done: `64/512`, `64`, `13%`, or nothing."""
  if not state.unit:
    return f"{state.done / state.total:.0%}" if state.total else ""
  return f"{state.done:,.0f}" + (f"{of}{state.total:,.0f}" if state.total else "")


def _time(state: State) -> str:
  """Returns the time left, or the time so far where that is not known."""
  if state.left is not None and state.done:
    return f"{clock(state.left)} left"
  return f"{clock(state.elapsed)} so far"


def _write(text: str) -> None:
  """Writes to stderr: stdout has the results of a command."""
  with _lock, contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
    sys.stderr.write(text)
    sys.stderr.flush()
