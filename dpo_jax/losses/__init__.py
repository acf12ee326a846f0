"""All training losses, as pure functions from log-probabilities to one loss per example.

An example is a pair, an unpaired completion, a prompt with K completions, or a text (for `sft`).

`LOSSES` maps names to functions. `resolve` binds arguments such as β, adds modifiers (options that
work with many losses, such as `sft_weight`), and refuses combinations that make no sense.

To add a loss: write the function, with formula, units and source in its docstring; add it to
`LOSSES` in registry.py; test it against a value worked out by hand and against a NumPy version
(tests/support/oracle.py); add a row to the table in docs/losses.md.
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
