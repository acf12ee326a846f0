"""Digests of examples: whether a run that is resumed learns from what it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.examples import Example, lengths

# A row's number changes when a row before it is dropped, and log-probs of the reference come from
# a store: neither is something that the examples say.
_LEFT_OUT = ("row", "reference")
_READ = [name for name in Example._fields if name not in _LEFT_OUT]
SAMPLE = 1000  # examples that are read of a set that stays on disk


class Digest:
  """A digest of examples that arrive one after another: token ids, scores and weights."""

  def __init__(self) -> None:
    self._hash = hashlib.blake2b(digest_size=16)

  def add(self, example: Example) -> None:
    """Adds an example; a field with its default value adds nothing, so that new fields may come."""
    for name in _READ:
      value = getattr(example, name)
      if name in Example._field_defaults and _is(value, Example._field_defaults[name]):
        continue
      self._hash.update(name.encode())
      self._add(value)

  def _add(self, value: Any) -> None:
    if isinstance(value, np.ndarray):
      # Its size too: otherwise the end of one completion could move to the start of the next.
      self._hash.update(f"{value.dtype}{value.shape}".encode())
      self._hash.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, tuple):
      self._hash.update(f"({len(value)}".encode())
      for one in value:
        self._add(one)
    else:
      # As float32, the type that a prepared set keeps scores and weights in.
      self._add(np.asarray(value, np.float32))

  def text(self) -> str:
    """Returns the digest of all that was added."""
    return self._hash.hexdigest()


def of(examples: Iterable[Example]) -> str:
  """Computes the digest of all examples, which are read one after another."""
  found = Digest()
  for example in examples:
    found.add(example)
  return found.text()


def of_rows(examples: Iterable[Example]) -> dict[int, int]:
  """Returns row -> a digest of 64 bits of its tokens, whatever its scores, labels and weights are.

  Absent completions count as none, so that it does not depend on how many other rows have.
  """
  found: dict[int, int] = {}
  for example in examples:
    # An unpaired row gives several examples; each adds to what the row had so far.
    text = hashlib.blake2b(found.get(example.row, 0).to_bytes(8), digest_size=8)
    for ids in (example.prompt, *example.completions):
      if len(ids):
        text.update(len(ids).to_bytes(8))
        text.update(np.asarray(ids, np.int32).tobytes())
    found[example.row] = int.from_bytes(text.digest())
  return found


def of_values(values: Sequence[Any]) -> str:
  """Computes the digest of values that JSON has, such as prompts that are not tokenized yet."""
  text = json.dumps(values, default=str, ensure_ascii=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def of_some(examples: Sequence[Example], known: str | None) -> str:
  """Computes a digest of examples that stay on disk: the length of each, and a thousand of them.

  Args:
    examples: those of one split of a prepared set.
    known: digest of all, from when the set was made; None for a set that has none.
  """
  found = hashlib.blake2b((known or "").encode(), digest_size=16)
  for array in lengths(examples):
    found.update(np.ascontiguousarray(array).tobytes())
  # Spread over all, so that another order, or a row more, changes most of them.
  picked = np.linspace(0, len(examples) - 1, min(len(examples), SAMPLE), dtype=np.int64)
  found.update(of(examples[int(i)] for i in picked).encode())
  return found.hexdigest()


def _is(value: Any, default: Any) -> bool:
  # Arrays are never a default, and comparing them gives an array.
  return not isinstance(value, np.ndarray) and type(value) is type(default) and value == default
