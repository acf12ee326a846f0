"""The command that trains: the lines that a finished run ends with."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_jax import train
from dpo_jax.training import verdict
from dpo_jax.training.checkpoint import Best
from dpo_jax.training.verdict import HeldOut


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("best", [40, 60, None])
def test_a_run_ends_with_the_commands_that_use_it(tmp_path, monkeypatch, capsys, adapter, best):
  monkeypatch.setattr(sys, "argv", ["dpo-jax train"])
  run = tmp_path / "my run"
  (run / "export").mkdir(parents=True)
  if adapter:
    (run / "export" / "adapter_config.json").touch()
  right_B = np.ones(4) if best else None  # pairs, or texts
  verdict.write(run, verdict.AFTER, HeldOut(np.ones(4), np.ones(4), right_B))
  found = Best(best, "rewards/accuracies", 0.75) if best else None
  verdict.write_result(run, 60, "better", best=found)
  train._print_next(run)
  lines = capsys.readouterr().out.splitlines()
  expected = [
    f"done: {run}/export (the {'adapter' if adapter else 'model'}), {run}/report.html (the report)",
    f"try it: dpo-jax sample '--model={run}/export' --prompt=\"TEXT\"",
  ]
  if best:
    expected.append(f"measure it: dpo-jax evaluate '--workdir={run}'")
  if best == 40:
    expected.append(f"export the best: dpo-jax convert '--workdir={run}' '--out={run}/best' --best")
  elif adapter:
    expected.append(
      f"merge it into its base: dpo-jax convert '--workdir={run}' '--out={run}/merged' --merge_lora"
    )
  assert lines[-len(expected) :] == expected and len(expected) <= 5
  assert (
    lines[: -len(expected)]
    == {
      40: ["best checkpoint: step 40 of 60, by held-out accuracy (75.0%)"],
      60: ["best checkpoint: step 60, the last, by held-out accuracy (75.0%)"],
      None: [],
    }[best]
  )


def test_ctrl_c_while_exporting_says_that_no_step_is_lost(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["dpo-jax train", "--workdir", "run", "--overwrite"])
  with (
    pytest.raises(KeyboardInterrupt),
    train._reporting_interruption(SimpleNamespace(workdir=tmp_path, steps=1200)),
  ):
    raise KeyboardInterrupt
  assert capsys.readouterr().out.splitlines() == [
    "not exported yet, but all 1,200 steps are saved",
    "continue: dpo-jax train --workdir run",
  ]


@pytest.mark.parametrize(("checkpoint", "finished"), [("60", True), (None, True), ("40", False)])
def test_a_run_is_finished_without_its_checkpoints_too(tmp_path, capsys, checkpoint, finished):
  (tmp_path / "export").mkdir()
  verdict.write_result(tmp_path, 60, "better")
  if checkpoint:
    (tmp_path / "checkpoints" / checkpoint).mkdir(parents=True)
    (tmp_path / "checkpoints" / checkpoint / "_CHECKPOINT_METADATA").write_text("{}")
  assert train._is_finished(tmp_path, 60) == finished
  assert ("has finished all 60 steps" in capsys.readouterr().out) == finished
  assert not train._is_finished(tmp_path, 90)
