"""Examples to batches: order, batching and resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.collate import check_fits, collate, collate_many, fit_row_length, fit_sizes
from dpo_jax.data.examples import Example, Lazy, Measured, lengths
from dpo_jax.data.packing import Sizes
from dpo_jax.structs import TokenBatch, UserError

WINDOW = 4096  # examples that are dealt out among batches


class Batching(NamedTuple):
  """The layout of the rows of every batch of a run.

  Attributes:
    layout: "shared", "packed" or "padded".
    row_length: L of packed and shared rows; 0 for one that suits the examples. Padded rows are as
      long as the longest sequence.
    groups: runs of rows that devices keep, on all hosts together.
    texts: whether the sequences of rows are listed: see `collate.collate`.
  """

  layout: str = "shared"
  row_length: int = 0
  groups: int = 1
  texts: bool = False


_SHARED = Batching()


def order(
  count: int,
  batch_size: int,
  *,
  seed: int = 0,
  shuffle: bool = True,
  cost_B: np.ndarray | None = None,
) -> Any:
  """Which of `count` rows are in batch k, without end: a Grain data set of lists of indices.

  Every epoch is shuffled anew; batch k is a pure function of the arguments and k. With the tokens
  of every row, `cost_B`, neighbouring batches exchange rows until all have about as many tokens.
  """
  import grain  # loads jax, which only training needs

  rows = grain.MapDataset.source(range(count)).seed(seed)
  if shuffle:
    rows = rows.shuffle()
  steps = rows.repeat().batch(batch_size, drop_remainder=True, batch_fn=list)
  if cost_B is None or not shuffle:
    return steps
  return grain.MapDataset.source(_Balanced(steps, batch_size, cost_B))


class _Balanced:
  """Batches of an order, the rows of neighbours, `WINDOW` at most, dealt out anew.

  Neighbours lie in one epoch, so that every epoch still has every row once.
  """

  def __init__(self, steps: Sequence[list[int]], batch_size: int, cost_B: np.ndarray):
    self._steps, self._size, self._cost_B = steps, batch_size, cost_B
    self._held: tuple[int, list[list[int]]] = (-1, [])

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, k: int) -> list[int]:
    first, end = self._window(int(k))
    held, batches = self._held
    if held != first:
      row_X = np.concatenate([self._steps[i] for i in range(first, end)])
      parts = packing.deal(self._cost_B[row_X], end - first)
      batches = [row_X[part].tolist() for part in parts]
      self._held = first, batches
    return batches[k - first]

  def _window(self, k: int) -> tuple[int, int]:
    """The first batch of those among which batch k is dealt, and the one behind the last."""
    count, size = len(self._cost_B), self._size
    epoch = k * size // count
    if ((k + 1) * size - 1) // count != epoch:  # partly of the next epoch
      return k, k + 1
    begin, end = -(-epoch * count // size), (epoch + 1) * count // size
    many = max(1, WINDOW // size)
    first = begin + (k - begin) // many * many
    return first, min(first + many, end)


def batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  batching: Batching = _SHARED,
  accumulate: int = 1,
  seed: int = 0,
  shuffle: bool = True,
  start: int = 0,
  share: tuple[int, int] = (0, 1),
  balance: bool = False,
) -> Iterator[TokenBatch]:
  """Batches without end, reshuffled every epoch; batch k is a pure function of (data, seed, k).

  Args:
    examples: the pairs, in memory or read one by one as they are wanted.
    batch_size: pairs a step, over all its micro-batches; the order of pairs knows nothing else.
    batching: the layout of the rows.
    accumulate: A, micro-batches of a step.
    seed: of the shuffle.
    shuffle: False keeps the order of the data.
    start: the step of the first batch; steps before it are skipped, not replayed.
    share: (i, H) for the i-th of H hosts, among whom every batch is divided; no example is on two,
      and what they have together does not depend on H.
    balance: whether batches, and micro-batches, are to have about as many tokens each: see `order`.
      Less of their rows is then padding.

  Returns:
    An iterator of `TokenBatch` of numpy arrays with A as the leading axis of every one.
  """
  import grain  # loads jax, which only training needs

  if batch_size % accumulate:
    raise UserError(
      f"batch size {batch_size} is not divisible by {accumulate} micro-batches;"
      f" try {batch_size // accumulate * accumulate or accumulate}"
    )
  micro = batch_size // accumulate
  check_share(share, batching.groups)
  balance = balance and shuffle
  row_length = batching.row_length or suit_row_length(
    examples,
    batching.layout,
    batch_size=batch_size,
    accumulate=accumulate,
    groups=batching.groups,
    balance=balance,
  )
  rows = _rows(examples, batching._replace(row_length=row_length))
  sizes = _usual_sizes(examples, micro, accumulate, rows, balance)
  cost_B = packing.costs(*lengths(examples), "shared")  # of whatever layout: it changes no order

  measured = Lazy(examples.__getitem__, lengths(examples))

  def lay_out(picked: Sequence[int]) -> TokenBatch:
    index = np.array(picked)
    parts = np.split(index, accumulate)
    if balance:
      parts = [index[part] for part in packing.deal(cost_B[index], accumulate)]
    micro_batches = [Lazy.of(measured, part) for part in parts]
    return collate_many(micro_batches, sizes=sizes, share=share, **rows._asdict())

  known = cost_B if balance else None
  steps = order(len(examples), batch_size, seed=seed, shuffle=shuffle, cost_B=known).map(lay_out)
  # One thread keeps ahead of a training step; more only contend with it for cores.
  return iter(
    steps[start:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )


def check_share(share: tuple[int, int], groups: int) -> None:
  """A host has as many groups as every other."""
  host, hosts = share
  if not 0 <= host < hosts or groups % hosts:
    raise UserError(f"host {host} of {hosts} cannot have its share of {groups} groups of rows")


def eval_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  batching: Batching = _SHARED,
  share: tuple[int, int] = (0, 1),
) -> Iterator[TokenBatch]:
  """Every example once, in order, all batches of one shape and without a micro-batch axis.

  What the last batch lacks has weight 0; `row_NS` says which data row each slot came from.
  `batching` and `share` as in `batches`.
  """
  if not len(examples):
    return
  rows = _rows(examples, batching)
  every = np.arange(len(examples))
  parts = np.split(every, every[batch_size::batch_size])
  check_share(share, batching.groups)
  all_of_them = Measured(lengths(examples))
  sizes = fit_sizes([all_of_them.some(part) for part in parts], **rows._asdict())
  for part in parts:
    yield collate(Lazy.of(examples, part), sizes=sizes, share=share, **rows._asdict())


def _rows(examples: Sequence[Example], batching: Batching) -> Batching:
  """Settles the length of rows, in which every example then fits."""
  row_length = batching.row_length
  if batching.layout == "padded" or not row_length:
    row_length = fit_row_length(examples, batching.layout)
  check_fits(examples, batching.layout, row_length)
  return batching._replace(row_length=row_length)


def suit_row_length(
  examples: Sequence[Example] | Measured,
  layout: str,
  *,
  batch_size: int,
  accumulate: int = 1,
  groups: int = 1,
  balance: bool = False,
) -> int:
  """A row length for batches of these examples; arguments as in `batches`.

  Balanced batches take about as many tokens each, and so as many rows: of lengths up to 2,048, or a
  quarter above the least that will do, the one is chosen that leaves least of them empty.
  """
  least = fit_row_length(examples, layout)
  if not balance or layout == "padded":
    return least
  size = batch_size // accumulate
  drawn = _drawn(examples, size, balance)[: max(16, WINDOW // size)]

  def taken(length: int) -> int:
    rows = max(packing.place(*batch.lengths, layout, length).rows for batch in drawn)
    return length * packing.round_up(rows, groups)

  return min(range(least, max(5 * least // 4, 2048) + 1, 64), key=taken)


def _drawn(examples: Sequence[Example] | Measured, size: int, balance: bool) -> list[Measured]:
  """The lengths of 64 random micro-batches or more, dealt out as in training.

  A pure function of its arguments, so that every host and every resumed run finds the same.
  """
  rng = np.random.default_rng(0)
  count, measured = len(lengths(examples)[0]), Measured(lengths(examples))
  cost_B, drawn = packing.costs(*measured.lengths, "shared"), []
  dealt = min(max(1, WINDOW // size), max(1, count // size)) if balance else 1
  while len(drawn) < 64:
    row_X = rng.choice(count, size * dealt, replace=count < size)
    drawn += [measured.some(row_X[part]) for part in packing.deal(cost_B[row_X], dealt)]
  return drawn


def _usual_sizes(
  examples: Sequence[Example], size: int, accumulate: int, rows: Batching, balance: bool
) -> Sizes:
  """Sizes that suffice for the rows of most steps, from packing random micro-batches."""
  drawn = _drawn(examples, size, balance)
  quantile, steps = (0.95, 64) if balance else (0.75, 8)
  # A step has the rows of the largest of its micro-batches.
  sizes = fit_sizes(drawn, quantile=quantile ** (1 / accumulate), steps=steps, **rows._asdict())
  # A batch that needs more scored tokens than any of these is rare, and rarer still with this.
  return sizes._replace(scored=sizes.scored + sizes.scored // 32)
