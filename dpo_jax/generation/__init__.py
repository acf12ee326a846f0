"""Sampling from a model.

`sampler` makes batches of prompts and runs the two programs of `decoding` on them. `stopping` has
the rules for where a completion ends. `rollouts` adds texts and the rewards of `rewards`, and makes
preference pairs.
"""
