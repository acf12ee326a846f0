"""Token ids to rows: cutting to the window, packing, and the arrays of a `TokenBatch`, in numpy.

Three layouts hold the same pairs and give the same log-probabilities:

  padded  one text a row, S = 1; rows K i .. K i + K - 1 are the answers of pair i
  packed  several texts a row, every answer with its own copy of the prompt
  shared  several pairs a row, the prompt of a pair once and its answers branching off it

With a prompt p_0 .. p_{P-1} and an answer a_0 .. a_{n-1}, the inputs p_0 .. p_{P-2} are branch 0;
the inputs p_{P-1}, a_0 .. a_{n-2} with the targets a_0 .. a_{n-1} are the answer's branch. A shared
pair therefore costs P - 1 plus the lengths of its answers.

A batch holds exactly the pairs it is given, whatever the layout. Only the padding around them is
rounded, so that few shapes are ever compiled: see `packing.Sizes`.

Prompts with fewer answers than others are filled up to K with absent ones (`examples.fill_up`). An
absent answer has no tokens, and its slot is an empty one: weight 0, score 0, data row -1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.examples import Example, Measured, lengths
from dpo_jax.data.packing import Places, Shape, Sizes
from dpo_jax.structs import TokenBatch, UserError

# --- laying out -----


def fit_row_length(
  examples: Sequence[Example] | Measured, layout: str, *, multiple: int = 64
) -> int:
  """A row length for these examples: the longest fits, and packed rows hold a few of the usual."""
  cost_B = packing.costs(*lengths(examples), layout)
  want = int(cost_B.max())
  if layout != "padded":
    want = max(want, min(2048, 4 * int(cost_B.mean())))
  return packing.round_up(want, multiple if layout != "padded" else 8)


def check_fits(examples: Sequence[Example], layout: str, row_length: int) -> None:
  """Every example fits a row, or the error names the data row of the largest."""
  if row_length < 1:
    raise UserError(f"row_length is {row_length}; a row holds 1 token or more (0 suits the data)")
  cost_B = packing.costs(*lengths(examples), layout)
  worst = int(cost_B.argmax())
  if cost_B[worst] > row_length:
    raise UserError(
      f"data row {examples[worst].row} takes {cost_B[worst]} tokens of a {layout} row and rows hold"
      f" {row_length}; raise row_length to {cost_B[worst]} or lower max_length"
    )


def count_padding(
  examples: Sequence[Example] | Measured,
  *,
  batch_size: int,
  layout: str = "shared",
  row_length: int | None = None,
) -> int:
  """Tokens of padding in the rows taken by one pass over the examples, in order."""
  prompt_B, tokens_BK = lengths(examples)
  real = packing.costs(prompt_B, tokens_BK, "shared" if layout == "shared" else "packed").sum()
  taken = count_taken(examples, batch_size=batch_size, layout=layout, row_length=row_length)
  return taken - int(real)


def count_taken(
  examples: Sequence[Example] | Measured,
  *,
  batch_size: int,
  layout: str = "shared",
  row_length: int | None = None,
) -> int:
  """Tokens of all rows taken by one pass over the examples, in order, padding included."""
  prompt_B, tokens_BK = lengths(examples)
  length = row_length or fit_row_length(examples, layout)
  parts = [slice(i, i + batch_size) for i in range(0, len(prompt_B), batch_size)]
  return length * sum(packing.place(prompt_B[i], tokens_BK[i], layout, length).rows for i in parts)


def fit_sizes(
  batches: Sequence[Sequence[Example] | Measured],
  *,
  layout: str = "shared",
  row_length: int,
  groups: int = 1,
  quantile: float = 1.0,
  steps: int = 8,
  texts: bool = False,
) -> Sizes:
  """Sizes that these batches share, but for those above `quantile` in rows: see `packing.fit`."""
  places = [packing.place(*lengths(batch), layout, row_length) for batch in batches]
  completions = lengths(batches[0])[1].shape[1]
  return packing.fit(places, completions, layout, groups, quantile, steps, texts)


def collate(
  examples: Sequence[Example],
  *,
  layout: str = "shared",
  row_length: int,
  groups: int = 1,
  sizes: Sizes | None = None,
  share: tuple[int, int] = (0, 1),
  texts: bool = False,
) -> TokenBatch:
  """Lays examples out as rows.

  Args:
    examples: pairs, all with the same number K of answers, of which some may be absent.
    layout: "shared", "packed" or "padded".
    row_length: L.
    groups: runs of rows that devices hold; scored tokens are spread evenly over them, and the K
      answers of a pair never part.
    sizes: what shapes are rounded up to, from `fit_sizes`; by default what this batch needs.
    share: (i, H) gives the rows of the i-th of H hosts, whose groups they are: put together they
      are the batch, whatever H is. Of examples that know their `lengths`, only those are read.
    texts: whether texts are listed, `sequence_GTW` and `place_NLK`; if sizes are given, they say.

  Returns:
    The batch, numpy arrays.
  """
  how = {"row_length": row_length, "groups": groups, "sizes": sizes, "share": share, "texts": texts}
  batch = collate_many([examples], layout=layout, **how)
  return TokenBatch(*(array if array is None else array[0] for array in batch))


def collate_many(
  micro_batches: Sequence[Sequence[Example]],
  *,
  layout: str = "shared",
  row_length: int,
  groups: int = 1,
  sizes: Sizes | None = None,
  share: tuple[int, int] = (0, 1),
  texts: bool = False,
) -> TokenBatch:
  """`collate` of A micro-batches into arrays of one shape, with A as their leading axis."""
  for batch in micro_batches:
    check_fits(batch, layout, row_length)
  completions = lengths(micro_batches[0])[1].shape[1]
  most_pairs = sizes.slots // completions if sizes else None
  places = [
    packing.place(*lengths(batch), layout, row_length, most_pairs) for batch in micro_batches
  ]
  sizes = sizes or packing.fit(places, completions, layout, groups, texts=texts)
  places, shape = packing.shape_of(places, sizes, layout, groups, row_length)
  stored = bool(micro_batches[0][0].reference)
  filled = [
    _fill(*_own(batch, place, shape, share), layout, stored)
    for batch, place in zip(micro_batches, places, strict=True)
  ]
  if shape.texts:
    copies = completions if layout == "shared" else 1
    listed = functools.partial(with_texts, texts=shape.texts, width=shape.width, copies=copies)
    filled = list(map(listed, filled))
  stack = lambda arrays: None if arrays[0] is None else np.stack(arrays)
  return TokenBatch(*map(stack, zip(*filled, strict=True)))


def _own(
  examples: Sequence[Example], places: Places, shape: Shape, share: tuple[int, int]
) -> tuple[list[Example], Measured, Places, Shape]:
  """The examples of one host, their lengths, where they stand among its rows, the rows' shape."""
  host, hosts = share
  rows = shape.rows // hosts
  (mine,) = np.nonzero(places.row_B // rows == host)
  moved = Places(
    row_B=places.row_B[mine] - host * rows,
    column_B=places.column_B[mine],
    order_B=places.order_B[mine],
    scored_B=places.scored_B[mine],
    texts_B=places.texts_B[mine],
    longest_B=places.longest_B[mine],
    rows=rows,
    movable=places.movable,
  )
  measured = Measured(lengths(examples)).some(mine)
  shape = shape._replace(rows=rows, groups=shape.groups // hosts)
  return [examples[i] for i in mine.tolist()], measured, moved, shape


class _Pieces(NamedTuple):
  """Runs of consecutive tokens of one branch, P to an example, each [B, P].

  Attributes:
    length_BP: tokens.
    source_BP, at_BP: where the first stands in the texts, and in the rows one after another.
    position_BP: of the first; those of the others follow.
    pair_BP, branch_BP, slot_BP: what all of them have, as in `TokenBatch`.
  """

  length_BP: np.ndarray
  source_BP: np.ndarray
  at_BP: np.ndarray
  position_BP: np.ndarray
  pair_BP: np.ndarray
  branch_BP: np.ndarray
  slot_BP: np.ndarray


def _pieces(measured: Measured, places: Places, length: int, layout: str) -> _Pieces:
  """Of examples whose texts lie one behind the other, in rows of so many tokens."""
  prompt_B, tokens_BK = measured.lengths
  completions = tokens_BK.shape[1]
  # Which branch each piece of an example is, and which text of it.
  every = np.arange(1, completions + 1)
  if layout == "shared":
    branch_P = np.concatenate([[0], every])
    text_P = np.zeros(completions + 1, np.int64)
  else:
    branch_P = np.stack([np.zeros_like(every), every], axis=1).reshape(-1)
    text_P = np.repeat(every - 1, 2)
  # Prompt pieces start at the prompt's first token, answer pieces one before the answer's first.
  start_B = np.cumsum(prompt_B + tokens_BK.sum(1)) - prompt_B - tokens_BK.sum(1)
  before_BK = start_B[:, None] + prompt_B[:, None] + np.cumsum(tokens_BK, 1) - tokens_BK - 1
  choose = lambda prompt_B1, answer_BK: np.concatenate([prompt_B1, answer_BK], 1)[:, branch_P]
  length_BP = choose(prompt_B[:, None] - 1, tokens_BK) * (tokens_BK > 0)[:, text_P]
  position_BP = np.where(branch_P > 0, prompt_B[:, None] - 1, 0)

  if layout == "padded":
    row_BP = places.row_B[:, None] + text_P
    column_BP, pair_BP = position_BP, np.zeros_like(row_BP)
    slot_BP = pair_BP
  else:
    row_BP = places.row_B[:, None]
    column_BP = places.column_B[:, None] + np.cumsum(length_BP, 1) - length_BP
    pair_BP = places.order_B[:, None] * (text_P[-1] + 1) + text_P
    slot_BP = places.order_B[:, None] * completions + np.maximum(branch_P - 1, 0)
  return _Pieces(
    length_BP=length_BP,
    source_BP=choose(start_B[:, None], before_BK),
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
  """Writes the arrays: pieces are copied whole, T tokens in all.

  There may be no example at all, on a host that has only padding; `stored` says whether there are
  log-probs of the reference.
  """
  prompt_B, tokens_BK = measured.lengths
  texts = [ids for example in examples for ids in (example.prompt, *example.completions)]
  flat = np.concatenate([*texts, np.zeros(1, np.int32)])
  pieces = _pieces(measured, places, shape.length, layout)

  length_X = pieces.length_BP.reshape(-1)
  end_X = np.cumsum(length_X)
  along_T = np.arange(length_X.sum()) - np.repeat(end_X - length_X, length_X)
  spread = lambda x_BP: np.repeat(x_BP.reshape(-1), length_X)
  at_T = spread(pieces.at_BP) + along_T
  source_T = spread(pieces.source_BP) + along_T
  branch_T = spread(pieces.branch_BP)
  scored_T = branch_T > 0
  ids_T = flat[source_T]
  first_T = scored_T & (along_T == 0)
  # The last prompt token opens every branch; only the first answer stands right behind it in flat.
  last_B = np.cumsum(prompt_B + tokens_BK.sum(1)) - tokens_BK.sum(1) - 1
  ids_T[first_T] = np.repeat(flat[last_B], (tokens_BK > 0).sum(1))

  def rows_of(values_T, dtype=np.int32, empty=0):
    out_X = np.full(shape.rows * shape.length, empty, dtype)
    out_X[at_T] = values_T
    return out_X.reshape(shape.rows, shape.length)

  target_T = np.where(scored_T, flat[source_T + 1], 0)
  reference_NL = None
  if stored:
    known = [x for one in examples for x in (np.zeros(len(one.prompt)), *one.reference)]
    known_T = np.concatenate([*known, np.zeros(1)])[source_T + 1]
    reference_NL = rows_of(np.where(scored_T, known_T, 0), np.float32)
  return TokenBatch(
    ids_NL=rows_of(ids_T),
    position_NL=rows_of(spread(pieces.position_BP) + along_T),
    pair_NL=rows_of(spread(pieces.pair_BP), empty=-1),
    branch_NL=rows_of(branch_T),
    slot_NL=rows_of(spread(pieces.slot_BP)),
    target_NL=rows_of(target_T),
    weight_NL=rows_of(scored_T, np.float32),
    scored_GM=_scored(at_T[scored_T], shape),
    reference_NL=reference_NL,
    **_slot_arrays(examples, tokens_BK, places, layout, shape),
  )


def _scored(at_T: np.ndarray, shape: Shape) -> np.ndarray:
  """Flat positions of scored tokens, group by group, in order: int32 [G, M]."""
  block = shape.rows // shape.groups * shape.length
  at_T = np.sort(at_T)
  group_T = at_T // block
  count_G = np.bincount(group_T, minlength=shape.groups)
  out_GM = np.full((shape.groups, shape.scored), block, np.int32)
  out_GM[group_T, np.arange(len(at_T)) - np.repeat(np.cumsum(count_G) - count_G, count_G)] = (
    at_T - group_T * block
  )
  return out_GM


def _slot_arrays(
  examples: Sequence[Example],
  tokens_BK: np.ndarray,
  places: Places,
  layout: str,
  shape: Shape,
) -> dict[str, np.ndarray]:
  """Weights, scores and data rows of the slots."""
  completions = tokens_BK.shape[1]
  first_B = places.row_B * shape.slots + (0 if layout == "padded" else places.order_B * completions)
  at_BK = first_B[:, None] + np.arange(completions)
  present_BK = tokens_BK > 0
  weight_X = np.zeros(shape.rows * shape.slots, np.float32)
  weight_B = np.array([example.weight for example in examples], np.float32)
  weight_X[at_BK] = np.where(present_BK, weight_B[:, None], 0)
  row_X = np.full(shape.rows * shape.slots, -1, np.int32)
  row_B = np.array([example.row for example in examples], np.int32)
  row_X[at_BK] = np.where(present_BK, row_B[:, None], -1)
  score_X = np.zeros(shape.rows * shape.slots, np.float32)
  if examples and examples[0].scores:
    score_X[at_BK] = np.array([example.scores for example in examples], np.float32)
  return {
    "weight_NS": weight_X.reshape(shape.rows, shape.slots),
    "score_NS": score_X.reshape(shape.rows, shape.slots),
    "row_NS": row_X.reshape(shape.rows, shape.slots),
  }


# --- sequences -----
# Among the tokens of one text, a prompt with one answer, the mask rule of `TokenBatch` is plain
# causal attention, which kernels know. So attention may take rows apart into texts, and put what
# comes of it back.


def with_texts(batch: TokenBatch, *, texts: int, width: int, copies: int) -> TokenBatch:
  """Lists the texts that the rows of a batch hold: `sequence_GTW` and `place_NLK`.

  P lists pairs of a row.

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
  sequence_GTW = np.full((groups, texts * width), block * length, np.int32)
  group_XK = np.broadcast_to((row_X // block)[:, None], held_XK.shape)
  at_XK = np.broadcast_to((row_X % block * length + column_X)[:, None], held_XK.shape)
  sequence_GTW[group_XK[held_XK], place_XK[held_XK]] = at_XK[held_XK]
  return batch._replace(
    sequence_GTW=sequence_GTW.reshape(groups, texts, width), place_NLK=place_NLK
  )
