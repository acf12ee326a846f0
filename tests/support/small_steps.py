"""An objective over the tiny model, and how near two steps should be."""

import numpy as np

from dpo_jax import logprobs, losses, step
from tests.support import tiny


def objective(name="sigmoid", sync=None, **given):
  loss = losses.resolve(name, **given)
  return step.Objective(
    logps_fn=logprobs.make_logps_fn(tiny.MODEL, beyond_shorter=loss.ld_alpha),
    loss=loss,
    completions={"text": 1, "ranked": 3}.get(loss.kind, 2),
    scored_fn=logprobs.make_scored_fn(tiny.MODEL, beyond_shorter=loss.ld_alpha, aligned=loss.wpo),
    sync=sync,
  )


def close(found, expected, rtol=1e-5):
  for key in expected:
    scale = np.abs(expected[key]).max()
    np.testing.assert_allclose(found[key], expected[key], rtol=rtol, atol=rtol * scale, err_msg=key)
