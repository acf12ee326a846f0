"""Messages about flags: those of absl in our words, and faults of configurations."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence

from dpo_jax.utils import config_flags


def of_configuration(error: Exception, argv: Sequence[str]) -> str:
  """Describes an error that a configuration in Python has itself; "" for other errors."""
  files = _configurations(argv)
  if isinstance(error, SyntaxError) and os.path.abspath(error.filename or "") in files:
    return f"{error.filename}: no configuration in Python: {error.msg}, line {error.lineno}"
  if isinstance(error, AttributeError) and error.name == "get_config":
    return f"{files[0]}: no configuration in Python, which has a function get_config()"
  if isinstance(error, ModuleNotFoundError):
    # Imported by the configuration, not by a module of ours.
    last = traceback.extract_tb(error.__traceback__)[-1]
    if os.path.abspath(last.filename) in files:
      return f"{last.filename}: {error}, line {last.lineno}"
  return ""


def _configurations(argv: Sequence[str]) -> list[str]:
  """Lists the files of the configurations that a command line names."""
  return [
    os.path.abspath(path.split(":")[0])
    for name in config_flags.names()
    for *_, path in config_flags.given(argv, name)
  ]


def reworded(message: str) -> str:
  """Rewords the messages of absl that a newcomer could not act on."""
  if "must have a value other than None" in message:
    name = message.split("--")[1].split("=")[0]
    return f"--{name} is required (see --help)"
  if "get_config() takes 0 positional arguments" in message:
    return f"{message.split(': ')[0].removeprefix('flag ')}: it takes no argument behind a colon"
  if message.startswith("Missing value for flag "):
    name = message.removeprefix("Missing value for flag ").strip()
    return f"{name} needs a value: {name}=VALUE"
  if "Error whilst parsing config file" in message:
    name = message.removeprefix("flag ").split(":")[0]
    return f"{name}: its get_config() fails: {message.rpartition('Error: ')[2]}"
  message = message.removeprefix("flag ").replace(" ?", "?")
  message = message.replace("('Non-boolean argument to boolean flag', ", "not true or false: ")
  message = message.replace("invalid literal for int() with base 10", "not an integer")
  message = message.replace("could not convert string to float", "not a number")
  # --lr=1e-6.: not a number: '1e-6.'
  message = re.sub(r": (not (?:a|an|true) [a-z ]+): '.*'\)?$", _rule, message)
  message = re.sub(r": \S+ is not a non-negative (number|integer)$", _rule, message)
  message = re.sub(r": \S+ is not a positive (number|integer)$", _rule, message)
  message = re.sub(
    r": \S+ is not (?:integer|number) >= (\S+)$", r": it must be \1 or above", message
  )
  return message


_RULES = {
  "not an integer": "not an integer; write it as 1000 or 1e3",
  "not a number": "not a number; write it as 0.1 or 1e-6",
  "not true or false": "not true or false",
}


def _rule(found: re.Match[str]) -> str:
  """Returns the rule that a value has broken, in place of absl's words."""
  if "non-negative" in found[0]:
    return ": it must be 0 or above"
  if "positive" in found[0]:
    return ": it must be above 0"
  return f": {_RULES.get(found[1], found[1])}"
