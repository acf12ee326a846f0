"""The folder of a run: whose it is, and files that are either whole or absent."""

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

# What a run writes; a folder that has one of these without a config.json is not ours to fill.
_OURS = ("metrics.jsonl", "data.json", "checkpoints", "export", "report.html")


def check(workdir: pathlib.Path, config: str) -> None:
  """Refuses a folder that holds something other than this very run.

  On which devices it runs may change: a run goes on on others than it began on.

  Args:
    workdir: the folder; it need not exist.
    config: the resolved configuration, JSON.

  Raises:
    UserError: naming the fields that differ, or the file that is in the way.
  """
  files.check_folder(workdir, f"--workdir={workdir}")
  held = workdir / "config.json"
  if not held.is_file():
    for name in _OURS:
      if (workdir / name).exists():
        raise UserError(
          f"{workdir} holds {name} but no config.json, so it is no run to resume;"
          " choose another --workdir"
        )
    return
  try:
    before = json.loads(held.read_text(encoding="utf-8"))
  except ValueError:
    raise UserError(f"{held} is not JSON; choose another --workdir") from None
  changed = _differences(_wherever(before), _wherever(json.loads(config)))
  if changed:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise UserError(
      f"{workdir} holds a run with another configuration: {'; '.join(changed[:3])}{more}."
      " Choose a new --workdir, or the same values to resume"
    )


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from training into an existing folder meanwhile.

  Raises:
    UserError: one is at it.
  """
  lock = workdir / ".lock"
  with lock.open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      who = file.read().strip()
      raise UserError(
        f"{workdir} is being trained into by another process{who and f' ({who})'}; wait for it, or"
        " choose another --workdir"
      ) from None
    except OSError:  # a file system that knows no locks
      yield
      return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def claim(workdir: pathlib.Path, config: str, ledger: dict) -> None:
  """Writes config.json and data.json; on resume, refuses data that changed meanwhile."""
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
  files.write_text(data, text)
  files.write_text(workdir / "config.json", config + "\n")


def _wherever(config: dict) -> dict:
  return {name: section for name, section in config.items() if name != "parallel"}


def _differences(before: object, now: object, name: str = "") -> list[str]:
  """Leaves that differ between two JSON values, each as `a.b was 1, now 2`."""
  if isinstance(before, dict) and isinstance(now, dict):
    keys = list(before) + [k for k in now if k not in before]
    return [
      line
      for key in keys
      for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    ]
  return [] if before == now else [f"{name} was {before!r}, now {now!r}"]
