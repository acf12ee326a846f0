"""Turns examples into an endless stream of batches: order, balancing, division among hosts, resume.

Batch k is a pure function of (data, seed, k). A resumed run seeks to its batch instead of replaying
the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import mixture as mixtures
from dpo_jax.data import packing
from dpo_jax.data.collate import check_fits, collate, collate_many, fit_row_length, fit_sizes
from dpo_jax.data.examples import Example, Lazy, Measured, lengths
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.packing import Shape, Sizes
from dpo_jax.structs import TokenBatch, UserError

WINDOW = 4096  # examples that neighbouring batches exchange at a time


class Batching(NamedTuple):
  """The layout of the rows of every batch of a run.

  Attributes:
    layout: "shared", "packed" or "padded".
    row_length: L of packed and shared rows; 0 for one that suits the examples. Padded rows are as
      long as the longest sequence.
    groups: runs of rows that devices keep, on all hosts together.
    per_line: the most sequences of a line of attention; 0 if sequences are not listed: see
      `collate.collate`.
  """

  layout: str = "shared"
  row_length: int = 0
  groups: int = 1
  per_line: int = 0


_SHARED = Batching()


def order(
  count: int,
  batch_size: int,
  *,
  seed: int = 0,
  shuffle: bool = True,
  cost_B: np.ndarray | None = None,
  mixture: Mixture | None = None,
) -> Any:
  """Returns the endless order of examples: a Grain data set whose element k is batch k.

  Every epoch is shuffled anew. Batch k is a pure function of the arguments and k.

  Args:
    count: number of examples.
    batch_size: examples per batch.
    seed: of the shuffle.
    shuffle: False keeps the order of the data.
    cost_B: tokens of every example. If given, neighbouring batches exchange examples so that all
      have about equally many tokens.
    mixture: the sources of the examples; None for one source.

  Returns:
    Lists of `batch_size` indices of examples.
  """
  import grain  # imports jax, which commands that only read data do not need

  def endless(size: int, seed: int) -> Any:
    rows = grain.MapDataset.source(range(size)).seed(seed)
    return (rows.shuffle() if shuffle else rows).repeat()

  rows = endless(count, seed)
  if mixture and mixture.is_weighted:
    # Seeds of their own: two sources of one size must not be in the same order.
    seeds = [int(mixtures.rng_of(name, seed).integers(2**31)) for name in mixture.names]
    mixed: Any = mixtures.Passes(mixture, rows, list(map(endless, mixture.sizes, seeds)))
    rows = grain.MapDataset.source(mixed)
  steps = rows.batch(batch_size, drop_remainder=True, batch_fn=list)
  if cost_B is None or not shuffle:
    return steps
  balanced: Any = _Balanced(steps, batch_size, cost_B)  # has what Grain asks of a source
  return grain.MapDataset.source(balanced)


class _Balanced:
  """An order whose neighbouring batches, up to `WINDOW` examples, have exchanged examples.

  All batches of a window belong to one epoch, so that every epoch still has every example once.
  """

  def __init__(self, steps: Any, batch_size: int, cost_B: np.ndarray):
    self._steps, self._size, self._cost_B = steps, batch_size, cost_B
    # (first batch, batches) of the last window. Only a cache: k alone decides what batch k is.
    self._cached: tuple[int, list[list[int]]] = (-1, [])

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, k: int) -> list[int]:
    first, end = self._window(int(k))
    cached, batches = self._cached
    if cached != first:
      row_x = np.concatenate([self._steps[i] for i in range(first, end)])
      parts = packing.divide_evenly(self._cost_B[row_x], end - first)
      batches = [row_x[part].tolist() for part in parts]
      # One assignment, so that another thread sees the old window or the new one.
      self._cached = first, batches
    return batches[k - first]

  def _window(self, k: int) -> tuple[int, int]:
    """Returns the window [first, end) of batches that batch k exchanges examples with."""
    count, size = len(self._cost_B), self._size
    epoch = k * size // count
    # A batch that spans two epochs exchanges nothing: otherwise an example could move into the next
    # epoch, and be missing from its own.
    if ((k + 1) * size - 1) // count != epoch:
      return k, k + 1
    # The whole batches of this epoch: rounded up at its begin, down at its end.
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
  mixture: Mixture | None = None,
) -> Iterator[TokenBatch]:
  """Returns an endless iterator of batches, reshuffled every epoch.

  Batch k is a pure function of (data, seed, k). The order of examples depends on the batch size and
  on `balance`, and on nothing else: not on layout, micro-batches, devices or hosts.

  Args:
    examples: the pairs, in memory or lazy.
    batch_size: pairs per step, over all its micro-batches.
    batching: the layout of the rows.
    accumulate: A, micro-batches per step.
    seed: of the shuffle.
    shuffle: False keeps the order of the data.
    start: step of the first batch; the steps before it are skipped, not replayed.
    share: (i, n) for host i of n. Every batch is divided among the hosts: no example is on two of
      them, and all their rows together do not depend on n.
    balance: True gives all batches, and all micro-batches, about equally many tokens (see `order`),
      so that less of their rows is padding.
    mixture: the sources of the examples; None for one source.

  Returns:
    An iterator of `TokenBatch` of NumPy arrays, each with A as its leading axis.

  Raises:
    UserError: sizes do not divide each other, or an example does not fit in a row.
  """
  import grain  # imports jax, which commands that only read data do not need

  if batch_size % accumulate:
    raise UserError(
      f"batch size {batch_size} is not divisible by {accumulate} micro-batches;"
      f" try {batch_size // accumulate * accumulate or accumulate}"
    )
  micro = batch_size // accumulate
  check_share(share, batching.groups)
  balance = balance and shuffle
  rate_B = mixture.rates() if mixture and mixture.is_weighted else None
  row_length = suit_row_length(
    examples, batching, batch_size // accumulate, balance=balance, rate_B=rate_B
  )
  rows = _rows(examples, batching._replace(row_length=row_length))
  sizes = _usual_sizes(examples, micro, accumulate, rows, balance, rate_B)
  # Costs of the shared layout whatever the layout is: the order must not depend on it.
  cost_B = packing.costs(lengths(examples), "shared")
  # Lengths are known once and for all, so that a host reads only its own share of every batch.
  measured = Lazy(examples.__getitem__, lengths(examples))

  def lay_out(picked: Sequence[int]) -> TokenBatch:
    index = np.array(picked)
    parts = np.split(index, accumulate)
    if balance:
      parts = [index[part] for part in packing.divide_evenly(cost_B[index], accumulate)]
    micro_batches = [Lazy.select(measured, part) for part in parts]
    return collate_many(micro_batches, sizes=sizes, share=share, **rows._asdict())

  known = cost_B if balance else None
  steps = order(
    len(examples), batch_size, seed=seed, shuffle=shuffle, cost_B=known, mixture=mixture
  ).map(lay_out)
  # One thread keeps ahead of the training step; more would only take cores away from it.
  return iter(
    steps[start:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
  )


def check_share(share: tuple[int, int], groups: int) -> None:
  """Raises `UserError` unless all hosts get equally many groups."""
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
  """Yields every example once, in order, in batches of one shape without an axis of micro-batches.

  The slots that the last batch lacks have weight 0; `row_NS` gives the data row of each slot.
  `batching` and `share` are as in `batches`.
  """
  if not len(examples):
    return
  rows = _rows(examples, batching)
  every = np.arange(len(examples))
  parts = np.split(every, every[batch_size::batch_size])
  check_share(share, batching.groups)
  measured = lengths(examples)
  # From all batches, so that one shape suffices and evaluation compiles once.
  sizes = fit_sizes([measured.select(part) for part in parts], **rows._asdict())
  for part in parts:
    yield collate(Lazy.select(examples, part), sizes=sizes, share=share, **rows._asdict())


def _rows(examples: Sequence[Example], batching: Batching) -> Batching:
  """Returns the batching with its row length chosen, after checking that every example fits."""
  row_length = batching.row_length
  if batching.layout == "padded" or not row_length:
    row_length = fit_row_length(examples, batching.layout)
  check_fits(examples, batching.layout, row_length)
  return batching._replace(row_length=row_length)


def suit_row_length(
  examples: Sequence[Example] | Measured,
  batching: Batching,
  size: int,
  *,
  balance: bool = False,
  rate_B: np.ndarray | None = None,
) -> int:
  """Returns the row length of a batching, or where it has none, one that suits these examples.

  `size` is the number of examples of a micro-batch. `rate_B` says how often an epoch has each
  example; None where that is once. Where attention reads lines, the length of rows costs nothing by
  itself, and a group is one row.

  Balanced batches have about equally many tokens, and so take equally many rows. Of the lengths up
  to 2,048 (or a quarter above the least possible; a half where several groups have rows of their
  own, often one or two), the one is chosen whose rows have the least padding.
  """
  if batching.row_length:
    return batching.row_length
  layout, groups = batching.layout, batching.groups
  least = fit_row_length(examples, layout)
  if not balance or layout == "padded":
    return least
  sampled = _sample_micro_batches(examples, size, balance, rate_B)[: max(16, WINDOW // size)]

  # Groups do not depend on the length of rows, so they are dealt once.
  dealt = [packing.deal(batch, layout, groups) for batch in sampled]

  def taken(length: int) -> int:
    pairs = zip(sampled, dealt, strict=True)
    return length * max(
      packing.place(batch, layout, length, groups=groups, group_B=group_B).rows
      for batch, group_B in pairs
    )

  if batching.per_line:
    # All tokens of a group in one row, so that no row has an end in which no example fits. The
    # margin is for the rest of the batches: one row more would double what they take.
    costs = [packing.costs(batch, layout) for batch in sampled]
    pairs = zip(costs, dealt, strict=True)
    most = max(int(np.bincount(group_B, cost_B).max()) for cost_B, group_B in pairs)
    return packing.round_up(max(least, most + most // 64), 64)
  longest = max((5 if groups == 1 else 6) * least // 4, 2048)
  return min(range(least, longest + 1, 64), key=taken)


def usual_shape(
  examples: Sequence[Example] | Measured,
  *,
  batch_size: int,
  batching: Batching = _SHARED,
  accumulate: int = 1,
  balance: bool = False,
) -> Shape:
  """Returns the shape that most micro-batches have; arguments as in `batches`.

  A few have the next larger one: see `packing.Sizes`.
  """
  measured = lengths(examples)
  row_length = suit_row_length(measured, batching, batch_size // accumulate, balance=balance)
  if batching.layout == "padded":
    row_length = fit_row_length(measured, batching.layout)
  rows = batching._replace(row_length=row_length)
  sizes = _usual_sizes(measured, batch_size // accumulate, accumulate, rows, balance, None)
  scored = packing.round_up(sizes.scored * sizes.rows // batching.groups, 8)
  return Shape(
    rows=sizes.rows,
    length=row_length,
    groups=batching.groups,
    scored=scored,
    slots=sizes.slots,
    lines=sizes.lines,
    width=sizes.width,
    per_line=sizes.per_line,
  )


def _sample_micro_batches(
  examples: Sequence[Example] | Measured,
  size: int,
  balance: bool,
  rate_B: np.ndarray | None = None,
) -> list[Measured]:
  """Returns the lengths of 64 or more random micro-batches, balanced as in training."""
  # A fixed seed: every host, and every resumed run, must find the same sizes.
  rng = np.random.default_rng(0)
  measured, sampled = lengths(examples), []
  count, cost_B = len(measured.prompt_B), packing.costs(measured, "shared")
  # Micro-batches of a window, which exchange examples as those of `_Balanced` do.
  window = min(max(1, WINDOW // size), max(1, count // size)) if balance else 1
  # A mix may repeat an example within a window.
  again, chance_B = (count < size, None) if rate_B is None else (True, rate_B / rate_B.sum())
  while len(sampled) < 64:
    row_x = rng.choice(count, size * window, replace=again, p=chance_B)
    parts = packing.divide_evenly(cost_B[row_x], window)
    sampled += [measured.select(row_x[part]) for part in parts]
  return sampled


def _usual_sizes(
  examples: Sequence[Example] | Measured,
  size: int,
  accumulate: int,
  rows: Batching,
  balance: bool,
  rate_B: np.ndarray | None,
) -> Sizes:
  """Returns sizes that suffice for the rows of most steps, by packing random micro-batches."""
  sampled = _sample_micro_batches(examples, size, balance, rate_B)
  # Balanced batches hardly differ, so finer steps still give few shapes.
  quantile, steps = (0.95, 64) if balance else (0.75, 8)
  # A step has the rows of the largest of its A micro-batches, which is below a quantile q with
  # probability q^A.
  sizes = fit_sizes(sampled, quantile=quantile ** (1 / accumulate), steps=steps, **rows._asdict())
  # A margin of 1/32, since a later batch may need more scored tokens than any of these.
  return sizes._replace(scored=sizes.scored + sizes.scored // 32)
