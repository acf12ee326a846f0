"""Settings of libtpu, the compiler for TPUs, on a machine without a TPU.

Nothing here imports jax, which reads some of them when it is imported.
"""

from __future__ import annotations

import os

# libtpu would otherwise ask Google's metadata server about the machine, refuse to be loaded by two
# programs at a time, and write its log to /tmp and stderr.
_SETTINGS = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}


def prepare() -> None:
  """Sets what libtpu reads, where the environment does not; to be called before jax is imported."""
  for name, value in _SETTINGS.items():
    os.environ.setdefault(name, value)
