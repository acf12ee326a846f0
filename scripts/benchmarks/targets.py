"""Makes a table of what the compilers of accelerators say of many runs, without any of them.

  pip install ".[aot-tpu]"
  python scripts/benchmarks/targets.py --suite=steps --out=runs/targets
  python scripts/benchmarks/targets.py --suite=pods --out=runs/targets --only=70B

Each row is one `dpo-jax plan --topology` in a process of its own, which takes one to five minutes
of a processor. Its result is added to targets.json as soon as it is there, and is not made again:
the command goes on where it stopped. Rows whose compiler is not installed are left for a Python
that has it (aot-tpu, aot-cuda), called with the same --out. The table goes to SUITE.md and stdout;
--before=FILE shows the results of an earlier targets.json beside those of today. The suites are in
dpo_jax/benchmarking/target_suites.py: `steps` are runs of all kinds of parallelism, `configs` what
configurations and documentation say to fit, and `pods` runs on 32 to 128 chips.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the package, uninstalled

from absl import flags

from dpo_jax.utils import cli, libtpu

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = flags.FLAGS
flags.DEFINE_enum("suite", "steps", ["steps", "configs", "pods"], "which runs")
flags.DEFINE_string("out", None, "folder of results", required=True)
flags.DEFINE_list("only", [], "words that a row's name contains, commas between (default: all)")
flags.DEFINE_float("minutes", 30, "after which a row is given up", lower_bound=0.1)
flags.DEFINE_bool("again", False, "make rows again that have a result")
flags.DEFINE_string("before", None, "an earlier targets.json to compare with")


def main(argv):
  del argv
  import json
  import os

  import jax

  from configs import benchmark as shapes
  from dpo_jax.benchmarking import target_suites
  from dpo_jax.utils import files

  jax.config.update("jax_platforms", "cpu")
  files.check_folder(FLAGS.out, f"--out={FLAGS.out}")
  out = pathlib.Path(FLAGS.out).absolute()
  before = target_suites.read_results(pathlib.Path(FLAGS.before)) if FLAGS.before else None
  out.mkdir(parents=True, exist_ok=True)
  os.chdir(ROOT)
  rows = target_suites.SUITES[FLAGS.suite]
  wanted = [row for row in rows if not FLAGS.only or any(w in row.name for w in FLAGS.only)]
  models = shapes.SHAPES | target_suites.LARGER
  path = out / "targets.json"
  for row in wanted:
    if row.name in target_suites.read_results(path) and not FLAGS.again:
      continue
    if why := target_suites.missing(row.topology):
      print(f"{row.name}: left out, {why}", file=sys.stderr)
      continue
    print(f"{row.name}: compiling", file=sys.stderr)
    result = target_suites.run(row, target_suites.command(row, out, models), FLAGS.minutes)
    # Read again: another environment may add its rows to the same file.
    results = target_suites.read_results(path) | {row.name: result}
    files.write_text(path, json.dumps(results, indent=1) + "\n")
  text = target_suites.page(FLAGS.suite, wanted, target_suites.read_results(path), before)
  files.write_text(out / f"{FLAGS.suite}.md", text)
  print(text)


if __name__ == "__main__":
  libtpu.prepare()
  cli.run(main)
