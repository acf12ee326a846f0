"""Rewards by name: functions (prompt, completion) -> real number."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np

from dpo_jax.controlled import reviews
from dpo_jax.structs import UserError
from dpo_jax.utils import functions

Reward = Callable[[str, str], float]

# Training and evaluation compute in float32: a larger reward would become infinite there.
LARGEST = float(np.finfo(np.float32).max)

REWARDS: dict[str, Reward] = {
  "controlled": reviews.reward,
}


def resolve(name: str) -> Reward:
  """Returns a reward by its name in `REWARDS`, or imports `module:function`.

  The current folder is added to the end of `sys.path`, since scripts and installed commands do not
  search it by themselves.

  Raises:
    UserError: no such name, module or function, or a module that fails when it is imported.
  """
  if name in REWARDS:
    return REWARDS[name]
  if ":" not in name:
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(REWARDS)}."
    raise UserError(f"no reward is named {name!r}; {hint} Give your own as module:function")
  found = functions.import_function("reward", name)
  _check_signature(name, found)
  return cast(Reward, found)


def _check_signature(name: str, found: Callable) -> None:
  """Checks that a function takes two arguments, if Python knows its signature."""
  try:
    signature = inspect.signature(found)
  except (TypeError, ValueError):  # a compiled function may have no signature
    return
  try:
    signature.bind("prompt", "completion")
  except TypeError:
    raise UserError(
      f"reward {name!r} takes {signature}; it must take (prompt, completion), two texts"
    ) from None


def values(reward: Reward, prompts: Iterable[str], completions: Iterable[str]) -> np.ndarray:
  """Returns the reward of each prompt and completion: float64 [B].

  Raises:
    UserError: the reward failed, or returned something other than a real number within float32.
  """
  rewards = []
  for prompt, completion in zip(prompts, completions, strict=True):
    try:
      value = reward(prompt, completion)
    except (Exception, SystemExit) as error:
      name = getattr(reward, "__name__", type(reward).__name__)
      raise UserError(
        f"the reward {name} fails with {functions.describe(error)}, for prompt {prompt!r} and"
        f" completion {completion!r}"
      ) from error
    try:
      # float() accepts the text "0.5", but a reward that returns a text has a mistake in it.
      number = None if isinstance(value, (str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, OverflowError):
      number = None
    if number is None or not abs(number) <= LARGEST:  # false for nan, too
      raise UserError(
        f"the reward gave {value!r} for prompt {prompt!r} and completion {completion!r};"
        f" it must give one finite number, of size {LARGEST:.1e} at most"
      )
    rewards.append(number)
  return np.array(rewards, np.float64)
