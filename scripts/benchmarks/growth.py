"""Measures how time and memory of the training step grow with its inputs, on this machine's CPU.

  python scripts/benchmarks/growth.py --out runs/growth
  python scripts/benchmarks/growth.py --out runs/growth --only=length,vocabulary

Quantities: length of a sequence, vocabulary, pairs per row, ranked completions per prompt, width
and depth of the model, devices among which it is divided. Every point is measured in a process of
its own, which is given up after --limit seconds. Writes growth.json (seconds per step, memory as
the compiler plans it and as the process used it) after every point and growth.png after every
quantity. Points that are there already are kept; each has its date and the version of JAX.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the package, uninstalled

from absl import flags

from dpo_jax.utils import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "folder of results", required=True)
flags.DEFINE_list("only", [], "names of quantities, commas between (default: all)")
flags.DEFINE_integer("most", None, "largest value to measure (default: all)", lower_bound=1)
flags.DEFINE_integer("limit", 150, "seconds after which a point is given up", lower_bound=1)
flags.DEFINE_string("point", None, "measure NAME=VALUE alone and print one JSON object")


def main(argv):
  del argv
  import datetime
  import json
  import signal

  import jax

  # By an exception, which ends the process of a point too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  if FLAGS.point:
    name, _, value = FLAGS.point.partition("=")
    if not value.isdecimal() or int(value) < 1:
      cli.fail(f"--point={FLAGS.point}: write NAME=VALUE, a whole number, such as length=512")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(value) if name == "devices" else 1)
    jax.config.update("jax_enable_compilation_cache", False)
    from dpo_jax.benchmarking import scaling

    about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    print(json.dumps(scaling.measure(name, int(value)) | about))
    return

  from dpo_jax.benchmarking import scaling
  from dpo_jax.monitoring import plots
  from dpo_jax.utils import files

  scaling.check_axes(FLAGS.only, "--only")
  files.check_folder(FLAGS.out, f"--out={FLAGS.out}")
  out = pathlib.Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  file, picture = out / "growth.json", out / "growth.png"
  points = scaling.read(file)
  labels = {name: axis.label for name, axis in scaling.AXES.items()}
  command = [sys.executable, __file__, f"--out={FLAGS.out}"]
  for name in FLAGS.only or scaling.AXES:
    for value in scaling.missing(points, name, FLAGS.most):
      points += filter(None, [scaling.measure_apart(command, name, value, FLAGS.limit)])
      scaling.write(file, points)
    if points:
      plots.save_png(plots.growth(points, labels), picture)
  if not points:
    cli.fail("no point was measured: --most left it out, or a line above says why it failed")
  print(f"done: {file}, {picture}")


if __name__ == "__main__":
  cli.run(main)
