"""How time and memory of the training step grow with what it is given, on this machine's CPU.

  python scripts/growth.py --out runs/growth
  python scripts/growth.py --out runs/growth --only=length,vocabulary

Quantities: length of a text, vocabulary, pairs of a row, ranked answers of a prompt, width and
depth of the model, devices among which it is divided. Every point is measured in a process of its
own, and given up after --limit seconds. Writes growth.json (seconds of a step, memory by the
compiler and as the process held it) after every point and growth.png after every quantity. Points
that are there already are kept; each has its date and the version of JAX.
"""

import pathlib
import sys

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

OUT = flags.DEFINE_string("out", None, "folder of results", required=True)
ONLY = flags.DEFINE_list("only", [], "names of quantities, commas between; all if none")
MOST = flags.DEFINE_integer("most", None, "leaves out points above so much", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 150, "seconds after which a point is given up", lower_bound=1)
POINT = flags.DEFINE_string("point", None, "measures NAME=VALUE alone and prints one JSON object")


def main(_):
  import datetime
  import json
  import signal

  import jax

  # By an exception, which ends the process of a point too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  if POINT.value:
    name, _, value = POINT.value.partition("=")
    if not value.isdecimal() or int(value) < 1:
      cli.fail(f"--point={POINT.value}: write NAME=VALUE, a whole number, such as length=512")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(value) if name == "devices" else 1)
    jax.config.update("jax_enable_compilation_cache", False)
    from dpo_jax.benchmarking import scaling

    about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    print(json.dumps(scaling.measure(name, int(value)) | about))
    return

  from dpo_jax.benchmarking import scaling
  from dpo_jax.monitoring import plots
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  for name in ONLY.value:
    if name not in scaling.AXES:
      raise UserError(f"--only: {name!r} does not grow; known are {', '.join(scaling.AXES)}")
  files.check_folder(OUT.value, f"--out={OUT.value}")
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  file, picture = out / "growth.json", out / "growth.png"
  points = scaling.read(file)
  labels = {name: axis.label for name, axis in scaling.AXES.items()}
  for name in ONLY.value or scaling.AXES:
    known = {one["value"] for one in points if one["axis"] == name}
    most = MOST.value or max(scaling.AXES[name].values)
    for value in [x for x in scaling.AXES[name].values if x <= most and x not in known]:
      points += filter(None, [point(name, value)])
      scaling.write(file, points)
    if points:
      plots.save_png(plots.growth(points, labels), picture)
  if not points:
    raise UserError("no point was measured: --most left it out, or a line above says why it failed")
  print(f"done: {file}, {picture}")


def point(name, value):
  """What another process measures; None where it fails or takes too long."""
  import json
  import subprocess

  command = [sys.executable, __file__, f"--out={OUT.value}", f"--point={name}={value}"]
  try:
    done = subprocess.run(
      command, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT.value
    )
  except subprocess.SubprocessError as error:
    late = isinstance(error, subprocess.TimeoutExpired)
    slow = f"took more than --limit={LIMIT.value} seconds"
    why = slow if late else f"failed ({error.returncode})"
    print(f"{name} {value}: left out; its process {why}", file=sys.stderr)
    return None
  found = json.loads(done.stdout)
  took = "not run" if found["seconds"] is None else f"{found['seconds']:.3f} s"
  print(f"{name} {value}: {took}, {found['planned_mb']:,.0f} MB by the compiler", file=sys.stderr)
  return found


if __name__ == "__main__":
  cli.run(main)
