"""The command line of every command: flags are parsed, and what is wrong is said in one line.

A command defines absl flags and `main(argv)`, and is run by `cli.run`. Nothing here loads jax, so
that `--help` does not wait for it; commands import what is heavy inside `main`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import platform
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from dpo_jax.utils import interrupts, paths
from dpo_jax.utils.malloc import keep_freed_memory

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # a flag of `define_path` is one of the command that calls it
_HELP = ("--help", "-help", "-h", "--helpshort")


def run(
  main: Callable[[list[str]], Any],
  define_flags: Callable[[], None] | None = None,
  *,
  usage: str | None = None,
  arguments: int = 0,
) -> None:
  """Parses the command line `sys.argv`, calls `main(argv)` and exits.

  Args:
    main: the command; `argv` contains its name and the words that are not flags.
    define_flags: defines its flags; None if its module has done that when it was imported.
    usage: its help, before the flags; by default the docstring of its module.
    arguments: how many words it takes besides flags.

  Bad input (`UserError`, a file that cannot be read or written, an unknown flag or config key)
  prints `error: …` on stderr, one line, and exits 1. A mistake of the program keeps its traceback.
  """
  if define_flags is not None:
    define_flags()
  if any(argument in _HELP for argument in sys.argv[1:]):
    try:
      print(_help(main.__module__, usage), flush=True)
    except BrokenPipeError:
      leave_unread()
    sys.exit(0)
  interrupts.install()
  keep_freed_memory()
  # Before `main` imports jax, which reads the folder of its cache at that moment.
  enable_compilation_cache()
  try:
    app.run(lambda argv: _guarded(main, argv, arguments), flags_parser=_parse)
  except KeyboardInterrupt:  # also while a configuration is being imported
    interrupts.end()
  except Exception:
    # Ctrl-C may come out of a library as another error.
    if not interrupts.is_pending():
      raise
    interrupts.end()


def fail(message: object) -> NoReturn:
  """Prints one line on stderr and exits 1."""
  # A message of a library may have line breaks; here it is one line.
  print("error: " + " ".join(str(message).split()), file=sys.stderr)
  sys.exit(1)


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs, under `$JAX_COMPILATION_CACHE_DIR` or the user's cache.

  The default folder is named after the processor: a program compiled for one CPU need not run on
  another that mounts the same home.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = base / "dpo_jax" / f"xla-{_processor()}"
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: compile anew each time
      return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  # Read when jax is imported; a jax that is imported already is configured directly.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
  if "jax" in sys.modules:
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
      "jax_persistent_cache_min_compile_time_secs",
      float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
    )


def _processor() -> str:
  """Returns eight digits that name this kind of processor and what it can do."""
  about = platform.machine()
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    about += "".join(
      sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )
  except OSError:  # not Linux
    about += platform.processor()
  return hashlib.sha256(about.encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------- running


def _guarded(main: Callable[[list[str]], Any], argv: list[str], arguments: int) -> Any:
  """Calls `main`; what the user can mend becomes one line."""
  if len(argv) > 1 + arguments:
    unknown = argv[1 + arguments]
    fail(f"unexpected argument {unknown!r}; every option is written --name=value (see --help)")
  # The flag itself cannot tell: a library that is imported may have set it.
  if not any(x.lstrip("-").startswith("verbosity") for x in sys.argv[1:]):
    logging.set_verbosity(logging.WARNING)  # the libraries below narrate every file they open
  try:
    return main(argv)
  except BrokenPipeError:
    leave_unread()
  except OSError as error:
    # Raised by a library, not by the system: a mistake of the program.
    if error.filename is None and error.errno is None:
      raise
    fail(os_error_line(error))
  except Exception as error:
    from dpo_jax.structs import UserError  # loads jax, which `--help` should not wait for

    if not isinstance(error, UserError):
      raise
    fail(error)


def leave_unread() -> NoReturn:
  """Exits without a word, since the reader of the output (`| head`) has what it wanted."""
  # Python would otherwise complain when it flushes what is left.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  # 128 + SIGPIPE, the status that a shell gives a program whose reader has left.
  sys.exit(141)


def os_error_line(error: OSError) -> str:
  """Describes what the system refused, and where: `/data/x.jsonl: no such file or directory`."""
  reason = (error.strerror or str(error)).lower()
  return f"{error.filename}: {reason}" if error.filename is not None else reason


# ---------------------------------------------------------------------------- commands to print


def this_command(*leave_out: str) -> str | None:
  """Returns the command line of this process, to be pasted into a shell; None outside a command.

  Args:
    leave_out: flags that are left out.
  """
  program = sys.argv[0]
  if program.endswith(os.path.join("dpo_jax", "train.py")):
    words = ["python", "-m", "dpo_jax.train"]
  elif program.split(" ")[0] == "dpo-jax" or program.startswith("python -m dpo_jax"):
    words = program.split(" ")
  else:
    return None
  given = [x for x in sys.argv[1:] if x.lstrip("-").split("=")[0] not in leave_out]
  return shlex.join([*words, *given])


def other_command(name: str, *arguments: str) -> str:
  """Returns the command line of another command, called in the way in which this one was.

  Args:
    name: of the command, such as `sample`.
    arguments: its flags.
  """
  script = pathlib.Path("scripts", f"{name}.py")
  words = ["python", "-m", "dpo_jax", name]
  if sys.argv[0].startswith("dpo-jax"):
    words = ["dpo-jax", name]
  elif script.is_file() and pathlib.Path("dpo_jax").is_dir():  # in the project's folder
    words = ["python", str(script)]
  return shlex.join([*words, *arguments])


# ---------------------------------------------------------------------------- flags


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses flags as absl does, but prints one line for whatever the user wrote wrongly."""
  _accept_natural_numbers_and_none()
  argv = _with_paths_of_configurations(argv)
  try:
    rest = FLAGS(argv)
    _refuse_none()
    return rest
  except flags.Error as error:
    fail(_flag_line(str(error)))
  except SyntaxError as error:
    # Only in the user's configuration: a syntax error in our own code is no mistake of the user.
    given = {os.path.abspath(path.split(":")[0]) for *_, path in _given_configurations(argv)}
    if os.path.abspath(error.filename or "") not in given:
      raise
    fail(f"{error.filename}: no configuration in Python: {error.msg}, line {error.lineno}")
  except Exception as error:
    unknown = _unknown_override(argv)
    if unknown:
      fail(unknown)
    from dpo_jax.structs import UserError

    if not isinstance(error, UserError):
      raise
    fail(error)


def _flag_line(message: str) -> str:
  """Rewords the messages of absl that a newcomer could not act on."""
  if "must have a value other than None" in message:
    name = message.split("--")[1].split("=")[0]
    return f"--{name} is required (see --help)"
  if "get_config() takes 0 positional arguments" in message:
    return f"{message.split(': ')[0].removeprefix('flag ')}: it takes no argument behind a colon"
  message = message.replace("('Non-boolean argument to boolean flag', ", "not true or false: ")
  message = message.replace("invalid literal for int() with base 10", "not an integer")
  message = message.replace("could not convert string to float", "not a number")
  return message.replace(" ?", "?").rstrip(")") + ("" if "--help" in message else " (see --help)")


def _config_library() -> Any:
  """Returns ml_collections' module of flags where the command uses it, else None."""
  return sys.modules.get("ml_collections.config_flags.config_flags")


def _config_names() -> list[str]:
  """Lists the flags that are ml_collections configurations."""
  library = _config_library()
  return [name for name in FLAGS if library.is_config_flag(FLAGS[name])] if library else []


def shipped_configurations() -> dict[str, pathlib.Path]:
  """Finds the configurations that come with the package: their files, by name."""
  package = pathlib.Path(__file__).parents[1]
  # An installed package contains them as `dpo_jax.configs`; in a checkout they lie beside it.
  inside = package / "configs"
  folder = inside if inside.is_dir() else package.parent / "configs"
  return {path.stem: path for path in sorted(folder.glob("*.py"))}


def _given_configurations(argv: Sequence[str]) -> Iterator[tuple[str, int, str]]:
  """Finds the configurations of a command line: a flag, the place of its value, and the value."""
  for name in _config_names():
    for place, argument in enumerate(argv):
      flag, equals, value = argument.partition("=")
      if flag not in (f"--{name}", f"-{name}"):
        continue
      if equals:
        yield name, place, value
      elif place + 1 < len(argv):
        yield name, place + 1, argv[place + 1]


def _with_paths_of_configurations(argv: Sequence[str]) -> list[str]:
  """Replaces names of configurations on a command line by their files; a file that exists wins.

  `--config=preferences:ARG` becomes `--config=/…/configs/preferences.py:ARG`.
  """
  found = list(argv)
  for name, place, value in _given_configurations(argv):
    path, colon, argument = value.partition(":")
    if path.startswith("~"):
      path = os.path.expanduser(path)
      found[place] = argv[place].removesuffix(value) + f"{path}{colon}{argument}"
    if os.path.isfile(path):
      continue
    shipped = shipped_configurations()
    if path not in shipped:
      fail(f"--{name}={value}: {_no_configuration(path, shipped)}")
    found[place] = argv[place].removesuffix(value) + f"{shipped[path]}{colon}{argument}"
  return found


def _no_configuration(path: str, shipped: Iterable[str]) -> str:
  """Explains why there is no configuration at a path, and lists those there are."""
  near = difflib.get_close_matches(path, shipped, n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  what = "a folder" if os.path.isdir(path) else "no such file"
  return f"{what}; {hint}configurations are files, or one of {', '.join(shipped)}"


def _unknown_override(argv: Sequence[str]) -> str | None:
  """Describes the first `--config.a.b=…` that names no field, with the nearest one that exists."""
  for name, _, path in _given_configurations(argv):
    try:
      config = _config_library().ConfigFileFlagParser(name).parse(path)
    except Exception:  # the configuration itself is at fault, and says so
      continue
    for argument in argv:
      written = re.match(rf"--?(?:no)?{name}\.([^=]+)", argument)
      if written is None:
        continue
      node, seen = config, name
      for part in written[1].split("."):
        if not hasattr(node, "keys") or part not in node:
          return _no_such_field(written[0], part, node, seen)
        node, seen = node[part], f"{seen}.{part}"
  return None


def _no_such_field(written: str, part: str, node: Any, seen: str) -> str:
  if not hasattr(node, "keys"):
    return f"{written}: {seen} is a value and has no field {part!r}"
  near = difflib.get_close_matches(part, list(node), n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}?" if near else "there are: " + ", ".join(sorted(node))
  return f"{written}: {seen} has no field {part!r}; {hint}"


def _refuse_none() -> None:
  """Refuses None as a value, except where it means `not given`.

  That is where the configuration itself has it, and for every argument of a loss: a configuration
  may set one that another loss does not read.
  """
  library = _config_library()
  for name in _config_names():
    config = FLAGS[name].value
    if config is None or not library.get_override_values(FLAGS[name]):
      continue
    path = library.get_config_filename(FLAGS[name])
    # Read again, as it is without the overrides.
    before = library.ConfigFileFlagParser(name).parse(path)
    for field in library.get_override_values(FLAGS[name]):
      now, then = config, before
      for part in field.split("."):
        now, then = now[part], then[part]
      argument = field.startswith("loss.") and field != "loss.name"
      if now is None and then is not None and not argument:
        kind = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
        fail(
          f"--{name}.{field}=None: {field} needs {kind.get(type(then), 'a value')};"
          f" leave the flag out for {then!r}"
        )


def _accept_natural_numbers_and_none() -> None:
  """Lets config overrides say `1e3` for an integer and `None` for an absent value."""
  library = _config_library()
  if library is not None:
    for kind, parser in ((int, _Integer()), (float, _Float()), (str, _Text())):
      library.register_flag_parser_for_type(kind, parser)


def _is_none(value: object) -> bool:
  return isinstance(value, str) and value in ("None", "none", "null")


class _Integer(flags.IntegerParser):
  def parse(self, argument: Any) -> Any:
    if _is_none(argument):
      return None
    # 1e3 is a number to everybody who writes a configuration; 0x1e is hexadecimal, with no
    # exponent.
    if isinstance(argument, str) and "e" in argument.lower() and "x" not in argument:
      number = float(argument)
      if not number.is_integer():
        raise ValueError(f"not an integer: {argument!r}")
      return int(number)
    return super().parse(argument)


class _Float(flags.FloatParser):
  def parse(self, argument: Any) -> Any:
    return None if _is_none(argument) else super().parse(argument)


class _Text(flags.ArgumentParser):
  def parse(self, argument: Any) -> Any:
    return None if _is_none(argument) else super().parse(argument)


def define_path(name: str, default: str | None, help: str, **given: Any) -> None:
  """Defines a flag whose value is a path, in which a leading `~` is the home folder."""
  flags.DEFINE(_Path(), name, default, help, serializer=flags.ArgumentSerializer(), **given)


class _Path(flags.ArgumentParser):
  def parse(self, argument: Any) -> Any:
    return paths.expand(super().parse(argument) or "")


# ---------------------------------------------------------------------------- help


def _help(module: str, usage: str | None) -> str:
  """Returns the usage of the command in `module`, then its flags with their defaults."""
  # absl files the flags of the main program under its path.
  own = FLAGS.get_key_flags_for_module(sys.argv[0] if module == "__main__" else module)
  rows = [(_shown(flag), (flag.help or "") + _default(flag)) for flag in own]
  rows += [
    (f"--{name}.a.b=VALUE", "sets field a.b of the configuration") for name in _config_names()
  ]
  width = max((len(left) for left, _ in rows), default=0)
  lines = [
    textwrap.fill(
      right,
      max(shutil.get_terminal_size().columns, width + 40),
      initial_indent=f"  {left:<{width}}  ",
      subsequent_indent=" " * (width + 4),
    )
    for left, right in rows
  ]
  text = (usage or sys.modules[module].__doc__ or "").strip()
  return "\n".join([text, "", "options:", *lines])


def _default(flag: flags.Flag) -> str:
  if any("other than None" in validator.message for validator in flag.validators):
    return " (required)"
  if flag.default in (None, "", False):
    return ""
  return f" (default: {str(flag.default_as_str).strip(chr(39))})"


def _shown(flag: flags.Flag) -> str:
  if flag.boolean:
    return f"--[no]{flag.name}"
  kind = {"int": "N", "float": "X"}.get(flag.flag_type(), "")
  return f"--{flag.name}={kind or flag.name.upper()}"
