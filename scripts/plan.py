"""What a run would take: memory of a device, FLOPs of a step, and what to change if it is too much.

  python scripts/plan.py --config=configs/llama_8b.py:fsdp --config.model.path=LLAMA_DIR \\
    --devices=8 --device_memory=80

Of the model only config.json is read, and no data: rows are taken to have --mean_length tokens of
prompt and answer. The step is compiled for shapes alone, on this machine's CPU.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags
from ml_collections import config_flags

from dpo_jax.utils import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "the run")
DEVICES = flags.DEFINE_integer("devices", 1, "devices of the run", lower_bound=1)
MEMORY = flags.DEFINE_float("device_memory", None, "GiB of a device; says whether it fits", 0.001)
MEAN = flags.DEFINE_integer("mean_length", 250, "tokens of a prompt and one answer", lower_bound=16)
PROMPT = flags.DEFINE_float("prompt_fraction", 0.5, "the prompt's share of them", 0.01, 0.99)
JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main(_):
  import json

  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES.value)
  from dpo_jax.benchmarking import planner
  from dpo_jax.distributed import memory

  if MEMORY.value is not None and not MEMORY.value < float("inf"):
    cli.fail(f"--device_memory={MEMORY.value}: a number of GiB is asked for")
  lengths = planner.Lengths(MEAN.value, PROMPT.value)
  config = CONFIG.value
  found = planner.plan(config, lengths)
  total = found["bytes_per_device"]["total"]
  room = None if MEMORY.value is None else MEMORY.value * memory.GIB
  if room is not None:
    found["fits"] = total <= room
  if JSON.value:
    print(json.dumps(found))
    return
  for line in planner.show(found):
    print(line)
  if room is not None:
    print(f"{'fits' if total <= room else 'does not fit'} a device of {MEMORY.value:g} GiB")
  if room is None or total <= room:
    return
  print("what would change it, one at a time:")
  for named, other in planner.changes(config, DEVICES.value):
    less = planner.plan(other, lengths)["bytes_per_device"]["total"]
    print(f"  {less / memory.GIB:8.2f} GiB  {named}", flush=True)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
