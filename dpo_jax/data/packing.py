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
    texts_B: its sequences: completions that are present.
    longest_B: tokens of its longest sequence, without the last one, which is only a target.
    rows: number of rows taken: the groups times the rows of the group that has most.
  """

  group_B: np.ndarray
  row_B: np.ndarray
  column_B: np.ndarray
  order_B: np.ndarray
  scored_B: np.ndarray
  texts_B: np.ndarray
  longest_B: np.ndarray
  rows: int


class Sizes(NamedTuple):
  """The sizes that the shapes of batches are rounded up to, so that few programs are compiled.

  Attributes:
    rows: N is at least this ...
    rows_step: ... and grows by this, a multiple of the number of groups.
    scored: M is at least this number of scored tokens per row of a group, and grows by an eighth.
    slots: S; no row takes more than S / K pairs.
    texts: T is at least this number of sequences per group, and grows by an eighth; 0 if sequences
      are not listed.
    width: W is at least this, and grows in the steps of `round_up_width`.
  """

  rows: int
  rows_step: int
  scored: int
  slots: int
  texts: int = 0
  width: int = 0


class Shape(NamedTuple):
  """The sizes N, L, G, M, S, T and W of a batch; T and W are 0 if sequences are not listed."""

  rows: int
  length: int
  groups: int
  scored: int
  slots: int
  texts: int = 0
  width: int = 0


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
  about_B = (measured.scored_BK.sum(1), present_BK.sum(1), costs(measured, "padded"))
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
      packed = _pack(cost_B[mine], row_length, most_pairs)
      row_B[mine], column_B[mine], order_B[mine], rows = packed
    most = max(most, rows)
  return Places(group_B, row_B, column_B, order_B, *about_B, groups * most)


def _pack(
  cost_B: np.ndarray, row_length: int, most_pairs: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """Packs examples into rows by best-fit decreasing: row, column and order of each, and the rows.

  The largest example goes first, each into the row where it leaves the least room. Ties go by the
  order of examples.
  """
  row_B, column_B, order_B = (np.zeros(len(cost_B), np.int64) for _ in range(3))
  used: list[int] = []  # tokens of each row
  count: list[int] = []  # examples of each row
  # (room, row) of the rows that may take more, sorted: the first with enough room is the best fit,
  # found in O(log rows). -1 sorts before every row number, so rows of exactly this room count.
  room_left: list[tuple[int, int]] = []
  # Stable, so that examples of equal cost keep their order on every platform.
  for i in np.argsort(-cost_B, kind="stable").tolist():
    cost = int(cost_B[i])
    at = bisect.bisect_left(room_left, (cost, -1))
    if at < len(room_left):
      room, row = room_left.pop(at)
    else:
      room, row = row_length, len(used)
      used.append(0)
      count.append(0)
    row_B[i], column_B[i], order_B[i] = row, used[row], count[row]
    used[row] += cost
    count[row] += 1
    if count[row] != most_pairs:
      bisect.insort(room_left, (room - cost, row))
  return row_B, column_B, order_B, len(used)


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
  texts: bool = False,
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
    texts: True if sequences are listed.
  """
  taken = [place.rows for place in places]
  if layout == "padded":  # the number of rows does not vary: whole groups of whole pairs
    step = groups * completions
  else:
    step = groups * largest_power_of_two_up_to(int(np.median(taken)) // groups // steps)
  rows = round_up(int(np.quantile(taken, quantile, method="higher")), step)
  per_row, most_texts = [], 0  # scored tokens per row of the fullest group, of each batch
  for place in places:
    room = max(rows, round_up(place.rows, step))
    assigned = assign_rows(place, room, groups)
    most = sum_by_group(assigned, assigned.scored_B, room, groups).max()
    # Per row, since a batch that takes more rows has room for more scored tokens.
    per_row.append(most * groups / room)
    most_texts = max(most_texts, int(sum_by_group(assigned, assigned.texts_B, room, groups).max()))
  # The fullest of several groups varies more than a whole batch does: room for the worst of all
  # would be padding in every other batch.
  share = quantile if groups > 1 else 1.0
  scored = float(np.quantile(per_row, share, method="higher"))
  # A power of two at or above the most pairs of a row: other batches may have a row with more.
  pairs = max(int(place.order_B.max()) + 1 for place in places)
  slots = 1 if layout == "padded" else completions * largest_power_of_two_up_to(2 * pairs - 1)
  sizes = Sizes(rows, step, int(np.ceil(scored)), slots)
  if not texts:
    return sizes
  longest = [int(place.longest_B.max()) for place in places]
  width = round_up_width(int(np.quantile(longest, quantile, method="higher")))
  return sizes._replace(texts=max(1, most_texts), width=width)


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
  if not sizes.texts:
    return assigned, shape
  need = max(int(sum_by_group(place, place.texts_B, rows, groups).max()) for place in assigned)
  step = max(1, round_up(sizes.texts, 8) // 8)
  width = max(sizes.width, *(round_up_width(int(place.longest_B.max())) for place in assigned))
  texts = sizes.texts + round_up(max(0, need - sizes.texts), step)
  return assigned, shape._replace(texts=texts, width=width)


def assign_rows(places: Places, rows: int, groups: int) -> Places:
  """Numbers the rows of all groups, one group after another, each with its part of the N rows."""
  row_B = places.group_B * (rows // groups) + places.row_B
  return places._replace(group_B=np.zeros_like(places.group_B), row_B=row_B)


def sum_by_group(places: Places, count_B: np.ndarray, rows: int, groups: int) -> np.ndarray:
  """Sums a count per example over the examples of every group: [G]."""
  return np.bincount(places.row_B // (rows // groups), count_B, minlength=groups)


def round_up_width(tokens: int) -> int:
  """Returns W for sequences of so many tokens: a multiple of 128, in steps of a quarter or less.

  The blocks of splash attention divide W, so that they have at least 128 positions.
  """
  return round_up(tokens, max(128, largest_power_of_two_up_to(tokens) // 4))


def largest_power_of_two_up_to(x: int) -> int:
  """Returns the largest power of two that is not above x; 1 for x < 1."""
  return 1 << max(0, int(x).bit_length() - 1)


def round_up(x: int, multiple: int) -> int:
  """Returns the smallest multiple that is not below x."""
  return -(-x // multiple) * multiple
