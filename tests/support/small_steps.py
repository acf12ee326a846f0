"""Provides objectives over the tiny model, and compares the results of two steps."""

import numpy as np

from dpo_jax import logprobs, losses, step
from tests.support import tiny


def objective(name="sigmoid", sync=None, **given):
  """Builds the objective of a loss by its name and arguments."""
  loss = losses.resolve(name, **given)
  return step.Objective(
    logps_fn=logprobs.make_scored_fn(tiny.MODEL, beyond_shorter=loss.ld_alpha, aligned=loss.wpo),
    loss=loss,
    completions=completions_of(loss),
    reference=step.LiveReference(sync) if sync else None,
  )


def completions_of(loss):
  """Returns the slots of an example, with three completions in a ranking."""
  unpaired = 2 if loss.mismatched else 1
  return {"text": 1, "pairs": 2, "unpaired": unpaired, "ranked": 3}[loss.kind]


def close(found, expected, rtol=1e-5):
  """Asserts equal arrays, up to rounding relative to the largest value of each array."""
  for key in expected:
    scale = np.abs(expected[key]).max()
    np.testing.assert_allclose(found[key], expected[key], rtol=rtol, atol=rtol * scale, err_msg=key)
