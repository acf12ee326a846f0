"""Trains a policy: supervised, from preferences or on-policy. Run the same command again to resume.

Ctrl-C and SIGTERM let it finish the current step, save a checkpoint, write the report and exit with
status 130 or 75; Ctrl-C again stops it at once.

  python -m dpo_jax.train --model=MODEL_DIR --data=PREFERENCES.jsonl \\
    --loss=sigmoid --beta=0.1 --lr=1e-6 --workdir=runs/mine
"""

from __future__ import annotations

if __name__ == "__main__":
  from dpo_jax.utils import interrupts

  interrupts.install()  # before the imports below, which take seconds

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpo_jax import defaults
from dpo_jax.distributed import heartbeat, preemption, processes
from dpo_jax.distributed.gather import gather_to_host
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.monitoring import divergence, loggers
from dpo_jax.structs import UserError
from dpo_jax.training import loop, model_card, setup, splits, verdict
from dpo_jax.training.checkpoint import latest_step
from dpo_jax.training.run import Run
from dpo_jax.utils import cli, messages, paths
from dpo_jax.utils import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "NAME, NAME:ARG, or FILE.py, FILE.py:ARG, FILE.yaml"
  )
  cli.define_path(
    "workdir",
    None,
    "folder of the run; a run found there is resumed (default: runs/MODEL-LOSS, where a number is"
    " added if that has another run)",
  )
  flags.DEFINE_bool(
    "accept_changes", False, "resume although data, weights, tokenizer or chat template changed"
  )
  flags.DEFINE_bool(
    "overwrite", False, "start anew; a run found in the workdir is renamed to WORKDIR.old-1"
  )


def main(argv: list[str]) -> None:
  """Runs the command."""
  del argv
  # As an unset variable of a shell leaves it; read as a path, it would be the current folder.
  if FLAGS.workdir == "":
    raise UserError("--workdir is empty; name a folder, or leave the flag out")
  execute(
    FLAGS.config,
    pathlib.Path(FLAGS.workdir) if FLAGS.workdir is not None else None,
    accept_changes=FLAGS.accept_changes,
    overwrite=FLAGS.overwrite,
  )


def execute(
  config: ConfigDict,
  workdir: pathlib.Path | None,
  *,
  accept_changes: bool = False,
  overwrite: bool = False,
  callbacks: Sequence[loggers.Callback] = (),
) -> pathlib.Path:
  """Checks the configuration, loads model and data, trains, exports, and writes the report.

  Args:
    config: of the run; a `~` in its paths is expanded.
    workdir: its folder; a run found there is resumed, or left alone if it is finished. None for
      runs/MODEL-LOSS, with a number if that has another run.
    accept_changes: whether it is resumed although what it learns from has changed.
    overwrite: whether a run found there is moved aside, and this one starts anew.
    callbacks: called with the metrics of every step and evaluation, in the first process.

  Returns:
    The folder of the run.

  Raises:
    UserError: bad input; files that were in `workdir` are unchanged.
    Diverged: the weights are broken; the last good checkpoint is kept, and nothing is exported.
    SystemExit: the run was asked to stop, and all is saved.
  """
  # What is chosen for this run must not be there for the next one with the caller's configuration.
  config = config.copy_and_resolve_references()
  paths.expand_fields(config)
  defaults.replace_aliases(config)
  section = config.parallel
  processes.start(section.coordinator, section.processes, section.process)
  with heartbeat.Heartbeat(), processes.quiet(), contextlib.ExitStack() as stack:
    # The order is important: until step 4, the workdir is not made, and nothing but the lock is
    # written to one that exists. After step 4 only training itself can fail.
    # 1. A workdir that exists must be from a run with this configuration (`parallel` may differ),
    # or a run that may be moved aside, and no other process may be training into it.
    named = workdir is not None
    workdir, replaces = _find_workdir(config, workdir, overwrite=overwrite)
    is_new = replaces or not workdir.exists()
    if workdir.exists() and processes.is_main_process():
      stack.enter_context(workdirs.lock(workdir))
    # 2. Set-up: first checks that read no files, then shapes and data, which a resumed run must
    # have begun with, then weights. A run that starts anew reads a folder that is not there.
    place = workdirs.beside(workdir, ".new") if replaces else workdir
    setup.check_base_is_kept(config)
    examined = setup.examine(config, place, accept_changes=accept_changes)
    if _is_finished(place, examined.described.steps):
      return workdir
    run, trained, reference_params, ledger = setup.build(config, place, examined=examined)
    processes.assert_consistent(setup.facts(config, run))
    if not named:
      messages.say(f"workdir: {workdir} (--workdir=DIR chooses another)")
    # 3. The check at step 0: policy equals reference, so margins are 0. A resumed run skips it.
    prepared = loop.prepare(run, trained, reference_params)
    del trained, reference_params  # a name here would keep memory that may be freed
    # 4. The workdir is made and locked, and the configuration is written to it.
    run = run._replace(workdir=workdir)
    claim = functools.partial(
      _claim, run, stack if is_new else None, config, ledger, replaces=replaces
    )
    processes.on_main_process(claim, "claim")
    # 5. Training, then the exported model and the report.
    try:
      trained = loop.train(run, prepared, callbacks)
    except preemption.Stopped as stopped:
      _report_stop(run, stopped.step)
      raise
    except divergence.Diverged:
      _write_report(run)
      raise
    with _reporting_interruption(run):
      _export(run, trained)
  return workdir


def _find_workdir(
  config: ConfigDict, workdir: pathlib.Path | None, *, overwrite: bool
) -> tuple[pathlib.Path, bool]:
  """Returns the folder of the run, and whether another run in it is to be moved aside.

  Raises:
    UserError: the folder has another run that may not be moved, or something else.
  """
  if workdir is None:
    if overwrite:
      raise UserError("--overwrite needs --workdir=DIR, the folder that is to be used again")
    setup.check_inputs(config)  # the folder is named after the model
  else:
    workdir = pathlib.Path(paths.expand(str(workdir)))
    if overwrite and workdir.exists():
      named = {field: section[key] for field, section, key in paths.fields_of(config)}
      workdirs.check_set_aside(workdir, named)
      return workdir, True
  usual = defaults.get_config().to_json_best_effort()
  fields = config.to_json_best_effort()
  if workdir is None:
    workdir = workdirs.choose(config.model.path or "scratch", config.loss.name, fields, usual)
  workdirs.check(workdir, fields, usual)
  return workdir, False


def _is_finished(workdir: pathlib.Path, steps: int) -> bool:
  """Returns True, and reports the result, if a run has taken its steps and is exported."""
  line = None
  # Whoever needs the space deletes the checkpoints of a finished run; it is finished all the same.
  if latest_step(workdir / "checkpoints") in (steps, None):
    line = verdict.finished(workdir, steps)
  # Decided by the first process, which wrote the result.
  if processes.from_main_process(str(line is not None)) == "False":
    return False
  messages.say(
    f"{workdir} has finished all {steps:,} steps; to train longer, raise --epochs or --steps; to"
    f" start anew, add --overwrite\n{line}"
  )
  _print_next(workdir)
  return True


def _claim(
  run: Run,
  stack: contextlib.ExitStack | None,
  config: ConfigDict,
  ledger: dict,
  *,
  replaces: bool,
) -> None:
  """Makes and locks the workdir, and writes to it the configuration and what is learned from.

  Args:
    run: the run.
    stack: releases the lock at the end; None if the folder is of this run and locked already.
    config: the resolved configuration, written to `config.json`.
    ledger: counts of data rows kept, cut and dropped, written to `data.json`.
    replaces: whether the folder has another run, which is moved aside.
  """
  if replaces:
    messages.say(f"the run that was in {run.workdir} is now in {workdirs.set_aside(run.workdir)}")
  run.workdir.mkdir(parents=True, exist_ok=True)
  if stack is not None:
    stack.enter_context(workdirs.lock(run.workdir))
  step = latest_step(run.workdir / "checkpoints") or 0
  if run.data.rows is not None:
    splits.write(run.workdir, run.data.rows, step=step)
  workdirs.claim(
    run.workdir,
    config.to_json_best_effort(indent=2),
    ledger,
    dict(run.inputs),
    began=run.began,
    step=step,
  )


def _export(run: Run, trained: loop.Trained) -> None:
  """Writes the trained model or adapter, the report and the result, from the first process."""
  # It loads matplotlib, which would make every start wait, also of a run that is refused.
  from dpo_jax.monitoring import report

  out, final, step = run.workdir / "export", trained.params, trained.step
  which = "" if step == run.steps else f", the best checkpoint (step {step:,})"
  messages.say(f"exporting to {out}{which}")
  if run.adapter:
    # Adapters are small, so every process gathers them whole; a model is gathered leaf by leaf.
    final = jax.tree.map(gather_to_host, final)
  if processes.is_main_process():
    beside: dict[str, Any] = {
      "source": run.settings.source,
      "end_ids": run.tokenizer.end_ids,
      "card": model_card.text(run.workdir, step, adapter=run.adapter is not None),
    }
    if run.adapter:
      peft.save(out, run.model_config, final, run.adapter, **beside)
    else:
      hf_checkpoint.save(out, run.model_config, final, **beside)
    report.write(run.workdir)
    records = loggers.read_metrics(run.workdir / loggers.METRICS)
    line = verdict.of_run(run.workdir, records, None if step == run.steps else step)
    # Last: it says that the export is there.
    verdict.write_result(run.workdir, run.steps, line, exported=step, best=trained.best)
    messages.say(line)
    _print_next(run.workdir)
  elif not run.adapter:
    hf_checkpoint.take_part_in_save(run.model_config, final)


def _print_next(workdir: pathlib.Path) -> None:
  """Prints where the results are, and the commands that use them, in at most five lines."""
  out, adapter = workdir / "export", peft.is_adapter(workdir / "export")
  best = verdict.read_best(workdir)
  if best:
    messages.say(best.line)
  what = "adapter" if adapter else "model"
  messages.say(f"done: {out} (the {what}), {workdir / 'report.html'} (the report)")
  sample = cli.other_command("sample", f"--model={out}")
  messages.say_command("try it", f'{sample} --prompt="TEXT"{model_card.sample_flag(workdir)}')
  held_out = verdict.read(workdir, verdict.AFTER)
  if held_out is not None and held_out.right_B is not None:
    messages.say_command("measure it", cli.other_command("evaluate", f"--workdir={workdir}"))
  # Either of the two: a longer list would not be read.
  if best and not best.exported:
    flags = [f"--workdir={workdir}", f"--out={workdir / 'best'}", "--best"]
    messages.say_command("export the best", cli.other_command("convert", *flags))
  elif adapter:
    flags = [f"--workdir={workdir}", f"--out={workdir / 'merged'}", "--merge_lora"]
    messages.say_command("merge it into its base", cli.other_command("convert", *flags))


def _write_report(run: Run) -> None:
  """Writes the report of a run that ends early, from the first process."""
  from dpo_jax.monitoring import report  # late, as in `_export`

  if processes.is_main_process():
    messages.say(f"report: {report.write(run.workdir)}")


def _report_stop(run: Run, step: int) -> None:
  """Reports that a run stopped and saved, writes its report, and prints how to continue."""
  messages.say(f"stopped and saved at step {step} of {run.steps}")
  _write_report(run)
  _print_continue(run)


@contextlib.contextmanager
def _reporting_interruption(run: Run) -> Iterator[None]:
  """Reports after a Ctrl-C inside the block, which exports, that no step is lost."""
  try:
    yield
  except KeyboardInterrupt:
    messages.say(f"not exported yet, but all {run.steps:,} steps are saved")
    _print_continue(run)
    raise


def _print_continue(run: Run) -> None:
  """Prints the command that continues a run."""
  # With --overwrite, the command would start anew.
  command = cli.this_command("overwrite", "nooverwrite")
  if command is None or processes.is_multiprocess():
    command = f"the same command again, with --workdir={run.workdir}"
  messages.say_command("continue", command)


if __name__ == "__main__":
  cli.run(main, define_flags, config="preferences")
