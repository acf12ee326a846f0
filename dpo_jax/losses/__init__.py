"""All training losses, as pure functions from log-probabilities to one loss per pair.

`LOSSES` maps names to functions. `resolve` binds arguments, adds modifiers, and refuses
combinations that make no sense.

To add a loss: write the function, with formula, units and source in its docstring; name it in
`LOSSES`; test it by hand and against an oracle; add a row to the table in the documentation.
"""

from dpo_jax.losses.registry import (
  LOSSES,
  MARGIN_LOSSES,
  REFERENCE_FREE,
  Loss,
  arguments,
  kind_of,
  modifiers,
  resolve,
)
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps

__all__ = [
  "LOSSES",
  "MARGIN_LOSSES",
  "REFERENCE_FREE",
  "Loss",
  "PairLogps",
  "RankedLogps",
  "UnpairedLogps",
  "arguments",
  "kind_of",
  "modifiers",
  "resolve",
]
