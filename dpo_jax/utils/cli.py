"""The command line of every command: flags are parsed, and what is wrong is said in one line.

A command defines absl flags and `main(argv)`, and is run by `cli.run`. Nothing here loads jax, so
that `--help` does not wait for it; commands import what is heavy inside `main`.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from dpo_jax.utils import (
  config_flags,
  field_docs,
  field_names,
  flag_messages,
  interrupts,
  messages,
  paths,
)
from dpo_jax.utils.malloc import keep_freed_memory

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # a flag of `define_path` is one of the command that calls it
# Commands that are not named as their script.
_SCRIPTS = {"convert": "convert_hf"}
_typed: dict[tuple[str, ...], list[str]] = {}  # expanded arguments -> as they were typed
_HELP = ("--help", "-help", "-h", "--helpshort")
_HELP_ALL = ("--help=all", "-help=all", "--helpfull", "-helpfull")


def run(
  main: Callable[[list[str]], Any],
  define_flags: Callable[[], None] | None = None,
  *,
  usage: str | None = None,
  arguments: int = 0,
  config: str = "",
) -> None:
  """Parses the command line `sys.argv`, calls `main(argv)` and exits.

  Args:
    main: the command; `argv` contains its name and the words that are not flags.
    define_flags: defines its flags; None if its module has done that when it was imported.
    usage: its help, before the flags; by default the docstring of its module.
    arguments: how many words it takes besides flags.
    config: name of the configuration where the command line names none.

  Bad input (`UserError`, a file that cannot be read or written, an unknown flag or config key)
  prints `error: …` on stderr, one line, and exits 1. A mistake of the program keeps its traceback.
  """
  if define_flags is not None:
    define_flags()
  everything = any(argument in _HELP_ALL for argument in sys.argv[1:])
  if everything or any(argument in _HELP for argument in sys.argv[1:]):
    try:
      print(_help(main.__module__, usage, config, everything), flush=True)
    except BrokenPipeError:
      leave_unread()
    sys.exit(0)
  interrupts.install()
  keep_freed_memory()
  # Before `main` imports jax, which reads the folder of its cache at that moment.
  enable_compilation_cache()
  try:
    # In place, since ml_collections looks for overrides in `sys.argv`.
    typed = sys.argv[1:]
    sys.argv[1:], short = config_flags.expand(typed, config)
    _typed[tuple(sys.argv[1:])] = typed
  except config_flags.RefusedError as error:
    fail(error)
  try:
    app.run(
      lambda argv: _guarded(main, argv, arguments), flags_parser=lambda argv: _parse(argv, short)
    )
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
  messages.show("error: " + " ".join(str(message).split()))
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
    fail(config_flags.unexpected_word(argv[1 + arguments]))
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
    if line := _no_device(error):
      fail(line)
    from dpo_jax.structs import UserError  # loads jax, which `--help` should not wait for

    if not isinstance(error, UserError):
      raise
    fail(error)


def _no_device(error: Exception) -> str:
  """Describes devices that JAX_PLATFORMS names and JAX does not find; "" for other errors."""
  asked, frame = os.environ.get("JAX_PLATFORMS"), error.__traceback__
  while frame is not None and frame.tb_next is not None:
    frame = frame.tb_next
  where = frame.tb_frame.f_globals.get("__name__") if frame is not None else None
  # JAX raises errors of several kinds there, one of them without a word.
  if not asked or where != "jax._src.xla_bridge":
    return ""
  return (
    f"the environment variable JAX_PLATFORMS is {asked!r}, and JAX finds no such devices here;"
    " unset it to take those that there are, or install JAX for yours (requirements-gpu.txt,"
    " requirements-tpu.txt)"
  )


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
  typed = _typed.get(tuple(sys.argv[1:]), sys.argv[1:])
  given = [x for x in typed if x.lstrip("-").split("=")[0] not in leave_out]
  return shlex.join([*words, *given])


def other_command(name: str, *arguments: str) -> str:
  """Returns the command line of another command, called in the way in which this one was.

  Args:
    name: of the command, such as `sample`.
    arguments: its flags.
  """
  script = pathlib.Path("scripts", f"{_SCRIPTS.get(name, name)}.py")
  words = ["python", "-m", "dpo_jax", name]
  if sys.argv[0].startswith("dpo-jax"):
    words = ["dpo-jax", name]
  elif script.is_file() and pathlib.Path("dpo_jax").is_dir():  # in the project's folder
    words = ["python", str(script)]
  return shlex.join([*words, *arguments])


# ---------------------------------------------------------------------------- flags


def _parse(argv: Sequence[str], short: dict[str, str]) -> list[str]:
  """Parses flags as absl does, but prints one line for whatever the user wrote wrongly.

  Args:
    argv: the words, as `config_flags.expand` returns them.
    short: the short flags that were written, by the flags that replaced them.
  """

  def fail_as_written(message: object) -> NoReturn:
    line = str(message)
    for long, written in short.items():
      line = line.replace(f"{long}=", f"{written}=").replace(f"{long}:", f"{written}:")
    fail(line)

  config_flags.accept_natural_numbers_and_none()
  try:
    rest = FLAGS(argv)
    config_flags.settle_none()
    return rest
  except flags.UnrecognizedFlagError as error:
    fail(config_flags.unknown_flag(error.flagname, argv))
  except flags.Error as error:
    # What stands where no word is expected says more than that a flag is missing.
    if "other than None" in str(error) and argv[1:] and not argv[1].startswith("-"):
      fail(config_flags.unexpected_word(argv[1]))
    fail_as_written(config_flags.section_given_value(argv) or flag_messages.reworded(str(error)))
  except config_flags.RefusedError as error:
    fail_as_written(error)
  except Exception as error:
    wrong = flag_messages.of_configuration(error, argv)
    if wrong:
      fail(wrong)
    unknown = config_flags.unknown_override(argv)
    if unknown:
      fail_as_written(unknown)
    from dpo_jax.structs import UserError

    if not isinstance(error, UserError):
      raise
    fail(error)


def define_path(name: str, default: str | None, help: str, **given: Any) -> None:
  """Defines a flag whose value is a path, in which a leading `~` is the home folder."""
  flags.DEFINE(_Path(), name, default, help, serializer=flags.ArgumentSerializer(), **given)


def define_force() -> None:
  """Defines the flag --force of a command that writes a file, for `files.check_output_file`."""
  flags.DEFINE_bool("force", False, "replace what is at --out; without it, nothing is overwritten")


class _Path(flags.ArgumentParser):
  def parse(self, argument: Any) -> Any:
    return paths.expand(super().parse(argument) or "")


# ---------------------------------------------------------------------------- help


def _help(module: str, usage: str | None, config: str, everything: bool) -> str:
  """Returns the usage of the command in `module`, then its flags with their defaults.

  Args:
    module: of the command.
    usage: what stands before the flags; None for the docstring of the module.
    config: name of the configuration where none is given.
    everything: whether all fields of the configuration are shown, or the usual ones.
  """
  # absl files the flags of the main program under its path.
  own = FLAGS.get_key_flags_for_module(sys.argv[0] if module == "__main__" else module)
  configs = config_flags.names()
  rows = [
    (_shown(flag), (flag.help or "") + _default(flag, config if flag.name in configs else ""))
    for flag in own
  ]
  parts = [("options:", rows)]
  taken = {flag.name for flag in own}
  for name in configs:
    parts += _all_fields(name) if everything else [_usual_fields(name, taken)]
    any_field = f"--{name}.SECTION.FIELD=VALUE"
    parts.append(("any field:", [(any_field, f"such as --{name}.checkpoint.keep=5")]))
  text = (usage or sys.modules[module].__doc__ or "").strip()
  return "\n".join([text, *(line for title, rows in parts for line in _table(title, rows))])


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
  """Yields a title and lines of two columns, which fit the terminal."""
  yield f"\n{title}"
  # A flag that is longer than most has its own line.
  width = min(max((len(left) for left, _ in rows), default=0), 36)
  columns = max(shutil.get_terminal_size().columns, width + 40)
  for left, right in rows:
    first = f"  {left:<{width}}  "
    if len(left) > width:
      yield f"  {left}"
      first = " " * (width + 4)
    yield textwrap.fill(right, columns, initial_indent=first, subsequent_indent=" " * (width + 4))


def _usual_fields(name: str, taken: set[str]) -> tuple[str, list[tuple[str, str]]]:
  """Returns the fields that have short flags, except flags that the command itself has."""
  fields, rows = field_docs.read(), []
  for short, field in field_names.SHORT.items():
    if short not in taken:
      about = fields[field]
      text = f"{about.phrase}{_field_default(field, about)} [{field}]"
      rows.append((f"--{short}={about.kind}", text))
  return f"usual fields of --{name}, by short flags (--help=all shows every field):", rows


def _all_fields(name: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
  """Yields the fields of every section, with their defaults."""
  # A loss may have arguments that no comment explains; its docstring does.
  unexplained = field_docs.Field("argument of some losses: docs/losses.md", "none")
  loss = [f for f in config_flags.default_fields() if f.startswith("loss.")]
  known = field_docs.read()
  fields = known | {field: unexplained for field in loss if field not in known}
  for section in dict.fromkeys(field.partition(".")[0] for field in fields):
    rows = []
    for field, about in fields.items():
      if field.partition(".")[0] == section:
        short = field_names.flag_of(field, name)
        also = "" if short.startswith(f"--{name}.") else f" [short: {short}]"
        text = f"{about.meaning}{_field_default(field, about)}{also}"
        rows.append((f"--{name}.{field}={about.kind}", text))
    yield f"{section}:", rows


def _field_default(field: str, about: field_docs.Field) -> str:
  """Returns what a help text says of a field's default."""
  if field.startswith("loss.") and about.default == "none":
    return " (default: that of the loss)" if field == "loss.beta" else ""
  if about.default in ("none", '""'):
    return ""
  return f" (default: {about.default})"


def _default(flag: flags.Flag, default: str = "") -> str:
  """Returns what a help text says of a flag's default, or of the one that a command gives it."""
  if default:
    return f" (default: {default})"
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
