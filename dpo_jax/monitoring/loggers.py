"""Writers of a run's metrics: `metrics.jsonl`, TensorBoard events, and progress on the screen.

`metrics.jsonl` contains every step exactly once, also after a kill and a resume: lines past the
step that training resumes from are cut off first. An evaluation joins the line of its step. Alerts
are printed with the metrics that raise them, and not again after a resume.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

# Protobuf makes these classes when the modules are imported: their files do not name them.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from dpo_jax.monitoring import alerts
from dpo_jax.structs import UserError
from dpo_jax.utils import files, messages, progress

METRICS = "metrics.jsonl"
# Called with a step and its metrics.
Callback = Callable[[int, dict[str, float]], object]

_SPEED = "pairs_per_second"
# Metrics that progress shows, if a step has them: name, label, format.
_SHOWN = (
  ("loss", "loss", "{:.4f}"),
  ("rewards/accuracies", "accuracy", "{:.3f}"),
  ("rewards/margins", "margin", "{:.3f}"),
  ("reward", "reward", "{:.3f}"),
  ("kl", "kl", "{:.2f}"),
  ("sampled/kl", "sampled kl", "{:.2f}"),
  (_SPEED, "", "{:,.0f}"),
)
# Those that a narrow terminal has no room for, the least important first.
_LEAST = ("sampled/kl", "kl", "rewards/margins", _SPEED, "reward", "rewards/accuracies", "loss")


class Loggers:
  """All writers of a training run as one context manager.

    with Loggers(workdir, start_step=state_step, total_steps=steps) as loggers:
      loggers.write(step, metrics)        # once per step
      loggers.write_eval(step, metrics)   # keys get the prefix eval/
      loggers.say("text")                 # a line that progress does not overwrite

  Values are of any type that `float` accepts. A number that is not finite becomes `null` in
  `metrics.jsonl`, since JSON has no such numbers.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    start_step: int = 0,
    total_steps: int,
    every: int = 10,
    console: rich.console.Console | None = None,
    callbacks: Sequence[Callback] = (),
  ):
    """Opens the files of a run in `workdir`, and makes that folder if it is missing.

    Args:
      workdir: folder of the run.
      start_step: step that training resumes from; later lines are cut off. 0 starts a new run.
      total_steps: last step, for progress.
      every: steps between lines of progress if there is no terminal.
      console: console for progress; by default standard output.
      callbacks: called with every record once it is written.

    Raises:
      UserError: a file cannot be written, or `metrics.jsonl` has a line that is not a step.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # The order is important: the file is cut back to the step that training resumes from, then the
    # watch reads the rest. Its alerts are dropped here: they were printed before the stop.
    self._lines = _Lines(folder / METRICS, start_step)
    self._watch = alerts.Watch()
    for record in read_metrics(folder / METRICS):
      self._watch.see_record(record)
    self._folder, self._callbacks = folder, callbacks
    with self._writing():
      self._events = _Events(folder, start_step)
    self._console = console or rich.console.Console(highlight=False)
    if self._console.is_terminal:
      self._progress = _Bar(self._console, start_step, total_steps)
    else:
      self._progress = _PlainLines(self._console, total_steps, every)

  def __enter__(self) -> Loggers:
    self._progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._progress.stop()
    self._lines.close()
    with self._writing():
      self._events.close()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Records the metrics of one training step."""
    values = {name: float(value) for name, value in metrics.items()}
    # Recorded before it is shown: what was on the screen is in the file, whatever happens next.
    self._record(step, values)
    self._progress.step(step, values)
    self._warn(step, values)
    self._call(step, values)

  def write_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Records an evaluation after `step`, under `eval/…`, on the line of that step."""
    values = {f"eval/{name.removeprefix('eval/')}": float(x) for name, x in metrics.items()}
    self._record(step, values)
    shown = {name.removeprefix("eval/"): value for name, value in values.items()}
    self.say(f"eval step {step}  " + "  ".join(_summary(shown)))
    # Evaluation sets and sources have metrics of their own, NAME/loss and others.
    for group in [name.removesuffix("loss") for name in shown if name.endswith("/loss")]:
      own = {k.removeprefix(group): value for k, value in shown.items() if k.startswith(group)}
      self.say(f"  {group.rstrip('/')}  " + "  ".join(_summary(own)))
    self._warn(step, values)
    self._call(step, values)

  def say(self, text: str) -> None:
    """Prints a line above the progress; in a terminal it wraps between words."""
    if self._console.is_terminal:
      text = messages.wrap(text, self._console.width)
    # Without markup: alerts and paths may contain [brackets], which rich would interpret.
    self._console.print(text, markup=False, soft_wrap=True)

  def _call(self, step: int, values: Mapping[str, float]) -> None:
    for callback in self._callbacks:
      callback(step, dict(values))

  def _warn(self, step: int, values: Mapping[str, float]) -> None:
    for alert in self._watch.see(step, values):
      self.say(f"warning: alert at step {step}: {alert.text}")

  def _record(self, step: int, values: Mapping[str, float]) -> None:
    with self._writing():
      self._lines.write(step, values)
      self._events.write(step, values)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      # The run ends: without its metrics nobody could tell afterwards what it did.
      why = (error.strerror or str(error)).lower()
      raise UserError(
        f"metrics could not be written in {self._folder}: {why}; fix that and run the same command"
        " again"
      ) from None


class Silent:
  """Stand-in for `Loggers` in every process but the main one; it writes nothing."""

  def __enter__(self) -> Silent:
    return self

  def __exit__(self, *_: object) -> None:
    pass

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Does nothing."""

  def write_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Does nothing."""

  def say(self, text: str) -> None:
    """Does nothing."""


# ---------------------------------------------------------------------------- metrics.jsonl


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the lines of a metrics file, without a last line that a kill left unfinished."""
  return [record for _, record in _records(pathlib.Path(path))]


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        return  # the process was killed while it wrote this line
      try:
        record = json.loads(line)
      except ValueError:
        record = None
      if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(
          f"{path}:{number}: not a JSON object with a step; delete that line and run again"
        )
      yield line.decode("utf-8"), record


class _Lines:
  """The metrics file: one line per step, passed to the system at once, without a buffer."""

  def __init__(self, path: pathlib.Path, start_step: int):
    self._last: tuple[int, int] | None = None  # step and offset of the last line
    if path.exists():
      # A step past the checkpoint is taken again, and would be there twice.
      kept = [(line, r) for line, r in _records(path) if start_step and r["step"] <= start_step]
      # Replaced as a whole: a kill at this moment must not cost the earlier steps.
      files.write_text(path, (line for line, _ in kept))
      if kept:
        line, record = kept[-1]
        self._last = record["step"], path.stat().st_size - len(line.encode())
    # Not O_APPEND, with which Linux ignores the offset of `pwrite`.
    self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values to the line of `step`, which is the last line or a new one.

    Raises:
      ValueError: a later step has been written already.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    end = os.fstat(self._file).st_size
    if self._last is not None and self._last[0] == step:
      start = self._last[1]
      record = json.loads(os.pread(self._file, end - start, start)) | finite
    elif self._last is not None and self._last[0] > step:
      raise ValueError(f"step {step} after step {self._last[0]}: steps are written in order")
    else:
      start, record = end, {"step": step} | finite
    # One write, padded so that it is never shorter than the line it replaces: whenever the process
    # is killed, the file ends in the old line or in the new one.
    os.pwrite(self._file, json.dumps(record).ljust(end - start - 1).encode() + b"\n", start)
    self._last = step, start

  def close(self) -> None:
    os.close(self._file)


class _Events:
  """The file that TensorBoard reads.

  It is written without tensorboardX's thread: a full disk ends that thread, and closing would then
  wait forever.
  """

  def __init__(self, folder: pathlib.Path, start_step: int):
    # The name has the time in seconds; the step keeps two files of the same second apart.
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{start_step}"
    self._file = RecordWriter(str(folder / name))
    self._flushed = 0.0
    self._add(file_version="brain.Event:2")
    # Tells TensorBoard to hide what an earlier process wrote from this step on.
    start = SessionLog(status=SessionLog.START)
    self._add(step=start_step + 1 if start_step else 0, session_log=start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    finite = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
      if math.isfinite(value)
    ]
    self._add(step=step, summary=Summary(value=finite))

  def _add(self, **fields: Any) -> None:
    now = time.time()
    self._file.write(Event(wall_time=now, **fields).SerializeToString())
    # Not at each step: TensorBoard is looked at now and then, and disks are slow.
    if now > self._flushed + 10:
      self._flushed = now
      self._file.flush()

  def close(self) -> None:
    self._file.close()


# ---------------------------------------------------------------------------- progress


def unit_of(names: Collection[str]) -> str:
  """Returns what `pairs_per_second` counts, by the names of the metrics of a step."""
  # Every kind of example has metrics of its own; supervised texts have none but the loss.
  kinds = {
    "rewards/best": "rankings",
    "rewards/margins": "pairs",
    "rewards/desirable": "completions",
    "reward": "prompts",
  }
  return next((unit for name, unit in kinds.items() if name in names), "texts")


def _fields(values: Mapping[str, float]) -> dict[str, str]:
  """Returns the values that progress shows, formatted, by name: `loss 0.6931`, `812 pairs/s`, …."""
  shown = {}
  for name, label, form in _SHOWN:
    if name in values:
      number = form.format(values[name])
      if name == "rewards/accuracies":
        number += _certainty(values)
      shown[name] = f"{number} {unit_of(values)}/s" if name == _SPEED else f"{label} {number}"
  return shown


def _summary(values: Mapping[str, float]) -> Iterator[str]:
  """Yields the values that progress shows, formatted."""
  yield from _fields(values).values()


def fit(fields: Mapping[str, str], room: int) -> str:
  """Returns those of the fields that fit into so many columns, in their order.

  The least important are left out first, as `_LEAST` says.
  """
  left = dict(fields)
  for name in _LEAST:
    if len("  ".join(left.values())) <= room:
      break
    left.pop(name, None)
  return "  ".join(left.values())[: max(0, room)]


def _certainty(values: Mapping[str, float]) -> str:
  """Returns how many pairs an accuracy is of, with its 95% interval; "" in a training step."""
  if "pairs" not in values:
    return ""
  count = f"{values['pairs']:,.0f} {'rankings' if 'rewards/best' in values else 'pairs'}"
  if "rewards/accuracies_low" not in values:  # rankings, whose comparisons are not independent
    return f" ({count})"
  low, high = (100 * values[f"rewards/accuracies_{end}"] for end in ("low", "high"))
  # Short, so that an evaluation is one line of 80 columns.
  return f" ({count}, 95%: {low:.0f}–{high:.0f}%)"


class _Remaining:
  """The time left, by the median of recent steps."""

  def __init__(self, total_steps: int):
    self._total, self._pace = total_steps, progress.Pace()

  def at(self, step: int) -> str:
    """Returns the time left after a step, `1:05`; "" while it is not known."""
    # The first step starts the clock: its time is that of compilation.
    self._pace.at(step)
    left = self._pace.left(self._total - step)
    return "" if left is None else progress.clock(left)


class _PlainLines:
  """Progress for a log file: lines for the first step, the last, and every `every` steps."""

  def __init__(self, console: rich.console.Console, total_steps: int, every: int):
    self._console, self._total, self._every = console, total_steps, every
    self._remaining, self._started = _Remaining(total_steps), False

  def start(self) -> None:
    pass

  def step(self, step: int, values: Mapping[str, float]) -> None:
    # At every step, also one without a line: the pace is counted from the first call.
    left = self._remaining.at(step)
    if self._started and step % self._every and step < self._total:
      return
    self._started = True
    # Step and time left come first, and are seen wherever a line ends.
    parts = [f"step {step}/{self._total}"]
    if left and step < self._total:
      parts.append(f"{left} left")
    parts += _summary(values)
    self._console.print("  ".join(parts), markup=False, soft_wrap=True)

  def stop(self) -> None:
    pass


class _Bar:
  """Progress in a terminal: one line that is redrawn, and fits the terminal.

  Step, bar and time left come first; of the numbers there are as many as fit.
  """

  def __init__(self, console: rich.console.Console, start_step: int, total_steps: int):
    self._console, self._total = console, total_steps
    self._remaining, self._fields = _Remaining(total_steps), {"": "compiling"}
    self._doing = ""  # what takes its time between two steps
    self._display = contextlib.ExitStack()
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("step {task.completed}/{task.total}", style="bold"),
      rich.progress.BarColumn(bar_width=12),
      rich.progress.TextColumn("{task.fields[left]} left"),
      rich.progress.TextColumn("{task.fields[numbers]}", markup=False),
      console=console,
      refresh_per_second=4,
    )
    self._task = self._progress.add_task(
      "", total=total_steps, completed=start_step, numbers="compiling", left="-:--"
    )

  def start(self) -> None:
    self._progress.start()
    self._display.enter_context(progress.shown_by(self._show))

  def step(self, step: int, values: Mapping[str, float]) -> None:
    self._fields = _fields(values)
    left = self._remaining.at(step) or "-:--"
    self._progress.update(self._task, completed=step, left=left, numbers=self._numbers(left))

  def _show(self, text: str) -> None:
    """Shows in place of the numbers what is done between two steps; "" for the numbers again."""
    self._doing = text
    self._progress.update(self._task, numbers=self._numbers(self._progress.tasks[0].fields["left"]))

  def _numbers(self, left: str) -> str:
    # Columns are one apart, and the last column of some terminals breaks the line.
    taken = len(f"step {self._total}/{self._total}") + 12 + len(f"{left} left") + 4
    room = self._console.width - taken
    return self._doing[: max(0, room)] or fit(self._fields, room)

  def stop(self) -> None:
    self._display.close()
    self._progress.stop()
