"""The notebook of the derivation: whole, readable where it is hosted, and without mathematics."""

import ast
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.generation import rewards
from tests.support.paths import ROOT

PATH = ROOT / "notebooks" / "derivation.ipynb"
# What the notebook trains, made smaller: its assertions hold all the same.
SMALLER = {
  "0.5, 0.1, ": "",  # of `BETAS`; assertions compare the strongest and the weakest
  "--prompts=6400": "--prompts=3200",
  "train__steps=300": "train__steps=200",
}
CHAIN = (
  *("assumed_objective", "rearranged_objective", "unnormalized_target", "partition_function"),
  *("optimal_policy", "kl_divergence", "implicit_reward", "bradley_terry", "expected_dpo_loss"),
  *("loss_part", "penalty_part", "kl_form", "frontier", "sampled_terms", "descend"),
)


def code_cells(path=PATH):
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def source_of(cell):
  return "".join(cell["source"])


def trees():
  """Every code cell as a syntax tree, less the lines for IPython."""
  sources = (source_of(cell) for cell in code_cells())
  return [ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE)) for source in sources]


def printed(cells):
  """What the cells printed, one text a cell."""
  streams = [[o for o in cell["outputs"] if o["output_type"] == "stream"] for cell in cells]
  return ["".join("".join(o["text"]) for o in each) for each in streams]


def test_every_cell_ran_once_in_order_and_without_error():
  cells = code_cells()
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert {o["output_type"] for o in outputs} <= {"stream", "display_data", "execute_result"}
  # A warning, or a bar of progress, would stand on stderr.
  assert all(o["name"] == "stdout" for o in outputs if o["output_type"] == "stream")


def test_pictures_are_inside_as_png():
  data = [o["data"] for cell in code_cells() for o in cell["outputs"] if "data" in o]
  assert sum("image/png" in each for each in data) >= 5
  assert all(set(each) <= {"image/png", "text/plain"} for each in data)
  assert PATH.stat().st_size < 1_000_000


def test_nothing_points_into_one_machine():
  text = PATH.read_text(encoding="utf-8")
  assert not re.search(r"(?<![\w.>])/(home|root|work|tmp|usr|opt|var|Users|mnt)/", text)
  assert "Warning" not in text
  cells = json.loads(text)["cells"]
  prose = "".join(source_of(cell) for cell in cells if cell["cell_type"] == "markdown")
  for target in re.findall(r"\]\(([^)]+)\)", prose):
    assert (PATH.parent / target).exists(), target


def test_the_mathematics_is_imported():
  nodes = [node for tree in trees() for node in ast.walk(tree)]
  called = {
    node.attr
    for node in nodes
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id == "derivation"
  }
  assert called >= set(CHAIN)
  defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
  assert not defined & set(CHAIN)
  # What a step of the derivation would be written with.
  used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
  assert not used & {"logsumexp", "logaddexp", "sigmoid", "log_sigmoid", "softmax", "grad"}


def test_its_flawed_reward_only_counts():
  praise = rewards.resolve("notebooks.praise:reward")
  assert praise("", " The plot was not bad, and I would read it again.") == -1 + 2
  assert praise("", " again" * 30) == 60


def numbers(text):
  return [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.\d+(?:e[-+]?\d+)?", text)]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_it_runs_and_says_what_it_said(tmp_path):
  for name in ("dpo_jax", "scripts", "configs"):
    (tmp_path / name).symlink_to(ROOT / name)
  shutil.copytree(PATH.parent, tmp_path / "notebooks")
  ran = tmp_path / "notebooks" / PATH.name
  text = ran.read_text("utf-8")
  for given, smaller in SMALLER.items():
    assert given in text
    text = text.replace(given, smaller)
  ran.write_text(text, "utf-8")
  # In a process of its own, as a user runs it; its cells hold the assertions.
  done = subprocess.run(
    [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=1800", str(ran)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  cells, before = code_cells(ran), code_cells()
  assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
  # Up to the trained model, all that is printed can be computed again.
  exact = next(i for i, cell in enumerate(cells) if "WORK =" in source_of(cell))
  assert exact > 10
  pairs = zip(printed(cells[:exact]), printed(before[:exact]), strict=True)
  for found, committed in pairs:
    np.testing.assert_allclose(numbers(found), numbers(committed), rtol=1e-3, atol=2e-4)
