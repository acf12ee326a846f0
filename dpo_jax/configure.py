"""Configurations from plain values: the arguments of `dpo_jax.fit`, and YAML or JSON files.

Sections and fields have the names of `defaults.py`. `--config=my.yaml` calls `get_config` here.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import numbers
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dpo_jax import defaults
from dpo_jax.structs import UserError
from dpo_jax.utils import config_flags, field_names, paths


def get_config(path: str) -> ConfigDict:
  """Returns the defaults with the fields of a YAML or JSON file, such as a run's config.json.

  Raises:
    UserError: the file is not YAML, or has a field or a value that is not known.
  """
  return update(defaults.get_config(), read(path), f"{path}: ")


def load(name: str) -> ConfigDict:
  """Returns the configuration that `--config=NAME` names, without overrides.

  Args:
    name: NAME, NAME:ARG, FILE.py, FILE.py:ARG or FILE.yaml.

  Raises:
    UserError: there is none.
  """
  try:
    path, *argument = config_flags.file_of(name).split(":", 1)
  except config_flags.RefusedError as error:
    raise UserError(str(error).removeprefix("--")) from None
  spec = importlib.util.spec_from_file_location("config_file", path)
  if spec is None or spec.loader is None:
    raise UserError(f"config={name}: no configuration in Python or YAML")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    inspect.signature(module.get_config).bind(*argument)
  except TypeError:
    raise UserError(f"config={name}: it takes no argument behind a colon") from None
  return module.get_config(*argument)


# Flags of the command that are no fields.
_FLAGS = ("workdir", "overwrite")


def update(
  config: ConfigDict, given: Mapping[str, Any], where: str = "", *, others: Sequence[str] = ()
) -> ConfigDict:
  """Sets fields of a configuration and locks it.

  Args:
    config: changed in place.
    given: values by the names of sections and fields, `{"loss": {"beta": 0.1}}` or
      `{"loss.beta": 0.1}`, or by short names, `{"beta": 0.1}`.
    where: what precedes an error, such as the name of the file.
    others: names that may be given beside the fields, for hints.

  Raises:
    UserError: a field does not exist or is given twice, or a value is of another kind.
  """
  flat = [*_flat(given, where)]
  name = dict(flat).get("loss.name")
  if isinstance(name, str) and ":" in name:  # a loss of the user's own has arguments of its own
    defaults.add_arguments(config.loss, name)
  config.lock()
  _refuse_unknown(config, [typed for typed, _ in flat], where, others)
  seen = set()
  for typed, value in flat:
    section, _, name = typed.rpartition(".")
    node: Any = config
    for part in section.split(".") if section else ():
      node = node[part]
    if typed in seen:
      raise UserError(f"{where}{typed} is given twice; keep one")
    seen.add(typed)
    node[name] = _converted(value, node, name, typed, where)
  return config


def _refuse_unknown(
  config: ConfigDict, names: Sequence[str], where: str, others: Sequence[str]
) -> None:
  """Refuses names that are no fields: the first with a hint, and all others in short.

  A file that was written for another trainer is then translated in one go.
  """
  fields, unknown = config_flags.fields_of(config), {}
  for typed in names:
    node: Any = config
    for place, part in enumerate(typed.split(".")):
      if not isinstance(node, ConfigDict):
        section = ".".join(typed.split(".")[:place])
        raise UserError(f"{where}{typed}: {section} has no fields of its own")
      if part not in node:
        unknown[typed] = node
        break
      node = node[part]
  if not unknown:
    return
  (first, node), *more = unknown.items()
  line = f"{where}there is no field {first}; {_hint(first, node, fields, others)}"
  rest = field_names.in_short([typed for typed, _ in more], fields, [*others, *_FLAGS])
  raise UserError(f"{line}{'.' if rest and not line.endswith('?') else ''}{rest}")


def _flat(given: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields every field with its value; short names are replaced by those of their fields."""
  sections = defaults.get_config()
  for key, value in given.items():
    if not isinstance(key, str):
      raise UserError(f"{where}{prefix}{key} is not the name of a field: names are texts")
    name = f"{prefix}{key}"
    # `model: DIR` is short for the field model.path, `model: {path: DIR}` is the section.
    if not isinstance(value, Mapping):
      yield field_names.SHORT.get(name, name), value
      continue
    node: Any = sections
    for part in name.split("."):
      node = node[part] if isinstance(node, ConfigDict) and part in node else None
    # A section without fields, such as model.scratch, takes any: it is set as a whole.
    is_open = isinstance(node, ConfigDict) and not len(node)
    # A section of another trainer has its hint as a whole, and an empty one would be overlooked.
    is_unknown = node is None and (
      not value or field_names.is_elsewhere(name) or field_names.reason(name)
    )
    if is_open or is_unknown or isinstance(node, str):
      yield name, value
    else:
      yield from _flat(value, where, f"{name}.")


def _hint(typed: str, node: ConfigDict, fields: Sequence[str], others: Sequence[str]) -> str:
  """Says which field was probably meant."""
  why = field_names.reason(typed)
  if why:
    return f"leave it out: {why}"
  found = field_names.suggest(typed, fields, [*others, *_FLAGS])
  if found == ["--workdir"] and not others:  # a file
    return "the folder of the run is named on the command line, --workdir=DIR"
  if found == ["--overwrite"] and not others:
    return "write --overwrite on the command line"
  if not found:
    return "there are: " + ", ".join(sorted(node))
  if found[0].startswith("--"):
    return f"did you mean {found[0].removeprefix('--')}?"
  shorts = {field: f" (short: {short})" for short, field in field_names.SHORT.items()}
  named = [
    field + (shorts.get(field.partition("=")[0], "") if field != "seed" else "")
    for field in found[:3]
  ]
  return f"did you mean {' or '.join(named)}?"


def _converted(value: Any, node: ConfigDict, name: str, typed: str, where: str) -> Any:
  """Returns a value as its field's type; numbers may be written as texts, such as 1e-6."""
  kind, now = node.get_type(name), node[name]
  if value is None:
    # As on the command line: an argument of a loss may always be taken back.
    if now is None or (typed.startswith("loss.") and typed != "loss.name"):
      return None
    usual = "its usual fields" if isinstance(now, ConfigDict) else repr(now)
    word = ", or write 'none'" if typed in field_names.NONE_IS_A_VALUE else ""
    raise UserError(f"{where}{typed} has no value; leave it out for {usual}{word}")
  found = None
  if isinstance(now, ConfigDict):
    found = ConfigDict(dict(value)) if isinstance(value, Mapping) else None
  elif kind is bool:
    texts = {"true": True, "false": False}
    found = texts.get(value.lower()) if isinstance(value, str) else value
    found = found if isinstance(found, bool) else None
  elif kind in (int, float):
    found = _number(value, kind)
  elif kind is str:
    found = _text(value, typed)
  if found is None:
    shown = repr(value)
    if len(shown) > 60 or shown.startswith("<"):
      shown = f"a {type(value).__name__}"
    raise UserError(f"{where}{typed} is {shown}; it must be {_wanted(kind, value, typed)}")
  return found


def _wanted(kind: type, value: Any, typed: str) -> str:
  """Says what the value of a field must be, and the way there from what was given."""
  if typed == "loss.name" and callable(value):
    return "a text: a function of your own is named as 'module:function'"
  if typed in ("data.path", "data.eval_path"):
    return "the path of a file: write the rows to a file, one JSON object per line"
  if typed in paths.FIELDS:
    return "the path of a folder"
  if typed == "model.remat":
    return "auto, none, dots or full"
  if kind is int and typed.rpartition(".")[2] in ("every", "sync_every", "warmup_steps"):
    return "an integer, a number of steps: neither a share of them nor a word"
  if kind is str and isinstance(value, bool):
    return "a text; YAML reads on, off, yes and no as true or false: write the word in quotes"
  what = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
  return what.get(kind, "a section with fields of its own")


def _number(value: Any, kind: type) -> float | int | None:
  """Returns a number, also one that was written as text; None for anything else."""
  if isinstance(value, bool):
    return None
  try:
    # YAML 1.1 has a point in every number with an exponent, and reads 1e-6 as a text.
    number = float(value) if isinstance(value, str | numbers.Real) else None
  except ValueError:
    return None
  if number is None or kind is float:
    return number
  if isinstance(value, numbers.Integral):
    return int(value)
  return int(number) if number.is_integer() else None


def _text(value: Any, typed: str) -> str | None:
  """Returns a text; also a path, and several texts with commas between them."""
  if isinstance(value, os.PathLike):
    value = os.fspath(value)
  if isinstance(value, Mapping) and typed == "data.template":
    return json.dumps(dict(value))
  if isinstance(value, Sequence) and not isinstance(value, str | bytes):
    parts = [_text(part, typed) for part in value]
    # A comma within a part would split it when the field is read.
    return None if any(p is None or "," in p for p in parts) else ",".join(map(str, parts))
  return value if isinstance(value, str) else None


# -- files -----------------------------------------------------------------------------------------


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads the fields of a YAML or JSON file.

  Raises:
    UserError: the file is not YAML (or JSON), or is no mapping from names to values.
  """
  # Not at the top: only those who write YAML wait for it.
  import yaml

  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".json"):
      found = json.loads(text, object_pairs_hook=_without_repeats)
    else:
      found = yaml.load(text, _loader())
  except OSError as error:
    raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
  except ValueError as error:  # JSON's own error names the line
    raise UserError(f"{path} cannot be read: {error}") from None
  except yaml.YAMLError as error:
    raise UserError(f"{path} is not YAML: {_yaml_problem(text, error)}") from None
  if not isinstance(found, dict | None):
    raise UserError(f"{path} contains a {type(found).__name__}; it must have lines `field: value`")
  return found or {}


def _yaml_problem(text: str, error: Any) -> str:
  """Returns what is wrong with a text that is not YAML, and in which line."""
  for number, line in enumerate(text.splitlines(), 1):
    if found := re.match(r"\s*([\w.]+)\s*=\s*(.*)", line):
      return f"line {number} is written with `=`; write `{found[1]}: {found[2]}`"
    if "\t" in line:
      return f"line {number} has a tab; YAML is indented by spaces"
  mark = getattr(error, "problem_mark", None)
  return f"{getattr(error, 'problem', error)}{f', line {mark.line + 1}' if mark else ''}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Makes a JSON object of its members, and refuses a name that stands twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
  return found


def _loader() -> type:
  """Returns YAML's safe loader, which refuses a key that stands twice; PyYAML takes the last."""
  import yaml

  class Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
      names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
      for place, (key, _) in enumerate(node.value):
        if isinstance(key, yaml.ScalarNode) and key.value in names[:place]:
          problem = f"{key.value} is given twice"
          raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
      return super().construct_mapping(node, deep)

  return Loader
