"""Runs of several processes: how they find each other, and checks that they do the same work.

Every process runs the same program on the same files and owns some of the devices. Process 0, the
main process, is the only one that writes files and prints. `heartbeat` ends the others when one of
them fails.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # no public name ends the service apart from the client
from jax.experimental import multihost_utils

from dpo_jax.structs import UserError

AUTO = "auto"
START_TIMEOUT = 300.0  # seconds within which all processes must have started
LINGER = 1.0  # seconds that JAX's service stays up after this process has disconnected from it


def start(coordinator: str, processes: int, process: int, *, notice: bool = True) -> None:
  """Connects this process to the others of the run, and returns when all have started.

  It must be called before anything else uses a device of JAX.

  Args:
    coordinator: "HOST:PORT" of process 0; "auto" where a TPU pod, SLURM or Open MPI provides the
      addresses; "" for a run of one process.
    processes: the number of processes, with an address.
    process: the index of this one, from 0, with an address.
    notice: True if SIGTERM is only recorded, for `preemption.Notice`; False if it ends the process.

  Raises:
    UserError: the settings contradict each other, or some processes did not start.
  """
  if not coordinator:
    if processes or process:
      raise UserError(
        f"parallel.processes is {processes} and parallel.process {process}, but"
        " parallel.coordinator is empty; name the first process, HOST:PORT"
      )
    return
  given: dict[str, Any] = {}
  if coordinator != AUTO:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
      raise UserError(f"parallel.coordinator is {coordinator!r}; it must be HOST:PORT or {AUTO}")
    if not 0 <= process < processes:
      raise UserError(
        f"parallel.process is {process} of parallel.processes {processes}; it must be 0 to one"
        " less than there are"
      )
    given = {
      "coordinator_address": coordinator,
      "num_processes": processes,
      "process_id": process,
      # Otherwise JAX asks SLURM or a TPU pod for what is not given here, such as local devices.
      "cluster_detection_method": "deactivate",
    }
  # Before `initialize`, which starts the service that catches SIGTERM.
  jax.config.update("jax_enable_preemption_service", notice)
  # JAX gets 30 seconds more than the timer, so that the timer always comes first: when JAX gives up
  # it ends the process with a trace.
  late = threading.Timer(START_TIMEOUT, _give_up, [coordinator])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(**given, initialization_timeout=int(START_TIMEOUT) + 30)
  except (RuntimeError, ValueError) as error:
    line = str(error).strip().splitlines()[0]
    raise UserError(
      f"parallel.coordinator={coordinator}: the processes of this run did not find each other"
      f" ({line}); all of them are started with the same command, and one address"
    ) from None
  finally:
    late.cancel()
  if distributed.global_state.service is not None:
    distributed.global_state.service = _Lingering(distributed.global_state.service)


class _Lingering:
  """JAX's coordination service in process 0, shut down with a delay.

  If it is shut down while another process is still sending, it aborts this process.
  """

  def __init__(self, service: Any):
    self._service = service

  def shutdown(self) -> None:
    time.sleep(LINGER)
    self._service.shutdown()


def _give_up(coordinator: str) -> None:
  """Prints one line and exits, shortly before JAX would end the process with a trace."""
  # This runs in the timer's thread while the main thread waits inside JAX, where no Python
  # exception reaches it: so a direct write and an immediate exit.
  os.write(
    2,
    f"error: parallel.coordinator={coordinator}: not all processes of this run came within"
    f" {START_TIMEOUT:.0f} seconds; start all of them, with one address that every one of them can"
    " reach\n".encode(),
  )
  os._exit(1)


def is_multiprocess() -> bool:
  """Returns True if the run has more than one process."""
  return jax.process_count() > 1


def is_main_process() -> bool:
  """Returns True in process 0, which alone writes files and prints."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process has called it with this name."""
  if is_multiprocess():
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def quiet() -> Any:
  """Discards what is printed inside the block, in every process but the main one."""
  if is_main_process():
    yield
    return
  with (
    open(os.devnull, "w", encoding="utf-8") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    yield


# --- consistency ----------------------------------------------------------------------------------


def assert_consistent(facts: dict[str, Any]) -> None:
  """Checks that facts such as the configuration are equal in all processes.

  All processes call it together, with the same names in the same order.

  Args:
    facts: name of a fact, for the error message, to its value, which JSON can represent.

  Raises:
    UserError: a fact differs. It is raised in every process, and names the fact and the processes.
  """
  if not is_multiprocess():
    return
  # Only digests travel: gathered arrays must have one shape in all processes, values need not.
  digests = [_digest(value) for value in facts.values()]
  mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(facts), -1)
  everyone = np.asarray(multihost_utils.process_allgather(mine))
  for name, digest_Pc in zip(facts, np.swapaxes(everyone, 0, 1), strict=True):
    others = [
      str(i) for i, digest in enumerate(digest_Pc) if not np.array_equal(digest, digest_Pc[0])
    ]
    if others:
      raise UserError(
        f"{name} of process {', '.join(others)} differs from that of process 0; start all of them"
        " with the same command, on the same code and files"
      )


def from_main_process(text: str) -> str:
  """Returns a short text of the main process in all of them; all processes call it together."""
  if not is_multiprocess():
    return text
  # As bytes of one length, since arrays that travel have one shape in all processes.
  data = np.frombuffer(text.encode().ljust(64), np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).decode().strip()


def _digest(value: Any) -> bytes:
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


@functools.cache
def code_digest() -> str:
  """Returns a digest of this package's source files and of the versions of JAX and Python."""
  found = hashlib.blake2b(f"{jax.__version__} {sys.version}".encode(), digest_size=16)
  folder = pathlib.Path(__file__).parents[1]  # of the package dpo_jax, not of distributed/ alone
  for path in sorted(folder.rglob("*.py")):  # sorted: each file system lists in its own order
    found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
  return found.hexdigest()


def on_main_process(fn: Callable[[], object], name: str) -> None:
  """Calls `fn` in the main process, while the others wait at the barrier `name`."""
  if is_main_process():
    fn()
  barrier(name)
