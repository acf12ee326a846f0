"""Checkpoints through Orbax: asynchronous, atomic, the latest few and the best kept.

A checkpoint contains all that evolves (`TrainState`) and nothing else: never the frozen reference,
never a tree replicated over devices. The data position is the step itself.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dpo_jax.distributed import processes
from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils import messages, progress


def _reason(error: BaseException) -> str:
  """Finds the line that matters of an Orbax error, which hides the cause deep in a chain."""
  # By `__context__` too: not every layer names its cause. A cause may lead back to itself.
  chain: list[BaseException] = []
  cause: BaseException | None = error
  while cause is not None and cause not in chain:
    chain.append(cause)
    cause = cause.__cause__ or cause.__context__
  for link in chain:
    # A full disk may be known by its message alone: not every layer raises an OSError.
    text = str(link)
    if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
      return "no space left on the device"
    if isinstance(link, PermissionError) or getattr(link, "errno", None) == errno.EROFS:
      return "the folder cannot be written"
  return (str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__])[0][:200]


def _not_orbax(record: logging.LogRecord) -> bool:
  """Keeps Orbax from printing a traceback of every failure that it also raises."""
  return "orbax" not in record.pathname


@functools.cache
def _hush_late_writers() -> None:
  """Keeps a failed save to its one line, for the process.

  The first part that cannot be written ends Orbax's event loop; the parts still being written
  then report to a closed one, from threads that can only print what they meet.
  """
  shown = sys.unraisablehook

  def hook(met: Any) -> None:
    if not (isinstance(met.exc_value, RuntimeError) and "loop is closed" in str(met.exc_value)):
      shown(met)

  sys.unraisablehook = hook


# Fields of a `TrainState` that checkpoints keep under an older name, so that a run which was begun
# before they were renamed goes on.
_SAVED_AS = {"running_stats": "memory"}


def _to_saved(state: PyTree) -> PyTree:
  """Names the fields of a state as checkpoints do; returns any other tree as it is."""
  if not hasattr(state, "_asdict"):
    return state
  return {_SAVED_AS.get(name, name): tree for name, tree in state._asdict().items()}


def _from_saved(saved: PyTree, like: PyTree) -> PyTree:
  """Undoes `_to_saved`: returns a state of the type of `like`."""
  if not hasattr(like, "_asdict"):
    return saved
  return type(like)(**{name: saved[_SAVED_AS.get(name, name)] for name in like._fields})


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  """Describes how a leaf is read: its shape and type, to its own sharding or to one device."""
  place = getattr(leaf, "sharding", None)
  place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _placed(loaded: PyTree, like: PyTree) -> PyTree:
  """Returns a tree that was read, with the leaves on host that name no sharding."""

  def put(leaf: jax.Array, wanted: Any) -> Any:
    # Orbax reads to devices only: a leaf without a sharding goes from there to the host.
    return leaf if getattr(wanted, "sharding", None) else np.asarray(leaf)

  return jax.tree.map(put, loaded, like)


def _steps(directory: pathlib.Path) -> list[int]:
  """Lists the steps of whole checkpoints: Orbax renames a folder to its number at the end."""
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def latest_step(directory: str | pathlib.Path) -> int | None:
  """Returns the step of the latest whole checkpoint in a folder, None where there is none."""
  return max(_steps(pathlib.Path(directory)), default=None)


class Best(NamedTuple):
  """The checkpoint of a run that is best on the held-out rows.

  Attributes:
    step: of the checkpoint.
    metric: the held-out metric it is best by.
    value: of that metric.
  """

  step: int
  metric: str
  value: float


# Held-out metrics that decide which checkpoint is the best, and whether more is better. The first
# that an evaluation has counts: only pairs and rankings have an accuracy.
DECIDING = {"rewards/accuracies": True, "loss": False}


def best_of(evaluations: Iterable[tuple[int, Mapping[str, float]]]) -> Best | None:
  """Returns the best of some evaluations, the latest of equals; None if none has a metric.

  Args:
    evaluations: step and held-out metrics, by rising steps.
  """
  given = [(step, metrics) for step, metrics in evaluations if metrics]
  for name, higher in DECIDING.items():
    values = [(step, metrics[name]) for step, metrics in given if name in metrics]
    values = [(step, value) for step, value in values if value is not None and np.isfinite(value)]
    if values:
      step, value = max(values, key=lambda one: (one[1] if higher else -one[1], one[0]))
      return Best(step, name, float(value))
  return None


class SavingTimes:
  """Decides after which steps a checkpoint is due by the clock, alike in all processes.

  Clocks differ, so only that of the first process counts. To ask it at every step would make the
  devices wait: with its answer it says how many steps may pass until it is asked again.
  """

  def __init__(
    self,
    minutes: float,
    from_main_process: Callable[[str], str] = processes.from_main_process,
    now: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      minutes: from one checkpoint to the next; 0 is never.
      from_main_process: text -> the text of the first process; all call it together.
      now: the clock, in seconds.
    """
    self._interval, self._from_main, self._now = 60 * minutes, from_main_process, now
    self._saved = self._looked = now()
    self._last = self._ask_at = 0

  def is_due(self, index: int) -> bool:
    """Returns True if the checkpoint is due after this step; it must be called at every step."""
    if not self._interval or index < self._ask_at:
      return False
    now = self._now()
    left = self._saved + self._interval - now
    # Half of the steps that fit into what is left at the pace since the last look: the pace may
    # change. Looks come ever closer, and at last at every step.
    pace = (now - self._looked) / max(1, index - self._last) if self._last else float("inf")
    steps = int(min(left / 2 / pace, 1000)) if pace > 0 else 1
    answer = self._from_main(f"{int(left <= 0)} {max(1, steps)}")
    due, steps = map(int, answer.split())
    self._last, self._looked, self._ask_at = index, now, index + steps
    return bool(due)

  def saved(self) -> None:
    """Starts the clock anew, after any checkpoint."""
    self._saved = self._now()


class Checkpoints:
  """The checkpoints of one run, in `directory`.

  Args:
    directory: `WORKDIR/checkpoints`.
    keep: how many of the latest stay.
    best: name of the metric whose best checkpoint stays as well; "" for none.
    higher: whether a larger value of that metric is better.
    tidy: whether to remove what a killed run left half-written; only the run itself may, since a
      reader could remove what the run is writing.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int = 2,
    best: str = "",
    higher: bool = True,
    tidy: bool = False,
  ):
    # A union of two rules: by the best alone, the latest would go, from which a run resumes.
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(keep)]
    if best:
      # Orbax keeps the largest: a metric of which less is better changes its sign.
      sign = 1.0 if higher else -1.0
      worst = -float("inf")
      kept.append(
        policies.BestN(
          n=1,
          get_metric_fn=lambda m: sign * m[best] if m and best in m else worst,
          # Otherwise every checkpoint without an evaluation would stay for ever.
          keep_checkpoints_without_metrics=False,
        )
      )
    self.directory = pathlib.Path(directory).resolve()
    self._pending: tuple[int, Any] | None = None
    self._failed = False
    logging.getLogger("absl").addFilter(_not_orbax)
    _hush_late_writers()
    self._open = functools.partial(
      ocp.training.Checkpointer,
      str(self.directory),
      # Orbax's policies take another record of a checkpoint than its own protocol names.
      preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
      cleanup_tmp_directories=tidy,
    )
    self._orbax = self._open()

  def steps(self) -> list[int]:
    """Lists the steps of the whole checkpoints, in order."""
    return _steps(self.directory)

  def latest(self) -> int | None:
    """Returns the step of the latest whole checkpoint, None where there is none."""
    return latest_step(self.directory)

  def best(self) -> Best | None:
    """Returns the best of the checkpoints that are there; None if no evaluation is kept."""
    whole = set(self.steps())
    kept = [one for one in self._orbax.checkpoints if one.step in whole]
    # Orbax takes any JSON for metrics; what is saved here are these.
    return best_of((one.step, cast(dict[str, float], one.metrics or {})) for one in kept)

  def save(self, step: int, state: PyTree, metrics: Mapping[str, float] | None = None) -> None:
    """Starts writing `state` as the checkpoint of `step`; returns before it is on disk.

    Args:
      step: updates made.
      state: one copy of it, on devices; they may go on at once.
      metrics: of an evaluation at that step, which decide which checkpoint is the best.

    Raises:
      UserError: this or the previous checkpoint could not be written; older ones stay whole.
    """
    self.wait()  # one at a time, so that an error names the right step
    try:
      response = self._orbax.save_async(
        step, _to_saved(state), force=True, metrics=None if metrics is None else {**metrics}
      )
    except Exception as error:
      raise self._failure(step, error) from error
    self._pending = (step, response)

  def wait(self) -> None:
    """Returns once everything started is on disk; raises as `save` does."""
    if self._pending is None:
      return
    # Forgotten before it is waited for: a failure is raised once, and not again by `close`.
    (step, response), self._pending = self._pending, None
    try:
      with progress.Progress(f"saving the checkpoint of step {step}"):
        response.result()
        self._orbax.wait()
    except Exception as error:
      raise self._failure(step, error) from error

  def _failure(self, step: int, error: Exception) -> UserError:
    """Returns the error of a checkpoint that could not be written."""
    self._failed = True
    whole = [s for s in self.steps() if s != step]
    kept = f"the checkpoint of step {whole[-1]} is whole" if whole else "no earlier one exists"
    return UserError(
      f"the checkpoint of step {step} could not be saved in {self.directory}: {_reason(error)};"
      f" {kept}; mend that and run the same command again"
    )

  def restore(self, like: PyTree, step: int | None = None) -> PyTree:
    """Reads the state saved at `step` (the latest by default), with the structure of `like`.

    Leaves of `like` that name a sharding are read straight to it, whatever they were saved from;
    the others come back on host.

    Raises:
      UserError: there is no such checkpoint, or it does not fit `like`.
    """
    step = self._known(step)
    loaded = _from_saved(self._load(step, jax.tree.map(_abstract, _to_saved(like))), like)
    return _placed(loaded, like)

  def restore_latest(self, like: PyTree) -> tuple[int, PyTree]:
    """Reads the latest state that can be read; reports later ones that cannot.

    They are moved next to the folder, as `unreadable-STEP`, once an earlier one has been read: the
    run writes the checkpoints of those steps anew.

    Returns:
      The step, and the state.

    Raises:
      UserError: as `restore` of the latest, if none can be read.
    """
    errors: dict[int, UserError] = {}
    for step in reversed(self.steps()):
      try:
        state = self.restore(like, step)
      except UserError as error:
        errors[step] = error
        continue
      # Moved only now: while nothing can be read, all stays where it was, for a person to look at.
      for spoilt in errors:
        names = (f"unreadable-{spoilt}" + "x" * more for more in itertools.count())
        aside = next(p for p in map(self.directory.with_name, names) if not p.exists())
        processes.on_main_process(
          functools.partial((self.directory / str(spoilt)).rename, aside), "aside"
        )
        messages.warn(
          f"the checkpoint of step {spoilt} cannot be read and is now {aside}; going on from step"
          f" {step}"
        )
      if errors:  # Orbax keeps a list of the steps there are
        self._orbax.close()
        self._orbax = self._open()
      return step, state
    raise next(iter(errors.values()), None) or self.none()

  def restore_params(self, step: int | None = None, like: PyTree | None = None) -> PyTree:
    """Reads the trained parameters alone, whatever else the checkpoint contains.

    Args:
      step: of the checkpoint; None for the latest.
      like: shapes, types and shardings of the parameters, as `restore` takes them of a state; None
        reads them to host.
    """
    step = self._known(step)
    try:
      # The structure is the checkpoint's own: to export or sample, nobody has to know optimizer or
      # loss.
      kept = self._orbax.metadata(step).metadata
      if kept is None:
        raise ValueError("it has no list of its contents")
    except Exception as error:
      raise self._unreadable(step, error) from error

    def wanted_of(name: str, leaf: Any) -> Any:
      if name != "params":
        return ocp.PLACEHOLDER  # not read: the moments are twice as large as the parameters
      # To this machine's first device, wherever they were saved from.
      return _abstract(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

    wanted = {
      name: jax.tree.map(functools.partial(wanted_of, name), tree) for name, tree in kept.items()
    }
    if like is None:
      return jax.tree.map(np.asarray, self._load(step, wanted)["params"])
    wanted["params"] = jax.tree.map(_abstract, like)
    return _placed(self._load(step, wanted)["params"], like)

  def _load(self, step: int, wanted: PyTree) -> PyTree:
    try:
      with progress.Progress(f"reading the checkpoint of step {step}"):
        return self._orbax.load(step, wanted)
    except Exception as error:
      raise self._unreadable(step, error) from error

  def _unreadable(self, step: int, error: Exception) -> UserError:
    """Returns the error of a checkpoint that cannot be read."""
    earlier = [other for other in self.steps() if other < step]
    way = f"to go on from step {earlier[-1]}" if earlier else "to start anew: it is the only one"
    return UserError(
      f"the checkpoint of step {step} cannot be read ({type(error).__name__}: {_reason(error)});"
      f" delete {self.directory / str(step)} {way}"
    )

  def _known(self, step: int | None) -> int:
    """Returns the requested step, of which there is a checkpoint, or the latest."""
    steps = self.steps()
    if not steps:
      raise self.none()
    if step is not None and step not in steps:
      raise UserError(
        f"{self.directory} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
      )
    return steps[-1] if step is None else step

  def none(self) -> UserError:
    """Returns the error of a folder without a checkpoint."""
    return UserError(f"{self.directory} holds no checkpoint; train there first")

  def close(self) -> None:
    """Waits for what is being written, then closes the folder."""
    try:
      self.wait()
    finally:
      # After a failed save, Orbax raises the same failure again.
      with contextlib.suppress(*([Exception] if self._failed else [])):
        self._orbax.close()
