"""The metrics of each step, written one step late so that the device never waits for the host.

They also stop a run that has diverged, before a checkpoint is made of its weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from dpo_jax.data.mixture import Mixture
from dpo_jax.monitoring.divergence import Diverged, Divergence, watched
from dpo_jax.monitoring.loggers import Loggers, Silent
from dpo_jax.structs import TokenBatch
from dpo_jax.training.checkpoint import Checkpoints


class _Pending(NamedTuple):
  """A step whose metrics may not be computed yet."""

  index: int
  means: dict[str, jax.Array]  # on the devices
  facts: dict[str, float]  # on host
  batch: TokenBatch


class MetricsWriter:
  """Writes the metrics of every step, with its rates, and stops a run that has diverged."""

  def __init__(
    self,
    log: Loggers | Silent,
    checkpoints: Checkpoints,
    *,
    to_host: Callable[[dict[str, jax.Array]], dict[str, np.ndarray]],
    schedule: optax.Schedule,
    data_path: str,
    divergence: Divergence,
    learning_rate: float,
    usual_rates: str,
    mixture: Mixture | None = None,
  ):
    """Starts the clock.

    Args:
      log: where metrics are written.
      checkpoints: of the run, whose last one an error names.
      to_host: `Executor.metrics_to_host`.
      schedule: learning rate by step.
      data_path: of the examples, which an error names.
      divergence: has what the first step of the run had.
      learning_rate: the largest of the run, which an error names.
      usual_rates: usual learning rates, which an error names.
      mixture: the sources of the examples, which an error names instead; None for one source.
    """
    self._log, self._checkpoints, self._to_host = log, checkpoints, to_host
    self._schedule, self._data_path, self._mixture = schedule, data_path, mixture
    self._divergence = divergence
    self._learning_rate, self._usual_rates = learning_rate, usual_rates
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
      Diverged: as `flush`.
    """
    # Only the step before is waited for: the device is already busy with this one.
    self.flush()
    self._pending = _Pending(index, means, facts, batch)

  @property
  def suspect(self) -> bool:
    """True if the latest step that is written had broken weights: they should not be saved."""
    return self._divergence.suspect

  def flush(self, *, at_end: bool = False) -> None:
    """Writes the pending step.

    Args:
      at_end: whether it is the last of the run.

    Raises:
      Diverged: its loss or gradient is not finite, or most of the last steps had broken weights.
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
    # After they are written: metrics and report show how it came about.
    self._divergence.add(means)
    if self._divergence.has_diverged(at_end=at_end):
      raise self._diverged(pending.index, means)

  def check_evaluation(self, index: int, found: dict[str, float]) -> None:
    """Raises `Diverged` if the loss of the held-out rows is not finite: the weights are broken."""
    if not np.isfinite(found.get("loss", 0.0)):
      raise Diverged(
        f"step {index}: the held-out loss is {found['loss']}. {self._likely_cause()}"
        f" {self._kept()}; no model is exported"
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

  def _diverged(self, index: int, means: dict[str, np.ndarray]) -> Diverged:
    """Returns the error of a run whose weights are broken."""
    first = self._divergence
    return Diverged(
      f"step {index}: training has diverged: the loss is {float(means['loss']):.4g}"
      f" ({first.first_loss:.4g} at the start), and completions to learn from have a log-prob of"
      f" {watched(means):.4g} nats ({first.first_logp:.4g} at the start)."
      f" {self._likely_cause()} {self._kept()}; no model is exported"
    )

  def _not_finite(
    self, pending: _Pending, means: dict[str, np.ndarray], bad_rows: np.ndarray
  ) -> Diverged:
    """Returns the error of a step whose loss or gradient is not finite."""
    if not len(bad_rows):  # the loss is finite and its gradient is not: any row may be the cause
      row_ANS = np.asarray(pending.batch.row_NS)
      bad_rows = row_ANS[row_ANS >= 0]
    rows = sorted(set(bad_rows.tolist()))
    named = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    where = f"rows {named} of {self._data_path}"
    if self._mixture:
      where = f"rows {self._mixture.name_rows(rows[:8])}" + (", …" if len(rows) > 8 else "")
    # The loss of step 1 is that of the initial weights.
    cause = f"{self._likely_cause()} Otherwise look at {where}."
    if pending.index == 1:
      cause = f"No update was made before: look at {where}, or at the weights."
    return Diverged(
      f"step {pending.index}: the loss is {means['loss']}, its gradient's norm"
      f" {means['grad_norm']}. {cause} {self._kept()}; no model is exported"
    )

  def _likely_cause(self) -> str:
    return (
      f"Likely cause: optimizer.learning_rate={self._learning_rate:g} is too high (usual:"
      f" {self._usual_rates}). Start anew by the same command with --overwrite and a lower"
      " --lr."
    )

  def _kept(self) -> str:
    # The last checkpoint may still be on its way to disk, and the message promises that it is kept.
    self._checkpoints.wait()
    last = self._checkpoints.latest()
    return f"The checkpoint of step {last} is kept" if last else "No checkpoint was due before"
