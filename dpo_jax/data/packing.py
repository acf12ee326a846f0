"""Which row every example goes to, and the few shapes that batches come in.

Works on lengths alone: prompt_B [B] and tokens_BK [B, K], tokens of the prompts and the answers. An
answer of no tokens is absent and takes nothing.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.structs import UserError

LAYOUTS = ("shared", "packed", "padded")


class Places(NamedTuple):
  """Where the examples of a batch stand.

  Attributes:
    row_B, column_B: first row and first column of each.
    order_B: its order among the examples of its row.
    scored_B: its number of scored tokens.
    texts_B, longest_B: its number of texts (answers that are there), and tokens of the longest.
    rows: rows taken.
    movable: whether rows may change places (a padded pair is several rows that stay together).
  """

  row_B: np.ndarray
  column_B: np.ndarray
  order_B: np.ndarray
  scored_B: np.ndarray
  texts_B: np.ndarray
  longest_B: np.ndarray
  rows: int
  movable: bool


class Sizes(NamedTuple):
  """What the shapes of batches are rounded up to, so that few programs are compiled.

  Attributes:
    rows: N is at least this ...
    rows_step: ... and grows by this, a multiple of the groups.
    scored: M has room for so many scored tokens for each row of a group, and grows by an eighth.
    slots: S; no row takes more than S / K pairs.
    texts: T has room for so many texts of a group, and grows by an eighth; 0 where none are listed.
    width: W is at least this, and grows as `widened` has it.
  """

  rows: int
  rows_step: int
  scored: int
  slots: int
  texts: int = 0
  width: int = 0


class Shape(NamedTuple):
  """The axes of a batch: N, L, G, M, S, T and W; the last two 0 where no texts are listed."""

  rows: int
  length: int
  groups: int
  scored: int
  slots: int
  texts: int = 0
  width: int = 0


def costs(prompt_B: np.ndarray, tokens_BK: np.ndarray, layout: str) -> np.ndarray:
  """Tokens of one row that each example takes: int [B] (its longest text when padded)."""
  if layout == "shared":
    return prompt_B - 1 + tokens_BK.sum(1)
  if layout == "packed":
    return (prompt_B - 1) * (tokens_BK > 0).sum(1) + tokens_BK.sum(1)
  if layout == "padded":
    return prompt_B - 1 + tokens_BK.max(1)
  raise UserError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")


def place(
  prompt_B: np.ndarray,
  tokens_BK: np.ndarray,
  layout: str,
  row_length: int,
  most_pairs: int | None = None,
) -> Places:
  """Best-fit decreasing: the largest first, each where it leaves the least room; ties by order.

  Args:
    prompt_B, tokens_BK: lengths; every cost is at most the row length.
    layout: padded rows are not packed.
    row_length: L.
    most_pairs: pairs that a row may hold, or None for no limit.
  """
  cost_B = costs(prompt_B, tokens_BK, layout)
  about_B = (tokens_BK.sum(1), (tokens_BK > 0).sum(1), costs(prompt_B, tokens_BK, "padded"))
  size, completions = tokens_BK.shape
  if layout == "padded":
    zeros_B = np.zeros(size, np.int64)
    first_B = np.arange(size) * completions
    return Places(first_B, zeros_B, zeros_B, *about_B, size * completions, movable=False)
  row_B, column_B, order_B = (np.zeros(size, np.int64) for _ in range(3))
  used: list[int] = []
  held: list[int] = []
  room_left: list[tuple[int, int]] = []  # (room, row) of the rows that are open, sorted
  for i in np.argsort(-cost_B, kind="stable").tolist():
    cost = int(cost_B[i])
    at = bisect.bisect_left(room_left, (cost, -1))
    if at < len(room_left):
      room, row = room_left.pop(at)
    else:
      room, row = row_length, len(used)
      used.append(0)
      held.append(0)
    row_B[i], column_B[i], order_B[i] = row, used[row], held[row]
    used[row] += cost
    held[row] += 1
    if held[row] != most_pairs:
      bisect.insort(room_left, (room - cost, row))
  return Places(row_B, column_B, order_B, *about_B, len(used), movable=True)


def deal(cost_B: np.ndarray, parts: int) -> list[np.ndarray]:
  """Divides examples into parts of one number whose costs are about equal: their indices.

  The largest first, each to the part that has least so far and is not full; ties by order.
  """
  size = len(cost_B) // parts
  dealt: list[list[int]] = [[] for _ in range(parts)]
  lightest = [(0, part) for part in range(parts)]  # (load, part)
  for i in np.argsort(-cost_B, kind="stable").tolist():
    load, part = heapq.heappop(lightest)
    dealt[part].append(i)
    if len(dealt[part]) < size:
      heapq.heappush(lightest, (load + int(cost_B[i]), part))
  return [np.array(part, np.int64) for part in dealt]


def fit(
  places: Sequence[Places],
  completions: int,
  layout: str,
  groups: int,
  quantile: float = 1.0,
  steps: int = 8,
  texts: bool = False,
) -> Sizes:
  """Sizes for batches like these.

  Args:
    places: how some batches were packed.
    completions: K.
    layout: of the rows.
    groups: G.
    quantile: how many of the batches the rows suffice for, and the width of texts; larger ones take
      further steps. Scored tokens, slots and texts suffice for all.
    steps: of about such a share of the rows.
    texts: whether texts are listed.
  """
  taken = [place.rows for place in places]
  if layout == "padded":  # rows do not vary: whole groups of whole pairs
    step = groups * completions
  else:
    step = groups * power_of_two(int(np.median(taken)) // groups // steps)
  rows = round_up(int(np.quantile(taken, quantile, method="higher")), step)
  scored, most_texts = 0.0, 0
  for place in places:
    held = max(rows, round_up(place.rows, step))
    dealt = spread(place, held, groups)
    most = of_groups(dealt, dealt.scored_B, held, groups).max()
    scored = max(scored, most * groups / held)
    most_texts = max(most_texts, int(of_groups(dealt, dealt.texts_B, held, groups).max()))
  pairs = max(int(place.order_B.max()) + 1 for place in places)
  slots = 1 if layout == "padded" else completions * power_of_two(2 * pairs - 1)
  sizes = Sizes(rows, step, int(np.ceil(scored)), slots)
  if not texts:
    return sizes
  longest = [int(place.longest_B.max()) for place in places]
  width = widened(int(np.quantile(longest, quantile, method="higher")))
  return sizes._replace(texts=max(1, most_texts), width=width)


def shape_of(
  places: Sequence[Places], sizes: Sizes, layout: str, groups: int, row_length: int
) -> tuple[list[Places], Shape]:
  """The shape that micro-batches of one step share, and their rows dealt out to the groups."""
  most = max(place.rows for place in places)
  rows = max(sizes.rows, round_up(most, sizes.rows_step))
  dealt = [spread(place, rows, groups) for place in places]
  room = round_up(sizes.scored * rows // groups, 8)
  need = max(int(of_groups(place, place.scored_B, rows, groups).max()) for place in dealt)
  scored = room + round_up(max(0, need - room), round_up(room, 64) // 8)
  shape = Shape(rows, row_length, groups, scored, sizes.slots)
  if not sizes.texts:
    return dealt, shape
  need = max(int(of_groups(place, place.texts_B, rows, groups).max()) for place in dealt)
  step = max(1, round_up(sizes.texts, 8) // 8)
  width = max(sizes.width, *(widened(int(place.longest_B.max())) for place in dealt))
  texts = sizes.texts + round_up(max(0, need - sizes.texts), step)
  return dealt, shape._replace(texts=texts, width=width)


def spread(places: Places, rows: int, groups: int) -> Places:
  """Deals rows out to the groups so that each scores about as many tokens."""
  if groups == 1 or not places.movable:
    return places
  load_R = np.bincount(places.row_B, places.scored_B, minlength=places.rows)
  room = rows // groups
  lightest = [(0.0, group, 0) for group in range(groups)]  # (load, group, rows it has)
  new_R = np.zeros(places.rows, np.int64)
  for row in np.argsort(-load_R, kind="stable").tolist():
    load, group, count = heapq.heappop(lightest)
    new_R[row] = group * room + count
    if count + 1 < room:
      heapq.heappush(lightest, (load + load_R[row], group, count + 1))
  return places._replace(row_B=new_R[places.row_B])


def of_groups(places: Places, count_B: np.ndarray, rows: int, groups: int) -> np.ndarray:
  """What each example counts, added up in every group: [G]."""
  return np.bincount(places.row_B // (rows // groups), count_B, minlength=groups)


def widened(tokens: int) -> int:
  """Columns for texts of so many tokens: a multiple of 128, in steps of a quarter or less."""
  return round_up(tokens, max(128, power_of_two(tokens) // 4))


def power_of_two(x: int) -> int:
  """The largest power of two not above x, and 1 for x < 1."""
  return 1 << max(0, int(x).bit_length() - 1)


def round_up(x: int, multiple: int) -> int:
  """The least multiple that is not below x."""
  return -(-x // multiple) * multiple
