"""Functions of the user's own, which a setting names as module:function."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, cast

from dpo_jax.structs import UserError


def import_function(what: str, name: str) -> Callable[..., Any]:
  """Imports `module:function`.

  The current folder is added to the end of `sys.path`, since scripts and installed commands do not
  search it by themselves.

  Args:
    what: the kind of function, such as "reward"; messages begin with it.
    name: module and function, with a colon between them.

  Raises:
    UserError: no such module or function, or a module that fails when it is imported.
  """
  module, _, function = name.partition(":")
  if not module or not function:
    missing = "function" if module else "module"
    raise UserError(f"{what} {name!r} names no {missing}; write it as module:function")
  if module.endswith(".py") or "/" in module:
    path = pathlib.PurePath(module.removesuffix(".py"))
    where = f", in the folder {path.parent}" if len(path.parts) > 1 else ""
    raise UserError(f"{what} {name!r} names a file; name its module{where}: {path.name}:{function}")
  # At the end, so that no file of the current folder can hide an installed module.
  if not {"", os.getcwd()} & {*sys.path}:
    sys.path.append(os.getcwd())
  try:
    imported = importlib.import_module(module)
    found = getattr(imported, function, None)
  except UserError as error:  # a line for the user already
    raise UserError(f"{what} {name!r}: {error}") from None
  except (Exception, SystemExit) as error:  # users' modules may raise anything, or call exit()
    # Two cases that need different help: the module itself is missing, or it is found and its own
    # imports fail.
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent and f"{module}.".startswith(f"{absent}."):
      raise UserError(
        f"{what} {name!r}: no module named {absent!r} is in the current folder, on PYTHONPATH or"
        " installed; go to the folder that holds it, or put that on PYTHONPATH"
      ) from None
    reason = describe(error)
    raise UserError(f"{what} {name!r}: importing {module!r} fails with {reason}") from error
  if found is None:
    where = getattr(imported, "__file__", None)
    raise UserError(
      f"{what} {name!r}: {module!r}{f' ({where})' if where else ''} has no {function!r}; name a"
      " function of that module"
    )
  if not callable(found):
    raise UserError(f"{what} {name!r} is no function but {type(found).__name__}")
  return cast(Callable[..., Any], found)


def file_of(name: str) -> pathlib.Path | None:
  """Returns the file of an imported `module:function`; None for a module without one."""
  path = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
  return None if path is None else pathlib.Path(path)


def describe(error: BaseException) -> str:
  """Describes an error of a user's function by its type, and its message if it has one."""
  return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
