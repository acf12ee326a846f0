"""Times this project's training step beside TRL's, in turns on one machine.

  bash scripts/compare.sh cpu runs/compare                   makes both environments, then calls
  python scripts/compare.py --suite=cpu --out=runs/compare
  python scripts/compare.py --suite=gpu --out=runs/compare --only=llama_1b-ultrafeedback

Both sides train on the same rows of token ids, as many at a time, from random weights of one
shape, with AdamW. On a CPU all programs of a group stay loaded, warm, and run a block each in turn;
a round during which other programs were at work is run again. The memory of a GPU holds one at a
time: each round starts each afresh, and its figure is the median of three blocks.

Into the folder go comparison.json (rates of every block, commands, last lines), comparison.md (a
table for each group), pairs/, stores/ and logs/. A ratio is that of tokens a second to the quickest
of the peers in the same round; told are its median, its least and its most, and rates in pairs of
mean length. Whatever does not fit in memory, or fails, is a row that says so. The groups are in
scripts/suites.py.
"""

import pathlib
import sys

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

SUITE = flags.DEFINE_enum("suite", "cpu", ["cpu", "gpu"], "which groups of programs")
OUT = flags.DEFINE_string("out", None, "folder of results", required=True)
ONLY = flags.DEFINE_list("only", [], "names of groups, commas between; all of the suite if none")
ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds that count", lower_bound=1)
STEPS = flags.DEFINE_integer("block_steps", 2, "steps of a block", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "steps before the first block", lower_bound=1)
PAIRS = flags.DEFINE_integer("pairs", None, "rows; those of the shape if not given", lower_bound=8)
QUIET = flags.DEFINE_integer(
  "quiet", 60, "seconds that a block waits at most for other programs to stop; 0 minds none", 0
)
PYTHON = flags.DEFINE_string("peers_python", ".venv-peers/bin/python", "interpreter that has TRL")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(_):
  import datetime
  import json
  import os

  import suites

  from dpo_jax.benchmarking import interleaved, pacing
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  gpu = SUITE.value == "gpu"
  suite = suites.GPU if gpu else suites.CPU
  for name in ONLY.value:
    if name not in suite:
      raise UserError(f"--only: {SUITE.value} has no group {name!r}; there are {', '.join(suite)}")
  python = pathlib.Path(PYTHON.value).absolute()
  if not python.is_file():
    raise UserError(
      f"--peers_python={PYTHON.value}: no such file; `bash scripts/compare.sh` makes .venv-peers"
    )
  if not os.access(python, os.X_OK):
    raise UserError(f"--peers_python={PYTHON.value} may not be run; name a Python that has TRL")
  files.check_folder(OUT.value, f"--out={OUT.value}")
  out = pathlib.Path(OUT.value).absolute()
  if (out / "comparison.json").exists():
    raise UserError(f"--out={OUT.value} holds a comparison already; name another folder")
  out.mkdir(parents=True, exist_ok=True)
  os.chdir(ROOT)
  date = datetime.date.today().isoformat()
  about = {"suite": SUITE.value, "date": date, "machine": machine(gpu), "rounds": ROUNDS.value}
  groups = {}
  for name in ONLY.value or suite:
    print(f"{name}:", file=sys.stderr)
    loaded = not gpu and name not in suites.APART
    rules = interleaved.Rules(
      rounds=ROUNDS.value,
      pace=pacing.Pace(1 if loaded else 3, STEPS.value, WARMUP.value),
      loaded=loaded,
      max_other=0.12 if loaded and QUIET.value else float("inf"),
      quiet_s=QUIET.value,
    )
    programs, length = contestants(name, suite[name], gpu, out, str(python))
    found = interleaved.compete(programs, rules, out / "logs" / name)
    base, rows = interleaved.summary(programs, found, length)
    groups[name] = {"loaded": loaded, "against": base, "rows": rows, "rounds": found["rounds"]}
    groups[name]["tokens_per_pair"] = length
    (out / "comparison.json").write_text(json.dumps(about | {"groups": groups}, indent=1) + "\n")
    (out / "comparison.md").write_text(page(about, groups))
  print((out / "comparison.md").read_text())


def contestants(group, programs, gpu, out, python):
  """Programs of one group, and the mean tokens of a pair; its rows are written for the peers."""
  import json

  from configs import benchmark as shapes
  from dpo_jax.benchmarking import interleaved, timing

  arg = group.replace("-", ",lengths=") if gpu else group.partition("-")[0]
  config = shapes.get_config(arg)
  with config.unlocked():
    config.synthetic.pairs = PAIRS.value or config.synthetic.pairs
  pairs = out / "pairs" / f"{group}.jsonl"
  pairs.parent.mkdir(parents=True, exist_ok=True)
  lengths = {"max_length": config.data.max_length, "seed": config.seed, **config.synthetic}
  rows = list(timing.make_pairs(config.model.scratch.vocab_size, **lengths))
  pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
  usual = {
    "pairs": str(pairs),
    "model": config.model.scratch.to_dict(),
    "batch_size": config.train.batch_size,
    "max_length": config.data.max_length,
    "device": "cuda" if gpu else "cpu",
  }
  # Each has the card to itself.
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} if gpu else {}
  made = []
  for one in programs:
    if one.options is not None:
      command = (python, "scripts/peers/trl_step.py", json.dumps(usual | one.options))
      made.append(interleaved.Contestant(one.name, command, peer=one.best))
      continue
    fields = {"synthetic.pairs": config.synthetic.pairs, **one.changes}
    if one.store:
      fields["reference.store"] = out / "stores" / f"{group}-{one.name}".replace(" ", "-")
    several = (sys.executable, "scripts/local.py", str(one.processes))
    command = (
      *(several if one.processes > 1 else ()),
      sys.executable,
      "scripts/benchmark.py",
      f"--config=configs/benchmark.py:{arg}",
      *(f"--config.{field}={value}" for field, value in fields.items()),
    )
    made.append(interleaved.Contestant(one.name, command, False, one.store, environment))
  # A prompt counts with each of its answers.
  sizes = [len(row["prompt_ids"]) + sum(map(len, row.values())) for row in rows]
  return made, sum(sizes) / len(sizes)


def machine(gpu):
  """What it is called."""
  import os
  import platform
  import subprocess

  name = platform.processor() or platform.machine()
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
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
    card = "a GPU that nvidia-smi does not tell"
  return f"{card}; {name}"


def page(about, groups):
  """Markdown of everything."""
  import shlex

  from dpo_jax.benchmarking import interleaved

  parts = [f"# {about['suite']}, {about['date']}: {about['machine']}\n"]
  for name, group in groups.items():
    length = group["tokens_per_pair"]
    how = "in turns, all loaded" if group["loaded"] else "each started afresh in every round"
    parts.append(f"## {name}\n\n{about['rounds']} rounds, {how}; {length:.0f} tokens a pair.\n")
    parts.append(interleaved.table(group["against"], group["rows"]))
    results = [row["result"] or {} for row in group["rows"].values()]
    versions = {one.get("versions") or ("jax" in one and f"jax {one['jax']}") for one in results}
    parts.append("; ".join(sorted(filter(None, versions))) + "\n")
    commands = [f"{n}: `{shlex.join(row['command'])}`" for n, row in group["rows"].items()]
    parts.append("\n\n".join(commands) + "\n")
  return "\n".join(parts)


if __name__ == "__main__":
  cli.run(main)
