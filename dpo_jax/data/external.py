"""Reads rows from data sets of other libraries: TensorFlow Datasets and Hugging Face `datasets`.

  FOLDER[:SPLIT]      a folder written by TFDS (ArrayRecord), or by `save_to_disk` of `datasets`
  tfds:NAME[:SPLIT]   a TFDS data set by name; it must have been prepared on this machine
  hf:NAME[:SPLIT]     a data set of the Hugging Face hub, streamed; needs `pip install datasets`

The default split is train. Rows are read one by one, so a data set may be larger than memory.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.data import arrow_rows
from dpo_jax.structs import UserError

Rows = Iterator[dict[str, Any]]
PREPARED = "lengths.npz"  # a folder with this file is a prepared set (see `prepared`)


def is_dataset(given: str | pathlib.Path) -> bool:
  """Returns True if a name or folder, perhaps with a split, is a data set of these libraries."""
  return _reader(str(given)) is not None


def read_rows(given: str | pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Reads the rows of a data set, as values that JSON has.

  Yields:
    (place, row): "NAME:row NUMBER", from 1.

  Raises:
    UserError: no such data set or split, or a library that is not installed.
  """
  found = _reader(str(given))
  if found is None:
    raise UserError(f"no data set {given}")
  reader, name, split = found
  try:
    for number, row in enumerate(reader(name, split), 1):
      yield f"{given}:row {number}", row
  except (UserError, MemoryError):
    raise
  except Exception as error:  # the libraries raise exceptions of many types, their own among them
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{given}: {line[:200]}") from None


def _reader(given: str) -> tuple[Callable[[str, str], Rows], str, str] | None:
  """Returns (reader, name, split) for a data set, or None if `given` is not one."""
  for prefix, reader in (("tfds:", _tfds_by_name), ("hf:", _hub)):
    if given.startswith(prefix):
      name, _, split = given.removeprefix(prefix).partition(":")
      return reader, name, split or "train"
  # A folder whose own name contains a colon is that folder, without a split.
  folder, _, split = (given, "", "") if pathlib.Path(given).is_dir() else given.rpartition(":")
  if folder and (pathlib.Path(folder) / PREPARED).is_file():
    raise UserError(
      f"{folder} is a prepared set, which only training reads (data.path); name the rows that it"
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
  """Returns the TFDS builder of a folder.

  Raises:
    UserError: the folder names a feature class that is not part of TFDS. TFDS would import, and so
      run, whatever module it names.
  """
  import tensorflow_datasets as tfds  # slow to import

  path = pathlib.Path(folder) / "features.json"
  # The check must come before the builder: building it is what imports the classes.
  for name in _classes(json.loads(path.read_text(encoding="utf-8"))):
    if not name.startswith("tensorflow_datasets."):
      raise UserError(
        f"{path} names {name}, which is not a class of TFDS, and code named by data is never run;"
        " write the set with TFDS's own features"
      )
  return tfds.builder_from_directory(folder)


def _classes(node: Any) -> Iterator[str]:
  """Yields every class named by a description of features, in TFDS's old or new notation."""
  if isinstance(node, list):
    for part in node:
      yield from _classes(part)
  elif isinstance(node, dict):
    for key, value in node.items():
      if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str):
        yield value
      elif key == "json" and isinstance(value, str):  # a feature inside another, as JSON text
        yield from _classes(json.loads(value))
      else:
        yield from _classes(value)


def _tfds_folder(folder: str, split: str) -> Rows:
  return _records(builder_of(folder), split)


def _tfds_by_name(name: str, split: str) -> Rows:
  import tensorflow_datasets as tfds

  # ArrayRecord is read by random access and without TensorFlow.
  try:
    builder = tfds.builder(name, file_format="array_record")
  except tfds.core.DatasetNotFoundError:
    raise UserError(f"tfds:{name}: TFDS has no data set of this name") from None
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
  """Converts a value of TFDS to values that JSON has.

  TFDS stores a sequence of objects as one object of sequences; here it is a list of objects again.
  """
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    inner = getattr(feature, "feature", None)  # set if `feature` is a sequence
    fields = {name: _plain(one, (inner or feature)[name]) for name, one in value.items()}
    if inner is None:
      return fields
    return [dict(zip(fields, each, strict=True)) for each in zip(*fields.values(), strict=True)]
  if isinstance(value, (str, bool, int, float)):
    return value
  if hasattr(value, "tolist") and not hasattr(value, "__len__"):  # a NumPy scalar
    return value.tolist()
  return [_plain(one, getattr(feature, "feature", None)) for one in value]


# --- datasets -------------------------------------------------------------------------------------


def _import_datasets(otherwise: str) -> Any:
  # Imported late: the library is optional.
  try:
    import datasets  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise UserError(
      "data sets of Hugging Face are read by `datasets`, which is not installed; pip install"
      f" datasets, or {otherwise}"
    ) from None
  return datasets


def _hub(name: str, split: str) -> Rows:
  rows = _import_datasets("name a file of rows").load_dataset(name, split=split, streaming=True)
  return map(arrow_rows.plain, rows)


def _saved(folder: str, split: str) -> Rows:
  found = _import_datasets(f"name its files, such as {folder}/*.arrow").load_from_disk(folder)
  if isinstance(found, dict):  # a DatasetDict; a single Dataset has no splits, and any name fits
    if split not in found:
      raise UserError(f"{folder} has no split {split}; it has {', '.join(found)}")
    found = found[split]
  return map(arrow_rows.plain, found)
