"""Settings of malloc for this process. It needs the standard library alone."""

from __future__ import annotations

import ctypes
import os
import sys


def keep_freed_memory() -> None:
  """Makes glibc reuse large freed blocks, in place of returning them to the system.

  By default each large array of a step on the CPU is a new mapping, which the system fills with
  zeros page by page. With an accelerator, which stores the arrays itself, or without glibc, this
  function changes nothing.
  """
  # Device files, since asking JAX would start its backends, and not every caller has JAX.
  accelerators = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")
  if not sys.platform.startswith("linux") or any(map(os.path.exists, accelerators)):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    # The numbers are from malloc.h, which ctypes cannot read.
    mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap keeps its top
    mallopt(-8, 1)  # M_ARENA_MAX: the heaps of other threads could not grow so large
