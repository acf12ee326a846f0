"""Rewards by name: functions of (prompt, answer) that give a real number."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np

from dpo_jax.data import controlled
from dpo_jax.structs import UserError

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {
  "controlled": controlled.reward,
}


def resolve(name: str) -> Reward:
  """A reward by its name in `REWARDS`, or imported from `module:function`.

  Raises:
    UserError: no such name, module or function.
  """
  if name in REWARDS:
    return REWARDS[name]
  module, colon, function = name.partition(":")
  if not colon:
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(REWARDS)}"
    raise UserError(f"no reward is named {name!r}; {hint}, or give your own as module:function")
  try:
    found = getattr(importlib.import_module(module), function)
  except ModuleNotFoundError as error:
    raise UserError(f"reward {name!r}: no module named {error.name!r} can be imported") from None
  except (AttributeError, ValueError):
    raise UserError(f"reward {name!r}: {module!r} holds no {function!r}") from None
  except Exception as error:  # whatever the module does when it is imported
    raise UserError(
      f"reward {name!r}: importing {module!r} fails with {type(error).__name__}: {error}"
    ) from error
  if not callable(found):
    raise UserError(f"reward {name!r} is no function but {type(found).__name__}")
  _check_signature(name, found)
  return cast(Reward, found)


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


def values(reward: Reward, prompts: Iterable[str], answers: Iterable[str]) -> np.ndarray:
  """The reward of each (prompt, answer): float64 [B].

  Raises:
    UserError: the reward failed, or gave something else than a finite real number.
  """
  rewards = []
  for prompt, answer in zip(prompts, answers, strict=True):
    try:
      value = reward(prompt, answer)
    except Exception as error:
      name = getattr(reward, "__name__", type(reward).__name__)
      raise UserError(
        f"the reward {name} fails with {type(error).__name__}: {error}, for prompt {prompt!r} and"
        f" answer {answer!r}"
      ) from error
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      raise UserError(
        f"the reward gave {value!r} for prompt {prompt!r} and answer {answer!r};"
        " it must give one finite number"
      )
    rewards.append(number)
  return np.array(rewards, np.float64)
