"""Rows from data sets of other libraries: TensorFlow Datasets and Hugging Face `datasets`.

  FOLDER[:SPLIT]      a TFDS data set (ArrayRecord), or one that `datasets` saved to disk
  tfds:NAME[:SPLIT]   by its name, where TFDS has prepared it
  hf:NAME[:SPLIT]     of the Hugging Face hub, streamed; needs `pip install datasets`

The split is train unless named. A row is read when its turn comes.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.data import fields as row_fields
from dpo_jax.structs import UserError

Rows = Iterator[dict[str, Any]]
PREPARED = "lengths.npz"  # what tells a set of `prepared` from those of others


def holds_one(given: str | pathlib.Path) -> bool:
  """Whether a name or a folder, perhaps with a split, is a data set of a library."""
  return _reader(str(given)) is not None


def read_rows(given: str | pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Its rows with where they stand; all of them values that JSON has.

  Raises:
    UserError: no such data set or split, or a library that is not installed.
  """
  reader, name, split = _reader(str(given))
  try:
    for number, row in enumerate(reader(name, split), 1):
      yield f"{given}:row {number}", row
  except (UserError, MemoryError):
    raise
  except Exception as error:  # both raise what they like
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{given}: {line[:200]}") from None


def _reader(given: str) -> tuple[Callable[[str, str], Rows], str, str] | None:
  """Who reads it, and the name and split he reads; None if it is no such data set."""
  for prefix, reader in (("tfds:", _tfds_by_name), ("hf:", _hub)):
    if given.startswith(prefix):
      name, _, split = given.removeprefix(prefix).partition(":")
      return reader, name, split or "train"
  folder, _, split = (given, "", "") if pathlib.Path(given).is_dir() else given.rpartition(":")
  if folder and (pathlib.Path(folder) / PREPARED).is_file():
    raise UserError(
      f"{folder} is a prepared set, which training alone reads (data.path); name the rows that it"
      " was made of"
    )
  for file, reader in (
    ("features.json", _tfds_folder),
    ("state.json", _saved),
    ("dataset_dict.json", _saved),
  ):
    if folder and (pathlib.Path(folder) / file).is_file():
      return reader, folder, split or "train"
  return None


# --- TFDS -----------------------------------------------------------------------------------------


def builder_of(folder: str | pathlib.Path) -> Any:
  """The data set of a folder.

  Raises:
    UserError: it names code of its own for a feature, which TFDS would import and so run.
  """
  import tensorflow_datasets as tfds  # takes a moment to load

  path = pathlib.Path(folder) / "features.json"
  for name in _classes(json.loads(path.read_text(encoding="utf-8"))):
    if not name.startswith("tensorflow_datasets."):
      raise UserError(
        f"{path} names {name}, which is no class of TFDS, and nothing that is read is run;"
        " write the set with TFDS's own features"
      )
  return tfds.builder_from_directory(folder)


def _classes(node: Any) -> Iterator[str]:
  """Every class that a description of features names, in either of the two forms there are."""
  if isinstance(node, list):
    for part in node:
      yield from _classes(part)
  elif isinstance(node, dict):
    for key, value in node.items():
      if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str):
        yield value
      elif key == "json" and isinstance(value, str):  # of features inside others
        yield from _classes(json.loads(value))
      else:
        yield from _classes(value)


def _tfds_folder(folder: str, split: str) -> Rows:
  return _records(builder_of(folder), split)


def _tfds_by_name(name: str, split: str) -> Rows:
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, file_format="array_record")
  if not pathlib.Path(builder.data_dir).is_dir():
    raise UserError(
      f"tfds:{name} is not prepared in {builder.data_dir}; make it there with TFDS, such as tfds"
      f" build {name} --file_format=array_record"
    )
  return _records(builder, split)


def _records(builder: Any, split: str) -> Rows:
  source = builder.as_data_source(split=split)
  return (_plain(source[i], builder.info.features) for i in range(len(source)))


def _plain(value: Any, feature: Any) -> Any:
  """Bytes as text, and as a list of objects what TFDS keeps as an object of lists."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    inner = getattr(feature, "feature", None)  # of a sequence
    fields = {name: _plain(one, (inner or feature)[name]) for name, one in value.items()}
    if inner is None:
      return fields
    return [dict(zip(fields, each, strict=True)) for each in zip(*fields.values(), strict=True)]
  if isinstance(value, (str, bool, int, float)):
    return value
  if hasattr(value, "tolist") and not hasattr(value, "__len__"):
    return value.tolist()
  return [_plain(one, getattr(feature, "feature", None)) for one in value]


# --- datasets -------------------------------------------------------------------------------------


def _library() -> Any:
  try:
    import datasets
  except ImportError:
    raise UserError(
      "data sets of Hugging Face are read by `datasets`, which is not installed; pip install"
      " datasets, or name a file of rows"
    ) from None
  return datasets


def _hub(name: str, split: str) -> Rows:
  return map(row_fields.without_nulls, _library().load_dataset(name, split=split, streaming=True))


def _saved(folder: str, split: str) -> Rows:
  found = _library().load_from_disk(folder)
  if isinstance(found, dict):
    if split not in found:
      raise UserError(f"{folder} has no split {split}; it has {', '.join(found)}")
    found = found[split]
  return map(row_fields.without_nulls, found)
