"""The work folder of a run: which run owns it, what it learns from, and the lock.

`config.json` has the configuration, `data.json` counts of rows, and `inputs.json` when the run
began and a digest of everything that it learns from: rows, weights, tokenizer and template.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.structs import UserError
from dpo_jax.utils import files, model_folder

RUNS = pathlib.Path("runs")
INPUTS = "inputs.json"
VERSION = 1  # of the digests in it; those of another version cannot be compared
# Fields that a run may be resumed with other values of: the caller checks them against the steps
# that were taken.
LENGTH = ("train.steps", "train.epochs")
# Fields that say how a step is computed, and change its result by rounding alone. Their values in
# `OPEN` leave the choice to the run, which stores what it chose.
COMPUTED = ("model.remat", "train.accumulate")
OPEN = ("auto", 0)
# Files of a run. A folder with one of them but without config.json belongs to something else.
_RUN_FILES = ("metrics.jsonl", "data.json", "checkpoints", "export", "report.html")


def check(workdir: pathlib.Path, config: str, defaults: str = "{}") -> None:
  """Checks that a folder is new, or contains this same run.

  The section `parallel` may differ, since a run can be resumed on other devices, and so may the
  fields in `COMPUTED` and `LENGTH`.

  Args:
    workdir: the folder; it need not exist.
    config: the resolved configuration, JSON.
    defaults: a configuration with all defaults, JSON: a run that was begun before a field existed
      has its default.

  Raises:
    UserError: the folder has another run, or files of something else; it names what differs.
  """
  files.check_folder(workdir, f"--workdir={workdir}")
  if model_folder.is_model(workdir):
    around = model_folder.run_around(workdir)
    run = f"; its run is {around}" if around else ""
    raise UserError(
      f"--workdir={workdir} is a model folder{run}; a run writes into a folder of its own, such as"
      " --workdir=runs/mine (the model is named by --model)"
    )
  before = stored_config(workdir)
  if before is None:
    for name in _RUN_FILES:
      if (workdir / name).exists():
        raise UserError(
          f"{workdir} contains {name} but no config.json, so it is no run to resume;"
          " choose another --workdir"
        )
    runs = [path.parent.name for path in sorted(workdir.glob("*/config.json"))]
    if runs := [name for name in runs if model_folder.is_run(workdir / name)]:
      raise UserError(
        f"--workdir={workdir} is a folder of runs ({', '.join(runs[:3])}); name a folder of its own"
        f" for this run, such as --workdir={workdir / 'new'}"
      )
    return
  before = _filled_in(before, json.loads(defaults))
  changed = _differences(_compared(before), _compared(json.loads(config)))
  if changed:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise UserError(
      f"{workdir} contains a run with another configuration: {'; '.join(changed[:3])}{more}."
      " Choose a new --workdir, the same values to resume, or --overwrite to start anew there"
    )


def choose(
  model: str, loss: str, config: str, defaults: str = "{}", parent: pathlib.Path = RUNS
) -> pathlib.Path:
  """Returns the folder of a run that names none: `runs/MODEL-LOSS`, perhaps with a number.

  The first such folder is taken that is new or has this same run, so that the same command resumes
  its own run and never meets another.

  Args:
    model: the model's folder.
    loss: name of the loss.
    config, defaults: as for `check`.
    parent: where the folder lies.

  Raises:
    UserError: `parent` may not be written to.
  """
  path = pathlib.Path(model).resolve()
  # The export of a run is named after that run.
  name = path.parent.name if path.name == "export" else path.name
  name = re.sub(r"[^\w.+-]+", "-", f"{name}-{loss}").strip("-.")
  files.check_folder(parent / name, f"--workdir={parent / name}")
  for number in itertools.count(1):
    folder = parent / (name if number == 1 else f"{name}-{number}")
    if not folder.exists():
      return folder
    with contextlib.suppress(UserError):
      check(folder, config, defaults)
      before = stored_config(folder)
      # Longer training is a run of its own, unless its folder is named, and so is one whose steps
      # are computed in another way.
      if before is not None and _is_same(before, json.loads(config)):
        return folder
  raise AssertionError  # the numbers do not end


def stored_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns the configuration of the run in a folder; None if there is no run."""
  return _read(workdir / "config.json")


def began(workdir: pathlib.Path) -> datetime.datetime:
  """Returns when the run in a folder began, in local time; the present for a new run."""
  record = _read(workdir / INPUTS)
  if record is not None:
    return datetime.datetime.fromisoformat(record["began"])
  config = workdir / "config.json"
  if config.is_file():  # of a run that has no record: the file is written once, at the beginning
    return datetime.datetime.fromtimestamp(int(config.stat().st_mtime))
  return datetime.datetime.now().replace(microsecond=0)


def changed_inputs(
  workdir: pathlib.Path, inputs: dict[str, str], ledger: dict[str, Any]
) -> tuple[list[str], bool]:
  """Compares what a run learns from with what the run in a folder began with.

  Args:
    workdir: the folder.
    inputs: name -> digest.
    ledger: counts of the rows read, kept and dropped.

  Returns:
    The names of what differs, and whether digests could be compared: a run that was begun before
    there were any has only its counts of rows.
  """
  record, counts = _read(workdir / INPUTS), _read(workdir / "data.json")
  if record is None or record["version"] != VERSION:
    changed = _differences(_counts(counts), _counts(ledger)) if counts is not None else []
    return [f"the data ({'; '.join(changed[:3])})"] if changed else [], False
  # Names of both, each once: something may be read now that was not read before.
  before = record["inputs"]
  names = [*before, *(name for name in inputs if name not in before)]
  return [name for name in names if before.get(name) != inputs.get(name)], True


def check_set_aside(workdir: pathlib.Path, named: Mapping[str, str]) -> None:
  """Checks that the run in a folder may be moved, for another to begin there.

  Args:
    workdir: the folder, which exists.
    named: name of a field -> the file or folder that it names, for all that a run reads.

  Raises:
    UserError: the folder contains no run, or something that the new run reads.
  """
  files.check_folder(workdir, f"--workdir={workdir}")
  if any(workdir.iterdir()) and not (workdir / "config.json").is_file():
    raise UserError(
      f"--overwrite: {workdir} contains files and no config.json, so it is no run that could be"
      " moved aside; choose another --workdir"
    )
  whole = workdir.resolve()
  for name, path in named.items():
    parts = filter(None, [path, *path.split(",")])  # data may be several files
    if any(pathlib.Path(part).resolve().is_relative_to(whole) for part in parts):
      raise UserError(
        f"--overwrite would move {workdir} aside, and {name}={path} lies in it; choose another"
        " --workdir"
      )


def beside(workdir: pathlib.Path, suffix: str) -> pathlib.Path:
  """Returns the path next to a folder whose name has a suffix more."""
  named = workdir if workdir.name not in ("", "..") else workdir.resolve()
  return named.with_name(named.name + suffix)


def set_aside(workdir: pathlib.Path) -> pathlib.Path:
  """Renames the folder of a run to `NAME.old-1`, or the next number that is free; returns that."""
  names = (beside(workdir, f".old-{n}") for n in itertools.count(1))
  aside = next(path for path in names if not path.exists())
  workdir.rename(aside)
  return aside


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


def claim(
  workdir: pathlib.Path,
  config: str,
  ledger: dict[str, Any],
  inputs: dict[str, str],
  *,
  began: datetime.datetime,
  step: int = 0,
) -> None:
  """Makes the folder and writes config.json, data.json and inputs.json to it.

  On resume they stay as they are, unless something was accepted that differs: then `changes` of
  inputs.json says what, after which step, and what was there before.

  Args:
    workdir: the folder.
    config: the resolved configuration, JSON.
    ledger: counts of the rows read, kept and dropped.
    inputs: name -> digest of what the run learns from.
    began: when the run began.
    step: steps that the run has taken.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  before, counts = stored_config(workdir), _read(workdir / "data.json")
  record: dict[str, Any] = {"version": VERSION, "began": began.isoformat(), "inputs": inputs}
  if before is not None and counts is not None:
    found, checked = changed_inputs(workdir, inputs, ledger)
    fields = LENGTH + COMPUTED
    lengths = _differences(_values(before, fields), _values(json.loads(config), fields))
    if checked and not found and not lengths:
      return
    old = _read(workdir / INPUTS) or {}
    change: dict[str, Any] = {"after_step": step, "changed": found + lengths}
    if found:
      change |= {"inputs_before": old.get("inputs"), "data_before": counts}
    record["changes"] = old.get("changes", []) + ([change] if found or lengths else [])
    # Kept by the record from here on, so that the files may have the present ones.
    files.write_text(workdir / INPUTS, _text(record))
    if found:
      files.write_text(workdir / "data.json", _text(ledger))
    if lengths:
      files.write_text(workdir / "config.json", config + "\n")
    return
  # The order is important: config.json comes last and marks a folder as complete. A run that was
  # killed between the writes does them again.
  files.write_text(workdir / "data.json", _text(ledger))
  files.write_text(workdir / INPUTS, _text(record))
  files.write_text(workdir / "config.json", config + "\n")


def _counts(ledger: dict[str, Any]) -> dict[str, Any]:
  """Returns the counts of a ledger that say what is learned from, of its held-out rows too.

  Not the reasons and names in it, whose words may be others in another version.
  """
  found = {name: ledger.get(name) for name in ("rows", "pairs")}
  found |= {f"tokens.{name}": ledger.get("tokens", {}).get(name) for name in ("prompt", "answer")}
  return found | ({"eval": _counts(ledger["eval"])} if "eval" in ledger else {})


def _text(value: object) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads the object in a file of the folder; None if there is no file."""
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    raise UserError(f"{path} is not JSON; choose another --workdir") from None


def _filled_in(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
  """Adds the fields and sections that a configuration lacks."""
  found = defaults | config
  for name, section in defaults.items():
    # Not the section of a model from scratch, whose fields are the user's own.
    if isinstance(section, dict) and isinstance(found[name], dict):
      found[name] = section | found[name]
  return found


def _compared(config: dict[str, Any]) -> dict[str, Any]:
  """Returns a configuration without what may differ on resume."""
  found = {name: section for name, section in config.items() if name != "parallel"}
  for field in LENGTH + COMPUTED:
    section, name = field.split(".")
    if isinstance(found.get(section), dict):
      found[section] = {key: value for key, value in found[section].items() if key != name}
  return found


def _values(config: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
  """Returns the values of some fields, by their names."""
  names = [field.split(".") for field in fields]
  return {f"{section}.{name}": config.get(section, {}).get(name) for section, name in names}


def _is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
  """Returns whether a run has the length, and computes its steps in the way, that is asked for."""
  if _values(before, LENGTH) != _values(now, LENGTH):
    return False
  was, wanted = _values(before, COMPUTED), _values(now, COMPUTED)
  # A run that began before a field existed, or stores no choice, is as good as any.
  return all(x in OPEN or was[name] in (None, x, *OPEN) for name, x in wanted.items())


def _differences(before: object, now: object, name: str = "") -> list[str]:
  """Returns the leaves that differ between two JSON values, each as "a.b was 1, now not set"."""
  if isinstance(before, dict) and isinstance(now, dict):
    # Keys of both, each once: a field that one side lacks counts as None there.
    keys = list(before) + [k for k in now if k not in before]
    return [
      line
      for key in keys
      for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    ]
  was, now_is = ("not set" if value is None else repr(value) for value in (before, now))
  return [] if before == now else [f"{name} was {was}, now {now_is}"]
