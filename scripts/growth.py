"""How time and memory of the training step grow with what it is given, on this machine's CPU.

  python scripts/growth.py --out runs/growth
  python scripts/growth.py --out runs/growth --only=length,vocabulary

Quantities: length of a text, vocabulary, pairs of a row, ranked answers of a prompt, width and
depth of the model, devices among which it is divided. Every point is measured in a process of its
own, and given up after --limit seconds. Writes growth.json (seconds of a step, memory by the
compiler and as the process held it) and growth.png, both after every quantity; points that are
there already are kept; each has the date and the version of JAX that it was measured with.
"""

import pathlib
import sys

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax import cli

OUT = flags.DEFINE_string("out", None, "folder of results", required=True)
ONLY = flags.DEFINE_list("only", [], "names of quantities, commas between; all if none")
MOST = flags.DEFINE_integer("most", None, "leaves out points above so much", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 150, "seconds after which a point is given up", lower_bound=1)
POINT = flags.DEFINE_string("point", None, "measures NAME=VALUE alone and prints one JSON object")


def main(_):
  import datetime
  import json

  import jax

  if POINT.value:
    name, _, value = POINT.value.partition("=")
    if not value.isdigit():
      cli.fail(f"--point={POINT.value}: write NAME=VALUE, a whole number, such as length=512")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(value) if name == "devices" else 1)
    jax.config.update("jax_enable_compilation_cache", False)
    from dpo_jax import growth

    about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    print(json.dumps(growth.measure(name, int(value)) | about))
    return

  from dpo_jax import growth, plots
  from dpo_jax.structs import UserError

  for name in ONLY.value:
    if name not in growth.AXES:
      raise UserError(f"--only: {name!r} does not grow; known are {', '.join(growth.AXES)}")
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  file, picture = out / "growth.json", out / "growth.png"
  try:
    points = json.loads(file.read_text())["points"] if file.is_file() else []
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{file} holds no points of an earlier run; move it away") from None
  labels = {name: axis.label for name, axis in growth.AXES.items()}
  for name in ONLY.value or growth.AXES:
    known = {one["value"] for one in points if one["axis"] == name}
    values = [value for value in growth.AXES[name].values if value not in known]
    points += filter(None, (point(name, x) for x in values if x <= (MOST.value or x)))
    file.write_text(json.dumps({"points": points}, indent=1) + "\n")
    if points:
      plots.save_png(plots.growth(points, labels), picture)
  if not points:
    raise UserError("no point could be measured; the lines above say why")
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
    why = str(error).rpartition("] ")[2] or str(error)
    print(f"{name} {value}: left out; the process {why[-80:]}", file=sys.stderr)
    return None
  found = json.loads(done.stdout)
  took = "not run" if found["seconds"] is None else f"{found['seconds']:.3f} s"
  print(f"{name} {value}: {took}, {found['planned_mb']:,.0f} MB by the compiler", file=sys.stderr)
  return found


if __name__ == "__main__":
  cli.run(main)
