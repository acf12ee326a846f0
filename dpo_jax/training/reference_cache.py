"""The reference's log-probs on disk: computed once, found again by every run that asks the same.

They are kept for every token, so that runs may differ in loss, β, learning rate, weights of tokens
or a shorter window. What they depend on is in the key: weights, what the forward pass computes and
in which numbers, prompt and answer. Whatever else is asked for is not found, and computed.

A store is a folder. For every reference it holds one of its own, with parts that are written whole
and never changed: writers at one time add parts of their own, and one that is killed leaves those
it finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo_jax.data import batches
from dpo_jax.data.examples import Example, Lazy, lengths
from dpo_jax.structs import TokenBatch, UserError

VERSION = 1
MARK = "reference_store.json"
# A part is written after so many tokens of answers, or seconds: what a killed run may lose.
PART_TOKENS, PART_SECONDS = 2**21, 60.0


class _Part(NamedTuple):
  """One file, read as it is asked for; R answers with T tokens.

  Attributes:
    name: of the file.
    digest_R2: uint64, of the prompt that each answers.
    start_R, tokens_R: where its tokens stand among those of the part, and how many.
    file: int32 `ids` [T] and float32 `logps` [T].
  """

  name: str
  digest_R2: np.ndarray
  start_R: np.ndarray
  tokens_R: np.ndarray
  file: Any


class Store:
  """Log-probs of the answers' tokens under one reference, nats.

  Args:
    root: the folder; made if it is not there.
    key: what the log-probs depend on beside prompt and answer, as JSON has it.

  Raises:
    UserError: the folder holds something else, or a part is broken.
  """

  def __init__(self, root: str | pathlib.Path, key: dict[str, Any]):
    root = pathlib.Path(root)
    check(root)
    text = json.dumps(key, sort_keys=True, indent=2) + "\n"
    self.folder = root / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    self.folder.mkdir(parents=True, exist_ok=True)
    _write(root / MARK, json.dumps({"version": VERSION}) + "\n")
    _write(self.folder / "key.json", text)
    self._parts: list[_Part] = []
    self.refresh()

  def refresh(self) -> None:
    """Finds what was written since, by whoever it was."""
    known = {part.name for part in self._parts}
    for path in sorted(self.folder.glob("*.safetensors")):
      if path.name not in known:
        self._parts.append(_open(path))
    join = lambda arrays, empty: np.concatenate([empty, *arrays])
    high_R = join([part.digest_R2[:, 0] for part in self._parts], np.zeros(0, np.uint64))
    counts = [len(part.digest_R2) for part in self._parts]
    order_R = np.argsort(high_R, kind="stable")
    self._high_R = high_R[order_R]
    self._part_R = np.repeat(np.arange(len(counts)), counts)[order_R]
    self._row_R = join([np.arange(count) for count in counts], np.zeros(0, np.int64))[order_R]

  def find(self, example: Example) -> tuple[np.ndarray, ...] | None:
    """Log-probs of the tokens of its answers; None if those of one are not known.

    In a causal model the start of an answer has the same log-probs whatever follows, so an answer
    that was cut is found in the whole one.
    """
    found = [self._match(ids, _digest(example.prompt)) for ids in example.completions]
    return None if any(one is None for one in found) else tuple(found)

  def _match(self, ids: np.ndarray, digest: np.ndarray) -> np.ndarray | None:
    if not len(ids):
      return np.zeros(0, np.float32)
    first, last = (np.searchsorted(self._high_R, digest[0], side) for side in ("left", "right"))
    for at in range(first, last):
      part, row = self._parts[self._part_R[at]], self._row_R[at]
      if part.digest_R2[row, 1] != digest[1] or part.tokens_R[row] < len(ids):
        continue
      piece = slice(int(part.start_R[row]), int(part.start_R[row]) + len(ids))
      if np.array_equal(part.file.get_slice("ids")[piece], ids):
        return part.file.get_slice("logps")[piece]
    return None

  def add(self, examples: Sequence[Example]) -> None:
    """Writes a part of examples that have their `reference`."""
    pairs = [
      (_digest(example.prompt), ids, logps)
      for example in examples
      for ids, logps in zip(example.completions, example.reference, strict=True)
      if len(ids)
    ]
    digests, ids, logps = zip(*pairs, strict=True)
    arrays = {
      "prompts": np.stack(digests),
      "tokens": np.array([len(one) for one in ids], np.int32),
      "ids": np.concatenate(ids).astype(np.int32),
      "logps": np.concatenate(logps).astype(np.float32),
    }
    name = uuid.uuid4().hex
    partial = self.folder / f".{name}"
    try:
      save_file(arrays, partial)
      os.replace(partial, self.folder / f"{name}.safetensors")
    except SafetensorError as error:
      raise UserError(
        f"{self.folder} cannot be written ({error}); make room, or name another reference.store"
      ) from None
    finally:
      partial.unlink(missing_ok=True)
    self.refresh()


def check(root: pathlib.Path) -> None:
  """A folder is a store, or may become one.

  Raises:
    UserError: it is something else, or a store of another version.
  """
  mark = root / MARK
  if root.exists() and not root.is_dir():
    raise UserError(f"the reference store {root} is a file; name a folder (reference.store)")
  if not mark.is_file():
    if root.is_dir() and any(root.iterdir()):
      raise UserError(
        f"{root} holds files and is no reference store; name an empty or a new folder"
        " (reference.store)"
      )
    return
  try:
    version = json.loads(mark.read_text(encoding="utf-8"))["version"]
  except (ValueError, KeyError, TypeError):
    version = "unknown"
  if version != VERSION:
    raise UserError(
      f"{root} is a reference store of version {version} and this program writes {VERSION}; name a"
      " new folder (reference.store), what is there stays as it is"
    )


def _open(path: pathlib.Path) -> _Part:
  try:
    file = safe_open(path, framework="np")  # closed with the store
    tokens_R = file.get_tensor("tokens").astype(np.int64)
    digest_R2 = file.get_tensor("prompts")
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{path} is a broken part of a reference store ({error}); remove it, and what it held is"
      " computed again"
    ) from None
  return _Part(path.name, digest_R2, np.cumsum(tokens_R) - tokens_R, tokens_R, file)


def _write(path: pathlib.Path, text: str) -> None:
  """A small file, whole or not there, that others may be writing too."""
  if not path.exists():
    partial = path.with_name(f".{uuid.uuid4().hex}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _digest(ids: np.ndarray) -> np.ndarray:
  """Two uint64 of some ids."""
  data = np.ascontiguousarray(ids, np.int32).tobytes()
  return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)


# --- what a run asks of it ------------------------------------------------------------------------


def stored(examples: Sequence[Example], store: Store) -> Lazy:
  """The same examples with their `reference`, looked up whenever one is asked for."""
  read = lambda i: examples[i]._replace(reference=store.find(examples[i]))
  return Lazy(read, lengths(examples))


def lacking(examples: Sequence[Example], store: Store) -> Lazy:
  """Those whose log-probs the store does not have."""
  index = [i for i, example in enumerate(examples) if store.find(example) is None]
  return Lazy.of(examples, np.array(index, np.int64))


def fill(
  store: Store | None,
  examples: Sequence[Example],
  token_fn: Callable[[TokenBatch], np.ndarray],
  **batching: Any,
) -> Iterator[int]:
  """Computes and keeps the log-probs of some examples; gives how many are done, now and then.

  Args:
    store: where they are kept, a part at a time; None where another process keeps them.
    examples: what is lacking.
    token_fn: batch -> log-probs of its scored tokens under the reference, [G, M], nats.
    batching: of `batches.eval_batches`.

  Raises:
    UserError: a log-prob is not finite, or the disk is full; the parts before are kept.
  """
  numbered = Lazy(lambda i: examples[i]._replace(row=i), lengths(examples))
  completions = numbered.lengths[1].shape[1]
  keep = store.add if store else lambda examples: None
  waiting: list[Example] = []
  tokens, done, since = 0, 0, time.perf_counter()
  for batch in batches.eval_batches(numbered, **batching):
    for number, logps in _by_example(batch, token_fn(batch), completions):
      example = numbered[number]
      if not all(np.isfinite(one).all() for one in logps):
        raise UserError(
          f"the reference gives data row {examples[number].row} log-probs that are not finite; its"
          " weights or its configuration are broken"
        )
      waiting.append(example._replace(reference=logps))
      tokens += sum(map(len, logps))
    now = time.perf_counter()
    if tokens >= PART_TOKENS or now - since >= PART_SECONDS:
      keep(waiting)
      done, tokens, since, waiting = done + len(waiting), 0, now, []
    yield done + len(waiting)
  if waiting:
    keep(waiting)


def _by_example(
  batch: TokenBatch, logps_GM: np.ndarray, completions: int
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
  """The data row of every example of a batch, and the log-probs of its answers' tokens."""
  groups, length = len(batch.scored_GM), batch.ids_NL.shape[1]
  slots = batch.row_NS.shape[1]
  block = batch.ids_NL.size // groups
  real_GM = batch.scored_GM < block
  at_X = (batch.scored_GM + block * np.arange(groups)[:, None])[real_GM]
  slot_X = at_X // length * slots + batch.slot_NL.reshape(-1)[at_X]
  # The tokens of an answer stand in order: sorted by slot, they are together.
  order_X = np.argsort(slot_X, kind="stable")
  counts = np.bincount(slot_X, minlength=batch.row_NS.size)
  pieces = np.split(logps_GM[real_GM][order_X], np.cumsum(counts)[:-1])
  for first in range(0, batch.row_NS.size, completions):
    row = int(batch.row_NS.reshape(-1)[first])
    if row >= 0:
      yield row, tuple(pieces[first : first + completions])
