"""Atomic writes: a file or folder is replaced by a complete one, or left as it was.

Everything here builds a hidden sibling first and renames it at the end. POSIX makes a rename within
one file system atomic, so a reader sees the old contents or the new ones, never a part of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from dpo_jax.structs import UserError

# --- checks before the work starts ----------------------------------------------------------------


def check_writable(path: str | pathlib.Path, name: str) -> None:
  """Checks that a file or folder can be created at a path, without creating it.

  Args:
    path: the file or folder to be created; folders above it may be missing.
    name: what the error message calls it.

  Raises:
    UserError: the nearest existing parent is a file, or is not writable.
  """
  folder = next(parent for parent in pathlib.Path(path).absolute().parents if parent.exists())
  if not folder.is_dir():
    raise UserError(f"{name}: {folder} is a file, and nothing can lie in it; name another path")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"{name}: {folder} may not be written to; name another folder")


def check_folder(path: str | pathlib.Path, name: str) -> None:
  """Checks that a folder is writable, or can be created.

  Args:
    path: the folder.
    name: what the error message calls it.

  Raises:
    UserError: the path is empty, is a file, lies below a file, or is not writable.
  """
  # The empty path is checked by itself: pathlib reads it as ".", which exists.
  if str(path) == "" or (pathlib.Path(path).exists() and not pathlib.Path(path).is_dir()):
    raise UserError(f"{name} is {'a file' if str(path) else 'empty'}; name a folder")
  # `check_writable` looks at the parents of a path, so it is given a file inside the folder.
  check_writable(pathlib.Path(path) / "file", name)


def check_output_file(path: str | pathlib.Path, *, force: bool = False) -> None:
  """Checks that the file of the flag --out can be written, without writing it.

  Args:
    path: the file.
    force: whether a file that exists may be replaced, as the flag --force says. An empty one always
      may: nothing is lost.

  Raises:
    UserError: the path is a folder or a device, lies below a file, or is not writable; or the file
      exists.
  """
  path = pathlib.Path(path)
  # A device such as /dev/stdout exists and is no regular file: a rename would replace it.
  if path.exists() and not path.is_file():
    raise UserError(f"--out={path} is {'a folder' if path.is_dir() else 'no file'}; name a file")
  if not force and path.exists() and path.stat().st_size:
    raise UserError(f"--out={path} exists; add --force to replace it, or name another file")
  check_writable(path, f"--out={path}")


# --- atomic writes --------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the path of a temporary file, which replaces `path` when the block ends.

  If the block or the rename fails, the old file stays and the temporary one is removed. Missing
  folders above `path` are created.

  Raises:
    OSError: writing failed; its `filename` is `path`.
  """
  path = pathlib.Path(path)
  # In the folder of `path`, because a rename is atomic only within one file system. A random name,
  # because several processes may write the same file. Not from `tempfile`, which makes files that
  # only their owner can read, and a rename keeps that mode.
  partial = path.with_name(f".{uuid.uuid4().hex}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, path)
  except OSError as error:
    # Users gave `path` and know nothing of the temporary file. An error that names any other file,
    # such as one that the block reads, passes as it is.
    named = error.filename
    if error.errno is None or (named is not None and not _is_ours(named, partial, path)):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def _is_ours(named: object, partial: pathlib.Path, path: pathlib.Path) -> bool:
  """Returns True for the temporary file and for the folders above it, which may be created."""
  return str(named) in {str(partial), *map(str, path.parents)}


def write_text(path: str | pathlib.Path, text: str | Iterable[str]) -> None:
  """Writes a UTF-8 file atomically.

  Args:
    path: the file; missing folders above it are created.
    text: the contents, as one string or as parts that are written one after the other.

  Raises:
    OSError: writing failed; the old file is unchanged.
  """
  with replacing_file(path) as partial, partial.open("w", encoding="utf-8") as file:
    # A string is an iterable of characters: writelines would take it one character at a time.
    file.writelines([text] if isinstance(text, str) else text)


def write_json_lines(path: str | pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  """Writes one JSON object per line, atomically; `rows` may be a generator."""
  write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def replacing_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty temporary folder, which replaces `path` when the block ends.

  If the block or a rename fails, the old folder stays and the temporary one is removed.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # mkdtemp makes the outer folder private; `new` inside it gets the usual mode, and is what stays.
  scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  new, old = scratch / "new", scratch / "old"
  try:
    new.mkdir()
    yield new
    try:
      # A folder that is not empty cannot be renamed over, so this takes two renames. The order is
      # important: 1. the old folder moves aside; 2. the new one takes its place; 3. only then is
      # the old one deleted, with `scratch`.
      if path.exists():
        path.rename(old)
      new.rename(path)
    except BaseException:  # also KeyboardInterrupt: never leave without a folder
      if old.exists() and not path.exists():
        old.rename(path)
      raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
