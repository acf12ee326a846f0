"""Plans a run: its memory per device, its FLOPs per step, and what to change if it does not fit.

  dpo-jax plan --config=llama_8b:fsdp --model=LLAMA_DIR --devices=8 --device_memory=80
  dpo-jax plan --config=llama_8b:fsdp --model=LLAMA_DIR --topology=v5p:2x2x2

Only config.json of the model is read, and no data: lengths of rows are assumed. The step is
compiled for shapes alone, on this machine's CPU. With --topology it is compiled for accelerators
that are not here, by their own compiler (extras aot-tpu, aot-cuda); memory, attention and room for
logits are then those of the accelerator, and products, collectives and time are reported too.
"""

import sys
from collections.abc import Iterator

from absl import flags
from ml_collections import config_flags

from dpo_jax.utils import cli, paths, progress

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  if any(word.lstrip("-").startswith("topology") for word in sys.argv[1:]):
    from dpo_jax.utils import libtpu

    # Before jax is imported, which a configuration does.
    libtpu.prepare()
  config_flags.DEFINE_config_file(
    "config", None, "NAME, NAME:ARG, or FILE.py, FILE.py:ARG, FILE.yaml"
  )
  flags.DEFINE_string(
    "topology",
    None,
    "accelerators to compile for, which need not be here: v5e:4x4, v5p:2x2x2, v6e:2x2, h100:8 …",
  )
  flags.DEFINE_integer("devices", None, "devices of the run (default: 1)", lower_bound=1)
  flags.DEFINE_float("device_memory", None, "GiB per device; reports whether the run fits", 0.001)
  flags.DEFINE_integer(
    "mean_length",
    None,
    "tokens of a prompt and one completion (default: those of the configuration, or 250)",
    lower_bound=16,
  )
  flags.DEFINE_float(
    "prompt_fraction",
    None,
    "fraction of them that is the prompt (default likewise: 0.5)",
    0.01,
    0.99,
  )
  flags.DEFINE_float(
    "sigma", None, "deviation of the logarithm of lengths (default likewise: 0.5)", 0.0, 3.0
  )
  flags.DEFINE_bool(
    "changes", None, "whether to try the usual changes (default: if the run does not fit)"
  )
  flags.DEFINE_bool("json", False, "print one JSON object")


def main(argv: list[str]) -> None:
  del argv
  import jax

  # Before anything starts JAX's devices, whose number is fixed from then on. The CPU is enough, and
  # every machine has it: only shapes are compiled.
  jax.config.update("jax_platforms", "cpu")
  # absl's lower bound lets infinity and NaN pass.
  if FLAGS.device_memory is not None and not FLAGS.device_memory < float("inf"):
    cli.fail(f"--device_memory={FLAGS.device_memory}: a number of GiB is asked for")
  if FLAGS.topology is None:
    jax.config.update("jax_num_cpu_devices", FLAGS.devices or 1)
  config = FLAGS.config
  paths.expand_fields(config)
  if FLAGS.topology is None:
    _plan_for_cpus(config)
  else:
    _plan_for_target(config)


def _lengths(config):
  """Returns the lengths of examples: as the flags say, or the configuration, or the usual ones."""
  from dpo_jax.benchmarking import planner

  return planner.lengths_of(
    config, mean=FLAGS.mean_length, prompt_fraction=FLAGS.prompt_fraction, sigma=FLAGS.sigma
  )


def _plan_for_cpus(config) -> None:
  import json

  from dpo_jax.benchmarking import planner
  from dpo_jax.distributed import memory

  lengths = _lengths(config)
  room = None if FLAGS.device_memory is None else int(FLAGS.device_memory * memory.GIB)
  with progress.Progress("compiling the step for shapes"):
    found = planner.plan(config, lengths, room)
  total = found["bytes_per_device"]["total"]
  if room is not None:
    found["fits"] = total <= room
  fits = room is None or total <= room

  def changed() -> Iterator[tuple[str, dict]]:
    for named, other in planner.changes(config, FLAGS.devices or 1):
      with progress.Progress(f"compiling with {named}"):
        less = planner.plan(other, lengths)["bytes_per_device"]["total"]
      yield named, {"total_bytes": less}

  try_changes = FLAGS.changes if FLAGS.changes is not None else not fits and not FLAGS.json
  if FLAGS.json:
    if try_changes:
      found["changes"] = [{"flags": named, **less} for named, less in changed()]
    print(json.dumps(found))
    return
  for line in planner.show(found):
    print(line)
  if room is not None:
    print(
      f"{'fits' if fits else 'does not fit'} a device of {FLAGS.device_memory:g} GiB, by the"
      " compiler for CPUs; --topology asks that of an accelerator"
    )
  if not try_changes:
    return
  print("what would change it, one at a time:")
  # Each change compiles the step anew, so its line is printed as soon as it is known.
  for named, less in changed():
    size = less["total_bytes"] / memory.GIB
    print(f"  {size:8.2f} GiB  {named}{planner.remark(named)}", flush=True)


def _plan_for_target(config) -> None:
  import json

  from dpo_jax.benchmarking import planner, target_plan, targets
  from dpo_jax.structs import UserError

  target = targets.find(FLAGS.topology)
  if FLAGS.devices not in (None, len(target.devices)):
    raise UserError(
      f"--devices={FLAGS.devices}, but --topology={target.name} has {len(target.devices)}; leave"
      " --devices out"
    )
  lengths = _lengths(config)
  limit = None if FLAGS.device_memory is None else int(FLAGS.device_memory * 2**30)
  with progress.Progress(f"compiling the step for {target.name}"):
    found = target_plan.plan(config, lengths, target, limit=limit)

  def changed() -> Iterator[tuple[str, dict]]:
    for named, other in planner.changes(config, len(target.devices), faster=found["fits"]):
      try:
        with progress.Progress(f"compiling with {named}"):
          yield named, target_plan.plan(other, lengths, target, limit=limit)
      except UserError as error:
        yield named, {"refused": str(error)}

  try_changes = FLAGS.changes if FLAGS.changes is not None else not found["fits"] and not FLAGS.json
  if FLAGS.json:
    if try_changes:
      found["changes"] = [{"flags": named, **other} for named, other in changed()]
    print(json.dumps(found))
    return
  for line in target_plan.show(found):
    print(line)
  if not try_changes:
    return
  print("what would change it, one at a time:")
  for named, other in changed():
    said = other.get("refused") or target_plan.brief(other)
    print(f"  {said}  {named}{planner.remark(named)}", flush=True)
