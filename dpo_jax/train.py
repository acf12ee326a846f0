"""Trains a policy: supervised, or from preferences. Run the same command again to resume.

Sent SIGTERM, it saves after the step it is at and exits with status 75.

  python -m dpo_jax.train --config=preferences --workdir=runs/mine \\
    --config.model.path=MODEL_DIR --config.data.path=PREFERENCES.jsonl
"""

from __future__ import annotations

import contextlib
import functools
import pathlib

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax.distributed import heartbeat, processes
from dpo_jax.distributed.gather import gather_to_host
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.monitoring import report
from dpo_jax.structs import PyTree
from dpo_jax.training import loop, setup
from dpo_jax.training.run import Run
from dpo_jax.utils import cli
from dpo_jax.utils import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file("config", None, "NAME, NAME:ARG, or FILE.py in place of NAME")
  flags.DEFINE_string("workdir", None, "folder of the run; a run found there is resumed")
  flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  """Runs the command."""
  del argv
  execute(FLAGS.config, pathlib.Path(FLAGS.workdir))


def execute(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks what is cheap to check, loads, trains, exports and reports.

  Raises:
    UserError: bad input; nothing that was in `workdir` has been touched.
  """
  section = config.parallel
  processes.start(section.coordinator, section.processes, section.process)
  with heartbeat.Heartbeat(), processes.quiet(), contextlib.ExitStack() as stack:
    # The order is important: a workdir is neither made nor, but for its lock, written to before
    # step 4, when nothing but training is left to fail.
    # 1. A workdir that exists must be this very run's, with no other process training into it.
    workdirs.check(workdir, config.to_json_best_effort())
    is_new = not workdir.exists()
    if not is_new and processes.is_main_process():
      stack.enter_context(workdirs.lock(workdir))
    # 2. Set-up: checks without files, descriptions, then weights and data.
    setup.check_base_is_kept(config)
    run, trained, reference_params, ledger = setup.build(config, workdir)
    processes.assert_consistent(setup.facts(config, run))
    # 3. The proof that policy and reference are what they should be at step 0.
    prepared = loop.prepare(run, trained, reference_params)
    del trained, reference_params  # taken over: their memory must not be kept here
    # 4. The workdir comes into being, is locked, and states whose it is.
    claim = functools.partial(_claim, workdir, stack if is_new else None, config, ledger)
    processes.on_main_process(claim, "claim")
    # 5. Training, and what it leaves.
    final = loop.train(run, prepared)
    _export(run, final)


def _claim(
  workdir: pathlib.Path,
  stack: contextlib.ExitStack | None,
  config: ConfigDict,
  ledger: dict,
) -> None:
  """Makes the workdir this run's own: folder, lock, configuration and ledger.

  Args:
    workdir: the folder.
    stack: releases the lock; None where the folder was there, and is locked already.
    config: the configuration, written whole.
    ledger: of the data; a resumed run is refused where it changed.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  if stack is not None:
    stack.enter_context(workdirs.lock(workdir))
  workdirs.claim(workdir, config.to_json_best_effort(indent=2), ledger)


def _export(run: Run, final: PyTree) -> None:
  """Writes the trained model, or adapter, and the report; the first process writes them."""
  out = run.workdir / "export"
  print(f"exporting to {out}", flush=True)
  if run.adapter:
    # Adapters are small, so every process gathers them whole; a model is gathered leaf by leaf.
    final = jax.tree.map(gather_to_host, final)
  if processes.is_main_process():
    if run.adapter:
      peft.save(out, run.model_config, final, run.adapter, source=run.settings.source)
    else:
      hf_checkpoint.save(out, run.model_config, final, source=run.settings.source)
    report.write(run.workdir)
  elif not run.adapter:
    hf_checkpoint.take_part_in_save(run.model_config, final)
  what = "the adapter" if run.adapter else "the model"
  print(f"done: {out} ({what}), {run.workdir / 'report.html'} (what happened)")


if __name__ == "__main__":
  cli.run(main, define_flags)
