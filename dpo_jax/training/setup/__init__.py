"""Set-up: a configuration becomes a run, in three parts, cheap ones first.

  1. `checks`        refuses what is wrong with the configuration alone, before a file is opened
  2. `description`   reads headers, tokenizer and data, with nothing on the devices
  3. `construction`  loads weights and makes the objective and the optimizer

Configuration stops here: sections become plain arguments, and nothing below knows a `ConfigDict`.
"""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from dpo_jax.structs import PyTree
from dpo_jax.training.run import Run
from dpo_jax.training.setup.checks import check, check_base_is_kept, check_inputs
from dpo_jax.training.setup.construction import (
  construct,
  facts,
  make_objective,
  make_optimizer,
  reference_key,
)
from dpo_jax.training.setup.description import (
  check_balance,
  choose_attention,
  data_settings,
  describe,
  describe_adapters,
  describe_model,
)

__all__ = [
  "build",
  "check",
  "check_balance",
  "check_base_is_kept",
  "check_inputs",
  "choose_attention",
  "construct",
  "data_settings",
  "describe",
  "describe_adapters",
  "describe_model",
  "facts",
  "make_objective",
  "make_optimizer",
  "reference_key",
]


def build(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, PyTree, PyTree | None, dict]:
  """Makes everything that a run needs; `workdir` is only named, not touched.

  Returns:
    The run; what is trained as it starts (the policy's parameters, or its adapters) and what stays
    frozen (the reference's; None if the loss reads none and nothing is adapted), for
    `Executor.place` to take, no array in both; and the ledger of the data.

  Raises:
    UserError: one line with the value, the rule and a way out.
  """
  # The order is important: 1. what no file is needed for; 2. headers, tokenizer and data; 3.
  # weights. A mistake ends the run before the next part has taken its time.
  checked = check(config)
  check_inputs(config)
  described = describe(config, checked)
  return *construct(config, workdir, checked, described), described.ledger
