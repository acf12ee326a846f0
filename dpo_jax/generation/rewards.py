"""Rewards by name: functions of (prompt, answer) that give a real number."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np

from dpo_jax.controlled import reviews
from dpo_jax.structs import UserError

Reward = Callable[[str, str], float]

LARGEST = float(np.finfo(np.float32).max)  # what training and measures compute with

REWARDS: dict[str, Reward] = {
  "controlled": reviews.reward,
}


def resolve(name: str) -> Reward:
  """A reward by its name in `REWARDS`, or imported from `module:function`.

  The current folder is added to the end of `sys.path`, where scripts/ and installed commands do not
  look by themselves.

  Raises:
    UserError: no such name, module or function, or a module that fails when it is imported.
  """
  if name in REWARDS:
    return REWARDS[name]
  module, colon, function = name.partition(":")
  if not colon:
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(REWARDS)}."
    raise UserError(f"no reward is named {name!r}; {hint} Give your own as module:function")
  if not module or not function:
    missing = "function" if module else "module"
    raise UserError(f"reward {name!r} names no {missing}; write it as module:function")
  if not {"", os.getcwd()} & {*sys.path}:
    sys.path.append(os.getcwd())
  try:
    imported = importlib.import_module(module)
    found = getattr(imported, function, None)
  except (Exception, SystemExit) as error:  # whatever the module does when it is imported
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent and f"{module}.".startswith(f"{absent}."):
      raise UserError(
        f"reward {name!r}: no module named {absent!r} is in the current folder, on PYTHONPATH or"
        " installed; go to the folder that holds it, or put that on PYTHONPATH"
      ) from None
    raise UserError(f"reward {name!r}: importing {module!r} fails with {_said(error)}") from error
  if found is None:
    where = getattr(imported, "__file__", None)
    raise UserError(
      f"reward {name!r}: {module!r}{f' ({where})' if where else ''} holds no {function!r}; name a"
      " function of that module"
    )
  if not callable(found):
    raise UserError(f"reward {name!r} is no function but {type(found).__name__}")
  _check_signature(name, found)
  return cast(Reward, found)


def _said(error: BaseException) -> str:
  return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _check_signature(name: str, found: Callable) -> None:
  """It takes two arguments, where Python can tell."""
  try:
    signature = inspect.signature(found)
  except (TypeError, ValueError):  # compiled, and silent about itself
    return
  try:
    signature.bind("prompt", "answer")
  except TypeError:
    raise UserError(
      f"reward {name!r} takes {signature}; it must take (prompt, answer), two texts"
    ) from None


def values(reward: Reward, prompts: Iterable[str], completions: Iterable[str]) -> np.ndarray:
  """The reward of each (prompt, answer): float64 [B].

  Raises:
    UserError: the reward failed, or gave something else than a real number within float32.
  """
  rewards = []
  for prompt, answer in zip(prompts, completions, strict=True):
    try:
      value = reward(prompt, answer)
    except (Exception, SystemExit) as error:
      name = getattr(reward, "__name__", type(reward).__name__)
      raise UserError(
        f"the reward {name} fails with {_said(error)}, for prompt {prompt!r} and answer {answer!r}"
      ) from error
    try:
      # float() reads "0.5", but a reward that gives texts is one whose author forgot something.
      number = None if isinstance(value, (str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, OverflowError):
      number = None
    if number is None or not abs(number) <= LARGEST:  # nan is not
      raise UserError(
        f"the reward gave {value!r} for prompt {prompt!r} and answer {answer!r};"
        f" it must give one finite number, of size {LARGEST:.1e} at most"
      )
    rewards.append(number)
  return np.array(rewards, np.float64)
