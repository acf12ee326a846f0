"""The metrics of each step, written one step late so that the device never waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from dpo_jax.data.mixture import Mixture
from dpo_jax.monitoring.loggers import Loggers, Silent
from dpo_jax.structs import TokenBatch, UserError
from dpo_jax.training.checkpoint import Checkpoints


class _Pending(NamedTuple):
  """A step whose metrics may not be computed yet."""

  index: int
  means: dict[str, jax.Array]  # on the devices
  facts: dict[str, float]  # on host
  batch: TokenBatch


class MetricsWriter:
  """Writes the metrics of every step, with its rates, and stops a run whose loss is not finite."""

  def __init__(
    self,
    log: Loggers | Silent,
    checkpoints: Checkpoints,
    *,
    to_host: Callable[[dict[str, jax.Array]], dict[str, np.ndarray]],
    schedule: optax.Schedule,
    data_path: str,
    mixture: Mixture | None = None,
  ):
    """Starts the clock.

    Args:
      log: where metrics are written.
      checkpoints: of the run, whose last one an error names.
      to_host: `Executor.metrics_to_host`.
      schedule: learning rate by step.
      data_path: of the examples, which an error names.
      mixture: the sources of the examples, which an error names instead; None for one source.
    """
    self._log, self._checkpoints, self._to_host = log, checkpoints, to_host
    self._schedule, self._data_path, self._mixture = schedule, data_path, mixture
    self._pending: _Pending | None = None
    self._reported = False
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves evaluation and saving out of the pairs per second."""
    self._since = time.perf_counter()

  def add(
    self, index: int, means: dict[str, jax.Array], facts: dict[str, float], batch: TokenBatch
  ) -> None:
    """Takes the metrics of a step, on device, and writes those of the step before.

    Raises:
      UserError: as `flush`.
    """
    # Only the step before is waited for: the device is already busy with this one.
    self.flush()
    self._pending = _Pending(index, means, facts, batch)

  def flush(self) -> None:
    """Writes the pending step.

    Raises:
      UserError: its loss or gradient is not finite; names the rows.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    means = self._to_host(pending.means)  # waits for the step
    # Taken out of the means: they are counts and row numbers, and no curve.
    bad_row_ANS, rows, tokens = (means.pop(key) for key in ("nonfinite_row_ANS", "rows", "tokens"))
    # After the transfer, which waits for the step: before it, only the launch would be timed.
    now = time.perf_counter()
    elapsed, self._since = now - self._since, now
    if not (np.isfinite(means["loss"]) and np.isfinite(means["grad_norm"])):
      raise self._not_finite(pending, means, bad_row_ANS[bad_row_ANS >= 0])
    self._report_rounding(pending.index, means)
    self._log.write(
      pending.index,
      {key: float(value) for key, value in means.items()}
      | pending.facts
      | {
        # Optax counts updates made, from 0.
        "learning_rate": float(np.asarray(self._schedule(pending.index - 1))),
        "pairs_per_second": rows / elapsed,
        "tokens_per_second": tokens / elapsed,
      },
    )

  def _report_rounding(self, index: int, means: dict[str, np.ndarray]) -> None:
    """Reports once how much of an update bfloat16 weights keep, which no curve of a loss shows."""
    if self._reported or "update/kept" not in means:
      return
    self._reported = True
    self._log.say(
      f"bfloat16 weights: step {index} changed {means['update/changed']:.2%} of them, and"
      f" {means['update/kept']:.0%} of the update arrived (rounded stochastically)"
    )

  def _not_finite(
    self, pending: _Pending, means: dict[str, np.ndarray], bad_rows: np.ndarray
  ) -> UserError:
    """Returns the error of a step, once the checkpoint before it is on disk."""
    if not len(bad_rows):  # the loss is finite and its gradient is not: any row may be the cause
      row_ANS = np.asarray(pending.batch.row_NS)
      bad_rows = row_ANS[row_ANS >= 0]
    rows = sorted(set(bad_rows.tolist()))
    named = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    named = f"{named} of {self._data_path}"
    if self._mixture:
      named = self._mixture.name_rows(rows[:8]) + (", …" if len(rows) > 8 else "")
    # The last checkpoint may still be on its way to disk, and the message promises that it is kept.
    self._checkpoints.wait()
    last = self._checkpoints.latest()
    kept = f"the checkpoint of step {last} is kept" if last else "no checkpoint was due before"
    return UserError(
      f"step {pending.index}: the loss is {means['loss']}, its gradient's norm"
      f" {means['grad_norm']}, in rows {named}; {kept}. Try a lower"
      " optimizer.learning_rate in a new --workdir, or look at those rows"
    )
