"""Set-up: a configuration becomes a run, in four parts, cheap ones first.

  1. `checks`        refuses what is wrong with the configuration alone, before a file is opened
  2. `description`   reads headers, tokenizer and data, with nothing on the devices
  3. `resume`        refuses to resume a run with other data, weights, tokenizer or template
  4. `construction`  loads weights and makes the objective and the optimizer

`reopen` opens a run that has ended, to evaluate it again.

Configuration stops here: sections become plain arguments, and nothing below knows a `ConfigDict`.
"""

from __future__ import annotations

import datetime
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from dpo_jax.distributed import processes
from dpo_jax.structs import PyTree
from dpo_jax.training.run import Run
from dpo_jax.training.setup import automatic
from dpo_jax.training.setup.checks import Checked, check, check_base_is_kept, check_inputs
from dpo_jax.training.setup.construction import (
  construct,
  facts,
  make_objective,
  make_optimizer,
  reference_key,
)
from dpo_jax.training.setup.description import (
  Described,
  check_balance,
  choose_attention,
  data_settings,
  describe,
  describe_adapters,
  describe_model,
)
from dpo_jax.training.setup.reopen import Reopened, check_run, load_trained, reopen
from dpo_jax.training.setup.resume import check_resumed, inputs_of
from dpo_jax.utils import workdir as workdirs

__all__ = [
  "Examined",
  "Reopened",
  "build",
  "check",
  "check_balance",
  "check_base_is_kept",
  "check_inputs",
  "check_resumed",
  "check_run",
  "choose_attention",
  "construct",
  "data_settings",
  "describe",
  "describe_adapters",
  "describe_model",
  "examine",
  "facts",
  "inputs_of",
  "load_trained",
  "make_objective",
  "make_optimizer",
  "reference_key",
  "reopen",
]


class Examined(NamedTuple):
  """A run before its weights are loaded.

  Attributes:
    checked, described: as `check` and `describe` return them.
    inputs: digests of what it learns from.
    began: when it began.
  """

  checked: Checked
  described: Described
  inputs: dict[str, str]
  began: datetime.datetime


def examine(config: ConfigDict, workdir: pathlib.Path, *, accept_changes: bool = False) -> Examined:
  """Checks a run, reads its data, and compares them with what a resumed run began with.

  Micro-batches and remat that `config` leaves open are those that the run began with; a new run has
  them chosen. Either way they are put into `config`.

  Args, Raises: as `build`.
  """
  # The order is important: 1. what no file is needed for; 2. headers, tokenizer and data; 3. the
  # comparison with what a resumed run began with. A mistake ends the run before the next part has
  # taken its time.
  automatic.take_stored(config, workdir)
  checked = check(config)
  check_inputs(config)
  # One moment for all processes: a template may write it into every prompt.
  moment = workdirs.began(workdir).isoformat()
  began = datetime.datetime.fromisoformat(processes.from_main_process(moment))
  described = describe(config, checked, began)
  inputs = inputs_of(config, described)
  check_resumed(config, workdir, described, inputs, accept=accept_changes)
  return Examined(checked, described, inputs, began)


def build(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  accept_changes: bool = False,
  examined: Examined | None = None,
) -> tuple[Run, PyTree, PyTree | None, dict]:
  """Makes everything that a run needs; `workdir` is only read, not touched.

  Args:
    config: of the run.
    workdir: its folder; the run that it may have is resumed.
    accept_changes: whether that run goes on with data, weights, tokenizer or template that have
      changed since it began.
    examined: as `examine` returned it; None examines the run first.

  Returns:
    The run; what is trained as it starts (the policy's parameters, or its adapters) and what stays
    frozen (the reference's; None if the loss reads none and nothing is adapted), for
    `Executor.place` to take, no array in both; and the ledger of the data.

  Raises:
    UserError: one line with the value, the rule and a way out.
  """
  # Weights come last: they may take minutes to load.
  known = examined or examine(config, workdir, accept_changes=accept_changes)
  run, trained, reference_params = construct(config, workdir, known.checked, known.described)
  run = run._replace(began=known.began, inputs=known.inputs)
  return run, trained, reference_params, known.described.ledger
