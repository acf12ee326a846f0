"""Trains a policy: supervised, from preferences or on-policy. Run the same command again to resume.

On SIGTERM it finishes the current step, saves a checkpoint and exits with status 75.

  python -m dpo_jax.train --model=MODEL_DIR --data=PREFERENCES.jsonl \\
    --loss=sigmoid --beta=0.1 --lr=1e-6 --workdir=runs/mine
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax import defaults
from dpo_jax.distributed import heartbeat, processes
from dpo_jax.distributed.gather import gather_to_host
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.monitoring.loggers import Callback
from dpo_jax.structs import PyTree
from dpo_jax.training import loop, setup
from dpo_jax.training.checkpoint import latest_step
from dpo_jax.training.run import Run
from dpo_jax.utils import cli
from dpo_jax.utils import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "NAME, NAME:ARG, or FILE.py, FILE.py:ARG, FILE.yaml"
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run; a run found there is resumed (default: runs/MODEL-LOSS, where a number is"
    " added if that has another run)",
  )
  flags.DEFINE_bool(
    "accept_changes", False, "resume although data, weights, tokenizer or chat template changed"
  )


def main(argv: list[str]) -> None:
  """Runs the command."""
  del argv
  workdir = pathlib.Path(FLAGS.workdir) if FLAGS.workdir is not None else None
  execute(FLAGS.config, workdir, accept_changes=FLAGS.accept_changes)


def execute(
  config: ConfigDict,
  workdir: pathlib.Path | None,
  *,
  accept_changes: bool = False,
  callbacks: Sequence[Callback] = (),
) -> pathlib.Path:
  """Checks the configuration, loads model and data, trains, exports, and writes the report.

  Args:
    config: of the run.
    workdir: its folder; a run found there is resumed. None for runs/MODEL-LOSS, with a number if
      that has another run.
    accept_changes: whether it is resumed although what it learns from has changed.
    callbacks: called with the metrics of every step and evaluation, in the first process.

  Returns:
    The folder of the run.

  Raises:
    UserError: bad input; files that were in `workdir` are unchanged.
  """
  defaults.replace_aliases(config)
  section = config.parallel
  processes.start(section.coordinator, section.processes, section.process)
  with heartbeat.Heartbeat(), processes.quiet(), contextlib.ExitStack() as stack:
    # The order is important: until step 4, the workdir is not made, and nothing but the lock is
    # written to one that exists. After step 4 only training itself can fail.
    # 1. A workdir that exists must be from a run with this configuration (`parallel` may differ),
    # and no other process may be training into it.
    usual = defaults.get_config().to_json_best_effort()
    named, fields = workdir is not None, config.to_json_best_effort()
    if workdir is None:
      setup.check_inputs(config)  # the folder is named after the model
      workdir = workdirs.choose(config.model.path or "scratch", config.loss.name, fields, usual)
    workdirs.check(workdir, fields, usual)
    is_new = not workdir.exists()
    if not is_new and processes.is_main_process():
      stack.enter_context(workdirs.lock(workdir))
    # 2. Set-up: first checks that read no files, then shapes and data, which a resumed run must
    # have begun with, then weights.
    setup.check_base_is_kept(config)
    run, trained, reference_params, ledger = setup.build(
      config, workdir, accept_changes=accept_changes
    )
    processes.assert_consistent(setup.facts(config, run))
    if not named:
      print(f"workdir: {workdir} (--workdir=DIR chooses another)", flush=True)
    # 3. The check at step 0: policy equals reference, so margins are 0. A resumed run skips it.
    prepared = loop.prepare(run, trained, reference_params)
    del trained, reference_params  # a name here would keep memory that may be freed
    # 4. The workdir is made and locked, and the configuration is written to it.
    claim = functools.partial(_claim, run, stack if is_new else None, config, ledger)
    processes.on_main_process(claim, "claim")
    # 5. Training, then the exported model and the report.
    final = loop.train(run, prepared, callbacks)
    _export(run, final)
  return workdir


def _claim(
  run: Run,
  stack: contextlib.ExitStack | None,
  config: ConfigDict,
  ledger: dict,
) -> None:
  """Makes and locks the workdir, and writes to it the configuration and what is learned from.

  Args:
    run: the run.
    stack: releases the lock at the end; None if the folder existed and is locked already.
    config: the resolved configuration, written to `config.json`.
    ledger: counts of data rows kept, cut and dropped, written to `data.json`.
  """
  run.workdir.mkdir(parents=True, exist_ok=True)
  if stack is not None:
    stack.enter_context(workdirs.lock(run.workdir))
  workdirs.claim(
    run.workdir,
    config.to_json_best_effort(indent=2),
    ledger,
    dict(run.inputs),
    began=run.began,
    step=latest_step(run.workdir / "checkpoints") or 0,
  )


def _export(run: Run, final: PyTree) -> None:
  """Writes the trained model or adapter, and the report, from the first process."""
  # It loads matplotlib, which would make every start wait, also of a run that is refused.
  from dpo_jax.monitoring import report

  out = run.workdir / "export"
  beside: dict[str, Any] = {"source": run.settings.source, "end_ids": run.tokenizer.end_ids}
  print(f"exporting to {out}", flush=True)
  if run.adapter:
    # Adapters are small, so every process gathers them whole; a model is gathered leaf by leaf.
    final = jax.tree.map(gather_to_host, final)
  if processes.is_main_process():
    if run.adapter:
      peft.save(out, run.model_config, final, run.adapter, **beside)
    else:
      hf_checkpoint.save(out, run.model_config, final, **beside)
    report.write(run.workdir)
  elif not run.adapter:
    hf_checkpoint.take_part_in_save(run.model_config, final)
  what = "the adapter" if run.adapter else "the model"
  print(f"done: {out} ({what}), {run.workdir / 'report.html'} (what happened)")


if __name__ == "__main__":
  cli.run(main, define_flags, config="preferences")
