"""A run that is asked to leave: it hears SIGTERM between steps, and saves before it goes."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils

# Exit status of a run that saved and left (EX_TEMPFAIL of sysexits.h): start it again.
AGAIN = 75


class Notice:
  """Hears SIGTERM, as schedulers send it before they take a machine away.

  In a run of one process the first one is remembered; another ends the process as it would have
  before. In a run of several, JAX's preemption service hears it and has all leave at one step.
  """

  def __enter__(self) -> Self:
    self._given = False
    self._before: Any = None
    if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._hear)
    return self

  def _hear(self, number: int, frame: Any) -> None:
    del number, frame
    self._given = True
    signal.signal(signal.SIGTERM, self._before)

  def leaving(self, step: int) -> bool:
    """Whether to leave after this step; asked at every one."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._given

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)


def leave(step: int) -> NoReturn:
  """Ends the process, everything being saved."""
  print(f"asked to stop: saved after step {step}; run the same command again to go on", flush=True)
  sys.exit(AGAIN)
