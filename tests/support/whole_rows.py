"""Builds a batch of whole rows, for comparisons with the models of transformers."""

import numpy as np

from dpo_jax.structs import TokenBatch


def whole_rows(ids_NL):
  """Returns a batch of one prompt per row: the mask is plain causal, and nothing is scored."""
  zeros = np.zeros_like(ids_NL)
  position_NL = np.broadcast_to(np.arange(ids_NL.shape[1], dtype=np.int32), ids_NL.shape)
  empty = np.zeros((len(ids_NL), 2), np.float32)
  return TokenBatch(
    ids_NL,
    position_NL,
    zeros,
    zeros,
    zeros,
    zeros,
    zeros.astype(np.float32),
    zeros[:1],
    empty,
    empty,
    empty.astype(np.int32),
  )
