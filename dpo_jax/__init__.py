"""Direct Preference Optimization in JAX, from its derivation to training at scale.

The modules of this folder are the method, in the order `structs` (records, axis letters),
`derivation`, `losses`, `logprobs`, `metrics`, `step`, `train` (the command). Every package around
them has one subject; imports point from the command down to the records.
"""

__version__ = "0.1.0"
