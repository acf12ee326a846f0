"""Compares this project's training step with TRL's: groups of programs, timed by `interleaved`.

The programs of a group train one shape on the same rows. Commands are relative to the checkout,
whose scripts they run.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.benchmarking import interleaved, pacing
from dpo_jax.benchmarking.suites import APART, Program
from dpo_jax.structs import UserError
from dpo_jax.utils import files


def check_groups(names: Sequence[str], suite: Mapping[str, Sequence[Program]], called: str) -> None:
  """Checks that groups are in a suite.

  Raises:
    UserError: one is not.
  """
  for name in names:
    if name not in suite:
      raise UserError(f"--only: {called} has no group {name!r}; there are {', '.join(suite)}")


def check_python(path: str) -> str:
  """Returns the absolute path of the interpreter that has TRL.

  Raises:
    UserError: there is no such program.
  """
  # Not `resolve`: the python of a virtual environment is a link, and the program behind it does not
  # have the environment's packages.
  python = pathlib.Path(path).absolute()
  if not python.is_file():
    raise UserError(
      f"--peers_python={path}: no such file; `bash scripts/benchmarks/compare.sh` makes .venv-peers"
    )
  if not os.access(python, os.X_OK):
    raise UserError(f"--peers_python={path} may not be run; name a Python that has TRL")
  return str(python)


def check_out(path: str) -> pathlib.Path:
  """Returns the absolute path of the folder of results.

  Raises:
    UserError: it cannot be one, or contains a comparison.
  """
  files.check_folder(path, f"--out={path}")
  out = pathlib.Path(path).absolute()
  if (out / "comparison.json").exists():
    raise UserError(f"--out={path} holds a comparison already; name another folder")
  return out


def rules(
  group: str, pace: pacing.Pace, *, gpu: bool, rounds: int, quiet: int
) -> interleaved.Rules:
  """Returns how a group is run: alternating block by block, or one program at a time.

  Args:
    group: its name in the suite.
    pace: of a block; a program that is started afresh runs three.
    gpu: whether it runs on a GPU, whose memory has room for one program.
    rounds: how many count.
    quiet: seconds that a block waits at most for other programs to stop; 0 ignores them.
  """
  # Loaded together, programs alternate within seconds and meet the same machine; it needs memory
  # for all of them at once.
  loaded = not gpu and group not in APART
  return interleaved.Rules(
    rounds=rounds,
    pace=pace._replace(blocks=1 if loaded else 3),
    loaded=loaded,
    max_other=0.12 if loaded and quiet else float("inf"),
    quiet_s=quiet,
  )


def contestants(
  group: str,
  programs: Sequence[Program],
  get_config: Callable[[str], Any],
  out: pathlib.Path,
  *,
  gpu: bool,
  peers_python: str,
  pairs: int | None = None,
) -> tuple[list[interleaved.Contestant], float]:
  """Writes the rows of one group and returns its programs, ready to run.

  Args:
    group: its name in the suite, which names a shape.
    programs: of the group.
    get_config: of configs/benchmark.py.
    out: folder of the comparison.
    gpu: whether the programs run on a GPU.
    peers_python: interpreter that has TRL.
    pairs: how many rows; None for as many as the shape has.

  Returns:
    The programs, and the mean tokens of a pair, a prompt counted with each of its completions.
  """
  from dpo_jax.benchmarking import timing  # loads all of training, for which checks need not wait

  # A group on a GPU is called SHAPE-LENGTHS, the argument of the configuration
  # SHAPE,lengths=LENGTHS.
  shape = group.replace("-", ",lengths=") if gpu else group.partition("-")[0]
  config = get_config(shape)
  with config.unlocked():
    config.synthetic.pairs = pairs or config.synthetic.pairs
  file = out / "pairs" / f"{group}.jsonl"
  file.parent.mkdir(parents=True, exist_ok=True)
  lengths = {"max_length": config.data.max_length, "seed": config.seed, **config.synthetic}
  rows = list(timing.make_pairs(config.model.scratch.vocab_size, **lengths))
  # For the peers. Ours make the very same rows from the configuration, by the same seed.
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  usual = {
    "pairs": str(file),
    "model": config.model.scratch.to_dict(),
    "batch_size": config.train.batch_size,
    "max_length": config.data.max_length,
    "device": "cuda" if gpu else "cpu",
  }
  # On a GPU each program has the whole card to itself.
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} if gpu else {}
  made = []
  for one in programs:
    if one.options is not None:
      script = "scripts/benchmarks/peers/trl_step.py"
      command = (peers_python, script, json.dumps(usual | one.options))
      made.append(interleaved.Contestant(one.name, command, peer=one.best))
      continue
    fields = {"synthetic.pairs": config.synthetic.pairs, **(one.changes or {})}
    if one.store:
      fields["reference.store"] = out / "stores" / f"{group}-{one.name}".replace(" ", "-")
    several = (sys.executable, "scripts/launch/local.py", str(one.processes))
    command = (
      *(several if one.processes > 1 else ()),
      sys.executable,
      "scripts/benchmark.py",
      f"--config=configs/benchmark.py:{shape}",
      *(f"--config.{field}={value}" for field, value in fields.items()),
    )
    made.append(interleaved.Contestant(one.name, command, False, one.store, environment))
  # `values` has the prompt once; once more, it counts with each completion.
  sizes = [len(row["prompt_ids"]) + sum(map(len, row.values())) for row in rows]
  return made, sum(sizes) / len(sizes)


def machine(*, gpu: bool) -> str:
  """Describes the machine: its processor and, if requested, its GPU."""
  name = platform.processor() or platform.machine()
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    # Those that this process may use: a container has fewer than its machine.
    cores = len(os.sched_getaffinity(0))
  except OSError:  # not Linux
    cores = os.cpu_count()
  name = f"{cores} cores, {name}"
  if not gpu:
    return name
  ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
  try:
    card = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    card = "a GPU that nvidia-smi does not describe"
  return f"{card}; {name}"


def page(about: dict[str, Any], groups: dict[str, dict[str, Any]]) -> str:
  """Returns the comparison as Markdown: for each group a table, versions and commands."""
  parts = [f"# {about['suite']}, {about['date']}: {about['machine']}\n"]
  for name, group in groups.items():
    length = group["tokens_per_pair"]
    how = "in turns, all loaded" if group["loaded"] else "each started afresh in every round"
    parts.append(f"## {name}\n\n{about['rounds']} rounds, {how}; {length:.0f} tokens per pair.\n")
    parts.append(interleaved.table(group["against"], group["rows"]))
    parts.append("; ".join(sorted(_versions(group["rows"]))) + "\n")
    commands = [f"{n}: `{shlex.join(row['command'])}`" for n, row in group["rows"].items()]
    parts.append("\n\n".join(commands) + "\n")
  return "\n".join(parts)


def _versions(rows: dict[str, dict[str, Any]]) -> set[str]:
  """Returns the versions of libraries that the programs reported."""
  found = set()
  for row in rows.values():
    result = row["result"] or {}
    if "versions" in result:
      found.add(result["versions"])
    elif "jax" in result:
      found.add(f"jax {result['jax']}")
  return found
