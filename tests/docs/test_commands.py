"""Commands in the documentation name scripts, flags and fields that exist, and their hardware."""

import concurrent.futures
import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from dpo_jax import defaults
from dpo_jax.evaluation import evaluate

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# The log keeps the options of its day, and the commands of the other are wrong on purpose.
CURRENT = [page for page in PAGES if page.name not in ("log.md", "mistakes.md")]
TRAIN = "dpo_jax.train"
# Subcommands of `dpo-jax` that are not named as their script.
SUBCOMMANDS = {"inspect": "inspect_data", "prepare": "prepare_data", "convert": "convert_hf"}
# Shell scripts that pass flags on, and to which program.
PASSED_ON = {
  "scripts/benchmarks/compare.sh": "scripts/benchmarks/compare.py",
  "scripts/tpu_vm.sh": TRAIN,
  "scripts/slurm.sbatch": TRAIN,
}
NEEDS_HARDWARE = re.compile(
  r"requirements-(gpu|tpu)|compare\.sh gpu|--suite=gpu|tpu_vm\.sh|sbatch|kubectl|docker run"
)
SAYS_SO = re.compile(r"\b(GPU|TPU|SLURM|Kubernetes|cluster|container)s?\b")


def name_of(page: pathlib.Path) -> str:
  """A page's path from the root, as the id of a test."""
  return str(page.relative_to(ROOT))


class Command(NamedTuple):
  """One command of a page.

  Attributes:
    text: the command, on one line.
    context: what a reader has just read: the paragraph before its block, and its own comment.
    whole: whether it stands in a block, to be run as it is, and not in a sentence.
  """

  text: str
  context: str
  whole: bool


def blocks(text: str) -> Iterator[tuple[str, str]]:
  """Yields every fenced block of shell commands with the paragraph before it."""
  parts = re.split(r"^```(.*)$", text, flags=re.MULTILINE)
  # Text, info string, content, closing fence's empty info string, text, …
  for before, info, content in zip(parts[::4], parts[1::4], parts[2::4], strict=False):
    if info.strip() in ("", "bash", "sh"):
      paragraphs = [p for p in re.split(r"\n\s*\n", before) if p.strip()]
      yield content, paragraphs[-1] if paragraphs else ""


def commands(page: pathlib.Path) -> Iterator[Command]:
  """Yields the commands of a page, from its blocks and from its sentences and tables."""
  text = page.read_text("utf-8")
  for content, before in blocks(text):
    for line in content.replace("\\\n", " ").splitlines():
      line, _, comment = line.partition("  #")
      for part in line.split(" && "):
        if is_command(part):
          yield Command(part.strip(), f"{before}\n{comment}", whole=True)
  prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
  for paragraph in re.split(r"\n\s*\n|(?<=\|)\n(?=\|)", prose):
    for code in re.findall(r"`([^`]+)`", paragraph):
      for part in " ".join(code.replace("\\|", "|").split()).split(" && "):
        if is_command(part):
          yield Command(part.strip(), paragraph, whole=False)


def is_command(line: str) -> bool:
  """Tells a command from a formula or the output of a program."""
  first = re.sub(r"^(\w+=\S* +)*", "", line.strip()).split(" ")[0]
  return first in ("python", "bash", "pip", "sbatch", "dpo-jax", "docker", "kubectl") or (
    first.startswith(".venv/bin/")
  )


ALL = [(page, command) for page in CURRENT for command in commands(page)]


def program(words: list[str]) -> tuple[str, list[str]]:
  """Returns what reads the flags of a command, and its arguments.

  The program is a script's path from the root, `dpo_jax.train`, or "" for what is not ours.
  """
  while words and re.match(r"\w+=", words[0]):  # variables of the environment
    words = words[1:]
  if words in (["dpo-jax"], ["dpo-jax", "--help"]):  # the program itself, without a command
    return "", []
  if words[:1] == ["dpo-jax"]:
    name = words[1].replace("-", "_")
    return TRAIN if name == "train" else f"scripts/{SUBCOMMANDS.get(name, name)}.py", words[2:]
  if words[0].endswith("python") and words[1:2] == ["-m"]:
    return (words[2] if words[2].startswith("dpo_jax.") else ""), words[3:]
  if words[0] in ("bash", "sbatch") or words[0].endswith("python"):
    for at, word in enumerate(words[1:], start=1):
      if not word.startswith("-"):
        return word, words[at + 1 :]
  return "", []


@functools.cache
def flags_of(name: str) -> frozenset[str]:
  """The flags that a program's --help names."""
  target = ["-m", name] if name == TRAIN else [name]
  shown = subprocess.run(
    [sys.executable, *target, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert shown.stdout and not shown.stderr, f"{name} --help: {shown.stderr[-500:]}"
  # Flags stand behind "options:", examples before; a program may have none.
  _, _, options = shown.stdout.partition("options:")
  found = re.findall(r"^ +--(?:\[no\])?([\w.]+)", options, flags=re.MULTILINE)
  return frozenset(found) | {f"no{flag}" for flag in found} | {"help"}


@functools.cache
def fields() -> frozenset[str]:
  """Dotted names of all sections and fields of a configuration."""

  def names(section: ConfigDict, prefix: str) -> Iterator[str]:
    for key, value in section.items():
      yield f"{prefix}{key}"
      if isinstance(value, ConfigDict):
        yield from names(value, f"{prefix}{key}.")

  return frozenset(names(defaults.get_config(), ""))


def is_ours(name: str) -> bool:
  """Whether a program is one of the commands, which all have --help."""
  return name == TRAIN or (name.startswith("scripts/") and name.endswith(".py"))


def readers() -> set[str]:
  """The programs whose flags the documentation uses."""
  found = set()
  for _, command in ALL:
    name, arguments = program(split(command.text))
    name = PASSED_ON.get(name, name)
    if is_ours(name):
      found.add(name)
    found |= {TRAIN for argument in arguments if argument == TRAIN}
  return found


def split(text: str) -> list[str]:
  """The words of a command; brackets round what may be left out are dropped."""
  words = shlex.split(re.sub(r"\[|\](?!:)", " ", text) if "--config=" not in text else text)
  return [word.strip("[]") for word in words if word.strip("[]") not in ("", "|", "…")]


@pytest.fixture(scope="module", autouse=True)
def help_pages():
  """Asks two programs at a time for their flags; one that fails fails the test that needs it."""
  existing = [name for name in readers() if name == TRAIN or (ROOT / name).is_file()]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for name in existing:
      pool.submit(flags_of, name)


def check_flags(name: str, arguments: list[str]) -> list[str]:
  """Returns the flags that the program does not have, or values that no configuration has."""
  wrong = []
  for argument in arguments:
    if not argument.startswith("--"):
      continue
    flag, _, value = argument[2:].partition("=")
    if flag.startswith("config.") and "config.SECTION.FIELD" in flags_of(name):
      field = flag.removeprefix("config.").rstrip("….")
      if field and field not in fields() and not field.isupper():
        wrong.append(argument)
    elif flag not in flags_of(name) or (flag == "config" and not builds(value)):
      wrong.append(argument)
  return wrong


def cli_names() -> set[str]:
  """The names of the configurations that come with the package."""
  return {path.stem for path in (ROOT / "configs").glob("*.py")}


def builds(value: str) -> bool:
  """Whether `configs/NAME.py:ARGUMENT` is a configuration that there is."""
  path, _, argument = value.partition(":")
  if path in ("configs/NAME.py", "NAME", "…", "my.yaml"):
    return True
  if path in cli_names():
    path = f"configs/{path}.py"
  if not (ROOT / path).is_file():
    return False
  spec = importlib.util.spec_from_file_location("documented", ROOT / path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not argument.startswith("SHAPE"):
    module.get_config(*filter(None, [argument]))
  return True


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_name_programs_and_flags_that_exist(page):
  wrong = []
  for where, command in ALL:
    if where != page:
      continue
    words = split(command.text)
    if words[:3] == ["pip", "install", "-r"] and not (ROOT / words[3]).is_file():
      wrong.append(command.text)
    name, arguments = program(words)
    if TRAIN in arguments:  # one program that starts another
      at = arguments.index(TRAIN)
      wrong += check_flags(TRAIN, arguments[at + 1 :])
      arguments = arguments[:at]
    if name and name != TRAIN and not (ROOT / name).exists():
      wrong.append(command.text)
      continue
    reader = PASSED_ON.get(name, name)
    if is_ours(reader):
      wrong += check_flags(reader, arguments)
  assert not wrong


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_fields_named_exist(page):
  """`--config.x.y` anywhere in a page, and `x.y` in code where x is a section."""
  text = page.read_text("utf-8")
  named = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)+)", text))
  sections = "|".join(sorted(field for field in fields() if "." not in field))
  for code in re.findall(r"`([^`\n]+)`", text):
    match = re.match(rf"((?:{sections})\.[a-z_0-9.]+)(?:$|[=:])", code)
    if match and not match[1].endswith((".json", ".jsonl")):
      named.add(match[1])
  named -= {field for field in named if field.startswith("synthetic.")}  # of benchmarks alone
  assert not named - fields()


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_that_need_hardware_stand_under_a_line_that_says_so(page):
  for where, command in ALL:
    if where == page and NEEDS_HARDWARE.search(command.text):
      assert SAYS_SO.search(command.context), command.text


def test_the_commands_of_a_page_are_found(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "On a GPU:\n\n"
    "```\nbash scripts/benchmarks/compare.sh gpu \\\n  runs/x --only=a  # long\n```\n\n"
    "`python scripts/score.py --model DIR [--reference DIR]` scores.\n"
  )
  first, second = commands(page)
  assert split(first.text) == ["bash", "scripts/benchmarks/compare.sh", "gpu", "runs/x", "--only=a"]
  assert "On a GPU" in first.context
  assert program(split(second.text)) == (
    "scripts/score.py",
    ["--model", "DIR", "--reference", "DIR"],
  )


def test_a_flag_that_there_is_not_is_found():
  assert check_flags("scripts/score.py", ["--modle=DIR"]) == ["--modle=DIR"]
  assert check_flags(TRAIN, ["--config.optimizer.rate=1"]) == ["--config.optimizer.rate=1"]
  assert check_flags(TRAIN, ["--config=configs/none.py"]) == ["--config=configs/none.py"]
  assert not check_flags(TRAIN, ["--config=configs/preferences.py", "--config.loss.beta=1"])


def test_the_recording_fits_a_terminal_of_80_columns():
  lines = (ROOT / "docs" / "first_hour.md").read_text("utf-8").splitlines()
  assert max(map(len, lines)) <= 80


def test_the_readme_shows_what_the_quickstart_prints(capsys):
  """Every line of its transcript, from the figures in it, by the function that prints them."""
  text = (ROOT / "README.md").read_text("utf-8")
  rows = re.findall(r"^│ (.+?) +│ (\S+) +│ (.*?) +│$", text, flags=re.MULTILINE)
  assert len(rows) == 7
  keys = (
    "reward_reference",
    "reward_policy",
    "win_rate",
    "kl",
    "frontier_reward_at_kl",
    "fraction_of_frontier_gain",
    "eval_accuracy",
  )
  summary: dict[str, float | list[float]] = {}
  for key, (_, value, interval) in zip(keys, rows, strict=True):
    summary[key] = number(value)
    if interval:
      summary[f"{key}_interval"] = [number(end) for end in interval.split(" to ")]
  evaluate.print_summary(summary, 0, "")
  printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
  assert [" ".join(line.split()) for line in printed] == [
    " ".join(f"│ {label} │ {value} │ {interval} │".split()) for label, value, interval in rows
  ]


def number(text: str) -> float:
  """Reads 0.5 or 50%."""
  return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
