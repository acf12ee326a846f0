"""What is varied, and that a point is measured and drawn."""

import json
import subprocess
import sys

import pytest

from dpo_jax.benchmarking import planner, scaling
from dpo_jax.monitoring import plots
from dpo_jax.structs import UserError
from tests.support.paths import ROOT


def test_quantities_grow_as_far_as_they_say():
  values = {name: axis.values for name, axis in scaling.AXES.items()}
  assert (values["length"][0], values["length"][-1]) == (256, 32768)
  assert values["vocabulary"] == (1024, 4096, 16384, 65536, 262144)
  assert values["devices"] == (1, 2, 4, 8)


@pytest.mark.parametrize(
  ("axis", "value", "tokens"),
  [
    # Of a pair of texts of 2 n tokens: n - 1 of the prompt and n of each answer; drawn by a
    # logarithm, each may come out one less.
    ("length", 512, 3 * 256 - 1),
    ("pairs", 4, 4 * (3 * 64 - 1)),
    ("answers", 8, 9 * 64 - 1),
  ],
)
def test_rows_hold_what_is_asked_for(axis, value, tokens):
  run = planner.outline(*scaling.configured(axis, value))
  real = int((run.batch.pair_NL >= 0).sum())
  rounded = {"length": 3, "pairs": 3 * value, "answers": value + 1}[axis]
  assert tokens - rounded <= real <= tokens
  if axis == "pairs":
    assert run.batch.ids_NL.shape == (1, 1, value * 192)  # all in one row


def test_an_unknown_quantity_is_refused():
  with pytest.raises(UserError, match="'colour' does not grow; known are length, vocabulary"):
    scaling.configured("colour", 3)


@pytest.mark.slow
def test_a_step_too_large_for_this_machine_is_planned_and_not_run(monkeypatch):
  monkeypatch.setattr(scaling, "_field", lambda path, name: 2**20)
  found = scaling.measure("pairs", 1)
  assert found["planned_mb"] > 1 and found["seconds"] is None and found["measured_mb"] is None


def test_the_figure_draws_every_curve_and_what_is_in_proportion():
  def point(value, seconds):
    memory = {"measured_mb": None, "planned_mb": 3.0 * value}
    return {"axis": "pairs", "value": value, "seconds": seconds, **memory}

  points = [point(1, 0.5), point(2, 1.5), point(2048, None)]
  figure = plots.growth(points, {"pairs": "pairs of a row", "depth": "layers"})
  time, memory = (ax for ax in figure.axes if ax.get_visible())
  measured, line = (curve.get_xydata().tolist() for curve in time.lines)
  assert measured == [[1, 0.5], [2, 1.5]]
  assert line == [[1, 0.75], [2, 1.5], [2048, 1536]]  # through the last that was measured
  assert [x.get_text() for x in time.get_xticklabels()] == ["1", "2", "2k"]
  assert time.get_xlabel() == "pairs of a row" and len(memory.lines) == 2


def test_points_are_kept_whole_or_refused(tmp_path):
  file = tmp_path / "growth.json"
  assert scaling.read(file) == []
  point = {"axis": "pairs", "value": 1, "seconds": 0.5, "planned_mb": 1.0, "measured_mb": None}
  scaling.write(file, [point])
  assert scaling.read(file) == [point]
  assert [path.name for path in tmp_path.iterdir()] == [file.name]
  for text in ("", "[]", '{"points": 5}', '{"points": [1]}', '{"points": [{"axis": "pairs"}]}'):
    file.write_text(text)
    with pytest.raises(UserError, match=r"growth\.json contains no points of an earlier run"):
      scaling.read(file)
  with pytest.raises(UserError, match="contains no points"):
    scaling.read(tmp_path)


@pytest.mark.slow
def test_the_command_measures_in_a_process_of_its_own_and_goes_on(tmp_path):
  script = "scripts/benchmarks/growth.py"
  command = [sys.executable, script, f"--out={tmp_path}", "--only=pairs", "--most=1"]
  run = lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  done = run()
  assert "pairs 1: " in done.stderr
  (found,) = json.loads((tmp_path / "growth.json").read_text())["points"]
  assert found["seconds"] > 0 and found["planned_mb"] > 1
  assert (tmp_path / "growth.png").stat().st_size > 10000
  assert "pairs 1: " not in run().stderr  # it is there already
