"""Folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from dpo_jax.structs import UserError


def check_writable(path: str | pathlib.Path, name: str) -> None:
  """Something can be made at a path, as far as can be told before it is.

  Args:
    path: what is to be made.
    name: how the error calls it.

  Raises:
    UserError: it would lie in what is no folder, or may not be written to.
  """
  folder = next(parent for parent in pathlib.Path(path).absolute().parents if parent.exists())
  if not folder.is_dir():
    raise UserError(f"{name}: {folder} is no folder; name a file in a folder")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"{name}: {folder} may not be written to; name another folder")


def check_folder(path: str | pathlib.Path, name: str) -> None:
  """A folder is there, or can be made; it may be written to.

  Args:
    path: of the folder.
    name: how the error calls it.

  Raises:
    UserError: it is a file, lies in what is no folder, or may not be written to.
  """
  if str(path) == "" or (pathlib.Path(path).exists() and not pathlib.Path(path).is_dir()):
    raise UserError(f"{name} is {'a file' if str(path) else 'empty'}; name a folder")
  check_writable(pathlib.Path(path) / "file", name)


@contextlib.contextmanager
def replacing(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder to be filled, which takes the place of `path` when it is whole.

  It is a hidden sibling until then, and nothing remains of it if it cannot be filled.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  new, old = scratch / "new", scratch / "old"
  try:
    new.mkdir()
    yield new
    try:
      if path.exists():
        path.rename(old)
      new.rename(path)
    except BaseException:
      if old.exists() and not path.exists():
        old.rename(path)
      raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
