"""The ways in which a command is called: dpo-jax, python -m dpo_jax, and the scripts."""

import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest

from dpo_jax import __version__
from dpo_jax.commands import console
from dpo_jax.utils import field_docs, field_names
from tests.support.paths import ROOT

SCRIPTS = {
  name: pathlib.Path(*command.module.split(".")).stem
  for name, command in console.COMMANDS.items()
  if name != "train"
}


def call(*words, cwd=ROOT):
  """Runs Python with some words, from a folder, and the package on its path."""
  return subprocess.run(
    [sys.executable, *map(str, words)],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def dpo_jax(*words, cwd=ROOT):
  return call("-m", "dpo_jax", *words, cwd=cwd)


def test_the_list_is_there_at_once_and_has_a_line_for_every_command():
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = dpo_jax("--help")
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert (done.returncode, done.stderr) == (0, "")
  # Seconds of a processor, which other programs at work do not change.
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
  listed = re.findall(r"^  ([a-z-]+) +(\S.*)$", done.stdout, re.MULTILINE)
  assert dict(listed) == {name: command.summary for name, command in console.COMMANDS.items()}
  assert "usage: python -m dpo_jax COMMAND FLAGS" in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 100
  assert dpo_jax().stdout == done.stdout


def test_the_list_loads_nothing_heavy():
  heavy = ("jax", "numpy", "absl", "ml_collections")
  show = (
    "import sys; from dpo_jax.commands import console; sys.argv = ['dpo-jax']; console.main();"
    f"print([x for x in {heavy} if x in sys.modules])"
  )
  assert call("-c", show).stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error():
  show = (
    "import os, sys; from dpo_jax.commands import console\n"
    "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
    "sys.argv = ['dpo-jax', *sys.argv[1:]]; console.main()"
  )
  for words in (["--help"], ["plan", "--help"]):
    done = call("-c", show, *words)
    assert (done.returncode, done.stderr) == (141, "")


def test_every_field_is_in_the_long_help():
  shown = dpo_jax("plan", "--help=all").stdout
  named = set(re.findall(r"^  --config\.([\w.]+)=", shown, re.MULTILINE))
  assert named - {"SECTION.FIELD"} == {*field_docs.read()} and len(named) > 80
  assert dpo_jax("help", "plan").stdout == dpo_jax("plan", "--help").stdout != shown


def test_the_version_is_that_of_the_package():
  assert dpo_jax("--version").stdout == f"dpo-jax {__version__}\n"


@pytest.mark.parametrize(
  ("words", "says"),
  [
    (["scroe"], "has no command 'scroe'; did you mean 'score'?"),
    (["inspect_dat"], "did you mean 'inspect_data'?"),
    (["generate"], "has no command 'generate'; did you mean 'sample'?"),
    (["xyz"], "has no command 'xyz'; there are train, score, sample, "),
    (
      ["--workdir=x", "train"],
      "--workdir=x comes before a command; write python -m dpo_jax COMMAND",
    ),
    (["plan", "--confg=b"], "--confg: no such flag; did you mean --config?"),
    (["plan", "--config=benchmark", "b"], "unexpected argument 'b'"),
    (["convert", "--workdir=x"], "--out is required"),
  ],
)
def test_what_is_not_understood_is_one_line(words, says):
  done = dpo_jax(*words)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr.startswith("error: ") and says in done.stderr
  assert done.stderr.count("\n") == 1


def test_commands_are_known_by_the_names_of_their_modules_too():
  for word, name in [
    ("inspect_data", "inspect"),
    ("prepare-data", "prepare"),
    ("convert_hf", "convert"),
    ("make_pairs", "make-pairs"),
    ("train", "train"),
  ]:
    assert console.find("dpo-jax", word) == name


@pytest.mark.parametrize("name", [name for name in console.COMMANDS if name != "train"])
def test_help_says_how_the_command_was_called_and_loads_no_jax(name, tmp_path):
  """By its script, from another folder; and by the program, whose flags are the same."""
  script = ROOT / "scripts" / f"{SCRIPTS[name]}.py"
  show = (
    "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '');"
    f"sys.path[0] = {str(script.parent)!r}\n"
    "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "finally: assert not {'jax', 'numpy'} & {*sys.modules}"
  )
  by_script = call("-c", show, script, "--help", cwd=tmp_path)
  assert (by_script.returncode, by_script.stderr) == (0, "")
  assert f"  python {script} " in by_script.stdout and "dpo-jax" not in by_script.stdout
  by_program = dpo_jax(name, "--help", cwd=tmp_path)
  assert (by_program.returncode, by_program.stderr) == (0, "")
  assert f"  python -m dpo_jax {name} " in by_program.stdout
  options = [done.stdout.split("\noptions:\n")[1] for done in (by_script, by_program)]
  assert options[0] == options[1] and "--" in options[0]


def test_training_by_its_module_and_by_the_program_where_all_commands_are_imported():
  modules = ", ".join(command.module for command in console.COMMANDS.values())
  program = "sys.argv = ['/bin/dpo-jax', 'train', '--help']; console.main()"
  named = call("-c", f"import sys, {modules}; from dpo_jax.commands import console; {program}")
  direct = call("-m", "dpo_jax.train", "--help")
  assert (named.returncode, direct.returncode) == (0, 0), named.stderr + direct.stderr
  assert "  python -m dpo_jax.train --model=" in direct.stdout
  assert named.stdout == direct.stdout.replace("python -m dpo_jax.train", "dpo-jax train")
  assert "--workdir=WORKDIR" in named.stdout
  # The usual fields with their defaults, each in a few words; the rest by --help=all.
  shown = re.findall(r"^  --(\w+)=", named.stdout.split("usual fields")[1], re.MULTILINE)
  assert shown == [*field_names.SHORT]
  assert "(default: 1e-05)" in named.stdout and "lora.alpha" not in named.stdout


def test_every_command_has_its_script_and_every_module_its_command():
  modules = {path.stem for path in (ROOT / "dpo_jax" / "commands").glob("*.py")}
  # Not commands: the program itself, and flags that several commands share.
  assert modules - {"__init__", "console", "row_flags"} == {*SCRIPTS.values()}
  for name, stem in SCRIPTS.items():
    assert f'console.run("{name}")' in (ROOT / "scripts" / f"{stem}.py").read_text()
