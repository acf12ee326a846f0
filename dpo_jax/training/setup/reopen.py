"""Opens a run that has ended, to evaluate it again: its parts, from its own configuration.

Of its data only the held-out rows are read. What has moved is refused in one line, or named anew.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from dpo_jax import losses, step
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import transformer
from dpo_jax.structs import PyTree, UserError
from dpo_jax.training import loop, splits, verdict
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.run import Run
from dpo_jax.training.setup.checks import check, check_inputs
from dpo_jax.training.setup.construction import construct
from dpo_jax.training.setup.description import describe
from dpo_jax.training.setup.resume import check_resumed, inputs_of
from dpo_jax.utils import model_folder, paths
from dpo_jax.utils import workdir as workdirs


class Reopened(NamedTuple):
  """A run that has ended.

  Attributes:
    run: its parts; the held-out examples are all that there are, without a limit.
    start: what it trained, as it was before the first step; None if that is not there any more.
    reference_params: as `setup.build` returns them.
    model: folder of what it trained.
    reference: folder of what that is compared with; "" where there is none.
    data: the files that the held-out rows are in.
    limit: how many examples of each set were evaluated in training.
    dtype: type of the model's parameters.
  """

  run: Run
  start: PyTree | None
  reference_params: PyTree | None
  model: pathlib.Path
  reference: str
  data: str
  limit: int
  dtype: str


def reopen(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  model: str | None = None,
  reference: str | None = None,
  data: str | None = None,
) -> Reopened:
  """Opens a run.

  Args:
    config: of the run; changed in place.
    workdir: its folder, which is only read.
    model: folder of the model to evaluate; None for the run's export.
    reference: folder of the reference, where it is not at the path that the run had.
    data: files with the held-out rows, where they are not at the path that the run had.

  Raises:
    UserError: something is missing; it names the way out.
  """
  if config.on_policy.reward:
    raise UserError(
      f"the run in {workdir} learned from samples, so its held-out prompts have no completions to"
      f" evaluate; name pairs: --model={workdir / 'export'} --reference=DIR --data=FILE"
    )
  # The order is important: 1. files, which are looked for before anything is read; 2. the rows,
  # which the configuration as it was decides; 3. what only training needs is left out.
  folder = pathlib.Path(model) if model else _export_of(workdir)
  if not model_folder.is_model(folder):
    raise UserError(f"--model: {model_folder.instead(folder)}")
  _name_data(config, data)
  start_is_there = _find_models(config, workdir, folder, reference)
  _check_files(config, workdir)
  rows = splits.read(workdir)
  if rows is None:
    rows = _rows_of_old_run(config, workdir, renamed=data is not None)
  if not rows:
    raise UserError(
      f"the run in {workdir} held out no rows; name some that it was not trained on:"
      f" --model={folder} --reference=DIR --data=FILE"
    )
  limit = config.data.eval_limit
  _leave_out(config)
  checked = check(config)
  check_inputs(config)
  described = describe(config, checked, workdirs.began(workdir), rows)
  run, start, reference_params = construct(config, workdir, checked, described)
  return Reopened(
    run,
    start if start_is_there else None,
    reference_params,
    folder,
    config.reference.path or config.lora.path or (config.model.path if start_is_there else ""),
    config.data.eval_path or config.data.path,
    limit,
    config.model.param_dtype,
  )


def load_trained(opened: Reopened) -> tuple[Run, step.TrainState]:
  """Loads what a run trained; the objective of the run returned fits it.

  Raises:
    UserError: the folder is no model of this run's shape, or a state that only a checkpoint has is
      not there.
  """
  run, folder, loss = opened.run, opened.model, opened.run.objective.loss
  places = run.executor.shardings(transformer.param_shapes(run.model_config))
  reference = None
  stats = {key: jnp.float32(value) for key, value in loss.running_stats.items()}
  if run.objective.sync or stats:
    state = _restore(opened)
    reference, stats = state.reference, state.running_stats
  if run.adapter and peft.is_adapter(folder):
    settings, trained = peft.load(folder, run.model_config)
    if settings.scale != run.adapter.settings.scale:
      raise UserError(f"{folder} is an adapter of another scale than that of the run; name its own")
  elif peft.is_adapter(folder):
    raise UserError(f"{folder} is an adapter, and the run trained a whole model; name that")
  else:
    # Of a run with adapters, the model that they were merged into.
    trained = hf_checkpoint.load(folder, dtype=opened.dtype, shardings=places)[1]
    whole = step.Objective._field_defaults["policy"]
    run = run._replace(objective=run.objective._replace(policy=whole))
  return run, step.TrainState(
    jnp.int32(run.steps), run.executor.place(trained), (), stats, reference
  )


def _restore(opened: Reopened) -> step.TrainState:
  """Reads the state of a run's last checkpoint: a moving reference, or statistics of the loss."""
  run, folder = opened.run, opened.run.workdir / "checkpoints"
  if opened.start is None or opened.model != run.workdir / "export":
    raise UserError(
      f"loss {run.objective.loss.name!r} or the reference of this run changes with training, so it"
      " can only be evaluated as it ended: put back model.path, and leave out --model"
    )
  checkpoints = Checkpoints(folder)
  try:
    like = loop.state_like(run, opened.start, opened.reference_params)
    return checkpoints.restore(like, _exported_step(run.workdir))
  finally:
    checkpoints.close()


# --- files ----------------------------------------------------------------------------------------


def check_run(workdir: pathlib.Path) -> None:
  """Checks that a folder is that of a run.

  Raises:
    UserError: it is something else; the message names what it is.
  """
  if model_folder.is_run(workdir):
    return
  if model_folder.is_model(workdir):
    around = model_folder.run_around(workdir)
    run = f"; its run is {around}" if around else ""
    raise UserError(f"--workdir={workdir} is a model folder{run}; for a model alone, use --model")
  what = "holds no run" if workdir.exists() else "does not exist"
  raise UserError(f"--workdir={workdir} {what}; name the folder that was trained into")


def _export_of(workdir: pathlib.Path) -> pathlib.Path:
  folder = workdir / "export"
  if not model_folder.is_model(folder):
    raise UserError(
      f"the run in {workdir} has no export yet; finish it by the command that began it, or evaluate"
      f" a checkpoint: dpo-jax convert --workdir={workdir} --out=DIR, then add --model=DIR"
    )
  return folder


def _name_data(config: ConfigDict, data: str | None) -> None:
  """Puts another path in the place of the files that have the held-out rows."""
  if data is None:
    return
  section = config.data
  if section.mix or section.eval_sets:
    raise UserError(
      f"--data={data}: the run has several sources (data.mix or data.eval_sets), which one path"
      " does not replace; put their files back, or name --model and --reference in place of"
      " --workdir"
    )
  section["eval_path" if section.eval_path else "path"] = data


def _find_models(
  config: ConfigDict, workdir: pathlib.Path, model: pathlib.Path, reference: str | None
) -> bool:
  """Checks that the models are there, and puts another path in the place of the reference.

  Returns:
    Whether what the run started from is there. Where it is not the reference too, only its numbers
    before training are missed, and `model` serves for its shape.
  """
  needs = losses.resolve(
    config.loss.name, **{k: v for k, v in config.loss.items() if k != "name" and v is not None}
  ).needs_reference
  adapted = bool(config.lora.rank or config.lora.path)
  is_start = adapted or (needs and not config.reference.path)
  if reference is not None:
    config["model" if is_start else "reference"].path = reference
  for field in ("reference.path", "lora.path"):
    section, key = field.split(".")
    _check_there(field, config[section][key], workdir, "" if section == "lora" else "--reference")
  if config.model.tokenizer and not pathlib.Path(config.model.tokenizer).exists():
    config.model.tokenizer = str(model)  # an export has a copy of it
  path = config.model.path
  if not path or pathlib.Path(path).exists():
    return True
  if is_start:
    _check_there("model.path", path, workdir, "--reference")
  config.model.path = str(model)
  return False


def _check_files(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks that the files with the held-out rows are there."""
  named = config.data.eval_path or config.data.eval_sets
  for field, section, key in paths.fields_of(config):
    of_training = field == "data.path" or field.startswith("data.mix")
    # A path may be a pattern, or several files; those are looked for where they are read.
    is_one = not any(sign in section[key] for sign in "*?[,")
    if field.startswith("data.") and not (named and of_training) and is_one:
      _check_there(field, section[key], workdir, "--data")


def _check_there(field: str, path: str, workdir: pathlib.Path, flag: str) -> None:
  if not path or pathlib.Path(path).exists():
    return
  way = f", or name where it is now: {flag}=PATH" if flag else ""
  raise UserError(
    f"{field}={path}, which the run in {workdir} read, is not there (paths are relative to the"
    f" folder that training was started in); put it back{way}"
  )


def _rows_of_old_run(
  config: ConfigDict, workdir: pathlib.Path, *, renamed: bool
) -> Sequence[splits.Row]:
  """Finds the held-out rows of a run that began before they were written, as training did.

  Raises:
    UserError: its files have changed, or have other names.
  """
  if renamed:
    raise UserError(
      f"the run in {workdir} began before held-out rows were written down, so they can only be"
      " found in the files that it read; leave out --data"
    )
  config = ConfigDict(config.to_dict())
  _leave_out(config, whole=False)
  checked = check(config)
  described = describe(config, checked, workdirs.began(workdir))
  check_resumed(config, workdir, described, inputs_of(config, described), accept=False)
  assert described.data.rows is not None
  return described.data.rows.held_out


def _leave_out(config: ConfigDict, *, whole: bool = True) -> None:
  """Leaves out of a configuration what only training needs, and runs it on one device.

  Args:
    config: changed in place.
    whole: whether all held-out rows are evaluated, and batches of training are not made.
  """
  one = {"mode": "mesh", "devices": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
  config.parallel.update(one | {"offload_optimizer": False, "coordinator": "", "processes": 0})
  config.reference.store = ""  # new rows would be added to it
  if not whole:
    return
  config.data.eval_limit = 1 << 62
  config.eval.samples = 0
  config.eval.batch_size = config.eval.batch_size or config.train.batch_size // max(
    1, config.train.accumulate
  )
  config.train.update(batch_size=1, accumulate=1, steps=max(1, config.train.steps))
  config.optimizer.warmup_steps = None


def _exported_step(workdir: pathlib.Path) -> int | None:
  """Returns the step that a run was exported after; None where that is not known."""
  found = verdict.read_result(workdir)
  return found.get("exported", found.get("step"))
