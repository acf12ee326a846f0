"""The installed package: all of it is in the wheel, and it works far from the checkout."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from dpo_jax import __version__
from dpo_jax.commands import console
from tests.support.paths import ROOT

SOURCES = ("dpo_jax", "configs", "setup.py", "pyproject.toml", "requirements.txt", "README.md")
NO_CACHES = shutil.ignore_patterns("__pycache__")


def packaged():
  """Files that the wheel must contain, by their paths in it."""
  inside = [path for path in (ROOT / "dpo_jax").rglob("*") if path.is_file()]
  found = {str(path.relative_to(ROOT)) for path in inside if "__pycache__" not in path.parts}
  return found | {f"dpo_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}


def run(*command, cwd):
  """Runs a command that must succeed, with no path to the checkout; returns what it prints."""
  hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
  environment = {key: value for key, value in os.environ.items() if key not in hidden}
  words = [str(word) for word in command]
  done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built by this environment from a copy: a build leaves folders in its sources."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  source.mkdir()
  for name in (*SOURCES, "LICENSE"):
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, source / name, ignore=NO_CACHES)
    else:
      shutil.copy(ROOT / name, source)
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
  run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, cwd=folder)
  (found,) = folder.glob("*.whl")
  return found


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
  """Folder of the programs of a fresh environment: ours is installed, the rest is this one's."""
  folder = tmp_path_factory.mktemp("environment")
  venv.create(folder, with_pip=False, symlinks=True)
  python = folder / "bin" / "python"
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
  run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
  place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
  here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
  # A line that names a folder appends it; its own .pth files, such as a checkout's, are not read.
  pathlib.Path(place.strip(), "this_environment.pth").write_text("\n".join(sorted(here)))
  return folder / "bin"


@pytest.mark.slow
def test_the_wheel_contains_the_package_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    about = archive.read(f"dpo_jax-{__version__}.dist-info/METADATA").decode()
  assert {name for name in names if not name.startswith("dpo_jax-")} == packaged()
  assert f"\nVersion: {__version__}\n" in about and "\nRequires-Dist: jax>=" in about
  assert {"dpo_jax/py.typed", "dpo_jax/monitoring/report.css"} <= {*names}


@pytest.mark.slow
def test_every_module_is_imported_from_where_it_is_installed(programs, tmp_path):
  files = [name for name in packaged() if name.endswith(".py")]
  modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
  show = (
    "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
  )
  found = run(programs / "python", "-c", show, *sorted(modules), cwd=tmp_path).splitlines()
  assert len(found) == len(modules) and all(str(programs.parent) in path for path in found)


@pytest.mark.slow
def test_the_program_lists_its_commands_and_shows_their_flags(programs, tmp_path):
  listed = run(programs / "dpo-jax", "--help", cwd=tmp_path)
  assert all(f"\n  {name} " in listed for name in console.COMMANDS)
  assert run(programs / "dpo-jax", "--version", cwd=tmp_path) == f"dpo-jax {__version__}\n"
  shown = run(programs / "dpo-jax", "train", "--help", cwd=tmp_path)
  assert "\n  dpo-jax train --model=" in shown and "--workdir=" in shown


@pytest.mark.slow
def test_rows_are_inspected_and_a_model_is_trained_by_name(programs, tmp_path):
  dpo_jax = programs / "dpo-jax"
  sizes = ("--sft_rows=64", "--prompts=8", "--eval_prompts=8")
  run(dpo_jax, "make-controlled", "--out=task", *sizes, cwd=tmp_path)
  rows = (tmp_path / "task" / "sft.jsonl", tmp_path / "task" / "tokenizer")
  words = (f"--data={rows[0]}", f"--model={rows[1]}", "--json")
  found = json.loads(run(dpo_jax, "inspect", *words, cwd=tmp_path))
  assert found["rows"] == 64 and found["pairs"] > 0
  given = {
    "model.tokenizer": rows[1],
    "data.path": rows[0],
    "train.steps": 2,
    "train.batch_size": 8,
    "optimizer.warmup_steps": 1,
  }
  flags = [f"--config.{name}={value}" for name, value in given.items()]
  said = run(dpo_jax, "train", "--config=controlled:sft", "--workdir=run", *flags, cwd=tmp_path)
  assert "done: run/export" in said
  assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
  style = (ROOT / "dpo_jax" / "monitoring" / "report.css").read_text().splitlines()[0]
  assert style in (tmp_path / "run" / "report.html").read_text()
