"""The configuration on a command line: names, YAML files, short flags, and hints for what is wrong.

`--config=NAME --config.section.field=VALUE` is parsed by ml_collections. What is here prepares the
words for it, and explains afterwards what it did not understand. A command that has no
configuration does not load ml_collections.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import flags

from dpo_jax.utils import field_docs, field_names

FLAGS = flags.FLAGS
# Files that contain the fields themselves, not a function that makes them.
PLAIN = (".yaml", ".yml", ".json")
_DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")


class RefusedError(Exception):
  """A mistake on the command line, described in one line."""


def library() -> Any:
  """Returns ml_collections' module of flags where the command uses it, else None."""
  return sys.modules.get("ml_collections.config_flags.config_flags")


def names() -> list[str]:
  """Lists the flags that are ml_collections configurations."""
  module = library()
  return [name for name in FLAGS if module.is_config_flag(FLAGS[name])] if module else []


def requested(field: str) -> str | None:
  """Returns what the command line sets a field of its configuration to; None if it does not.

  It can be asked before flags are parsed, while the configuration itself is made.
  """
  found = None
  for place, argument in enumerate(sys.argv[1:], 1):
    flag, equals, value = argument.partition("=")
    if flag.lstrip("-") in {f"{name}.{field}" for name in names()}:
      found = value if equals else "".join(sys.argv[place + 1 : place + 2])
  return found


def shipped() -> dict[str, pathlib.Path]:
  """Finds the configurations that come with the package: their files, by name."""
  package = pathlib.Path(__file__).parents[1]
  # An installed package contains them as `dpo_jax.configs`; in a checkout they lie beside it.
  inside = package / "configs"
  folder = inside if inside.is_dir() else package.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}


def file_of(value: str, name: str = "config") -> str:
  """Replaces the name of a configuration by its Python file; a file that exists wins.

  `preferences:ARG` becomes `/…/configs/preferences.py:ARG`, and `my.yaml` an argument of
  `dpo_jax/configure.py`, which reads such files.

  Raises:
    RefusedError: there is no such configuration.
  """
  path, colon, argument = value.partition(":")
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    if path.endswith(_DATA):
      raise RefusedError(
        f"--{name}={value}: a file of data; did you mean --data={value}? Configurations are files"
        " (.py, .yaml)"
      )
    if not path.endswith(PLAIN):
      return f"{path}{colon}{argument}"
    if colon:
      raise RefusedError(f"--{name}={value}: it takes no argument behind a colon")
    return f"{pathlib.Path(__file__).parents[1] / 'configure.py'}:{path}"
  files = shipped()
  if path not in files:
    raise RefusedError(f"--{name}={value}: {_no_configuration(path, files)}")
  return f"{files[path]}{colon}{argument}"


def _no_configuration(path: str, shipped: Iterable[str]) -> str:
  """Explains why there is no configuration at a path, and lists those there are."""
  near = difflib.get_close_matches(path, shipped, n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  what = "a folder" if os.path.isdir(path) else "no such file"
  stored = os.path.join(path, "config.json")
  if os.path.isfile(stored):
    hint = f"did you mean {stored}? "
  return f"{what}; {hint}configurations are files (.py, .yaml), or one of {', '.join(shipped)}"


# ---------------------------------------------------------------------------- before parsing


def expand(words: Sequence[str], default: str = "") -> tuple[list[str], dict[str, str]]:
  """Rewrites the words of a command line so that ml_collections understands them.

  The order is important: 1. hyphens in the names of flags become underscores; 2. short flags become
  overrides, `--beta 0.1` `--config.loss.beta=0.1`; 3. the configuration moves to the front, since
  overrides are refused before it; 4. its name becomes a file.

  Args:
    words: the command line without the name of the program.
    default: name of the configuration where none is given; "" for none.

  Returns:
    The new words, and the short flags that were used: `--beta` by `--config.loss.beta`.

  Raises:
    RefusedError: a field is set twice, a short flag has no value, or there is no such
      configuration.
  """
  words = [_with_underscores(word) for word in words]
  if not names():
    return words, {}
  (name, *_) = names()
  words, used = _without_short_flags(words, name)
  front, rest = [], list(words)
  for place, count, value in [*given(words, name)][::-1]:
    del rest[place : place + count]
    front.insert(0, f"--{name}={file_of(value, name)}")
  if not front and default:
    front = [f"--{name}={file_of(default, name)}"]
  return front + rest, used


def given(words: Sequence[str], name: str) -> Iterator[tuple[int, int, str]]:
  """Finds the configurations among words: their place, how many words they are, the value."""
  for place, word in enumerate(words):
    flag, equals, value = word.partition("=")
    if flag in (f"--{name}", f"-{name}"):
      if equals:
        yield place, 1, value
      elif place + 1 < len(words):
        yield place, 2, words[place + 1]


def _with_underscores(word: str) -> str:
  """Returns a flag by its name here where it was written with hyphens: `--batch-size=8`."""
  found = re.match(r"(--?)([a-z][a-z_]*-[a-z_-]+)(?==|$)", word)
  if found is None:
    return word
  name = found[2].replace("-", "_")
  known = name in field_names.SHORT if names() else False
  return word.replace(found[2], name, 1) if known or name in FLAGS else word


def _without_short_flags(words: Sequence[str], name: str) -> tuple[list[str], dict[str, str]]:
  """Replaces short flags by overrides; see `expand`."""
  found, used, skip = [], {}, False
  for place, word in enumerate(words):
    if skip:
      skip = False
      continue
    flag, equals, value = word.partition("=")
    short = re.sub("^--?", "", flag) if flag.startswith("-") else ""
    # A flag of the command itself has its own meaning.
    if short not in field_names.SHORT or short in FLAGS:
      found.append(word)
      continue
    if not equals:
      value, skip = words[place + 1] if place + 1 < len(words) else "--", True
      if value == "=":
        then = "".join(words[place + 2 : place + 3])
        raise RefusedError(f"--{short} = {then}: write it without spaces, --{short}={then}")
      if value.startswith("--"):
        raise RefusedError(f"--{short} needs a value: --{short}=VALUE")
    long = f"--{name}.{field_names.SHORT[short]}"
    used[long] = f"--{short}"
    found.append(f"{long}={value}")
  for word in words:
    long = re.sub("^--?", "--", word.split("=")[0])
    if long in used:
      raise RefusedError(f"{used[long]} and {long} are the same field; give one of them")
  return found, used


# ---------------------------------------------------------------------------- hints


def unknown_override(argv: Sequence[str]) -> str | None:
  """Describes the first `--config.a.b=…` that names no field, with the nearest one that exists."""
  for name, config, written, field, value in _overrides(argv):
    node, seen = config, name
    for part in field.split("."):
      if not hasattr(node, "keys"):
        return f"{written}: {seen} is a value and has no field {part!r}"
      if part not in node:
        if seen == f"{name}.data.fields" and value in node:
          return (
            f"{written}: our name of a field comes first, then that in the rows:"
            f" --{seen}.{value}={part}"
          )
        hint = _hint(field, part, node, seen, fields_of(config), name)
        return f"{written}: {seen} has no field {part!r}; {hint}"
      node, seen = node[part], f"{seen}.{part}"
  return None


def section_given_value(argv: Sequence[str]) -> str | None:
  """Describes the first `--config.SECTION=VALUE`, which names no field; None if there is none."""
  for name, config, written, field, value in _overrides(argv):
    if not hasattr(config.get(field), "keys"):
      continue
    if field in field_names.SHORT:
      meant = f"did you mean --{field}={value}?"
    else:
      meant = f"set its fields by --{name}.{field}.FIELD=VALUE (see --help=all)"
    return f"{written}={value}: {field} is a section; {meant}"
  return None


def _overrides(argv: Sequence[str]) -> Iterator[tuple[str, Any, str, str, str]]:
  """Yields every `--config.a.b=c` of a configuration that can be read.

  Each is the name of its configuration, that configuration without overrides, `--config.a.b`,
  `a.b` and `c`.
  """
  for name in names():
    config = _parsed(argv, name)
    for argument in argv if config is not None else ():
      written, _, value = argument.partition("=")
      found = re.fullmatch(rf"--?(?:no)?{name}\.(.+)", written)
      if found:
        yield name, config, written, found[1], value


def _parsed(argv: Sequence[str], name: str) -> Any:
  """Returns the configuration that a command line names, without overrides; None if it fails."""
  for *_, path in given(argv, name):
    try:
      return library().ConfigFileFlagParser(name).parse(path)
    except Exception:  # the configuration itself is at fault, and says so
      return None
  return None


def fields_of(config: Any, prefix: str = "") -> list[str]:
  """Lists the dotted names of all fields of a configuration."""
  found = []
  for key, value in config.items():
    own = fields_of(value, f"{prefix}{key}.") if hasattr(value, "keys") else []
    found += own or [f"{prefix}{key}"]
  return found


def _hint(
  typed: str, part: str, node: Any, seen: str, fields: Sequence[str], name: str = "config"
) -> str:
  """Says what was probably meant by a field that does not exist.

  Args:
    typed: the field as it was written.
    part: the first part of it that does not exist.
    node, seen: the section in which it does not exist, and its name.
    fields: all fields.
    name: of the configuration's flag.
  """
  why = field_names.reason(typed)
  if why:
    return f"leave it out: {why}"
  found = field_names.suggest(typed, fields, _own_flags())
  if found:
    return _meant(typed, found, name, short_first=False)
  near = difflib.get_close_matches(part, list(node), n=1, cutoff=0.5)
  if near:
    return f"did you mean --{seen}.{near[0]}?"
  return "there are: " + ", ".join(sorted(node))


def _meant(typed: str, found: Sequence[str], name: str, *, short_first: bool) -> str:
  """Formats suggestions: `did you mean --lr (short for --config.optimizer.learning_rate)?`."""
  parts = []
  for field in found[:3]:
    short = field_names.flag_of(field, name)
    long = short if field.startswith("--") else f"--{name}.{field}"
    if short == long:
      parts.append(long)
    elif short_first:
      parts.append(f"{short} (short for {long})")
    else:
      parts.append(f"{long} (short: {short})")
  line = f"did you mean {' or '.join(parts)}?"
  # The same word may mean something else elsewhere: what it means here is said.
  about = field_docs.read().get(found[0].partition("=")[0])
  if field_names.is_elsewhere(typed) and about:
    line += f" It is: {about.phrase}"
  return line


def default_fields() -> list[str]:
  """Lists the fields of the shipped configuration `preferences`: every field that there is."""
  return fields_of(library().ConfigFileFlagParser("config").parse(str(shipped()["preferences"])))


def unknown_flag(flag: str, argv: Sequence[str]) -> str:
  """Describes a flag that the command does not have, with what was probably meant."""
  line, own = f"--{flag}: no such flag", _own_flags()
  for name in names():
    why = field_names.reason(flag)
    config = _parsed(argv, name)
    if why:
      rest = ""
      if config is not None:
        rest = field_names.in_short(_unknown_too(flag, argv), fields_of(config), own, name)
      return f"{line}; leave it out: {why}{'.' if rest else ''}{rest}"
    if flag == "fields":
      return f"{line}; did you mean --{name}.data.fields.prompt=NAME?"
    if config is not None:
      fields = fields_of(config)
      found = field_names.suggest(flag, fields, own)
      if found:
        line += f"; {_meant(flag, found, name, short_first=True)}"
        rest = field_names.in_short(_unknown_too(flag, argv), fields, own, name)
        return f"{line}{'.' if rest and not line.endswith('?') else ''}{rest}"
  if not names() and (why := _of_another_command(flag, own)):
    return f"{line}; {why}"
  found = field_names.suggest(flag, (), own)
  return f"{line}; did you mean {found[0]}?" if found else f"{line} (see --help)"


def _unknown_too(flag: str, argv: Sequence[str]) -> list[str]:
  """Lists the flags of a command line, behind one that is unknown, that are unknown as well."""
  typed = [word[2:].partition("=")[0] for word in argv if word.startswith("--") and len(word) > 2]
  names_in_order = dict.fromkeys(name for name in typed if "." not in name)
  known = {*FLAGS, *(f"no{name}" for name in FLAGS), *field_names.SHORT, "help"}
  return [name for name in names_in_order if name != flag and name not in known]


def _of_another_command(flag: str, own: Sequence[str]) -> str | None:
  """Says what to write in place of a flag of training, in a command that has no configuration."""
  if flag.startswith("config.data.fields.") and "fields" in own:
    return f"did you mean --fields {flag.rpartition('.')[2]}=NAME?"
  if flag.startswith("config."):
    return "this command has no configuration (see --help)"
  if flag == "workdir" and "model" in own:
    return "did you mean --model? The model of a run is its folder export"
  if flag == "model" and "workdir" in own:
    return "did you mean --workdir, the folder of a run?"
  return None


def _own_flags() -> list[str]:
  """Lists the flags of the command, not overrides of a configuration, nor absl's own."""
  modules = FLAGS.flags_by_module_dict().items()
  absl = {flag.name for module, found in modules if module.startswith("absl.") for flag in found}
  return [flag for flag in FLAGS if "." not in flag and len(flag) > 2 and flag not in absl]


def unexpected_word(word: str) -> str:
  """Describes a word that is no flag, with the flag that was probably meant."""
  if hint := _pasted(word):
    return f"unexpected argument {word!r}; {hint}"
  hint = "every option is written --name=value (see --help)"
  path, own = pathlib.Path(word), _own_flags()
  takes = {short for short in field_names.SHORT if names() or short in own}
  if (path / "config.json").is_file() and "model" in takes:
    hint = f"did you mean --model={word}?"
  elif path.is_file() and not word.endswith((".py", *PLAIN)) and "data" in takes:
    hint = f"did you mean --data={word}?"
  elif word in takes:
    hint = f"did you mean --{word}=VALUE?"
  elif names():
    (name, *_) = names()
    field, equals, value = word.partition("=")
    if word.partition(":")[0] in shipped() or word.endswith((".py", *PLAIN)):
      hint = f"did you mean --{name}={word}?"
    elif equals and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", field):
      found = field_names.suggest(field, [*field_docs.read()])
      known = found[0] if found else field
      hint = f"did you mean {field_names.flag_of(known, name)}={value}?"
  return f"unexpected argument {word!r}; {hint}"


def _pasted(word: str) -> str:
  """Explains a word that a command has from a page or an editor; "" for other words."""
  if not word.strip(" \\"):
    return "a backslash that continues a line must be its last character, without a space behind it"
  if word[0] in "\u2010\u2011\u2012\u2013\u2014\u2212":
    meant = word.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2212")
    return f"its dash is not a hyphen: did you mean --{meant}?"
  return ""


# ---------------------------------------------------------------------------- values


def settle_none() -> None:
  """Reads the words for None among the values of overrides, or refuses them.

  None means `not given`. It may stand where the configuration itself has it, and for every argument
  of a loss: a configuration may set one that another loss does not read. A text is only known as
  such a word here, since a field may have "none" among its values.

  Raises:
    RefusedError: names the field and the kind of value that it needs.
  """
  module = library()
  for name in names():
    config = FLAGS[name].value
    if config is None or not module.get_override_values(FLAGS[name]):
      continue
    path = module.get_config_filename(FLAGS[name])
    # Read again, as it is without the overrides.
    before = module.ConfigFileFlagParser(name).parse(path)
    for field in module.get_override_values(FLAGS[name]):
      node, then = config, before
      *sections, key = field.split(".")
      for part in sections:
        node, then = node[part], then[part]
      now, then = node[key], then[key]
      is_word = field in field_names.NONE_IS_A_VALUE
      if is_none(now) and not (is_word and now == "none"):
        now = node[key] = None
      argument = field.startswith("loss.") and field != "loss.name"
      if now is None and then is not None and not argument:
        kind = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
        way = f"leave the flag out for {then!r}{', or write none' if is_word else ''}"
        raise RefusedError(
          f"--{name}.{field}=None: {field} needs {kind.get(type(then), 'a value')}; {way}"
        )


def accept_natural_numbers_and_none() -> None:
  """Lets config overrides say `1e3` for an integer and `None` for an absent value."""
  module = library()
  if module is not None:
    for kind, parser in ((int, _Integer()), (float, _Float())):
      module.register_flag_parser_for_type(kind, parser)


def is_none(value: object) -> bool:
  """Returns True for what means `not given` on a command line."""
  return isinstance(value, str) and value in ("None", "none", "null")


class _Integer(flags.IntegerParser):
  def parse(self, argument: Any) -> Any:
    if is_none(argument):
      return None
    # 1e3 is a number to everybody who writes a configuration; 0x1e is hexadecimal, with no
    # exponent.
    if isinstance(argument, str) and "e" in argument.lower() and "x" not in argument:
      try:
        number = float(argument)
      except ValueError:
        number = 0.5
      if not number.is_integer():
        raise ValueError(f"not an integer: {argument!r}")
      return int(number)
    return super().parse(argument)


class _Float(flags.FloatParser):
  def parse(self, argument: Any) -> Any:
    return None if is_none(argument) else super().parse(argument)
