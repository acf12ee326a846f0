"""Compares this project's training step with TRL's, in turns on one machine.

  bash scripts/benchmarks/compare.sh cpu runs/compare       makes both environments, then calls
  python scripts/benchmarks/compare.py --suite=cpu --out=runs/compare
  python scripts/benchmarks/compare.py --suite=gpu --out=runs/compare --only=llama_1b-ultrafeedback

Both sides train on the same rows of token ids, as many at a time, from random weights of one
shape, with AdamW. On a CPU all programs of a group stay loaded, warm, and run a block each in turn;
a round during which other programs were at work is run again. The memory of a GPU has room for one
at a time: each round starts each afresh, and its figure is the median of three blocks.

Written to the folder are comparison.json (rates of every block, commands, last lines),
comparison.md (a table for each group), pairs/, stores/ and logs/. A ratio is that of tokens per
second to the fastest of the peers in the same round; reported are its median, minimum and maximum,
and rates in pairs of mean length. A program that fails or does not fit in memory has a row that
says so. The groups are in dpo_jax/benchmarking/suites.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the package, uninstalled

from absl import flags

from dpo_jax.utils import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "cpu", ["cpu", "gpu"], "which groups of programs")
flags.DEFINE_string("out", None, "folder of results", required=True)
flags.DEFINE_list("only", [], "names of groups, commas between (default: all of the suite)")
flags.DEFINE_integer("rounds", 5, "rounds that count", lower_bound=1)
flags.DEFINE_integer("block_steps", 2, "steps per block", lower_bound=1)
flags.DEFINE_integer("warmup", 2, "steps before the first block", lower_bound=1)
flags.DEFINE_integer("pairs", None, "rows (default: those of the shape)", lower_bound=8)
flags.DEFINE_integer(
  "quiet", 60, "seconds that a block waits at most for other programs to stop; 0 ignores them", 0
)
flags.DEFINE_string("peers_python", ".venv-peers/bin/python", "interpreter that has TRL")


def main(argv):
  del argv
  import datetime
  import json
  import os

  from configs import benchmark as shapes
  from dpo_jax.benchmarking import comparison, interleaved, pacing, suites

  gpu = FLAGS.suite == "gpu"
  suite = suites.GPU if gpu else suites.CPU
  comparison.check_groups(FLAGS.only, suite, FLAGS.suite)
  python = comparison.check_python(FLAGS.peers_python)
  out = comparison.check_out(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  os.chdir(ROOT)  # the programs are scripts of this checkout
  about = {"suite": FLAGS.suite, "date": datetime.date.today().isoformat()}
  about |= {"machine": comparison.machine(gpu=gpu), "rounds": FLAGS.rounds}
  pace = pacing.Pace(1, FLAGS.block_steps, FLAGS.warmup)
  groups = {}
  for name in FLAGS.only or suite:
    print(f"{name}:", file=sys.stderr)
    rules = comparison.rules(name, pace, gpu=gpu, rounds=FLAGS.rounds, quiet=FLAGS.quiet)
    where = {"gpu": gpu, "peers_python": python, "pairs": FLAGS.pairs}
    programs, length = comparison.contestants(name, suite[name], shapes.get_config, out, **where)
    found = interleaved.compete(programs, rules, out / "logs" / name)
    base, rows = interleaved.summary(programs, found, length)
    groups[name] = {"loaded": rules.loaded, "against": base, "rows": rows}
    groups[name] |= {"rounds": found["rounds"], "tokens_per_pair": length}
    (out / "comparison.json").write_text(json.dumps(about | {"groups": groups}, indent=1) + "\n")
    (out / "comparison.md").write_text(comparison.page(about, groups))
  print((out / "comparison.md").read_text())


if __name__ == "__main__":
  cli.run(main)
