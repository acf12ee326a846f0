"""Direct Preference Optimization in JAX, from its derivation to training at scale.

The modules of this folder are the method, in the order `structs` (records, axis letters),
`derivation`, `losses`, `logprobs`, `metrics`, `step`, `train` (the command). Every package around
them has one subject; imports point from the command down to the records. `dpo_jax.fit` trains from
Python.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dpo_jax.api import fit as fit

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  # At first use, not above: `import dpo_jax` must not wait for jax, which commands load last.
  if name == "fit":
    from dpo_jax.api import fit

    return fit
  hint = "; dpo_jax.fit(…) trains from Python" if name in ("train", "run", "Trainer") else ""
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
