"""Reading and writing the safetensors files of a model folder, which may be one file or several.

Safetensors files cannot contain code, unlike pickled weights. Tensors are read and written whole,
one at a time, so memory contains no more than one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.structs import UserError
from dpo_jax.utils import progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of `sampled_digest`, in bytes: a file that is read whole; a piece of a tensor, and how many.
WHOLE, WINDOW, WINDOWS = 2**26, 4096, 4
# Types that a model may be stored in, by their names in the format.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Weights:
  """The tensors of a folder by name, whichever file contains them."""

  def __init__(self, handle_of: dict[str, Any]):
    self._handle_of = handle_of
    self.names = set(handle_of)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape, from the header of its file."""
    return tuple(self._handle_of[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Returns the format's name of a tensor's type, from the header of its file."""
    return self._handle_of[name].get_slice(name).get_dtype()

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor's numbers, in a buffer of their own."""
    # Not with `get_slice`: to return a part it reads the whole tensor, and memory contains both.
    return self._handle_of[name].get_tensor(name)

  def digest(self, name: str) -> bytes:
    """Computes a digest of a tensor's numbers in float32, whatever type they are stored in."""
    # A row at a time: a copy of all of them would take as much memory again.
    found = hashlib.blake2b(digest_size=16)
    for row in self.read(name):
      found.update(np.asarray(row, np.float32).tobytes())
    return found.digest()


@contextlib.contextmanager
def open_weights(path: pathlib.Path) -> Iterator[Weights]:
  """Opens the weights of a folder; only headers are read.

  Raises:
    UserError: a file is missing, broken or pickled, or disagrees with the index.
  """
  shard_of = _shard_of(path)
  files: dict[str, tuple[str, Any]] = {}
  with contextlib.ExitStack() as stack:
    for shard in [WEIGHTS] if shard_of is None else sorted(set(shard_of.values())):
      try:
        # By default the file is mapped, and pages that were read count as memory of the process.
        handle = stack.enter_context(safe_open(path / shard, framework="np", backend="pread"))
      except SafetensorError as error:
        raise _broken(path / shard) from error
      for name in handle.keys():  # noqa: SIM118 (not a dictionary)
        if name in files:
          raise UserError(
            f"{path}: tensor {name} is in both {files[name][0]} and {shard}; files of two"
            " exports are mixed, copy the folder again"
          )
        files[name] = (shard, handle)
    if shard_of is not None:
      _check_index(path, shard_of, {name: shard for name, (shard, _) in files.items()})
    yield Weights({name: handle for name, (_, handle) in files.items()})


def _broken(file: pathlib.Path) -> UserError:
  """Returns what is wrong with a file of weights that cannot be opened."""
  with file.open("rb") as opened:
    if opened.read(24) == b"version https://git-lfs.":
      return UserError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull there")
  return UserError(f"{file} is broken or cut short; copy or download it again")


def digest(path: pathlib.Path) -> str:
  """Computes a digest of all bytes of a folder's weight files."""
  shard_of = _shard_of(path)
  found = hashlib.blake2b(digest_size=16)
  for shard in [WEIGHTS] if shard_of is None else sorted(set(shard_of.values())):
    found.update(file_digest(path / shard))
  return found.hexdigest()


def file_digest(path: pathlib.Path) -> bytes:
  """Computes a digest of all bytes of one file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def sampled_digest(path: pathlib.Path) -> str:
  """Computes a digest of a folder's weight files from their headers and samples of every tensor.

  Files of up to `WHOLE` bytes are read whole. Of a larger one the header is read, and of each
  tensor `WINDOWS` pieces of `WINDOW` bytes, spread from its first number to its last: some MB of
  many GB. Training, merging or adding noise changes every tensor, and is always found. A change
  that keeps all shapes, and touches only numbers between the pieces, is not.
  """
  shard_of = _shard_of(path)
  found = hashlib.blake2b(digest_size=16)
  for shard in [WEIGHTS] if shard_of is None else sorted(set(shard_of.values())):
    file = path / shard
    size = file.stat().st_size
    found.update(f"{shard} {size}".encode())
    found.update(file_digest(file) if size <= WHOLE else _sample(file, size))
  return found.hexdigest()


def _sample(path: pathlib.Path, size: int) -> bytes:
  """Computes a digest of a file's header and of pieces of every tensor."""
  found = hashlib.blake2b(digest_size=16)
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    # A broken file is refused when its weights are read; here it must only not fill the memory.
    header = file.read(min(length, size))
    found.update(header)
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
      ends = [about["data_offsets"] for about in json.loads(header).values() if "dtype" in about]
      for begin, end in sorted(ends):
        for at in np.linspace(begin, max(begin, end - WINDOW), WINDOWS, dtype=np.int64):
          file.seek(8 + length + int(at))
          found.update(file.read(min(WINDOW, end - begin)))
  return found.digest()


def _shard_of(path: pathlib.Path) -> dict[str, str] | None:
  """Returns the file of each tensor according to the index; None for a single file.

  Raises:
    UserError: no weights, pickled weights only, or an index that is broken or names missing files.
  """
  if (path / WEIGHTS).is_file():
    return None
  if (path / INDEX).is_file():
    shard_of = read_json(path / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
      raise UserError(f"{path / INDEX} maps no tensors to files (weight_map); copy it again")
    for shard in sorted(set(shard_of.values())):
      # A path out of the folder, as in "../x", would read files that are not of this model.
      if pathlib.PurePath(shard).name != shard:
        raise UserError(f"{path / INDEX} names {shard!r}, which is not a file of the folder")
      if not (path / shard).is_file():
        raise UserError(f"{path} lacks {shard}, which its index names; copy the missing shard")
    return shard_of
  # Pickled weights are refused by name and not as missing, since the user sees them in the folder.
  pickled = [file.name for kind in ("*.bin", "*.pt*") for file in sorted(path.glob(kind))]
  if any(name.startswith(("pytorch_model", "model", "consolidated")) for name in pickled):
    raise UserError(
      f"{path} holds pickled weights only ({pickled[0]}), which can run code when read; save the "
      "model again with transformers: model.save_pretrained(folder, safe_serialization=True)"
    )
  raise UserError(f"{path} has no {WEIGHTS}; name a folder that holds the weights")


def _check_index(path: pathlib.Path, listed: dict[str, str], found: dict[str, str]) -> None:
  """Checks that the index names every tensor, and the file that contains it."""
  for name in sorted(listed.keys() | found.keys()):
    if name not in found:
      raise UserError(
        f"{path}: {listed[name]} lacks tensor {name}, which the index puts there; copy it again"
      )
    if listed.get(name) != found[name]:
      where = f"puts in {listed[name]}" if name in listed else "does not name"
      raise UserError(
        f"{path}: {found[name]} contains tensor {name}, which the index {where}; files of two"
        " exports are mixed, copy the folder again"
      )


class Entry(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: its type.
    fetch: () -> its numbers; called once, just before they are written.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[], np.ndarray]

  @property
  def bytes(self) -> int:
    """The size of the numbers in bytes."""
    # int64: a product in 32 bits overflows at 2 GiB.
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_weights(folder: pathlib.Path, entries: list[Entry], max_shard_size: int) -> None:
  """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes and their index.

  A tensor that is larger has a shard of its own.
  """
  total = sum(entry.bytes for entry in entries)
  with progress.Progress("writing the weights", total) as shown:
    _write_shards(folder, entries, max_shard_size, shown)


def _write_shards(
  folder: pathlib.Path, entries: list[Entry], max_shard_size: int, shown: progress.Progress
) -> None:
  """Writes the file or files of `write_weights`."""
  # All shards are planned before the first is written, since their names contain their number.
  shards: list[list[Entry]] = [[]]
  free = max_shard_size
  for entry in entries:
    if entry.bytes > free and shards[-1]:
      shards.append([])
      free = max_shard_size
    shards[-1].append(entry)
    free -= entry.bytes
  if len(shards) == 1:
    return write_file(folder / WEIGHTS, entries, shown)
  shard_of = {}
  for i, shard in enumerate(shards):
    name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    write_file(folder / name, shard, shown)
    shard_of |= {entry.name: name for entry in shard}
  total = sum(entry.bytes for entry in entries)
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
  path: pathlib.Path,
  entries: list[Entry],
  shown: progress.Progress | None = None,
  **metadata: str,
) -> None:
  """Writes one safetensors file, with one tensor in memory at a time; counts bytes in `shown`.

  The same tensors give the same bytes. `safetensors.serialize_file` needs all tensors of a file at
  once, hence this function. The format: the length of the header (8 bytes, little-endian), the
  header (JSON, padded to 8 bytes), the numbers.
  """
  # Wider types first, since readers view the file in place and need every tensor aligned.
  entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
  names = {np.dtype(jnp.dtype(dtype)): name for name, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
  end = 0
  for entry in entries:
    start, end = end, end + entry.bytes
    header[entry.name] = {
      "dtype": names[entry.dtype],
      "shape": list(entry.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
      file.write(_bytes(entry).data)
      if shown:
        shown.advance(entry.bytes)
    file.flush()
    os.fsync(file.fileno())  # whole on disk before the folder gets its name


def _bytes(entry: Entry) -> np.ndarray:
  """Returns the numbers of a tensor as bytes."""
  array = np.ascontiguousarray(entry.fetch())
  assert (array.shape, array.dtype) == (entry.shape, entry.dtype), entry
  return array.reshape(-1).view(np.uint8)


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads the object in a JSON file.

  Raises:
    UserError: the file is not JSON, or contains something else than an object.
  """
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{file} is not JSON ({error}); copy or download it again") from error
  if not isinstance(fields, dict):
    raise UserError(f"{file} contains a {type(fields).__name__}, not an object; copy it again")
  return fields
