"""Training from Python: `dpo_jax.fit(model="DIR", data="FILE", loss="sigmoid", beta=0.1)`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpo_jax import configure, train
from dpo_jax.distributed import preemption
from dpo_jax.monitoring import loggers
from dpo_jax.structs import UserError
from dpo_jax.utils import interrupts


class Finished(NamedTuple):
  """A finished run.

  Attributes:
    workdir: its folder.
    export: the trained model or adapter, a Hugging Face folder.
    metrics: the metrics of every step, as in metrics.jsonl; held-out values are under eval/.
  """

  workdir: pathlib.Path
  export: pathlib.Path
  metrics: list[dict[str, Any]]


def fit(
  *,
  workdir: str | os.PathLike[str] | None = None,
  config: str | os.PathLike[str] | ConfigDict = "preferences",
  callbacks: loggers.Callback | Sequence[loggers.Callback] = (),
  accept_changes: bool = False,
  overwrite: bool = False,
  **fields: Any,
) -> Finished:
  """Trains a policy, as `dpo-jax train` does; the same call resumes a run that was stopped.

    dpo_jax.fit(model="MODEL_DIR", data="pairs.jsonl", loss="sigmoid", beta=0.1, lr=1e-6)

  Args:
    workdir: folder of the run; None for runs/MODEL-LOSS, where a number is added if that folder has
      another run.
    config: its name or file as in --config: "llama_8b:lora", "my.yaml"; or a configuration with all
      fields, as `dpo_jax.configure.load` returns it.
    callbacks: called as `callback(step, metrics)` after every step and every evaluation, whose
      metrics are under eval/. The metrics of a step arrive when the next one has been started. An
      exception ends the run; its last checkpoint stays.
    accept_changes: whether a run is resumed although what it learns from has changed.
    overwrite: whether a run found in `workdir` is renamed to WORKDIR.old-1, and this one starts
      anew.
    **fields: fields to set, by the names of the short flags (model, data, loss, beta, lr, epochs,
      steps, batch_size, accumulate, max_length, eval_data, reference, lora_rank, dtype, seed), or
      by section: loss={"name": "ipo", "beta": 0.2}, **{"checkpoint.every": 50}.

  Raises:
    UserError: bad input, in one line; nothing has been written.
    KeyboardInterrupt: Ctrl-C, or the stop button of a notebook; a checkpoint has been saved.
  """
  listeners = [callbacks] if isinstance(callbacks, Callable) else callbacks
  if isinstance(listeners, str) or not isinstance(listeners, Sequence):
    raise UserError(f"callbacks is {callbacks!r}; it must be a function, or a list of functions")
  if isinstance(config, Mapping):
    raise UserError("config is a mapping; give its fields as arguments, fit(**fields)")
  if not isinstance(workdir, str | os.PathLike | None):
    raise UserError(f"workdir is {workdir!r}; it must be the path of a folder")
  if workdir is not None and not os.fspath(workdir):
    raise UserError("workdir is empty; name a folder, or leave it out")
  base = _base(config)
  resolved = configure.update(base, fields, others=("workdir", "config", "callbacks", "overwrite"))
  folder = pathlib.Path(workdir) if workdir is not None else None
  try:
    folder = train.execute(
      resolved,
      folder,
      accept_changes=accept_changes,
      overwrite=overwrite,
      callbacks=listeners,
    )
  except preemption.Stopped as stopped:
    # The exit of a command would end a notebook's kernel or a loop over runs without a word.
    if stopped.code == interrupts.STATUS:
      raise KeyboardInterrupt(f"stopped and saved at step {stopped.step}") from stopped
    raise
  return Finished(folder, folder / "export", loggers.read_metrics(folder / loggers.METRICS))


def _base(config: str | os.PathLike[str] | ConfigDict) -> ConfigDict:
  """Returns the configuration that fields are set in; the caller's own stays as it is."""
  if isinstance(config, str | os.PathLike):
    return configure.load(os.fspath(config))
  if not isinstance(config, ConfigDict):
    raise UserError(f"config is {config!r}; it must be a name, a file or a ConfigDict")
  missing = [section for section in configure.load("preferences") if section not in config]
  if missing:
    raise UserError(
      f"config has no {', '.join(missing)}; begin with dpo_jax.configure.load('preferences'), or"
      " give the fields as arguments, fit(**fields)"
    )
  return config.copy_and_resolve_references()
