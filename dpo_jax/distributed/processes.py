"""Several processes that train one model: how they find each other, agree, and part.

Every process runs the same program on the same files and holds some of the devices. The first one
alone writes and speaks. Beside JAX's own service, which ends a run some time after a process has
gone, every process is in touch with the first: one that fails or falls silent ends the others at
once, with a line that says which.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, Self

import jax
import numpy as np
from jax._src import distributed  # no public name ends the service apart from the client
from jax.experimental import multihost_utils

from dpo_jax.distributed.preemption import AGAIN
from dpo_jax.structs import UserError

AUTO = "auto"
WAIT = 300.0  # seconds for all to come
BEAT, SILENCE = 5.0, 60.0  # seconds between signs of life, and without one until a process is lost
LINGER = 1.0  # seconds that JAX's service outlives the last that left it
_ALIVE, _BYE = "alive", "bye"


def start(coordinator: str, processes: int, process: int, *, notice: bool = True) -> None:
  """Joins the others of a run; returns when all are there.

  Args:
    coordinator: "HOST:PORT" of the first process; "auto" where a TPU pod, SLURM or Open MPI says
      who there is; "" for a run of one process.
    processes, process: how many there are and which this is, from 0, with an address.
    notice: whether SIGTERM is only remembered, for `preemption.Notice`; else it ends the process.

  Raises:
    UserError: settings that do not belong together, or not all came.
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
      "cluster_detection_method": "deactivate",
    }
  jax.config.update("jax_enable_preemption_service", notice)
  late = threading.Timer(WAIT, _give_up, [coordinator])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(**given, initialization_timeout=int(WAIT) + 30)
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
  """JAX's service, in the first process: ended while another still sends, it aborts this one."""

  def __init__(self, service: Any):
    self._service = service

  def shutdown(self) -> None:
    time.sleep(LINGER)
    self._service.shutdown()


def _give_up(coordinator: str) -> None:
  """Before JAX does, which ends the process with a trace of its own."""
  os.write(
    2,
    f"error: parallel.coordinator={coordinator}: not all processes of this run came within"
    f" {WAIT:.0f} seconds; start all of them, with one address that every one of them can"
    " reach\n".encode(),
  )
  os._exit(1)


def is_multiprocess() -> bool:
  """Whether there are more than this one."""
  return jax.process_count() > 1


def is_main_process() -> bool:
  """Whether this is the process that writes and speaks."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Returns when every process has come to this point."""
  if is_multiprocess():
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def quiet() -> Any:
  """Prints nothing in processes other than the first."""
  if is_main_process():
    yield
    return
  with (
    open(os.devnull, "w", encoding="utf-8") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    yield


# --- agreement ------------------------------------------------------------------------------------


def assert_consistent(facts: dict[str, Any]) -> None:
  """Refuses processes that differ in what all must have alike.

  Args:
    facts: what it is called, and its value as JSON has it.

  Raises:
    UserError: in every process; names what differs, and in which of them.
  """
  if not is_multiprocess():
    return
  text = lambda value: json.dumps(value, sort_keys=True, default=str).encode()
  digests = [hashlib.blake2b(text(value), digest_size=16).digest() for value in facts.values()]
  mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(facts), -1)
  everyone = np.asarray(multihost_utils.process_allgather(mine))
  for name, digest_P in zip(facts, np.swapaxes(everyone, 0, 1), strict=True):
    others = [
      str(i) for i, digest in enumerate(digest_P) if not np.array_equal(digest, digest_P[0])
    ]
    if others:
      raise UserError(
        f"{name} of process {', '.join(others)} differs from that of process 0; start all of them"
        " with the same command, on the same code and files"
      )


@functools.cache
def code_digest() -> str:
  """Of the program's own files, and of the versions of JAX and Python."""
  found = hashlib.blake2b(f"{jax.__version__} {sys.version}".encode(), digest_size=16)
  folder = pathlib.Path(__file__).parents[1]  # the whole package, not distributed/ alone
  for path in sorted(folder.rglob("*.py")):
    found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
  return found.hexdigest()


# --- in touch -------------------------------------------------------------------------------------


class Touch:
  """While it is open, the end of one process ends the others: a context manager.

  One that leaves with an error tells the others, who print it and exit with status 1. One that is
  gone without a word, or silent for `SILENCE` seconds, is lost: the others say so and exit with
  status 75, for what was saved can be gone on from.
  """

  def __enter__(self) -> Self:
    self._lines: dict[int, connection.Connection] = {}
    self._lock, self._over = threading.Lock(), threading.Event()
    if is_multiprocess():
      self._connect()
      threading.Thread(target=self._beat, daemon=True).start()
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if not is_multiprocess():
      return
    if error is None or isinstance(error, SystemExit):  # which all of them come to together
      wait("leaving")
      self._over.set()
      self._tell(_BYE)
      return
    # If another is lost, that is why; it is known by then, and `_end` says so.
    if self._over.wait(0.5 if isinstance(error, UserError) else 2.0):
      time.sleep(SILENCE)
    self._over.set()
    self._tell(f"1 {self._name()} stopped: {' '.join(str(error).split()) or kind.__name__}")
    # JAX would wait for the others when Python exits.
    atexit.register(os._exit, 130 if kind is KeyboardInterrupt else 1)

  def _connect(self) -> None:
    """All others connect to the first, at an address that it shares through the devices."""
    about = np.zeros(4 + 2 + 32, np.uint8)
    server = None
    if is_main_process():
      token = secrets.token_bytes(32)
      server = connection.Listener(("0.0.0.0", 0), authkey=token, backlog=jax.process_count())
      port = server.address[1].to_bytes(2, "big")
      about = np.frombuffer(socket.inet_aton(_own_address()) + port + token, np.uint8)
    about = np.asarray(multihost_utils.broadcast_one_to_all(about)).astype(np.uint8).tobytes()
    if server is None:
      place = socket.inet_ntoa(about[:4]), int.from_bytes(about[4:6], "big")
      line = connection.Client(place, authkey=about[6:])
      line.send_bytes(self._name().encode())
      self._hear(0, "process 0", line)
      return
    for _ in range(jax.process_count() - 1):
      line = server.accept()
      name = line.recv_bytes().decode()
      self._hear(int(name.split()[1]), name, line)
    server.close()

  def _hear(self, index: int, name: str, line: connection.Connection) -> None:
    self._lines[index] = line
    threading.Thread(target=self._listen, args=(name, line), daemon=True).start()

  def _listen(self, name: str, line: connection.Connection) -> None:
    while True:
      try:
        word = line.recv_bytes().decode() if line.poll(SILENCE) else None
      except (EOFError, OSError):
        return self._end(f"{name} is gone without a word", AGAIN)
      if word is None:
        return self._end(f"{name} gave no sign of life for {SILENCE:.0f} seconds", AGAIN)
      if word == _BYE:
        return None
      if word != _ALIVE:
        status, _, sentence = word.partition(" ")
        # The others lose none but the first. If it hears that it was lost, nobody waits for it.
        return self._end(sentence, int(status), linger=int(status) != AGAIN)

  def _beat(self) -> None:
    while not self._over.wait(BEAT):
      self._tell(_ALIVE)

  def _end(self, sentence: str, status: int, linger: bool = True) -> None:
    """Passes on why it is over, and exits: the first process only when the others could say so."""
    if self._over.is_set():
      return
    self._over.set()
    self._tell(f"{status} {sentence}")
    more = "; run the same command again to go on from what was saved" if status == AGAIN else ""
    os.write(2, f"error: {sentence}{more}\n".encode())
    if is_main_process() and linger:
      time.sleep(1.0)  # JAX ends the others as soon as this one is gone; let them say why before
    os._exit(status)

  def _tell(self, word: str) -> None:
    with self._lock:
      for line in self._lines.values():
        with contextlib.suppress(OSError):
          line.send_bytes(word.encode())

  @staticmethod
  def _name() -> str:
    return f"process {jax.process_index()} ({socket.gethostname()})"


def _own_address() -> str:
  """Of this machine as others see it, 127.0.0.1 if none do."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(("10.255.255.255", 1))  # of UDP: nothing is sent
      return probe.getsockname()[0]
    except OSError:
      return "127.0.0.1"


def on_main_process(fn: Callable[[], None], name: str) -> None:
  """Calls `fn` in the first process, while the others wait for it."""
  if is_main_process():
    fn()
  wait(name)
