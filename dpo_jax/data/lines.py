"""Lists the sequences in the rows of a batch, in lines as attention kernels take them.

Among the tokens of one sequence (a prompt with one completion) the mask rule of `TokenBatch` is
plain causal attention, which fused kernels support. So attention may gather the tokens of the
sequences from the rows into lines, run a kernel on these, and gather the results back. Sequences
differ in length, and several share a line where the kernel keeps them apart.
"""

from __future__ import annotations

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.packing import Shape
from dpo_jax.structs import TokenBatch


def with_lines(batch: TokenBatch, shape: Shape, *, copies: int) -> TokenBatch:
  """Adds the list of the sequences in the rows: `sequence_GTW`, `start_GTSq` and `place_NLK`.

  Args:
    batch: NumPy arrays, without an axis of micro-batches.
    shape: T, W and Sq suffice for the sequences of every group.
    copies: K, the most sequences that one token belongs to.
  """
  groups, (rows, length) = len(batch.scored_GM), batch.ids_NL.shape
  past = shape.lines * shape.width  # the place of what is in no sequence
  # The tokens that are not padding, as one list.
  row_x, column_x = np.nonzero(batch.pair_NL >= 0)
  pair_x = batch.pair_NL[row_x, column_x]
  branch_x = batch.branch_NL[row_x, column_x]
  position_x = batch.position_NL[row_x, column_x]
  completion_x = branch_x > 0

  # 1. Every completion that is present has a token, and is a sequence, as long as the position of
  #    its last token says. Its place is that of its first token.
  dims = (rows, pair_x.max(initial=0) + 1, max(copies, branch_x.max(initial=1)))
  at_x = row_x[completion_x], pair_x[completion_x], branch_x[completion_x] - 1
  length_NPrK = np.zeros(dims, np.int64)
  np.maximum.at(length_NPrK, at_x, position_x[completion_x] + 1)
  place_Gx, start_GTSq = _fill_lines(length_NPrK.reshape(groups, -1), shape)
  place_NPrK = place_Gx.reshape(dims)

  # 2. The sequences of each token: a prompt token is in all sequences of its pair, a completion
  #    token only in its own. Sorted, so that the sequences that exist come first.
  first_NPrK = np.sort(place_NPrK, axis=2)[:, :, :copies]
  first_xK = first_NPrK[row_x, pair_x]
  first_xK[completion_x] = past
  first_xK[completion_x, 0] = place_NPrK[at_x]

  # 3. Write both directions: token -> its places in lines, and place -> token.
  exists_xK = first_xK < past
  place_NLK = np.full((rows, length, copies), past, np.int32)
  place_xK = np.where(exists_xK, first_xK + position_x[:, None], past)
  place_NLK[row_x, column_x] = place_xK
  block = rows // groups  # rows of a group
  sequence_GTw = np.full((groups, past), block * length, np.int32)
  group_xK = np.broadcast_to((row_x // block)[:, None], exists_xK.shape)
  at_xK = np.broadcast_to((row_x % block * length + column_x)[:, None], exists_xK.shape)
  sequence_GTw[group_xK[exists_xK], place_xK[exists_xK]] = at_xK[exists_xK]
  return batch._replace(
    sequence_GTW=sequence_GTw.reshape(groups, shape.lines, shape.width),
    start_GTSq=start_GTSq,
    place_NLK=place_NLK,
  )


def _fill_lines(length_Gx: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  """Puts the sequences of every group into its lines.

  Args:
    length_Gx: tokens of each sequence; 0 for none.
    shape: T, W and Sq.

  Returns:
    The place of each sequence's first token, T * W for none; and `TokenBatch.start_GTSq`.
  """
  width, per_line = shape.width, shape.per_line
  place_Gx = np.full(length_Gx.shape, shape.lines * width, np.int64)
  start_GTSq = np.full((len(length_Gx), shape.lines, per_line), width, np.int32)
  for length_x, place_x, start_TSq in zip(length_Gx, place_Gx, start_GTSq, strict=True):
    (exists_x,) = np.nonzero(length_x)
    filled = packing.fill_lines(length_x[exists_x], width, per_line)
    place_x[exists_x] = filled.bin_x * width + filled.start_x
    start_TSq[filled.bin_x, filled.order_x] = filled.start_x
  return place_Gx, start_GTSq
