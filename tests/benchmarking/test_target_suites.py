"""Tables of targets: their rows, what is kept between calls, and what cells say."""

import json
import subprocess

import pytest

from configs import benchmark as shapes
from dpo_jax.benchmarking import target_suites, targets
from dpo_jax.benchmarking.target_suites import Row

MODELS = shapes.SHAPES | target_suites.LARGER
ROWS = [row for suite in target_suites.SUITES.values() for row in suite]
PLAN = {
  "fits": True,
  "peak_bytes": 8 * 2**30,
  "limit_bytes": 16 * 2**30,
  "utilization_by_products": 0.823,
  "utilization_by_cycles": 0.41,
  "utilization_by_roofline": None,
  "collectives": {"all-gather": {"runs": 2, "bytes": 4e9, "sent_bytes": 3e9}},
  "sent_seconds": 0.015,
  "estimated_seconds": 1.25,
  "attention": "splash",
  "compile_seconds": 86.2,
}


def test_every_row_has_a_name_of_its_own_in_its_suite():
  for suite in target_suites.SUITES.values():
    names = [row.name for row in suite]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_name_targets_and_models_that_exist(row, tmp_path):
  kind, _, shape = row.topology.partition(":")
  assert kind in targets.CHIPS and shape
  words = target_suites.command(row, tmp_path, MODELS)
  assert words[:2] == [f"--config={row.config}", f"--topology={row.topology}"]
  if row.model:
    config = json.loads((tmp_path / "models" / row.model / "config.json").read_text())
    assert config == MODELS[row.model]


def test_a_result_is_what_the_command_prints_or_its_last_line(monkeypatch):
  ended = subprocess.CompletedProcess([], 0, json.dumps(PLAN), "compiling")
  monkeypatch.setattr(subprocess, "run", lambda *words, **given: ended)
  row = Row("a", "llama_8b", "v5e:2x2", model="llama_8b")
  found = target_suites.run(row, ["--topology=v5e:2x2", "--config.model.path=/models/x"], 1)
  assert found["plan"] == PLAN and found["date"]
  assert found["command"] == "--topology=v5e:2x2 --config.model.path=llama_8b"
  ended = subprocess.CompletedProcess([], 1, "", "compiling\nerror: --topology=x is not known\n")
  monkeypatch.setattr(subprocess, "run", lambda *words, **given: ended)
  assert target_suites.run(row, [], 1)["error"] == "--topology=x is not known"

  def slow(*words, timeout, **given):
    raise subprocess.TimeoutExpired([], timeout)

  monkeypatch.setattr(subprocess, "run", slow)
  assert "not compiled in 2 minutes" in target_suites.run(row, [], 2)["error"]


def test_a_table_shows_what_was_and_what_is():
  row, refused = Row("a", "benchmark:a", "v5e:2x2"), Row("b", "benchmark:b", "h100:8")
  never = Row("c", "benchmark:c", "h100:8")
  results = {row.name: {"plan": PLAN}, refused.name: {"error": "64 is not divisible"}}
  header, _, first, second = target_suites.table([row, refused, never], results).splitlines()
  assert header.startswith("| run | target | fits |")
  assert first == (
    "| a | v5e:2x2 | yes | 8.0 of 16.00 | 82% | 41% | 3.0 | 0.015 | 1.250 | splash | 86 |"
  )
  assert second.startswith("| b | h100:8 | no: 64 is not divisible |")
  before = {row.name: {"plan": PLAN | {"fits": False, "utilization_by_cycles": 0.2}}}
  *_, first = target_suites.table([row], results, before).splitlines()
  assert "**no** → yes | 8.0 of 16.00 | 82% | 20% → 41% |" in first


def test_a_step_that_does_not_fit_has_no_figures_but_its_size():
  unknown = dict.fromkeys(
    (
      "utilization_by_products",
      "utilization_by_cycles",
      "collectives",
      "sent_seconds",
      "estimated_seconds",
    )
  )
  row = Row("a", "benchmark:a", "v5e:2x2")
  *_, line = target_suites.table(
    [row], {row.name: {"plan": PLAN | unknown | {"fits": False}}}
  ).splitlines()
  assert line == "| a | v5e:2x2 | **no** | 8.0 of 16.00 | – | – | – | – | – | splash | 86 |"
