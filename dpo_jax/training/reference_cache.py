"""The reference's log-probs on disk: computed once, and found again by every run that needs them.

They are stored for every token, so that runs may differ in loss, β, learning rate, weights of
tokens or a shorter window. The key has all that they depend on: weights, what the forward pass
computes and in which number types, prompt and completion. With any other key nothing is found, and
the log-probs are computed.

A store is a folder. It contains a folder for every reference, with parts that are written whole and
never changed: writers at one time add parts of their own, and one that is killed leaves those that
it finished.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo_jax.data import batches
from dpo_jax.data.batches import Batching
from dpo_jax.data.examples import Example, Lazy, lengths
from dpo_jax.distributed import processes
from dpo_jax.structs import TokenBatch, UserError
from dpo_jax.utils import files, progress

VERSION = 1
MARK = "reference_store.json"
# A part is written after so many tokens of completions, or seconds: what a killed run may lose.
PART_TOKENS, PART_SECONDS = 2**21, 60.0


class _Part(NamedTuple):
  """One file of R completions with T tokens, whose ids and log-probs are read as needed.

  Attributes:
    name: of the file.
    digest_Rc2: uint64, of the prompt of each completion.
    start_Rc, tokens_Rc: the position of its first token in the part, and the number of its tokens.
    file: int32 `ids` [tokens] and float32 `logps` [tokens].
  """

  name: str
  digest_Rc2: np.ndarray
  start_Rc: np.ndarray
  tokens_Rc: np.ndarray
  file: Any


class Store:
  """Log-probs of the completions' tokens under one reference, in nats.

  Args:
    root: the folder; made if it is not there.
    key: all that the log-probs depend on besides prompt and completion, as JSON has it.

  Raises:
    UserError: the folder contains something else, or a part is broken.
  """

  def __init__(self, root: str | pathlib.Path, key: dict[str, Any]):
    root = pathlib.Path(root)
    check(root)
    # Sorted, since the folder is named by a digest of this text: the order in which a dictionary
    # was filled must not matter.
    text = json.dumps(key, sort_keys=True, indent=2) + "\n"
    self.folder = root / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    self.folder.mkdir(parents=True, exist_ok=True)
    _write(root / MARK, json.dumps({"version": VERSION}) + "\n")
    # The key itself beside its digest, so that a person can see why nothing was found.
    _write(self.folder / "key.json", text)
    self._parts: list[_Part] = []
    self.refresh()

  def refresh(self) -> None:
    """Opens the parts that were written since, by this process or another."""
    known = {part.name for part in self._parts}
    for path in sorted(self.folder.glob("*.safetensors")):
      if path.name not in known:
        self._parts.append(_open(path))
    # An index of all parts, sorted by the first half of the digest for a binary search.
    digests = [part.digest_Rc2[:, 0] for part in self._parts]
    high_Rc = np.concatenate([np.zeros(0, np.uint64), *digests])
    counts = [len(part.digest_Rc2) for part in self._parts]
    row_Rc = np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)])
    order_Rc = np.argsort(high_Rc, kind="stable")
    self._high_Rc = high_Rc[order_Rc]
    self._part_Rc = np.repeat(np.arange(len(counts)), counts)[order_Rc]
    self._row_Rc = row_Rc[order_Rc]

  def find(self, example: Example) -> tuple[np.ndarray, ...] | None:
    """Returns the log-probs of the completions' tokens; None if one completion has none.

    In a causal model the start of a completion has the same log-probs whatever follows, so one that
    was cut is found in the whole one.
    """
    matches = [self._match(ids, _digest(example.prompt)) for ids in example.completions]
    found = tuple(match for match in matches if match is not None)
    return found if len(found) == len(matches) else None

  def _match(self, ids: np.ndarray, digest: np.ndarray) -> np.ndarray | None:
    """Returns the log-probs of one completion of a prompt with that digest."""
    # A completion without tokens only fills an example up to K.
    if not len(ids):
      return np.zeros(0, np.float32)
    first, last = (np.searchsorted(self._high_Rc, digest[0], side) for side in ("left", "right"))
    for at in range(first, last):
      part, row = self._parts[self._part_Rc[at]], self._row_Rc[at]
      # A stored completion that is shorter lacks the log-probs of the rest.
      if part.digest_Rc2[row, 1] != digest[1] or part.tokens_Rc[row] < len(ids):
        continue
      # The digest is of the prompt alone; the ids of the completion are compared themselves.
      piece = slice(int(part.start_Rc[row]), int(part.start_Rc[row]) + len(ids))
      if np.array_equal(part.file.get_slice("ids")[piece], ids):
        return part.file.get_slice("logps")[piece]
    return None

  def add(self, examples: Sequence[Example]) -> None:
    """Writes a part of examples that have their `reference`.

    Raises:
      UserError: the part cannot be written; the parts before are whole.
    """
    pairs = [
      (_digest(example.prompt), ids, logps)
      for example in examples
      for ids, logps in zip(example.completions, example.reference, strict=True)
      if len(ids)
    ]
    digests, ids, logps = zip(*pairs, strict=True)
    # float32, the type in which the step computes log-probs: a stored reference gives the same loss
    # as a live one.
    arrays = {
      "prompts": np.stack(digests),
      "tokens": np.array([len(one) for one in ids], np.int32),
      "ids": np.concatenate(ids).astype(np.int32),
      "logps": np.concatenate(logps).astype(np.float32),
    }
    # A name that no other writer picks. A reader sees the whole part or none.
    try:
      with files.replacing_file(self.folder / f"{uuid.uuid4().hex}.safetensors") as partial:
        save_file(arrays, partial)
    except SafetensorError as error:
      raise UserError(
        f"{self.folder} cannot be written ({error}); make room, or name another reference.store"
      ) from None
    self.refresh()


def check(root: pathlib.Path) -> None:
  """Checks that a folder is a store, or may become one.

  Raises:
    UserError: it is something else, or a store of another version.
  """
  mark = root / MARK
  if root.exists() and not root.is_dir():
    raise UserError(f"the reference store {root} is a file; name a folder (reference.store)")
  if not mark.is_file():
    if root.is_dir() and any(root.iterdir()):
      raise UserError(
        f"{root} holds files and is not a reference store; name an empty or a new folder"
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
  """Opens a part; ids and log-probs stay on disk."""
  try:
    file = safe_open(path, framework="np")  # closed with the store
    tokens_Rc = file.get_tensor("tokens").astype(np.int64)
    digest_Rc2 = file.get_tensor("prompts")
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{path} is a broken part of a reference store ({error}); remove it, and its"
      " log-probs are computed again"
    ) from None
  return _Part(path.name, digest_Rc2, np.cumsum(tokens_Rc) - tokens_Rc, tokens_Rc, file)


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a small file, whole or not at all, that others may be writing too."""
  if not path.exists():
    files.write_text(path, text)


def _digest(ids: np.ndarray) -> np.ndarray:
  """Computes a digest of token ids: two uint64."""
  # One type and layout, since the digest is of bytes: equal ids must give equal bytes.
  data = np.ascontiguousarray(ids, np.int32).tobytes()
  return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)


# --- a run with a store ---------------------------------------------------------------------------


def look_up(store: Store, *sides: Sequence[Example]) -> tuple[tuple[Lazy, ...], tuple[Lazy, ...]]:
  """Looks up the examples of a run, and reports how many are found.

  Args:
    store: the store.
    sides: examples to train on, and those that are held out.

  Returns:
    The examples that the store lacks, of every side that has such; and all sides, with their
    `reference` read whenever an example is.
  """
  missing = tuple(filter(len, (lacking(side, store) for side in sides)))
  rows = sum(map(len, sides))
  found = rows - sum(map(len, missing))
  print(f"reference store {store.folder}: {found:,} of {rows:,} examples found", file=sys.stderr)
  return missing, tuple(stored(side, store) for side in sides)


def fill_all(
  store: Store,
  missing: Sequence[Sequence[Example]],
  token_fn: Callable[[TokenBatch], np.ndarray],
  *,
  batch_size: int,
  batching: Batching,
) -> None:
  """Fills a store with all that it lacks, and reports how far that is. All processes call it.

  Args:
    store: the store; every process finds in it afterwards what the first one wrote.
    missing, token_fn, batch_size, batching: as `fill` takes them, for several sets of examples.
  """
  # All processes compute, since each has a part of the model; the first one writes.
  writer = store if processes.is_main_process() else None
  started = time.perf_counter()
  with progress.Progress("reference store", sum(map(len, missing)), "examples") as shown:
    for examples in missing:
      done = 0
      for now in fill(writer, examples, token_fn, batch_size=batch_size, batching=batching):
        shown.advance(now - done)
        done = now
  if missing:
    count = sum(map(len, missing))
    seconds = time.perf_counter() - started
    print(f"reference store: {count:,} examples computed in {seconds:.1f} s", file=sys.stderr)
  # Nobody looks before the last part is written.
  processes.barrier("reference store")
  store.refresh()


def stored(examples: Sequence[Example], store: Store) -> Lazy:
  """Returns the examples with their `reference`, which is looked up whenever one is read."""

  def read(i: int) -> Example:
    return examples[i]._replace(reference=store.find(examples[i]))

  return Lazy(read, lengths(examples))


def lacking(examples: Sequence[Example], store: Store) -> Lazy:
  """Returns the examples whose log-probs the store does not have."""
  index = [i for i, example in enumerate(examples) if store.find(example) is None]
  return Lazy.select(examples, np.array(index, np.int64))


def fill(
  store: Store | None,
  examples: Sequence[Example],
  token_fn: Callable[[TokenBatch], np.ndarray],
  *,
  batch_size: int,
  batching: Batching,
) -> Iterator[int]:
  """Computes and stores the log-probs of examples; yields after every batch how many are done.

  Args:
    store: the store, which gets a part at a time; None where another process writes it.
    examples: examples that the store lacks.
    token_fn: batch -> log-probs of its scored tokens under the reference, [G, M], nats.
    batch_size: examples that are computed at a time.
    batching: the layout of their rows.

  Raises:
    UserError: a log-prob is not finite, or the disk is full; the parts before are kept.
  """
  # Numbered by their place, by which a batch's examples are found again: data rows have gaps. And
  # without token weights: what is stored are all tokens of a completion, so that runs find it
  # whatever they score.
  measured = lengths(examples)
  numbered = Lazy(
    lambda i: examples[i]._replace(row=i, token_weights=()),
    measured._replace(scored_BK=measured.tokens_BK),
  )
  completions = measured.tokens_BK.shape[1]
  waiting: list[Example] = []
  tokens, done, since = 0, 0, time.perf_counter()
  for batch in batches.eval_batches(numbered, batch_size=batch_size, batching=batching):
    for number, logps in _by_example(batch, token_fn(batch), completions):
      example = numbered[number]
      # Refused before it is stored: a store outlives the run, and later runs would trust it.
      if not all(np.isfinite(one).all() for one in logps):
        raise UserError(
          f"the reference gives data row {examples[number].row} log-probs that are not finite; its"
          " weights or its configuration are broken"
        )
      waiting.append(example._replace(reference=logps))
      tokens += sum(map(len, logps))
    now = time.perf_counter()
    if tokens >= PART_TOKENS or now - since >= PART_SECONDS:
      if store:
        store.add(waiting)
      done, tokens, since, waiting = done + len(waiting), 0, now, []
    yield done + len(waiting)
  if waiting and store:
    store.add(waiting)


def _by_example(
  batch: TokenBatch, logps_GM: np.ndarray, completions: int
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
  """Yields the data row of every example of a batch, and the log-probs of its completions."""
  groups, length = len(batch.scored_GM), batch.ids_NL.shape[1]
  slots = batch.row_NS.shape[1]
  block = batch.ids_NL.size // groups
  # The list of scored positions is padded with one past the end of its group, and counts within its
  # group.
  real_GM = batch.scored_GM < block
  at_Tk = (batch.scored_GM + block * np.arange(groups)[:, None])[real_GM]
  slot_Tk = at_Tk // length * slots + batch.slot_NL.reshape(-1)[at_Tk]
  # The tokens of a completion are in order: sorted by slot, by a sort that is stable, they are
  # together and still in order.
  order_Tk = np.argsort(slot_Tk, kind="stable")
  counts = np.bincount(slot_Tk, minlength=batch.row_NS.size)
  pieces = np.split(logps_GM[real_GM][order_Tk], np.cumsum(counts)[:-1])
  for first in range(0, batch.row_NS.size, completions):
    row = int(batch.row_NS.reshape(-1)[first])
    if row >= 0:
      yield row, tuple(pieces[first : first + completions])
