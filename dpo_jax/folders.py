"""Folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


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
