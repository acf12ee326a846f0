"""The texts that rows hold, a prompt with one answer each: where their tokens stand, in numpy.

Among the tokens of one text the mask rule of `TokenBatch` is plain causal attention, which kernels
know. So attention may take rows apart into texts, and put what comes of it back.

P lists pairs of a row.
"""

from __future__ import annotations

import numpy as np

from dpo_jax.structs import TokenBatch


def with_texts(batch: TokenBatch, *, texts: int, width: int, copies: int) -> TokenBatch:
  """A batch of rows with `text_GTW` and `place_NLK`.

  Args:
    batch: numpy arrays, no axis of micro-batches.
    texts, width: T and W; no group has more texts, no text more tokens.
    copies: K, in how many texts a token may be.
  """
  groups, (rows, length) = len(batch.scored_GM), batch.ids_NL.shape
  row_X, column_X = np.nonzero(batch.pair_NL >= 0)
  of = lambda x_NL: x_NL[row_X, column_X]
  pair_X, branch_X, position_X = of(batch.pair_NL), of(batch.branch_NL), of(batch.position_NL)

  # Every answer that is there has a token, and is a text: they are numbered in every group.
  answered_X = branch_X > 0
  shape = (rows, pair_X.max(initial=0) + 1, max(copies, branch_X.max(initial=1)))
  there_NPK = np.zeros(shape, bool)
  there_NPK[row_X[answered_X], pair_X[answered_X], branch_X[answered_X] - 1] = True
  number_GX = np.cumsum(there_NPK.reshape(groups, -1), axis=1) - 1
  number_NPK = np.where(there_NPK, number_GX.reshape(shape), texts)

  # A token of a prompt is in all texts of its pair, one of an answer in its own.
  first_NPK = np.sort(number_NPK, axis=2)[:, :, :copies]
  number_XK = first_NPK[row_X, pair_X]
  number_XK[answered_X] = texts
  own_X = number_NPK[row_X[answered_X], pair_X[answered_X], branch_X[answered_X] - 1]
  number_XK[answered_X, 0] = own_X

  held_XK = number_XK < texts
  place_NLK = np.full((rows, length, copies), texts * width, np.int32)
  place_XK = np.where(held_XK, number_XK * width + position_X[:, None], texts * width)
  place_NLK[row_X, column_X] = place_XK
  block = rows // groups
  text_GTW = np.full((groups, texts * width), block * length, np.int32)
  group_XK = np.broadcast_to((row_X // block)[:, None], held_XK.shape)
  at_XK = np.broadcast_to((row_X % block * length + column_X)[:, None], held_XK.shape)
  text_GTW[group_XK[held_XK], place_XK[held_XK]] = at_XK[held_XK]
  return batch._replace(text_GTW=text_GTW.reshape(groups, texts, width), place_NLK=place_NLK)
