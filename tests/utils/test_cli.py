"""A command's manners: what a person reads when something is wrong, and when nothing is."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from dpo_jax.utils import cli, config_flags
from tests.support.paths import CONFIGS, ROOT

COMMAND = '''"""Counts the rows of a file.

  python command.py --out=FILE
"""
from absl import flags
from ml_collections import config_flags

from dpo_jax.utils import cli

CONFIG = config_flags.DEFINE_config_file("config")
ROWS = flags.DEFINE_integer("num_rows", 3, "rows to count")
OUT = flags.DEFINE_string("out", None, "where to write", required=True)
KIND = flags.DEFINE_enum("kind", "plain", ["plain", "fancy"], "what kind")


def main(argv):
  from dpo_jax.structs import UserError

  if OUT.value == "user":
    raise UserError("rows 5 is not 4; try 4")
  if OUT.value == "file":
    open("/no/such/file")
  if OUT.value == "device":
    import jax

    jax.devices()
  if OUT.value == "stop":
    raise KeyboardInterrupt
  if OUT.value == "bug":
    raise ValueError("a mistake of the program")
  print(CONFIG.value.to_json() if CONFIG.value else "no config")


if __name__ == "__main__":
  cli.run(main)
'''

CONFIG = """
from ml_collections import ConfigDict, config_dict


def get_config(arg="plain"):
  if arg == "module":
    import nothing_there
  if arg == "broken":
    raise KeyError("the configuration's own mistake")
  if arg == "slow":
    raise KeyboardInterrupt  # as Ctrl-C does while modules are imported
  if arg == "texts":
    loss = ConfigDict({"name": "sigmoid", "link": config_dict.placeholder(str)})
    return ConfigDict({"model": ConfigDict({"remat": "dots"}), "loss": loss})
  smoothing = config_dict.placeholder(float)
  loss = ConfigDict({"name": "sigmoid", "beta": 0.1, "smoothing": smoothing})
  train = ConfigDict({"steps": 100, "limit": config_dict.placeholder(int), "shuffle": True})
  return ConfigDict({"loss": loss, "train": train, "path": "x"})
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  folder = tmp_path_factory.mktemp("command")
  (folder / "command.py").write_text(COMMAND)
  (folder / "config.py").write_text(CONFIG)
  (folder / "words.md").write_text("plain words\n")
  (folder / "empty.py").touch()

  def run(*arguments, out="x", **environment):
    out = [f"--out={out}"] if out else []
    return subprocess.run(
      [sys.executable, folder / "command.py", *out, *arguments],
      capture_output=True,
      text=True,
      cwd=folder,
      env={"PYTHONPATH": str(cli.__file__).rsplit("/", 3)[0], "HOME": str(folder)} | environment,
      check=False,
    )

  return run


def assert_refused(done, *words):
  assert done.returncode == 1
  assert done.stdout == ""
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1, done.stderr
  for word in words:
    assert word in done.stderr


@pytest.mark.parametrize(
  ("out", "words"),
  [("user", ["rows 5 is not 4; try 4"]), ("file", ["/no/such/file", "no such file"])],
)
def test_what_the_user_can_mend_is_one_line(command, out, words):
  assert_refused(command(out=out), *words)


def test_a_mistake_of_the_program_keeps_its_traceback(command):
  done = command(out="bug")
  assert done.returncode == 1
  assert "Traceback" in done.stderr
  assert "ValueError: a mistake of the program" in done.stderr


def test_devices_that_are_not_there_are_one_line(command):
  """JAX has an assertion for some, and a traceback for all."""
  for name in ("cuda", "gpus"):
    assert_refused(command(out="device", JAX_PLATFORMS=name), f"JAX_PLATFORMS is {name!r}, and JAX")


def test_interrupting_is_quiet(command):
  done = command(out="stop")
  assert done.returncode == 130
  assert done.stderr.strip() == "interrupted"


def test_interrupting_imports_is_quiet(command):
  done = command("--config=config.py:slow")
  assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
  root = pathlib.Path(cli.__file__).parents[2] / "scripts"
  early = [sys.executable, "-c", "import _root; raise KeyboardInterrupt"]
  done = subprocess.run(
    early, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)}
  )
  assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--num_rws=3", ["--num_rws: no such flag", "did you mean --num_rows?"]),
    ("--num_rows=many", ["--num_rows=many", "not an integer"]),
    ("--kind=odd", ["--kind=odd", "plain|fancy"]),
    ("--num_rows", ["--num_rows needs a value: --num_rows=VALUE"]),
    ("rows.jsonl", ["unexpected argument 'rows.jsonl'", "--name=value"]),
    (
      "--config=none.py",
      ["none.py", "no such file; configurations are files (.py, .yaml), or one"],
    ),
    ("--config=preference:a", ["preference:a: no such file; did you mean 'preferences'?"]),
    ("--config=none", ["one of benchmark, controlled, llama_1b, llama_8b, preferences, qwen"]),
    ("--config=qwen_0_5b:a", ["qwen_0_5b.py:a: it takes no argument behind a colon"]),
    ("--config=.", ["--config=.: a folder; configurations are files (.py, .yaml)"]),
    ("--config=words.md", ["words.md: no configuration in Python: ", "line 1"]),
    (
      "--config=empty.py",
      ["empty.py: no configuration in Python, which has a function get_config"],
    ),
    ("--config=config.py:module", ["config.py: No module named 'nothing_there', line 7"]),
  ],
)
def test_a_wrong_flag_is_one_line(command, argument, words):
  assert_refused(command(argument), *words)


def test_a_configuration_may_follow_a_space(command):
  assert_refused(command("--config", "none.py"), "none.py", "no such file")
  wrong = ("--config", "config.py", "--config.loss.bta", "1")
  assert_refused(
    command(*wrong), "config.loss has no field 'bta'", "did you mean --config.loss.beta "
  )


def test_a_configuration_has_a_name_and_a_file_of_that_name_comes_first(command, tmp_path):
  for given in (["--config=preferences:loss=ipo,beta=0.5"], ["--config", "preferences:loss=ipo"]):
    done = command(*given, "--config.loss.beta=0.25", "--config.train.steps=7")
    found = json.loads(done.stdout)
    assert (found["loss"]["name"], found["loss"]["beta"]) == ("ipo", 0.25)
    assert found["train"]["steps"] == 7
  own = tmp_path / "preferences"
  own.write_text(CONFIG)
  assert json.loads(command(f"--config={own}").stdout)["path"] == "x"


def test_shipped_configurations_are_the_files_of_configs():
  found = config_flags.shipped()
  assert {*found.values()} == {*CONFIGS.glob("*.py")}
  assert found["controlled"] == CONFIGS / "controlled.py"


def test_a_missing_flag_is_one_line(command):
  assert_refused(command(out=None), "--out is required")


@pytest.mark.parametrize(
  ("override", "words"),
  [
    (
      "--config.loss.bta=1",
      ["config.loss has no field 'bta'", "did you mean --config.loss.beta ("],
    ),
    ("--config.los.beta=1", ["config has no field 'los'", "did you mean --config.loss.beta ("]),
    ("--config.loss.beta.x=1", ["config.loss.beta is a value"]),
    ("--config.zzz=1", ["there are: loss, path, train"]),
    ("--noconfig.train.shufle", ["'shufle'", "did you mean --config.train.shuffle?"]),
    ("--config.train.steps=many", ["--config.train.steps=many", "not an integer"]),
    ("--config.train.steps=1.5e0", ["not an integer"]),
    ("--config.loss.beta=little", ["not a number"]),
    ("--config.train.shuffle=maybe", ["not true or false", "maybe"]),
    ("--config.train.steps=None", ["config.train.steps=None", "needs an integer", "100"]),
    ("--config.loss.name=None", ["loss.name needs a text", "'sigmoid'"]),
    ("--config.loss=3", ["--config.loss=3: loss is a section; did you mean --loss=3?"]),
    ("--config.train=3", ["set its fields by --config.train.FIELD=VALUE"]),
  ],
)
def test_a_wrong_override_is_one_line(command, override, words):
  assert_refused(command("--config=config.py", override), *words)


def test_a_mistake_inside_the_configuration_keeps_its_traceback(command):
  done = command("--config=config.py:broken", "--config.loss.beta=1")
  assert done.returncode == 1
  assert 'KeyError: "the configuration\'s own mistake"' in done.stderr


def test_numbers_and_none_as_people_write_them(command):
  done = command(
    "--config=config.py",
    "--config.train.steps=1e3",
    "--config.train.limit=1e2",
    "--config.loss.beta=1e-3",
    "--config.loss.smoothing=1",
    "--noconfig.train.shuffle",
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == {
    "loss": {"name": "sigmoid", "beta": 0.001, "smoothing": 1.0},
    "train": {"steps": 1000, "limit": 100, "shuffle": False},
    "path": "x",
  }


def test_none_clears_a_number_that_may_be_absent(command):
  done = command("--config=config.py", "--config.train.limit=7", "--config.train.limit=None")
  assert json.loads(done.stdout)["train"]["limit"] is None


def test_none_is_a_word_where_a_field_has_it_among_its_values(command):
  done = command("--config=config.py:texts", "--config.model.remat=none", "--config.loss.link=none")
  assert json.loads(done.stdout) == {
    "model": {"remat": "none"},
    "loss": {"name": "sigmoid", "link": None},
  }
  done = command("--config=config.py:texts", "--config.model.remat=None")
  assert_refused(done, "model.remat needs a text; leave the flag out for 'dots', or write none")


def test_help_says_what_there_is_and_at_once(command):
  started = time.monotonic()
  done = command("--help", out=None)
  assert time.monotonic() - started < 2
  assert done.returncode == 0
  assert done.stdout.startswith("Counts the rows of a file.")
  for words in ("--num_rows=N", "(default: 3)", "--out=OUT", "(required)", "<plain|fancy>"):
    assert words in done.stdout


def test_compiled_programs_are_kept_where_the_user_says_and_else_at_home(tmp_path):
  def chosen(imports="os", **environment):
    show = f"from dpo_jax.utils import cli; cli.enable_compilation_cache(); import {imports}; " + (
      "print(os.environ.get('JAX_COMPILATION_CACHE_DIR'))"
      if imports == "os"
      else "print(jax.config.jax_compilation_cache_dir)"
    )
    environment |= {"PYTHONPATH": str(cli.__file__).rsplit("/", 3)[0]}
    done = subprocess.run(
      [sys.executable, "-c", show], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip()

  assert chosen(HOME=str(tmp_path)).startswith(str(tmp_path / ".cache" / "dpo_jax"))
  assert chosen(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "c")).startswith(
    str(tmp_path / "c" / "dpo_jax")
  )
  mine = str(tmp_path / "mine")
  # JAX reads the variable when it is imported.
  assert chosen("jax", HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=mine) == mine
  assert chosen(HOME="/proc/none") == "None"  # a home that cannot be written


@pytest.mark.parametrize(
  ("program", "found"),
  [
    ("/somewhere/dpo_jax/train.py", "python -m dpo_jax.train '--workdir=my runs'"),
    ("dpo-jax train", "dpo-jax train '--workdir=my runs'"),
    ("python -m dpo_jax train", "python -m dpo_jax train '--workdir=my runs'"),
    ("/usr/bin/pytest", None),
  ],
)
def test_the_command_line_to_continue_with(monkeypatch, program, found):
  monkeypatch.setattr(sys, "argv", [program, "--overwrite", "--workdir=my runs"])
  assert cli.this_command("overwrite") == found


def test_the_command_line_to_continue_with_has_the_flags_that_were_typed(monkeypatch):
  given = ["--model", "my-model", "--lr=1e-4", "--overwrite"]
  monkeypatch.setattr(sys, "argv", ["dpo-jax train", *given])
  expanded = ["--config.model.path=my-model", "--config.optimizer.learning_rate=1e-4", given[3]]
  monkeypatch.setattr(cli.config_flags, "expand", lambda words, config: (expanded, {}))
  monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: None)
  cli.run(lambda argv: None, lambda: None, config="preferences")
  assert sys.argv[1:] == expanded
  assert cli.this_command("overwrite") == "dpo-jax train --model my-model --lr=1e-4"


def test_other_commands_are_called_as_this_one_was(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, "argv", ["/somewhere/dpo_jax/train.py"])
  monkeypatch.chdir(ROOT)
  assert cli.other_command("sample", "--model=a b") == "python scripts/sample.py '--model=a b'"
  assert cli.other_command("convert") == "python scripts/convert_hf.py"
  monkeypatch.chdir(tmp_path)
  assert cli.other_command("sample") == "python -m dpo_jax sample"
  monkeypatch.setattr(sys, "argv", ["dpo-jax train"])
  assert cli.other_command("sample") == "dpo-jax sample"


def test_a_home_folder_that_is_not_there_is_one_line():
  """Through the flags of a command: `~` before a user that there is not."""
  program = (
    "import sys\nfrom dpo_jax.utils import cli\ncli.define_path('out', None, 'x')\n"
    "from absl import flags\n"
    "def main(argv): print(flags.FLAGS.out)\n"
    "cli.run(main)"
  )
  for given, status in (("~/x", 0), ("~nobody_here/x", 1)):
    done = subprocess.run(
      [sys.executable, "-c", program, f"--out={given}"],
      capture_output=True,
      text=True,
      env={"PYTHONPATH": str(ROOT), "HOME": "/home/someone"},
      check=False,
    )
    assert done.returncode == status
    assert done.stdout == ("/home/someone/x\n" if not status else "")
    assert not status or done.stderr == (
      "error: --out=~nobody_here/x: no home folder ~nobody_here; write the whole path, or"
      " ./~nobody_here/x for a name that begins with ~\n"
    )
