"""Examples to batches: order, batching and resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.layout import (
  Example,
  Lazy,
  Measured,
  check_fits,
  collate,
  collate_many,
  fit_row_length,
  fit_sizes,
  lengths,
)
from dpo_jax.data.packing import Sizes
from dpo_jax.structs import TokenBatch, UserError


def order(count: int, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> Any:
  """Which of `count` rows are in batch k, without end: a Grain data set of lists of indices.

  Every epoch is shuffled anew; batch k is a pure function of the arguments and k.
  """
  import grain  # loads jax, which only training needs

  rows = grain.MapDataset.source(range(count)).seed(seed)
  if shuffle:
    rows = rows.shuffle()
  return rows.repeat().batch(batch_size, drop_remainder=True, batch_fn=list)


def batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  accumulate: int = 1,
  seed: int = 0,
  layout: str = "shared",
  row_length: int | None = None,
  groups: int = 1,
  shuffle: bool = True,
  start: int = 0,
  share: tuple[int, int] = (0, 1),
) -> Iterator[TokenBatch]:
  """Batches without end, reshuffled every epoch; batch k is a pure function of (data, seed, k).

  Args:
    examples: the pairs, in memory or read one by one as they are wanted.
    batch_size: pairs a step, over all its micro-batches; the order of pairs knows nothing else.
    accumulate: A, micro-batches of a step.
    seed: of the shuffle.
    layout: "shared", "packed" or "padded".
    row_length: L of packed and shared rows; None or 0 for one that suits the examples. Padded rows
      are as long as the longest text.
    groups: runs of rows that devices hold, on all hosts together.
    shuffle: False keeps the order of the data.
    start: the step of the first batch; steps before it are skipped, not replayed.
    share: (i, H) for the i-th of H hosts, among whom every batch is divided; no example is on two,
      and what they have together does not depend on H.

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
  check_share(share, groups)
  rows = _rows(examples, layout, row_length, groups)
  sizes = _usual_sizes(examples, micro, accumulate, rows)

  measured = Lazy(examples.__getitem__, lengths(examples))

  def lay_out(picked: Sequence[int]) -> TokenBatch:
    parts = [Lazy.of(measured, picked[i : i + micro]) for i in range(0, batch_size, micro)]
    return collate_many(parts, sizes=sizes, share=share, **rows)

  steps = order(len(examples), batch_size, seed=seed, shuffle=shuffle).map(lay_out)
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
  layout: str = "shared",
  row_length: int | None = None,
  groups: int = 1,
  share: tuple[int, int] = (0, 1),
) -> Iterator[TokenBatch]:
  """Every example once, in order, all batches of one shape and without a micro-batch axis.

  What the last batch lacks has weight 0; `row_NS` says which data row each slot came from. `share`
  as in `batches`.
  """
  if not len(examples):
    return
  rows = _rows(examples, layout, row_length, groups)
  every = np.arange(len(examples))
  parts = np.split(every, every[batch_size::batch_size])
  check_share(share, groups)
  all_of_them = Measured(lengths(examples))
  sizes = fit_sizes([all_of_them.some(part) for part in parts], **rows)
  for part in parts:
    yield collate(Lazy.of(examples, part), sizes=sizes, share=share, **rows)


def _rows(examples: Sequence[Example], layout: str, row_length: int | None, groups: int) -> dict:
  """Keyword arguments of `collate`, every example known to fit."""
  if layout == "padded" or not row_length:
    row_length = fit_row_length(examples, layout)
  check_fits(examples, layout, row_length)
  return {"layout": layout, "row_length": row_length, "groups": groups}


def _usual_sizes(examples: Sequence[Example], size: int, accumulate: int, rows: dict) -> Sizes:
  """Sizes that suffice for the rows of three steps in four, from packing 64 random batches.

  A pure function of its arguments, so that every host and every resumed run finds the same.
  """
  rng = np.random.default_rng(0)
  few = len(examples) < size
  all_of_them = Measured(lengths(examples))
  drawn = [all_of_them.some(rng.choice(len(examples), size, replace=few)) for _ in range(64)]
  # A step has the rows of the largest of its micro-batches.
  sizes = fit_sizes(drawn, quantile=0.75 ** (1 / accumulate), **rows)
  # A batch that needs more scored tokens than any of these is rare, and rarer still with this.
  return sizes._replace(scored=sizes.scored + sizes.scored // 32)
