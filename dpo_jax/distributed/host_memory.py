"""Free memory of the host, as its kernel and its container allow it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

UNLIMITED = 2**60  # version 1 writes a number near 2^63 for no limit


def available(root: str | pathlib.Path = "/") -> int | None:
  """Returns the bytes that a process of this machine could still take, swap included.

  The least of what the kernel has and what each control group around this process allows (Linux,
  versions 1 and 2), page cache counted as free.

  Args:
    root: of the file system; another one for tests.

  Returns:
    None where the system does not tell (not Linux).
  """
  root = pathlib.Path(root)
  known = _table(root / "proc/meminfo")
  if "MemAvailable" not in known:
    return None
  swap = known.get("SwapFree", 0)
  # The table of /proc is in kB, those of control groups are in bytes.
  free = [(known["MemAvailable"] + swap) * 1024]
  free += [room + swap * 1024 for room in _rooms(root)]
  return max(0, min(free))


def _rooms(root: pathlib.Path) -> Iterator[int]:
  """Yields what every control group around this process has left."""
  lines = _read(root / "proc/self/cgroup").splitlines()
  for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
    if not controllers:  # version 2
      names = "memory.max", "memory.current", ("file",)
      top = root / "sys/fs/cgroup"
    elif "memory" in controllers.split(","):
      # The totals are of the group with those inside it, as its usage is.
      names = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_cache",)
      top = root / "sys/fs/cgroup/memory"
    else:
      continue
    # From the group outwards. Inside a container the path is often that of the host, and is not
    # there: then the top is the container's own group.
    inside = pathlib.PurePosixPath(path.lstrip("/"))
    for folder in dict.fromkeys([top / inside, *(top / part for part in inside.parents), top]):
      limit, used = (_read(folder / name).strip() for name in names[:2])
      if limit.isdigit() and used.isdigit() and int(limit) < UNLIMITED:
        stat = _table(folder / "memory.stat")
        yield int(limit) - int(used) + sum(stat.get(name, 0) for name in names[2])


def _table(path: pathlib.Path) -> dict[str, int]:
  """Reads lines of a name and a number."""
  rows = (line.replace(":", " ").split() for line in _read(path).splitlines())
  return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ""
