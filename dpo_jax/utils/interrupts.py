"""Ctrl-C: the first ends a command in one line, or lets training save; the second stops at once.

A command installs this before its slow imports, so it needs nothing but the standard library.
Two parts see every Ctrl-C. The handler runs in the main thread, and so not while XLA compiles or a
device is waited for. The watcher is a thread that sees the signal at any time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT  # exit status of a command that Ctrl-C has ended, as in shells
TOGETHER = 0.2  # seconds within which two signals are one Ctrl-C that came by two ways
PATIENCE = 1.0  # seconds after which the first Ctrl-C is answered, if the command has not ended
AGAIN = 0.05  # seconds between two looks at whether the command may be ended now

# Modules of JAX that trace, lower and compile. An exception that a handler raises there unwinds
# through C++, and has ended a process by a segmentation fault.
_COMPILING = ("jax._src.compiler", "jax._src.interpreters", "jax._src.pjit", "jaxlib")

# Both ends of what Python writes signals to, for as long as the process lives: once closed, its
# number would be that of another file, and signals would be written into that.
_sockets: tuple[socket.socket, ...] = ()
_pending = False  # a Ctrl-C has come that is to end the command
_answer = ""  # what the first Ctrl-C is answered with at once; "" where it ends the command


def install() -> None:
  """Handles Ctrl-C from here on, in a program of this project; once is enough.

  It does nothing where something else handles Ctrl-C, or where it is ignored, as in the background
  jobs of a script.
  """
  global _sockets
  if _sockets or threading.current_thread() is not threading.main_thread():
    return
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return
  _sockets = reader, writer = socket.socketpair()
  writer.setblocking(False)
  # Python writes the number of every signal there, whatever the main thread is doing.
  signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, _handle)
  signal.signal(signal.SIGALRM, _handle)  # of the timers below
  threading.Thread(target=_watch, args=(reader,), daemon=True).start()
  # A forked child would report its signals to this process, which would count every one twice.
  os.register_at_fork(after_in_child=_uninstall)
  shown = sys.unraisablehook

  def hook(met: Any) -> None:
    # Raised in a destructor or a callback, where Python can only print it: it is raised anew.
    if _pending and issubclass(met.exc_type, KeyboardInterrupt):
      signal.setitimer(signal.ITIMER_REAL, AGAIN)
    else:
      shown(met)

  sys.unraisablehook = hook


def is_installed() -> bool:
  """Returns True if a second Ctrl-C ends the process without the help of the main thread."""
  return bool(_sockets)


def is_pending() -> bool:
  """Returns True once a Ctrl-C has come that is to end the command."""
  return _pending


def answer(text: str) -> None:
  """Sets what the first Ctrl-C is answered with while something else handles it; "" ends that."""
  global _answer
  _answer = text


@contextlib.contextmanager
def blocked() -> Iterator[None]:
  """Keeps Ctrl-C from processes that are started inside the block: this one ends them."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end() -> NoReturn:
  """Ends the process after a Ctrl-C in one line."""
  # Not by sys.exit: the interpreter would take down objects that threads of XLA are still using.
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # its reader has left, or it is closed
      stream.flush()
  _write("\ninterrupted\n")
  os._exit(STATUS)


def _uninstall() -> None:
  global _sockets
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  _sockets = ()


def _handle(number: int, frame: types.FrameType | None) -> None:
  """Ends the command by a KeyboardInterrupt, as soon as it may be raised."""
  global _pending
  if number == signal.SIGINT and _pending:
    return  # it has come twice at once; the watcher ends the process at a second one
  _pending = True
  names = list(_modules(frame))
  if "importlib._bootstrap" in names:
    end()  # nothing has begun, and imports of C extensions hide a KeyboardInterrupt in other errors
  if any(name.startswith(_COMPILING) for name in names):
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    return
  raise KeyboardInterrupt


def _modules(frame: types.FrameType | None) -> Iterator[str]:
  """Yields the names of the modules whose functions are running."""
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      yield "importlib._bootstrap"
    yield frame.f_globals.get("__name__") or ""
    frame = frame.f_back


def _watch(reader: socket.socket) -> None:
  """Answers the first Ctrl-C, and ends the process at the second."""
  first = None
  while signals := reader.recv(1):
    if signals[0] != signal.SIGINT:
      continue
    now = time.monotonic()
    if first is None:
      first = now
      if _answer:
        _write(f"\n{_answer}\n")
      elif not select.select([reader], [], [], PATIENCE)[0]:
        _write("\nstopping as soon as this part is done; Ctrl-C again stops at once\n")
    elif now - first > TOGETHER:
      _write("\nstopped at once\n")
      _kill_children()
      os._exit(STATUS)


def _kill_children() -> None:
  """Ends the worker processes of this one, which would wait for work for ever."""
  if "multiprocessing" in sys.modules:
    for child in sys.modules["multiprocessing"].active_children():
      child.kill()


def _write(text: str) -> None:
  # Unbuffered, and without Python's locks, which the main thread may have.
  with contextlib.suppress(OSError):  # the terminal is gone
    os.write(2, text.encode())
