"""Paths as people write them: a leading `~` is the home folder, in every flag and field.

A shell expands `~` only where a word begins, so `--workdir=~/runs` arrives here as it is written.
Environment variables are left to the shell, which expands them everywhere.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

# Fields of a configuration that name a file or a folder; those of `data` may name several.
FIELDS = (
  "model.path",
  "model.tokenizer",
  "reference.path",
  "reference.store",
  "lora.path",
  "data.path",
  "data.eval_path",
)


def expand(path: str) -> str:
  """Replaces a leading `~` or `~user` by the home folder, in each of several paths with commas.

  Raises:
    ValueError: there is no such home folder.
  """
  # A name with a comma that exists is one name, as where data are read.
  if "," in path and not pathlib.Path(path).exists():
    return ",".join(map(expand, path.split(",")))
  written = path.strip()
  if not written.startswith("~"):
    return path
  found = os.path.expanduser(written)
  if found.startswith("~"):
    raise ValueError(
      f"no home folder {written.split('/')[0]}; write the whole path, or ./{written} for a name"
      " that begins with ~"
    )
  return found


def fields_of(config: Any) -> Iterator[tuple[str, Any, str]]:
  """Yields every field of a configuration that is a path: its name, its section, its key there."""
  for field in FIELDS:
    section, _, key = field.partition(".")
    yield field, config[section], key
  # A source is a path, or fields of its own.
  for group in ("mix", "eval_sets"):
    sources = config.data[group]
    for name, source in sources.items():
      nested = hasattr(source, "keys")
      if not nested:
        yield f"data.{group}.{name}", sources, name
      elif "path" in source:
        yield f"data.{group}.{name}.path", source, "path"


def expand_fields(config: Any) -> None:
  """Expands the fields of a configuration that are paths, in place.

  Raises:
    UserError: a field begins with ~ and means no home folder.
  """
  from dpo_jax.structs import UserError  # loads jax, for which `--help` should not wait

  for field, section, key in [*fields_of(config)]:
    if not isinstance(section[key], str):
      continue  # refused by the part of set-up that reads it
    try:
      section[key] = expand(section[key])
    except ValueError as error:
      raise UserError(f"{field}={section[key]}: {error}") from None
