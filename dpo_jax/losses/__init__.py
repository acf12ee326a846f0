"""All training losses, as pure functions from log-probabilities to one loss per example.

An example is a pair, an unpaired completion, a prompt with K completions, or a text (for `sft`).

`LOSSES` maps names to functions. `resolve` binds arguments such as β, adds modifiers (options that
work with many losses, such as `sft_weight`), and refuses combinations that make no sense.

To add a loss: write the function, with formula, units and source in its docstring, and declare on
it what it needs (`declare`). Everything else finds it; tests say which lines of theirs it lacks.
"""

from dpo_jax.losses.declaration import Running, declare
from dpo_jax.losses.registry import (
  LOSSES,
  MARGIN_LOSSES,
  REFERENCE_FREE,
  Loss,
  arguments,
  canonical,
  kind_of,
  modifiers,
  own_functions,
  resolve,
  types,
)
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps

__all__ = [
  "LOSSES",
  "MARGIN_LOSSES",
  "REFERENCE_FREE",
  "Loss",
  "PairLogps",
  "RankedLogps",
  "Running",
  "UnpairedLogps",
  "arguments",
  "canonical",
  "declare",
  "kind_of",
  "modifiers",
  "own_functions",
  "resolve",
  "types",
]
