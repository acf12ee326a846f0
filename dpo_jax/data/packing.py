"""Packs examples into rows, and chooses the few array shapes that batches have.

Everything here works on lengths alone, which are an `examples.Measured`. A completion of no tokens
is absent and takes no space.

Few shapes, because every new shape compiles the training step again. So rows, scored tokens and
sequences are rounded up to steps, and only batches that need unusually much get another shape.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.examples import Measured
from dpo_jax.structs import UserError

LAYOUTS = ("shared", "packed", "padded")


class Places(NamedTuple):
  """The place of every example of a batch in its rows.

  Attributes:
    group_B: group of each example; 0 for all once `assign_rows` has numbered the rows.
    row_B, column_B: its first row, counted within its group, and its first column.
    order_B: its number among the examples of its row, from 0.
    scored_B: its scored tokens.
    sequence_BK: tokens of its prompt with each completion, without the last one, which is only a
      target; 0 if the completion is absent.
    rows: number of rows taken: the groups times the rows of the group that has most.
  """

  group_B: np.ndarray
  row_B: np.ndarray
  column_B: np.ndarray
  order_B: np.ndarray
  scored_B: np.ndarray
  sequence_BK: np.ndarray
  rows: int


class Sizes(NamedTuple):
  """The sizes that the shapes of batches are rounded up to, so that few programs are compiled.

  Attributes:
    rows: N is at least this ...
    rows_step: ... and grows by this, a multiple of the number of groups.
    scored: M is at least this number of scored tokens per row of a group, and grows by an eighth.
    slots: S; no row takes more than S / K pairs.
    lines: T is at least this number of lines per group, and grows by an eighth; 0 if sequences are
      not listed.
    width: W is at least this, and grows in the steps of `round_up_width`.
    per_line: Sq; no line takes more sequences.
  """

  rows: int
  rows_step: int
  scored: int
  slots: int
  lines: int = 0
  width: int = 0
  per_line: int = 0


class Shape(NamedTuple):
  """The sizes N, L, G, M, S, T, W and Sq of a batch; the last three are 0 without lines."""

  rows: int
  length: int
  groups: int
  scored: int
  slots: int
  lines: int = 0
  width: int = 0
  per_line: int = 0


def costs(measured: Measured, layout: str) -> np.ndarray:
  """Returns the tokens of a row that each example takes, int [B].

  A prompt of P tokens takes P - 1 positions: its last token is repeated at the head of every
  completion (see `collate`). A padded example takes several rows; its cost is its longest sequence.
  """
  prompt_B, tokens_BK, _ = measured
  if layout == "shared":
    return prompt_B - 1 + tokens_BK.sum(1)
  if layout == "packed":
    return (prompt_B - 1) * (tokens_BK > 0).sum(1) + tokens_BK.sum(1)
  if layout == "padded":
    return prompt_B - 1 + tokens_BK.max(1)
  raise UserError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")


def place(
  measured: Measured,
  layout: str,
  row_length: int,
  most_pairs: int | None = None,
  *,
  groups: int = 1,
  group_B: np.ndarray | None = None,
) -> Places:
  """Deals examples to groups, and packs those of every group into rows of its own.

  Groups come before rows: a group with few examples then has rows of about as many tokens, and
  scores about as many, as any other. The result is a function of the arguments alone.

  Args:
    measured: lengths; no cost may be larger than the row length.
    layout: "padded" examples are not packed; each takes K rows.
    row_length: L.
    most_pairs: most pairs of a row, or None for no limit.
    groups: G.
    group_B: group of each example, as `deal` returns it; None deals them here.
  """
  cost_B = costs(measured, layout)
  present_BK = measured.tokens_BK > 0
  sequence_BK = np.where(present_BK, measured.prompt_B[:, None] - 1 + measured.tokens_BK, 0)
  about_B = (measured.scored_BK.sum(1), sequence_BK)
  size, completions = present_BK.shape
  if group_B is None:
    group_B = deal(measured, layout, groups)
  row_B, column_B, order_B = (np.zeros(size, np.int64) for _ in range(3))
  most = 0
  for group in range(groups):
    (mine,) = np.nonzero(group_B == group)
    if layout == "padded":
      row_B[mine] = np.arange(len(mine)) * completions
      rows = len(mine) * completions
    else:
      filled = _best_fit(cost_B[mine], row_length, most_pairs)
      row_B[mine], column_B[mine], order_B[mine] = filled[:3]
      rows = filled.count
    most = max(most, rows)
  return Places(group_B, row_B, column_B, order_B, *about_B, groups * most)


class _Filled(NamedTuple):
  """The place of every item in bins: its bin, its start in it, and its number there, from 0."""

  bin_x: np.ndarray
  start_x: np.ndarray
  order_x: np.ndarray
  count: int


def _best_fit(cost_x: np.ndarray, room_of_bin: int, most_items: int | None) -> _Filled:
  """Puts items into as few bins as best-fit decreasing needs; no bin takes more than `most_items`.

  The largest item goes first, each into the bin where it leaves the least room. Ties go by the
  order of items.
  """
  bin_x, start_x, order_x = (np.zeros(len(cost_x), np.int64) for _ in range(3))
  used: list[int] = []  # room taken of each bin
  count: list[int] = []  # items of each bin
  # (room, bin) of the bins that may take more, sorted: the first with enough room is the best fit,
  # found in O(log bins). -1 sorts before every bin's number, so bins of exactly this room count.
  room_left: list[tuple[int, int]] = []
  # Stable, so that items of equal cost keep their order on every platform.
  for i in np.argsort(-cost_x, kind="stable").tolist():
    cost = int(cost_x[i])
    at = bisect.bisect_left(room_left, (cost, -1))
    if at < len(room_left):
      room, number = room_left.pop(at)
    else:
      room, number = room_of_bin, len(used)
      used.append(0)
      count.append(0)
    bin_x[i], start_x[i], order_x[i] = number, used[number], count[number]
    used[number] += cost
    count[number] += 1
    if count[number] != most_items:
      bisect.insort(room_left, (room - cost, number))
  return _Filled(bin_x, start_x, order_x, len(used))


def fill_lines(length_x: np.ndarray, width: int, per_line: int) -> _Filled:
  """Puts the sequences of a group into lines of `width` positions, by best-fit decreasing.

  How many lines that takes depends on the lengths alone, not on their order.
  """
  return _best_fit(length_x, width, per_line)


# --- groups ---------------------------------------------------------------------------------------

_FEW = 64  # examples of a group up to which exchanges are tried; more are even without


def deal(measured: Measured, layout: str, groups: int) -> np.ndarray:
  """Deals examples to groups with about equally many tokens and scored tokens: int64 [B].

  What the fullest group has decides rows and scored slots of all of them. So the largest example
  goes first, each to the group that is then the least full, and afterwards the fullest group
  exchanges examples with others as long as that helps. A group gets one example more than its share
  at most, so that their sequences are about as many too; padded ones, whose rows are counted by
  examples, get their share.
  """
  size = len(measured.prompt_B)
  group_B = np.zeros(size, np.int64)
  if groups == 1 or not size:
    return group_B
  cost_B, scored_B = costs(measured, layout), measured.scored_BK.sum(1)
  # Tokens as shares of all tokens and scored tokens as shares of all scored ones, over a common
  # denominator: integers, so that every host finds the same.
  share_2B = np.stack([cost_B * max(1, int(scored_B.sum())), scored_B * int(cost_B.sum())])
  most = -(-size // groups) + (layout != "padded")
  load_2G, count_G = np.zeros((2, groups), np.int64), np.zeros(groups, np.int64)
  for i in np.argsort(-share_2B.max(0), kind="stable").tolist():
    full_G = (load_2G + share_2B[:, i : i + 1]).max(0)
    full_G[count_G == most] = np.iinfo(np.int64).max
    group = int(full_G.argmin())
    group_B[i] = group
    load_2G[:, group] += share_2B[:, i]
    count_G[group] += 1
  if most <= _FEW:
    _exchange(group_B, load_2G, share_2B)
  return group_B


def _exchange(group_B: np.ndarray, load_2G: np.ndarray, share_2B: np.ndarray) -> None:
  """Lets the fullest group exchange examples, one for one, until none makes it less full.

  Args:
    group_B: group of every example, changed in place.
    load_2G: sums of the shares of every group, changed in place.
    share_2B: shares of every example in all tokens and in all scored tokens.
  """
  # Every exchange lowers the fullest group, so this ends; the bound keeps it short.
  for _ in range(4 * load_2G.shape[1]):
    fullest = int(load_2G.max(0).argmax())
    (mine,), (others,) = np.nonzero(group_B == fullest), np.nonzero(group_B != fullest)
    if not len(mine) or not len(others):
      return
    moved_2BB = share_2B[:, mine][:, :, None] - share_2B[:, others][:, None, :]
    left_BB = (load_2G[:, fullest][:, None, None] - moved_2BB).max(0)
    taken_BB = (load_2G[:, group_B[others]][:, None, :] + moved_2BB).max(0)
    fuller_BB = np.maximum(left_BB, taken_BB)  # the fuller of the two groups after an exchange
    best = int(fuller_BB.argmin())
    if fuller_BB.flat[best] >= load_2G[:, fullest].max():
      return
    given, got = mine[best // len(others)], others[best % len(others)]
    moved_2 = share_2B[:, given] - share_2B[:, got]
    load_2G[:, fullest] -= moved_2
    load_2G[:, group_B[got]] += moved_2
    group_B[given], group_B[got] = group_B[got], fullest


def divide_evenly(cost_B: np.ndarray, parts: int) -> list[np.ndarray]:
  """Divides examples into parts with equally many examples and about equal costs.

  The largest example goes first, each to the part with the least cost so far that is not full; ties
  go by order.

  Args:
    cost_B: tokens of each example; `parts` divides B.
    parts: how many parts.

  Returns:
    The indices of the examples of each part, int64.
  """
  size = len(cost_B) // parts
  divided: list[list[int]] = [[] for _ in range(parts)]
  lightest = [(0, part) for part in range(parts)]  # heap of (cost, part); full parts are not in it
  for i in np.argsort(-cost_B, kind="stable").tolist():
    load, part = heapq.heappop(lightest)
    divided[part].append(i)
    if len(divided[part]) < size:
      heapq.heappush(lightest, (load + int(cost_B[i]), part))
  return [np.array(part, np.int64) for part in divided]


def fit(
  places: Sequence[Places],
  completions: int,
  layout: str,
  groups: int,
  quantile: float = 1.0,
  steps: int = 8,
  per_line: int = 0,
) -> Sizes:
  """Chooses sizes that suit some sample batches.

  Args:
    places: how the sample batches were packed.
    completions: K.
    layout: of the rows.
    groups: G.
    quantile: share of the batches for which the rows, the width of sequences and the scored tokens
      of several groups suffice; larger batches take further steps. Slots, sequences and the scored
      tokens of one group suffice for all of them.
    steps: number of steps in which the rows of a usual batch would be reached.
    per_line: the most sequences of a line; 0 if sequences are not listed.
  """
  taken = [place.rows for place in places]
  if layout == "padded":  # the number of rows does not vary: whole groups of whole pairs
    step = groups * completions
  else:
    step = groups * largest_power_of_two_up_to(int(np.median(taken)) // groups // steps)
  rows = round_up(int(np.quantile(taken, quantile, method="higher")), step)
  per_row: list[float] = []  # scored tokens per row of the fullest group, of each batch
  lengths: list[list[np.ndarray]] = []  # of the sequences of each group of each batch
  for place in places:
    room = max(rows, round_up(place.rows, step))
    assigned = assign_rows(place, room, groups)
    lengths.append(sequences_by_group(assigned, room, groups))
    most = sum_by_group(assigned, assigned.scored_B, room, groups).max()
    # Per row, since a batch that takes more rows has room for more scored tokens.
    per_row.append(most * groups / room)
  # The fullest of several groups varies more than a whole batch does: room for the worst of all
  # would be padding in every other batch.
  share = quantile if groups > 1 else 1.0
  scored = float(np.quantile(per_row, share, method="higher"))
  # A power of two at or above the most pairs of a row: other batches may have a row with more.
  pairs = max(int(place.order_B.max()) + 1 for place in places)
  slots = 1 if layout == "padded" else completions * largest_power_of_two_up_to(2 * pairs - 1)
  sizes = Sizes(rows, step, int(np.ceil(scored)), slots)
  return _with_lines(sizes, lengths, quantile, per_line) if per_line else sizes


def _with_lines(
  sizes: Sizes, lengths: list[list[np.ndarray]], quantile: float, per_line: int
) -> Sizes:
  """Adds the sizes of lines, given the lengths of the sequences of each group of each batch."""
  longest = [int(np.concatenate(lengths_G).max()) for lengths_G in lengths]
  usual = round_up_width(int(np.quantile(longest, quantile, method="higher")))
  widths = [max(usual, round_up_width(tokens)) for tokens in longest]
  if per_line > 1:
    # A kernel has an entry for as many sequences of every line. Twice the mean leaves hardly any
    # line short of entries, and a fixed number keeps shapes few.
    filled = [
      fill_lines(length_x, width, per_line)
      for lengths_G, width in zip(lengths, widths, strict=True)
      for length_x in lengths_G
    ]
    count = sum(len(one.bin_x) for one in filled)
    per_line = min(per_line, 2 * -(-count // sum(one.count for one in filled)))
  lines = max(
    most_lines(lengths_G, width, per_line) for lengths_G, width in zip(lengths, widths, strict=True)
  )
  return sizes._replace(lines=lines, width=usual, per_line=per_line)


def choose_shape(
  places: Sequence[Places], sizes: Sizes, layout: str, groups: int, row_length: int
) -> tuple[list[Places], Shape]:
  """Chooses the shape that the micro-batches of one step share.

  Returns:
    The places with the rows of all groups numbered, and the shape.
  """
  most = max(place.rows for place in places)
  rows = max(sizes.rows, round_up(most, sizes.rows_step))
  assigned = [assign_rows(place, rows, groups) for place in places]
  room = round_up(sizes.scored * rows // groups, 8)
  need = max(int(sum_by_group(place, place.scored_B, rows, groups).max()) for place in assigned)
  # What exceeds the room is rounded up to eighths of it, so that a few shapes cover all batches.
  scored = room + round_up(max(0, need - room), round_up(room, 64) // 8)
  shape = Shape(rows, row_length, groups, scored, sizes.slots)
  if not sizes.lines:
    return assigned, shape
  width = max(sizes.width, *(round_up_width(int(place.sequence_BK.max())) for place in assigned))
  need = max(
    most_lines(sequences_by_group(place, rows, groups), width, sizes.per_line) for place in assigned
  )
  step = max(1, round_up(sizes.lines, 8) // 8)
  lines = sizes.lines + round_up(max(0, need - sizes.lines), step)
  return assigned, shape._replace(lines=lines, width=width, per_line=sizes.per_line)


def assign_rows(places: Places, rows: int, groups: int) -> Places:
  """Numbers the rows of all groups, one group after another, each with its part of the N rows."""
  row_B = places.group_B * (rows // groups) + places.row_B
  return places._replace(group_B=np.zeros_like(places.group_B), row_B=row_B)


def sum_by_group(places: Places, count_B: np.ndarray, rows: int, groups: int) -> np.ndarray:
  """Sums a count per example over the examples of every group: [G]."""
  return np.bincount(places.row_B // (rows // groups), count_B, minlength=groups)


def sequences_by_group(places: Places, rows: int, groups: int) -> list[np.ndarray]:
  """Returns the lengths of the sequences of every group, in order of examples."""
  group_B = places.row_B // (rows // groups)
  lengths = [places.sequence_BK[group_B == group] for group in range(groups)]
  return [length_BK[length_BK > 0] for length_BK in lengths]


def most_lines(lengths_G: Sequence[np.ndarray], width: int, per_line: int) -> int:
  """Returns the lines of the group that needs most of them, at least 1."""
  return max(1, *(fill_lines(length_x, width, per_line).count for length_x in lengths_G))


def round_up_width(tokens: int) -> int:
  """Returns W for sequences of so many tokens: a multiple of 128, in steps of a quarter or less.

  The blocks of attention on TPUs divide W and are multiples of 128.
  """
  return round_up(tokens, max(128, largest_power_of_two_up_to(tokens) // 4))


def largest_power_of_two_up_to(x: int) -> int:
  """Returns the largest power of two that is not above x; 1 for x < 1."""
  return 1 << max(0, int(x).bit_length() - 1)


def round_up(x: int, multiple: int) -> int:
  """Returns the smallest multiple that is not below x."""
  return -(-x // multiple) * multiple
