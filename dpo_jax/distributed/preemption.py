"""Preemption: after SIGTERM a run finishes its step, saves a checkpoint and exits."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils

# Exit status of a run that saved and stopped, and can be started again (EX_TEMPFAIL of sysexits.h).
AGAIN = 75


class Notice:
  """Records SIGTERM, which schedulers send before they take a machine away.

  In a run of one process the first SIGTERM is recorded, and a second one ends the process. In a run
  of several processes JAX's preemption service catches it, and makes all stop after the same step.
  """

  def __enter__(self) -> Self:
    self._given = False
    self._before: Any = None
    # Python allows signal handlers in the main thread alone. With several processes JAX's service
    # has a handler already, and this one would replace it.
    if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._record)
    return self

  def _record(self, number: int, frame: Any) -> None:
    del number, frame
    self._given = True
    # The earlier handler comes back, so that a second SIGTERM does not wait for a long step.
    signal.signal(signal.SIGTERM, self._before)

  def should_stop(self, step: int) -> bool:
    """Returns True if the run is to stop after this step. It must be called at every step."""
    if jax.process_count() > 1:
      # The service agrees on a step that no process has passed; it must be called at each.
      return multihost_utils.reached_preemption_sync_point(step)
    return self._given

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)


def exit_saved(step: int) -> NoReturn:
  """Prints that the run stopped after `step` and exits with status 75; all must be saved before."""
  print(f"stopped: saved after step {step}; run the same command again to continue", flush=True)
  sys.exit(AGAIN)
