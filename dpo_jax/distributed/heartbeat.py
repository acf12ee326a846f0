"""Ends every process of a run when one of them fails or falls silent.

JAX's own service notices a lost process only after some time, and cannot say why it stopped. Here
every process keeps a connection to process 0, which passes on what it receives. A process that
fails sends the reason, and the others print it and exit at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import threading
import time
from multiprocessing import connection
from typing import Any, Self, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.distributed import processes
from dpo_jax.distributed.preemption import AGAIN
from dpo_jax.structs import UserError

# Seconds between two messages, and seconds without one after which a process counts as lost.
INTERVAL, TIMEOUT = 5.0, 60.0
_ALIVE, _BYE = "alive", "bye"  # any other message is "STATUS SENTENCE", the reason of an end


class Heartbeat:
  """Ends all processes when one ends early, for as long as this context manager is open.

  A process that leaves with an error sends it to the others, which print it and exit with status 1.
  A process that disappears, or sends nothing for `TIMEOUT` seconds, counts as lost: the others say
  so and exit with status 75, because the run can go on from its last checkpoint.

  In a run of one process it does nothing.
  """

  def __enter__(self) -> Self:
    self._lines: dict[int, connection.Connection] = {}
    # The lock keeps two threads from mixing their bytes on one connection. The event is set once:
    # it stops the heartbeat, and keeps a second reason from replacing the first.
    self._lock, self._over = threading.Lock(), threading.Event()
    if processes.is_multiprocess():
      self._connect()
      threading.Thread(target=self._beat, daemon=True).start()
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if not processes.is_multiprocess():
      return
    # SystemExit is the end that all processes reach together, after a preemption notice.
    if error is None or isinstance(error, SystemExit):
      # The order is important: 1. wait until all have come here, still beating, so that none is
      # taken for lost; 2. stop the heartbeat; 3. say goodbye, so that the others do not take the
      # closed connection for a loss.
      processes.barrier("leaving")
      self._over.set()
      self._send_all(_BYE)
      return
    # If another process is lost, JAX fails here too. Its error would hide the real reason, which
    # the listening thread learns within moments: `_end` then reports it and exits during the sleep.
    if self._over.wait(0.5 if isinstance(error, UserError) else 2.0):
      time.sleep(TIMEOUT)
    self._over.set()
    self._send_all(f"1 {self._name()} stopped: {' '.join(str(error).split()) or kind.__name__}")
    # When Python exits, JAX would wait for the other processes, which are already gone. Registered
    # last, this runs first.
    atexit.register(os._exit, 130 if kind is KeyboardInterrupt else 1)

  def _connect(self) -> None:
    """Connects all others to process 0, at an address and port that it sends over the devices."""
    about = np.zeros(4 + 2 + 32, np.uint8)  # IPv4 address, port, secret
    server = None
    if processes.is_main_process():
      # The port is open to the network: only holders of the secret are accepted.
      token = secrets.token_bytes(32)
      server = connection.Listener(("0.0.0.0", 0), authkey=token, backlog=jax.process_count())
      _, number = cast(tuple[str, int], server.address)  # a string only for a socket file
      port = number.to_bytes(2, "big")
      about = np.frombuffer(socket.inet_aton(_own_address()) + port + token, np.uint8)
    # The broadcast is a sum over devices, which widens uint8.
    about = np.asarray(multihost_utils.broadcast_one_to_all(about)).astype(np.uint8).tobytes()
    if server is None:
      place = socket.inet_ntoa(about[:4]), int.from_bytes(about[4:6], "big")
      line = connection.Client(place, authkey=about[6:])
      line.send_bytes(self._name().encode())
      self._start_listening(0, "process 0", line)
      return
    for _ in range(jax.process_count() - 1):
      line = server.accept()
      # Connections arrive in any order; the first message is the name, "process 3 (HOST)".
      name = line.recv_bytes().decode()
      self._start_listening(int(name.split()[1]), name, line)
    server.close()

  def _start_listening(self, index: int, name: str, line: connection.Connection) -> None:
    self._lines[index] = line
    threading.Thread(target=self._listen, args=(name, line), daemon=True).start()

  def _listen(self, name: str, line: connection.Connection) -> None:
    """Reads one connection until the other end says goodbye, fails or falls silent."""
    while True:
      try:
        word = line.recv_bytes().decode() if line.poll(TIMEOUT) else None
      except (EOFError, OSError):
        return self._end(f"{name} is gone without a word", AGAIN)
      if word is None:
        return self._end(f"{name} gave no sign of life for {TIMEOUT:.0f} seconds", AGAIN)
      if word == _BYE:
        return None
      if word != _ALIVE:
        status, _, sentence = word.partition(" ")
        # The others are connected to process 0 alone. Status 75 from one of them means that process
        # 0 was paused and is itself the lost one, so nobody is left to wait for.
        return self._end(sentence, int(status), linger=int(status) != AGAIN)

  def _beat(self) -> None:
    while not self._over.wait(INTERVAL):
      self._send_all(_ALIVE)

  def _end(self, sentence: str, status: int, linger: bool = True) -> None:
    """Passes the reason on, prints it and exits; process 0 first lets the others print theirs."""
    if self._over.is_set():
      return
    self._over.set()
    self._send_all(f"{status} {sentence}")
    more = "; run the same command again to go on from what was saved" if status == AGAIN else ""
    # os.write and os._exit: this is not the main thread, which may hang in a collective and hold
    # Python's stream locks. sys.exit would end the thread alone.
    os.write(2, f"error: {sentence}{more}\n".encode())
    if processes.is_main_process() and linger:
      time.sleep(1.0)  # JAX ends the others as soon as process 0 is gone; let them print first
    os._exit(status)

  def _send_all(self, word: str) -> None:
    with self._lock:
      for line in self._lines.values():
        with contextlib.suppress(OSError):  # a process that is gone must not stop the message
          line.send_bytes(word.encode())

  @staticmethod
  def _name() -> str:
    return f"process {jax.process_index()} ({socket.gethostname()})"


def _own_address() -> str:
  """Returns the address of this machine on its network, 127.0.0.1 if it has no network."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      # Connecting a UDP socket sends nothing; it makes the system choose an outgoing address.
      probe.connect(("10.255.255.255", 1))
      return probe.getsockname()[0]
    except OSError:
      return "127.0.0.1"
