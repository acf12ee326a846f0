"""Prints what `planner` says of a step and what the process then holds at most, both in bytes.

python tests/tools/measured_step.py CONFIG MEAN_LENGTH DEVICES [FIELD=VALUE …]
"""

import ctypes
import gc
import json
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def status(name):
  """Of this process, bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{name}:"):
      return int(line.split()[1]) * 1024
  raise KeyError(name)


def main(name, mean_length, devices, *changes):
  jax.config.update("jax_num_cpu_devices", int(devices))
  import runpy

  import jax.numpy as jnp

  from dpo_jax.benchmarking import planner

  path, _, argument = name.partition(":")
  config = runpy.run_path(path)["get_config"](*([argument] if argument else []))
  with config.unlocked():
    for change in changes:
      field, value = change.split("=")
      given = type(config.to_dict() and _at(config, field))
      config.update_from_flattened_dict({field: given(value)})
  lengths = planner.Lengths(float(mean_length))
  planned = planner.plan(config, lengths)["bytes_per_device"]["total"] * int(devices)
  run = planner.outline(config, lengths)
  compiled = run.compile()
  zeros = lambda x: jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
  batch = run.executor.place_batch(run.batch)
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  before = status("VmRSS")
  state, reference = jax.tree.map(zeros, (run.state, run.reference))
  for _ in range(2):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the most held, from here on
    state, _ = compiled(state, reference, batch)
    jax.block_until_ready(state)
  print(json.dumps({"planned": planned, "measured": status("VmHWM") - before}))


def _at(config, field):
  for part in field.split("."):
    config = config[part]
  return config


if __name__ == "__main__":
  main(*sys.argv[1:])
