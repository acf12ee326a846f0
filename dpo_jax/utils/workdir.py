"""The work folder of a run: which run owns it, and the lock against a second process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from dpo_jax.structs import UserError
from dpo_jax.utils import files

# Files of a run. A folder with one of them but without config.json belongs to something else.
_RUN_FILES = ("metrics.jsonl", "data.json", "checkpoints", "export", "report.html")


def check(workdir: pathlib.Path, config: str) -> None:
  """Checks that a folder is new, or contains this same run.

  The section `parallel` may differ: a run can be resumed on other devices.

  Args:
    workdir: the folder; it need not exist.
    config: the resolved configuration, JSON.

  Raises:
    UserError: the folder has another run, or files of something else; it names what differs.
  """
  files.check_folder(workdir, f"--workdir={workdir}")
  stored = workdir / "config.json"
  if not stored.is_file():
    for name in _RUN_FILES:
      if (workdir / name).exists():
        raise UserError(
          f"{workdir} contains {name} but no config.json, so it is no run to resume;"
          " choose another --workdir"
        )
    return
  try:
    before = json.loads(stored.read_text(encoding="utf-8"))
  except ValueError:
    raise UserError(f"{stored} is not JSON; choose another --workdir") from None
  changed = _differences(_without_parallel(before), _without_parallel(json.loads(config)))
  if changed:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise UserError(
      f"{workdir} contains a run with another configuration: {'; '.join(changed[:3])}{more}."
      " Choose a new --workdir, or the same values to resume"
    )


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Locks an existing folder against other processes that would train into it.

  Raises:
    UserError: another process has the lock.
  """
  # flock, not a file that exists or not: the system frees it however the process ends. "a+" creates
  # the file, and keeps the name that the owner of the lock wrote into it.
  with (workdir / ".lock").open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().strip()
      raise UserError(
        f"{workdir} is being trained into by another process{owner and f' ({owner})'}; wait for it,"
        " or choose another --workdir"
      ) from None
    except OSError:  # a file system without locks, such as some network ones: train without
      yield
      return
    # For the error message of another process: this one now owns the lock.
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def claim(workdir: pathlib.Path, config: str, ledger: dict) -> None:
  """Makes the folder and writes config.json and data.json, or on resume compares the data.

  Args:
    workdir: the folder.
    config: the resolved configuration, JSON.
    ledger: counts of the rows read, kept and dropped.

  Raises:
    UserError: the data differ from those that the run in this folder began with.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  data = workdir / "data.json"
  text = json.dumps(ledger, indent=2, ensure_ascii=False) + "\n"
  if (workdir / "config.json").is_file() and data.is_file():
    changed = _differences(json.loads(data.read_text(encoding="utf-8")), json.loads(text))
    if changed:
      raise UserError(
        f"the data changed since the run in {workdir} began: {'; '.join(changed[:3])}."
        " Choose a new --workdir"
      )
    return
  # The order is important: config.json comes last and marks a folder as complete. A run that was
  # killed between the two writes both again.
  files.write_text(data, text)
  files.write_text(workdir / "config.json", config + "\n")


def _without_parallel(config: dict) -> dict:
  return {name: section for name, section in config.items() if name != "parallel"}


def _differences(before: object, now: object, name: str = "") -> list[str]:
  """Returns the leaves that differ between two JSON values, each as "a.b was 1, now 2"."""
  if isinstance(before, dict) and isinstance(now, dict):
    # Keys of both, each once: a field that one side lacks counts as None there.
    keys = list(before) + [k for k in now if k not in before]
    return [
      line
      for key in keys
      for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    ]
  return [] if before == now else [f"{name} was {before!r}, now {now!r}"]
