"""Lays examples out in rows: builds the arrays of a `TokenBatch`, in NumPy.

Three layouts contain the same pairs and give the same log-probs:

  padded  one sequence per row, S = 1; rows K i .. K i + K - 1 are the completions of pair i
  packed  several sequences per row, every completion with its own copy of the prompt
  shared  several pairs per row, the prompt of a pair once, and its completions branching off it

With a prompt p_0 .. p_{m-1} and a completion a_0 .. a_{n-1}, the inputs p_0 .. p_{m-2} are branch
0; the inputs p_{m-1}, a_0 .. a_{n-2} with the targets a_0 .. a_{n-1} are the branch of the
completion. Every target is scored, unless its token weight is 0: such a token is an input alone,
which the tokens after it attend to. A shared pair therefore takes m - 1 positions plus the lengths
of its completions.

A batch contains exactly the pairs it is given, whatever the layout. Only the padding around them is
rounded, so that few shapes are compiled: see `packing.Sizes`.

Examples with fewer completions than others are filled up to K with absent ones
(`examples.fill_up`). An absent completion has no tokens, and its slot is empty: weight 0, score 0,
data row -1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import lines, packing
from dpo_jax.data.examples import Example, Measured, lengths, weights_of
from dpo_jax.data.packing import Places, Shape, Sizes
from dpo_jax.structs import TokenBatch, UserError

# --- sizes ----------------------------------------------------------------------------------------


def fit_row_length(
  examples: Sequence[Example] | Measured, layout: str, *, multiple: int = 64
) -> int:
  """Returns a row length that suits these examples, in tokens.

  The longest example fits. Packed and shared rows have room for four examples of mean cost, up to
  2,048 tokens: longer rows pack more tightly, but attention costs more.
  """
  cost_B = packing.costs(lengths(examples), layout)
  want = int(cost_B.max())
  if layout != "padded":
    want = max(want, min(2048, 4 * int(cost_B.mean())))
  return packing.round_up(want, multiple if layout != "padded" else 8)


def check_fits(examples: Sequence[Example], layout: str, row_length: int) -> None:
  """Raises `UserError` unless every example fits in a row; the message names the largest."""
  if row_length < 1:
    raise UserError(
      f"row_length is {row_length}; a row has 1 token or more (0 chooses by the data)"
    )
  cost_B = packing.costs(lengths(examples), layout)
  worst = int(cost_B.argmax())
  if cost_B[worst] > row_length:
    raise UserError(
      f"data row {examples[worst].row} takes {cost_B[worst]} tokens of a {layout} row and rows have"
      f" {row_length}; raise row_length to {cost_B[worst]} or lower max_length"
    )


def count_padding(
  examples: Sequence[Example] | Measured,
  *,
  batch_size: int,
  layout: str = "shared",
  row_length: int | None = None,
) -> int:
  """Counts the padding tokens of one pass over the examples, in order."""
  # Padded rows repeat the prompt for every completion, as packed ones do.
  real = packing.costs(lengths(examples), "shared" if layout == "shared" else "packed").sum()
  taken = count_taken(examples, batch_size=batch_size, layout=layout, row_length=row_length)
  return taken - int(real)


def count_taken(
  examples: Sequence[Example] | Measured,
  *,
  batch_size: int,
  layout: str = "shared",
  row_length: int | None = None,
) -> int:
  """Counts the tokens of all rows of one pass over the examples, in order, padding included."""
  measured = lengths(examples)
  length = row_length or fit_row_length(examples, layout)
  size = len(measured.prompt_B)
  parts = [measured.select(slice(i, i + batch_size)) for i in range(0, size, batch_size)]
  return length * sum(packing.place(part, layout, length).rows for part in parts)


def fit_sizes(
  batches: Sequence[Sequence[Example] | Measured],
  *,
  layout: str = "shared",
  row_length: int,
  groups: int = 1,
  quantile: float = 1.0,
  steps: int = 8,
  per_line: int = 0,
) -> Sizes:
  """Returns sizes that suit these batches, except those above `quantile` in rows.

  Args as in `packing.fit`.
  """
  places = [packing.place(lengths(batch), layout, row_length, groups=groups) for batch in batches]
  completions = lengths(batches[0]).tokens_BK.shape[1]
  return packing.fit(places, completions, layout, groups, quantile, steps, per_line)


# --- batches --------------------------------------------------------------------------------------


def collate(
  examples: Sequence[Example],
  *,
  layout: str = "shared",
  row_length: int,
  groups: int = 1,
  sizes: Sizes | None = None,
  share: tuple[int, int] = (0, 1),
  per_line: int = 0,
) -> TokenBatch:
  """Lays examples out in rows.

  Args:
    examples: pairs, all with the same number K of completions, some of which may be absent.
    layout: "shared", "packed" or "padded".
    row_length: L.
    groups: G, the runs of rows that devices keep. Scored tokens are distributed evenly over them,
      and the K completions of a pair stay in one group.
    sizes: sizes that shapes are rounded up to, from `fit_sizes`; by default those of this batch.
    share: (i, n) gives only the rows of host i of n. The rows of all hosts in order are the whole
      batch, whatever n is. If the examples know their `lengths`, only those of the host are read.
    per_line: lists the sequences, at most so many to a line, as `sequence_GTW`, `start_GTSq` and
      `place_NLK`; 0 lists none. If `sizes` is given, `sizes.per_line` decides instead.

  Returns:
    The batch, as NumPy arrays.
  """
  options = {
    "row_length": row_length, "groups": groups, "sizes": sizes, "share": share,
    "per_line": per_line,
  }  # fmt: skip
  batch = collate_many([examples], layout=layout, **options)
  first: list[Any] = [None if array is None else array[0] for array in batch]
  return TokenBatch(*first)


def collate_many(
  micro_batches: Sequence[Sequence[Example]],
  *,
  layout: str = "shared",
  row_length: int,
  groups: int = 1,
  sizes: Sizes | None = None,
  share: tuple[int, int] = (0, 1),
  per_line: int = 0,
) -> TokenBatch:
  """Lays A micro-batches out in arrays of one shape, with A as the leading axis.

  Arguments as in `collate`, except for `micro_batches`: the examples of each.
  """
  for batch in micro_batches:
    check_fits(batch, layout, row_length)
  completions = lengths(micro_batches[0]).tokens_BK.shape[1]
  most_pairs = sizes.slots // completions if sizes else None
  places = [
    packing.place(lengths(batch), layout, row_length, most_pairs, groups=groups)
    for batch in micro_batches
  ]
  # Sizes and shape come from the lengths of the whole batch, before it is divided among hosts: all
  # hosts must compute the same shape, though each reads only its own examples.
  sizes = sizes or packing.fit(places, completions, layout, groups, per_line=per_line)
  places, shape = packing.choose_shape(places, sizes, layout, groups, row_length)
  # From the first example of the batch, which every host reads: a host without examples of its own
  # must build the same arrays.
  stored = bool(micro_batches[0][0].reference)
  filled = [
    _fill(*_host_share(batch, place, shape, share), layout, stored)
    for batch, place in zip(micro_batches, places, strict=True)
  ]
  if shape.lines:
    # Only in shared rows is a token, one of the prompt, part of several sequences.
    copies = completions if layout == "shared" else 1
    filled = [lines.with_lines(batch, shape, copies=copies) for batch in filled]
  arrays = zip(*filled, strict=True)
  stacked: list[Any] = [None if each[0] is None else np.stack(each) for each in arrays]
  return TokenBatch(*stacked)


def _host_share(
  examples: Sequence[Example], places: Places, shape: Shape, share: tuple[int, int]
) -> tuple[list[Example], Measured, Places, Shape]:
  """Returns the examples of one host, their lengths, their places in its rows, and its shape."""
  host, hosts = share
  rows = shape.rows // hosts
  (mine,) = np.nonzero(places.row_B // rows == host)
  moved = Places(
    group_B=places.group_B[mine],
    row_B=places.row_B[mine] - host * rows,
    column_B=places.column_B[mine],
    order_B=places.order_B[mine],
    scored_B=places.scored_B[mine],
    sequence_BK=places.sequence_BK[mine],
    rows=rows,
  )
  measured = lengths(examples).select(mine)
  shape = shape._replace(rows=rows, groups=shape.groups // hosts)
  return [examples[i] for i in mine.tolist()], measured, moved, shape


class _Pieces(NamedTuple):
  """Pieces of examples: runs of tokens of one branch that are neighbours in a row; each [B, P].

  A shared example has P = 1 + K pieces: the prompt and each completion. In the other layouts it has
  2 K: a copy of the prompt and one completion, in turns.

  Attributes:
    length_BP: number of tokens; 0 if the piece is absent.
    source_BP: index of the first token among the ids of all examples, one after another.
    at_BP: index of the first token in the rows, one after another.
    position_BP: `TokenBatch.position_NL` of the first token; the others count up from it.
    pair_BP, branch_BP, slot_BP: as in `TokenBatch`, equal for all tokens of a piece.
  """

  length_BP: np.ndarray
  source_BP: np.ndarray
  at_BP: np.ndarray
  position_BP: np.ndarray
  pair_BP: np.ndarray
  branch_BP: np.ndarray
  slot_BP: np.ndarray


def _pieces(measured: Measured, places: Places, length: int, layout: str) -> _Pieces:
  """Describes the pieces of examples in rows of `length` tokens.

  The ids of an example are its prompt and then its completions, one after another.
  """
  prompt_B, tokens_BK, _ = measured
  completions = tokens_BK.shape[1]
  # The branch of each piece, and the copy of the prompt that it belongs to.
  every_K = np.arange(1, completions + 1)
  if layout == "shared":
    branch_P = np.concatenate([[0], every_K])
    copy_P = np.zeros(completions + 1, np.int64)
  else:
    branch_P = np.stack([np.zeros_like(every_K), every_K], axis=1).reshape(-1)
    copy_P = np.repeat(every_K - 1, 2)
  # A prompt's piece starts at its first id. A completion's piece starts one id earlier than the
  # completion: its first input is the token before it.
  start_B = np.cumsum(prompt_B + tokens_BK.sum(1)) - prompt_B - tokens_BK.sum(1)
  before_BK = start_B[:, None] + prompt_B[:, None] + np.cumsum(tokens_BK, 1) - tokens_BK - 1

  def per_piece(prompt_B1: np.ndarray, completion_BK: np.ndarray) -> np.ndarray:
    return np.concatenate([prompt_B1, completion_BK], 1)[:, branch_P]

  # The copy of a prompt whose completion is absent is absent too. (In a shared row the copy is that
  # of the first completion, which is always present.)
  length_BP = per_piece(prompt_B[:, None] - 1, tokens_BK) * (tokens_BK > 0)[:, copy_P]
  position_BP = np.where(branch_P > 0, prompt_B[:, None] - 1, 0)

  if layout == "padded":
    # A row starts with its sequence, so columns are positions; it has one pair and one slot.
    row_BP = places.row_B[:, None] + copy_P
    column_BP, pair_BP = position_BP, np.zeros_like(row_BP)
    slot_BP = pair_BP
  else:
    row_BP = places.row_B[:, None]
    column_BP = places.column_B[:, None] + np.cumsum(length_BP, 1) - length_BP
    # Packed, every copy of the prompt is a pair of its own to the mask rule.
    pair_BP = places.order_B[:, None] * (copy_P[-1] + 1) + copy_P
    slot_BP = places.order_B[:, None] * completions + np.maximum(branch_P - 1, 0)
  return _Pieces(
    length_BP=length_BP,
    source_BP=per_piece(start_B[:, None], before_BK),
    at_BP=row_BP * length + column_BP,
    position_BP=position_BP,
    pair_BP=pair_BP,
    branch_BP=np.broadcast_to(branch_P, length_BP.shape),
    slot_BP=slot_BP,
  )


def _fill(
  examples: Sequence[Example],
  measured: Measured,
  places: Places,
  shape: Shape,
  layout: str,
  stored: bool,
) -> TokenBatch:
  """Writes the arrays of a batch, or of one host's share of it.

  Every piece of every example is expanded into its tokens, Tk in all, and each array is written by
  one indexed assignment: no loop over examples or tokens.

  Args:
    examples: may be none, on a host that has only padding.
    measured: their lengths.
    places: their places in the rows.
    shape: of the arrays.
    layout: of the rows.
    stored: True if the examples have log-probs of the reference.
  """
  prompt_B, tokens_BK, _ = measured
  ids = [ids for example in examples for ids in (example.prompt, *example.completions)]
  # The zero is for a host without examples: there is nothing else to concatenate.
  flat_x = np.concatenate([*ids, np.zeros(1, np.int32)])
  pieces = _pieces(measured, places, shape.length, layout)

  length_x = pieces.length_BP.reshape(-1)
  end_x = np.cumsum(length_x)
  along_Tk = np.arange(length_x.sum()) - np.repeat(end_x - length_x, length_x)  # within its piece

  def per_token(value_BP: np.ndarray) -> np.ndarray:
    return np.repeat(value_BP.reshape(-1), length_x)

  at_Tk = per_token(pieces.at_BP) + along_Tk
  source_Tk = per_token(pieces.source_BP) + along_Tk
  branch_Tk = per_token(pieces.branch_BP)
  ids_Tk = flat_x[source_Tk]
  first_Tk = (branch_Tk > 0) & (along_Tk == 0)
  # The first input of every completion is the last prompt token. Only before the first completion
  # does it stand there in `flat_x`; before the others stands the end of the completion before.
  last_B = np.cumsum(prompt_B + tokens_BK.sum(1)) - tokens_BK.sum(1) - 1
  ids_Tk[first_Tk] = np.repeat(flat_x[last_B], (tokens_BK > 0).sum(1))

  def to_rows(value_Tk: np.ndarray, dtype: Any = np.int32, empty: int = 0) -> np.ndarray:
    out_x = np.full(shape.rows * shape.length, empty, dtype)
    out_x[at_Tk] = value_Tk
    return out_x.reshape(shape.rows, shape.length)

  def at_targets(values: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    """Reads a number of every completion token where the token is the target: [Tk]."""
    # Laid out like `flat_x`, zeros for the prompt, so that the same indices read it.
    pairs = zip(examples, values, strict=True)
    known = [x for one, several in pairs for x in (np.zeros(len(one.prompt)), *several)]
    return np.concatenate([*known, np.zeros(1)])[source_Tk + 1]

  # From branches and not from ids: padding is id 0, and so may be a real token.
  weight_Tk = np.where(branch_Tk > 0, 1.0, 0.0)
  if any(example.token_weights for example in examples):
    weight_Tk *= at_targets(map(weights_of, examples))
  scored_Tk = weight_Tk > 0
  target_Tk = np.where(scored_Tk, flat_x[source_Tk + 1], 0)
  reference_NL = None
  if stored:
    known_Tk = at_targets(example.reference for example in examples)
    reference_NL = to_rows(np.where(scored_Tk, known_Tk, 0), np.float32)
  return TokenBatch(
    ids_NL=to_rows(ids_Tk),
    position_NL=to_rows(per_token(pieces.position_BP) + along_Tk),
    pair_NL=to_rows(per_token(pieces.pair_BP), empty=-1),
    branch_NL=to_rows(branch_Tk),
    slot_NL=to_rows(per_token(pieces.slot_BP)),
    target_NL=to_rows(target_Tk),
    weight_NL=to_rows(weight_Tk, np.float32),
    scored_GM=_list_scored(at_Tk[scored_Tk], shape),
    reference_NL=reference_NL,
    **_slot_arrays(examples, tokens_BK, places, layout, shape),
  )


def _list_scored(at_Tk: np.ndarray, shape: Shape) -> np.ndarray:
  """Lists the flat positions of scored tokens, in order within each group: int32 [G, M]."""
  block = shape.rows // shape.groups * shape.length  # tokens of a group
  at_Tk = np.sort(at_Tk)
  group_Tk = at_Tk // block
  count_G = np.bincount(group_Tk, minlength=shape.groups)
  # One past the end where nothing is scored: a gather with mode="fill" reads 0 there.
  out_GM = np.full((shape.groups, shape.scored), block, np.int32)
  number_Tk = np.arange(len(at_Tk)) - np.repeat(np.cumsum(count_G) - count_G, count_G)
  out_GM[group_Tk, number_Tk] = at_Tk - group_Tk * block
  return out_GM


def _slot_arrays(
  examples: Sequence[Example],
  tokens_BK: np.ndarray,
  places: Places,
  layout: str,
  shape: Shape,
) -> dict[str, np.ndarray]:
  """Returns weights, scores and data rows of the slots, each [N, S]."""
  completions = tokens_BK.shape[1]
  first_B = places.row_B * shape.slots + (0 if layout == "padded" else places.order_B * completions)
  # The K slots of an example are neighbours. Padded, S = 1: they are in K neighbouring rows.
  at_BK = first_B[:, None] + np.arange(completions)
  present_BK = tokens_BK > 0
  weight_x = np.zeros(shape.rows * shape.slots, np.float32)
  weight_B = np.array([example.weight for example in examples], np.float32)
  weight_x[at_BK] = np.where(present_BK, weight_B[:, None], 0)
  row_x = np.full(shape.rows * shape.slots, -1, np.int32)
  row_B = np.array([example.row for example in examples], np.int32)
  row_x[at_BK] = np.where(present_BK, row_B[:, None], -1)
  score_x = np.zeros(shape.rows * shape.slots, np.float32)
  if examples and examples[0].scores:
    score_x[at_BK] = np.array([example.scores for example in examples], np.float32)
  return {
    "weight_NS": weight_x.reshape(shape.rows, shape.slots),
    "score_NS": score_x.reshape(shape.rows, shape.slots),
    "row_NS": row_x.reshape(shape.rows, shape.slots),
  }
