"""Scored characters of a completion, and the weights that its tokens get from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.fields import RowError

Spans = tuple[tuple[int, int, float], ...]  # start, end and weight, in characters


class Written(NamedTuple):
  """The text of a completion.

  Attributes:
    text: it includes the end of the last turn.
    spans: the characters of each message that is scored; () if all of the text is.
  """

  text: str
  spans: Spans = ()


def weigh(
  offsets: Sequence[tuple[int, int]], start: int, spans: Spans, count: int
) -> np.ndarray | None:
  """Returns the weights of the tokens of a completion, or None if all are 1.

  A token that contains any character of a span is scored, as a token at the boundary of prompt and
  completion is.

  Args:
    offsets: the characters of each token, from the first of the completion on.
    start: the character at which the completion begins.
    spans: what is scored, in characters from there.
    count: number of tokens of the completion, with its end token and without what follows it.

  Raises:
    RowError: no token is scored.
  """
  if not spans:
    return None
  # A token before the completion belongs to it where the completion changes how it merges.
  spans = tuple((a if a else -start, b, weight) for a, b, weight in spans)
  weights = [
    max((weight for a, b, weight in spans if begin < start + b and end > start + a), default=0.0)
    for begin, end in offsets[:count]
  ]
  weights += [spans[-1][2]] * (count - len(weights))  # EOS, where the template writes none
  if not any(weights):
    raise RowError("no scored token")
  return None if set(weights) == {1.0} else np.asarray(weights, np.float32)


def fill_weights(
  weights: Sequence[np.ndarray | None], completions: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
  """Returns the weights of all completions, 1 where there are none; () if no completion has any."""
  if all(one is None for one in weights):
    return ()
  return tuple(
    np.ones(len(ids), np.float32) if one is None else one
    for one, ids in zip(weights, completions, strict=True)
  )


def common_start(one: str, other: str) -> int:
  """Returns the number of characters with which both texts begin."""
  return len(os.path.commonprefix([one, other]))  # noqa: RUF071  by characters, as wanted
