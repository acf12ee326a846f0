"""How this process takes memory from the system. Needs nothing but the standard library."""

from __future__ import annotations

import ctypes
import os
import sys


def keep_freed_memory() -> None:
  """Has glibc hand large blocks out again instead of giving them back to the system.

  By default each large array of a step on the CPU is a fresh mapping, which the system zeroes page
  by page. Left alone where an accelerator holds the arrays, or where there is no glibc.
  """
  accelerators = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")
  if not sys.platform.startswith("linux") or any(map(os.path.exists, accelerators)):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap keeps its top
    mallopt(-8, 1)  # M_ARENA_MAX: the heaps of other threads could not grow so large
