"""Preemption: after Ctrl-C or SIGTERM a run finishes its step, saves a checkpoint and exits."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from dpo_jax.utils import interrupts

# Exit status of a run that saved and stopped, and can be started again (EX_TEMPFAIL of sysexits.h).
# After Ctrl-C it is 130, as of any command: a person who stops a run does not want it repeated.
AGAIN = 75

_ANSWER = "stopping: this step is finished and saved first; Ctrl-C again stops at once"


class Stopped(SystemExit):
  """Ends a run that was asked to stop, once everything is saved.

  Attributes:
    step: the last step, of which there is a checkpoint.
    code: the exit status.
  """

  def __init__(self, step: int, code: int):
    super().__init__(code)
    self.step = step


class Notice:
  """Records Ctrl-C, and SIGTERM, which schedulers send before they take a machine away.

  The first is recorded, and a second one ends the process. In a run of several processes JAX's
  preemption service catches SIGTERM, and makes all stop after the same step; a process that Ctrl-C
  reaches sends itself that signal.
  """

  def __enter__(self) -> Self:
    self._given = 0
    self._before: dict[int, Any] = {}
    # Python allows signal handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
      return self
    if interrupts.is_pending():  # it came while the first step was being prepared
      raise KeyboardInterrupt
    # With several processes JAX's service has a handler already, and this one would replace it.
    if jax.process_count() == 1:
      self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._record)
    # It is ignored in the background jobs of a script, and handled by whoever embeds this.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
      interrupts.answer(_ANSWER)
      self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._record)
    return self

  def _record(self, number: int, frame: Any) -> None:
    del frame
    first = not self._given
    self._given = number
    if number == signal.SIGINT and interrupts.is_installed():
      pass  # it has been answered, and a second one ends the process, by a thread
    else:
      # The earlier handler comes back, so that a second signal does not wait for a long step.
      signal.signal(number, self._before[number])
      if number == signal.SIGINT:
        print(f"\n{_ANSWER}", file=sys.stderr)
    if number == signal.SIGINT and first and jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def should_stop(self, step: int) -> bool:
    """Returns True if the run is to stop after this step. It must be called at every step."""
    if jax.process_count() > 1:
      # The service agrees on a step that no process has passed; it must be called at each.
      return multihost_utils.reached_preemption_sync_point(step)
    return bool(self._given)

  def stopped(self, step: int) -> Stopped:
    """Returns what ends the run; all must be saved before it is raised."""
    interrupted = self._given == signal.SIGINT
    return Stopped(step, interrupts.STATUS if interrupted else AGAIN)

  def __exit__(self, *_: object) -> None:
    interrupts.answer("")
    for number, handler in self._before.items():
      signal.signal(number, handler)
