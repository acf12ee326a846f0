"""Every objective, once: log-probabilities in, one number a pair out.

`LOSSES` names the functions; `resolve` binds arguments, adds modifiers and refuses what makes no
sense. To add a loss: write the function (formula, units and source in its docstring), name it in
`LOSSES`, test it by hand and against an oracle, and give it a row in the README's table.
"""

from dpo_jax.losses.registry import (
  FREE,
  LOSSES,
  OF_MARGIN,
  Loss,
  arguments,
  kind_of,
  modifiers,
  resolve,
)
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps

__all__ = [
  "FREE",
  "LOSSES",
  "OF_MARGIN",
  "Loss",
  "PairLogps",
  "RankedLogps",
  "UnpairedLogps",
  "arguments",
  "kind_of",
  "modifiers",
  "resolve",
]
