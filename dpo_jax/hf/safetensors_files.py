"""Safetensors files of a model folder: read as one, however many there are, and written as needed.

Nothing that is read here can be executed. A tensor is read and written whole and by itself, so that
memory holds one at a time.
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

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The format's names of the dtypes a model may lie in.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Weights:
  """Tensors of a folder by name, whichever file they lie in."""

  def __init__(self, handle_of: dict[str, Any]):
    self._handle_of = handle_of
    self.names = set(handle_of)

  def shape(self, name: str) -> tuple[int, ...]:
    """Its shape, from the header of its file alone."""
    return tuple(self._handle_of[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """The format's name of its dtype, from the header alone."""
    return self._handle_of[name].get_slice(name).get_dtype()

  def read(self, name: str) -> np.ndarray:
    """Its numbers, in a buffer of their own."""
    # Not by `get_slice`: for a part of a tensor it holds the whole and the part together.
    return self._handle_of[name].get_tensor(name)


@contextlib.contextmanager
def open_weights(path: pathlib.Path) -> Iterator[Weights]:
  """The weights of a folder, their headers read and no tensor yet.

  Raises:
    UserError: a file is missing, broken or pickled, or disagrees with the index.
  """
  shard_of = _shard_of(path)
  files: dict[str, tuple[str, Any]] = {}
  with contextlib.ExitStack() as stack:
    for shard in [WEIGHTS] if shard_of is None else sorted(set(shard_of.values())):
      try:
        handle = stack.enter_context(safe_open(path / shard, framework="np", backend="pread"))
      except SafetensorError as error:
        raise UserError(
          f"{path / shard} is broken or cut short ({error}); copy or download it again"
        ) from error
      for name in handle.keys():  # noqa: SIM118 (not a dictionary)
        if name in files:
          raise UserError(
            f"{path}: tensor {name} lies in both {files[name][0]} and {shard}; files of two"
            " exports are mixed, copy the folder again"
          )
        files[name] = (shard, handle)
    if shard_of is not None:
      _check_index(path, shard_of, {name: shard for name, (shard, _) in files.items()})
    yield Weights({name: handle for name, (_, handle) in files.items()})


def digest(path: pathlib.Path) -> str:
  """Of the bytes of a folder's weight files: every one of them is read."""
  shard_of = _shard_of(path)
  found = hashlib.blake2b(digest_size=16)
  for shard in [WEIGHTS] if shard_of is None else sorted(set(shard_of.values())):
    found.update(file_digest(path / shard))
  return found.hexdigest()


def file_digest(path: pathlib.Path) -> bytes:
  """Of the bytes of one file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def sampled_digest(path: pathlib.Path) -> str:
  """Of the sizes of a folder's weight files and of 16 pieces of each; quick, and seldom fooled."""
  shard_of = _shard_of(path)
  found = hashlib.blake2b(digest_size=16)
  for shard in [WEIGHTS] if shard_of is None else sorted(set(shard_of.values())):
    with (path / shard).open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      found.update(f"{shard} {size}".encode())
      for at in np.linspace(0, max(0, size - 65536), 16, dtype=np.int64):
        file.seek(int(at))
        found.update(file.read(65536))
  return found.hexdigest()


def _shard_of(path: pathlib.Path) -> dict[str, str] | None:
  """The file that each tensor lies in, by the index; None for a single file."""
  if (path / WEIGHTS).is_file():
    return None
  if (path / INDEX).is_file():
    shard_of = read_json(path / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
      raise UserError(f"{path / INDEX} maps no tensors to files (weight_map); copy it again")
    for shard in sorted(set(shard_of.values())):
      if pathlib.PurePath(shard).name != shard:
        raise UserError(f"{path / INDEX} names {shard!r}, which is not a file of the folder")
      if not (path / shard).is_file():
        raise UserError(f"{path} lacks {shard}, which its index names; copy the missing shard")
    return shard_of
  pickled = [file.name for kind in ("*.bin", "*.pt*") for file in sorted(path.glob(kind))]
  if any(name.startswith(("pytorch_model", "model", "consolidated")) for name in pickled):
    raise UserError(
      f"{path} holds pickled weights only ({pickled[0]}), which can run code when read; save the "
      "model again with transformers: model.save_pretrained(folder, safe_serialization=True)"
    )
  raise UserError(f"{path} has no {WEIGHTS}; name a folder that holds the weights")


def _check_index(path: pathlib.Path, said: dict[str, str], found: dict[str, str]) -> None:
  """Every tensor lies where the index says, and the index names every tensor."""
  for name in sorted(said.keys() | found.keys()):
    if name not in found:
      raise UserError(
        f"{path}: {said[name]} lacks tensor {name}, which the index puts there; copy it again"
      )
    if said.get(name) != found[name]:
      where = f"puts in {said[name]}" if name in said else "does not name"
      raise UserError(
        f"{path}: {found[name]} holds tensor {name}, which the index {where}; files of two exports"
        " are mixed, copy the folder again"
      )


class Entry(NamedTuple):
  """A tensor to be written; `fetch` is called once, when its turn comes."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[], np.ndarray]

  @property
  def bytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_weights(folder: pathlib.Path, entries: list[Entry], max_shard_size: int) -> None:
  """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes and their index.

  A tensor larger than that has a shard of its own.
  """
  shards: list[list[Entry]] = [[]]
  room = max_shard_size
  for entry in entries:
    if entry.bytes > room and shards[-1]:
      shards.append([])
      room = max_shard_size
    shards[-1].append(entry)
    room -= entry.bytes
  if len(shards) == 1:
    return write_file(folder / WEIGHTS, entries)
  shard_of = {}
  for i, shard in enumerate(shards):
    name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    write_file(folder / name, shard)
    shard_of |= {entry.name: name for entry in shard}
  total = sum(entry.bytes for entry in entries)
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: pathlib.Path, entries: list[Entry], **metadata: str) -> None:
  """One safetensors file, a tensor in memory at a time; the same bytes for the same numbers.

  Written here since `safetensors.serialize_file` wants all tensors of a file at once. The format:
  the header's length (8 bytes, little-endian), the header (JSON, padded to 8 bytes), the numbers.
  """
  # Wider dtypes first: readers view the file in place and want every tensor aligned.
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
    file.flush()
    os.fsync(file.fileno())  # whole on disk before the folder gets its name


def _bytes(entry: Entry) -> np.ndarray:
  array = np.ascontiguousarray(entry.fetch())
  assert (array.shape, array.dtype) == (entry.shape, entry.dtype), entry
  return array.reshape(-1).view(np.uint8)


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    UserError: it holds anything else.
  """
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{file} is not JSON ({error}); copy or download it again") from error
  if not isinstance(fields, dict):
    raise UserError(f"{file} holds a {type(fields).__name__}, not an object; copy it again")
  return fields
