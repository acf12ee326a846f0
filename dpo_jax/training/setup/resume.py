"""Set-up of a run that is resumed: it must learn from what it began with, for as long as it may.

What a run learns from is everything outside its configuration: rows, weights, tokenizer, chat
template, and a loss of the user's own. Their digests are in the workdir, and what differs is named
before weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import losses
from dpo_jax.hf import peft, safetensors_files
from dpo_jax.structs import UserError
from dpo_jax.training import optimizer
from dpo_jax.training.checkpoint import latest_step
from dpo_jax.training.setup.description import Described, steps_of
from dpo_jax.utils import functions, messages
from dpo_jax.utils import workdir as workdirs

# Fields of a config.json that say who wrote it, and nothing of the model.
_ABOUT = ("transformers_version", "_name_or_path")


def inputs_of(config: ConfigDict, described: Described) -> dict[str, str]:
  """Returns a digest of everything that a run learns from, by names for messages.

  Rows are digested whole, and large files of weights by samples: see `data.digest` and
  `safetensors_files.sampled_digest`.
  """
  tokenizer = described.tokenizer
  folder = config.model.tokenizer or config.model.path
  found = dict(described.data.digests)
  found[f"the tokenizer of {folder}"] = _digest(
    safetensors_files.file_digest(pathlib.Path(folder) / "tokenizer.json").hex(),
    tokenizer.adds_bos,
    tokenizer.bos_id,
    tokenizer.eos_id,
  )
  template = tokenizer.template
  found[f"the chat template of {folder}"] = _digest(template.source, template.arguments)
  for name in ("model", "reference"):
    path = config[name].path
    if path:
      found[f"the weights at {name}.path={path}"] = safetensors_files.sampled_digest(
        pathlib.Path(path)
      )
      fields = safetensors_files.read_json(pathlib.Path(path) / "config.json")
      described_as = {key: value for key, value in fields.items() if key not in _ABOUT}
      found[f"config.json at {name}.path={path}"] = _digest(described_as)
  if config.lora.path:
    found[f"the adapter at lora.path={config.lora.path}"] = peft.digest(config.lora.path)
  return found | code_of(config.loss.name)


def code_of(loss: str) -> dict[str, str]:
  """Returns digests of the files with the losses of the user's own; not of what these import."""
  names = losses.own_functions(loss)
  paths = {name: functions.file_of(name) for name in names}
  digest = safetensors_files.file_digest
  return {f"the code of loss {name}": digest(path).hex() for name, path in paths.items() if path}


def _digest(*values: Any) -> str:
  text = json.dumps(values, sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_resumed(
  config: ConfigDict,
  workdir: pathlib.Path,
  described: Described,
  inputs: dict[str, str],
  *,
  accept: bool,
) -> None:
  """Checks that a run may be resumed with these inputs, and for so many steps.

  Args:
    config: of the run, which agrees with that of the workdir but for `workdirs.LENGTH`.
    workdir: the folder; a new one passes.
    described: of the run.
    inputs: from `inputs_of`.
    accept: whether inputs may have changed; the change is then reported.

  Raises:
    UserError: it names what changed, or why the number of steps cannot be another.
  """
  before = workdirs.stored_config(workdir)
  if before is None:
    return
  changed, checked = workdirs.changed_inputs(workdir, inputs, described.ledger)
  names = ", ".join(changed)
  if changed and not accept:
    raise UserError(
      f"{workdir} contains a run whose inputs changed since it began: {names}. Put back what was"
      " there, choose a new --workdir, or go on with what is there now by --accept_changes"
    )
  if changed:
    messages.warn(f"{workdir}: goes on although this changed: {names}")
  if not checked:
    messages.warn(
      f"{workdir}: this run began before its inputs were digested, so whether rows, weights and"
      " chat template are still the same could not be checked; from here on they are"
    )
  _check_length(config, workdir, described, before["train"])
  for field in workdirs.COMPUTED:
    section, name = field.split(".")
    was, now = before[section].get(name), config[section][name]
    if was not in (None, now, *workdirs.OPEN):
      messages.show(f"{workdir}: goes on with {field}={now}, in place of {was}")


def _check_length(
  config: ConfigDict, workdir: pathlib.Path, described: Described, before: dict[str, Any]
) -> None:
  """Checks that a run may take another number of steps: those taken must be steps of it too."""
  now = config.train
  if (before["steps"], before["epochs"]) == (now.steps, now.epochs):
    return
  old = steps_of(before["steps"], before["epochs"], described.data)
  new, done = described.steps, latest_step(workdir / "checkpoints") or 0
  what = "train.steps" if now.steps else "train.epochs"
  if new < done:
    steps = f"{new} step{'s' * (new != 1)}"
    raise UserError(
      f"{what} asks for {steps}, and the run in {workdir} has taken {done}; ask for as many or more"
    )
  rates = [
    np.asarray(optimizer.build(steps, **config.optimizer)[0](jnp.arange(done)))
    for steps in (old, new)
  ]
  # A rate that does not depend on the step is one number.
  if not np.allclose(*rates, rtol=1e-6, atol=0):
    raise UserError(
      f"{what} asks for {new} steps, and the {done} steps that the run in {workdir} has taken had"
      f" learning rates for {old} (optimizer.schedule={config.optimizer.schedule}); give the value"
      " that it began with, or train on in a new --workdir from what it learned:"
      f" {_from_export(config, workdir)}"
    )
  messages.show(f"{workdir}: goes on to step {new}, in place of {old}")


def _from_export(config: ConfigDict, workdir: pathlib.Path) -> str:
  """Returns the flags by which a new run starts from what a run learned."""
  export = workdir / "export"
  if config.lora.rank or config.lora.path:
    flags = f"--config.lora.path={export} --lora_rank=0"
  else:
    first = config.reference.path or config.model.path
    flags = f"--model={export}" + (f" --reference={first}" if first else "")
  if export.is_dir():
    return flags
  return f"{flags} (first: dpo-jax convert --workdir={workdir} --out={export})"
