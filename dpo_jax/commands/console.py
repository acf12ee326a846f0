"""Finds and runs the commands: of `dpo-jax NAME`, of `python -m dpo_jax NAME` and of scripts/.

Imports nothing heavy, so that `dpo-jax --help` is quick; the module of a command is imported when
that command is run.
"""

from __future__ import annotations

import difflib
import importlib
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.utils import interrupts


class Command(NamedTuple):
  """A command and where it is.

  Attributes:
    module: has a docstring, `define_flags()` and `main(argv)`.
    summary: its line in the list of commands.
    arguments: words that it takes besides flags.
    config: its configuration where the command line names none.
  """

  module: str
  summary: str
  arguments: int = 0
  config: str = ""


COMMANDS = {
  "train": Command(
    "dpo_jax.train",
    "trains a policy: supervised, from preferences or on-policy",
    config="preferences",
  ),
  "score": Command("dpo_jax.commands.score", "writes the log-probability of every pair of a file"),
  "sample": Command("dpo_jax.commands.sample", "generates text with a model"),
  "inspect": Command("dpo_jax.commands.inspect_data", "shows what a model will be trained on"),
  "prepare": Command("dpo_jax.commands.prepare_data", "tokenizes rows once, into a data set"),
  "evaluate": Command(
    "dpo_jax.commands.evaluate", "measures a model on held-out pairs, and by samples"
  ),
  "convert": Command("dpo_jax.commands.convert_hf", "writes a checkpoint as a Hugging Face folder"),
  "make-pairs": Command(
    "dpo_jax.commands.make_pairs", "samples completions and labels them with a reward"
  ),
  "make-controlled": Command(
    "dpo_jax.commands.make_controlled", "writes the texts and the tokenizer of the embedded task"
  ),
  "frontier": Command(
    "dpo_jax.commands.frontier", "measures reward against KL for every method on that task"
  ),
  "benchmark": Command(
    "dpo_jax.commands.benchmark",
    "measures the training step, or generation",
    arguments=1,
    config="benchmark:b",
  ),
  "plan": Command(
    "dpo_jax.commands.plan",
    "estimates memory and FLOPs of a run before it starts",
    config="preferences",
  ),
}
# What people call the commands elsewhere.
SYNONYMS = {
  "train": "fit finetune fine-tune dpo sft kto orpo cpo",
  "sample": "generate chat complete infer",
  "evaluate": "eval test",
  "convert": "export merge merge-lora to-hf",
  "prepare": "tokenize preprocess",
  "inspect": "show preview data",
  "benchmark": "bench profile",
}
PROGRAM = "dpo-jax"
HELP = ("--help", "-help", "-h", "help")
# In the docstrings, a command as it is called once the package is installed.
_CALL = re.compile(rf"python -m dpo_jax\.train\b|{PROGRAM} ([a-z-]+)")


def main() -> None:
  """The program: runs the command that its first word names, with the words after it as flags."""
  # `python -m dpo_jax` is started by the path of __main__.py, the installed program by its name.
  module = pathlib.Path(sys.argv[0]).name == "__main__.py"
  program, words = "python -m dpo_jax" if module else PROGRAM, sys.argv[1:]
  if words[:1] == ["help"] and len(words) > 1:
    words = [words[1], "--help"]
  if not words or words[0] in HELP:
    try:
      print(_listing(program), flush=True)
    except BrokenPipeError:
      from dpo_jax.utils import cli

      cli.leave_unread()
    return
  if words[0] == "--version":
    from dpo_jax import __version__

    print(f"{PROGRAM} {__version__}")
    return
  name = find(program, words[0])
  # The command takes the first word for the program's name, in its help and in its errors.
  sys.argv = [f"{program} {name}", *words[1:]]
  _run(name, lambda other: f"{program} {other}")


def run(name: str) -> None:
  """Runs one command by its script, `scripts/MODULE.py`, with the script's own flags."""
  script = pathlib.Path(sys.argv[0])

  def call(other: str) -> str:
    module = COMMANDS[other].module
    if module == "dpo_jax.train":
      return f"python -m {module}"
    return f"python {script.with_stem(module.rpartition('.')[2])}"

  _run(name, call)


def _run(name: str, call: Callable[[str], str]) -> None:
  """Runs a command whose help spells every command as `call` does."""
  command = COMMANDS[name]
  interrupts.install()  # before the imports: training imports jax, which takes seconds
  module = importlib.import_module(command.module)
  from dpo_jax.utils import cli

  def spelled(found: re.Match[str]) -> str:
    other = found[1] or "train"
    return call(other) if other in COMMANDS else found[0]

  usage = _CALL.sub(spelled, module.__doc__ or "")
  cli.run(
    module.main,
    module.define_flags,
    usage=usage,
    arguments=command.arguments,
    config=command.config,
  )


def find(program: str, word: str) -> str:
  """Finds a command by its own name or that of its module; exits with a line if there is none."""
  spellings = {command.module.rpartition(".")[2]: name for name, command in COMMANDS.items()}
  spellings |= {name.replace("-", "_"): name for name in COMMANDS}
  # Modules are written with underscores and some commands with hyphens: all spellings are found.
  name = spellings.get(word.replace("-", "_"))
  if name is not None:
    return name
  # Not at the top: the list of commands should not wait for absl.
  from dpo_jax.utils import cli

  if word.startswith("-"):
    cli.fail(f"{word} comes before a command; write {program} COMMAND FLAGS (see {program} --help)")
  elsewhere = [name for name, others in SYNONYMS.items() if word.lower() in others.split()]
  near = elsewhere or difflib.get_close_matches(word, [*COMMANDS, *spellings], n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(COMMANDS)
  cli.fail(f"{program} has no command {word!r}; {hint} (see {program} --help)")


def _listing(program: str) -> str:
  """Returns the help of the program: every command with its line."""
  width = max(map(len, COMMANDS))
  lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
  return "\n".join(
    [
      "Direct Preference Optimization in JAX.\n",
      f"usage: {program} COMMAND FLAGS\n",
      *lines,
      f"\n`{program} COMMAND --help` shows its flags; `{program} --version` shows the version.",
    ]
  )
