"""Plans a run: its memory per device, its FLOPs per step, and what to change if it does not fit.

  dpo-jax plan --config=llama_8b:fsdp --model=LLAMA_DIR --devices=8 --device_memory=80

Only config.json of the model is read, and no data: rows are assumed to have --mean_length tokens of
prompt and completion. The step is compiled for shapes alone, on this machine's CPU.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax.utils import cli, paths, progress

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "NAME, NAME:ARG, or FILE.py, FILE.py:ARG, FILE.yaml"
  )
  flags.DEFINE_integer("devices", 1, "devices of the run", lower_bound=1)
  flags.DEFINE_float("device_memory", None, "GiB per device; reports whether the run fits", 0.001)
  flags.DEFINE_integer("mean_length", 250, "tokens of a prompt and one completion", lower_bound=16)
  flags.DEFINE_float("prompt_fraction", 0.5, "fraction of them that is the prompt", 0.01, 0.99)
  flags.DEFINE_bool("json", False, "print one JSON object")


def main(argv: list[str]) -> None:
  del argv
  import json

  import jax

  # Before anything starts JAX's devices, whose number is fixed from then on. The CPU is enough, and
  # every machine has it: only shapes are compiled.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", FLAGS.devices)
  from dpo_jax.benchmarking import planner
  from dpo_jax.distributed import memory

  # absl's lower bound lets infinity and NaN pass.
  if FLAGS.device_memory is not None and not FLAGS.device_memory < float("inf"):
    cli.fail(f"--device_memory={FLAGS.device_memory}: a number of GiB is asked for")
  lengths = planner.Lengths(FLAGS.mean_length, FLAGS.prompt_fraction)
  config = FLAGS.config
  paths.expand_fields(config)
  room = None if FLAGS.device_memory is None else int(FLAGS.device_memory * memory.GIB)
  with progress.Progress("compiling the step for shapes"):
    found = planner.plan(config, lengths, room)
  total = found["bytes_per_device"]["total"]
  if room is not None:
    found["fits"] = total <= room
  if FLAGS.json:
    print(json.dumps(found))
    return
  for line in planner.show(found):
    print(line)
  if room is not None:
    print(f"{'fits' if total <= room else 'does not fit'} a device of {FLAGS.device_memory:g} GiB")
  if room is None or total <= room:
    return
  print("what would change it, one at a time:")
  # Each change compiles the step anew, so its line is printed as soon as it is known.
  for named, other in planner.changes(config, FLAGS.devices):
    with progress.Progress(f"compiling with {named}"):
      less = planner.plan(other, lengths)["bytes_per_device"]["total"]
    print(f"  {less / memory.GIB:8.2f} GiB  {named}{planner.remark(named)}", flush=True)
