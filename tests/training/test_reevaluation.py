"""A run that has ended, evaluated again: its own numbers, from its folder alone."""

import json
import shutil
import types

import numpy as np
import pytest

from dpo_jax import configure, train
from dpo_jax.commands import evaluate as command
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.structs import UserError
from dpo_jax.training import reevaluation, setup, verdict
from tests.support import small_task

pytestmark = pytest.mark.usefixtures("one_picture")

SMALL = {"parallel.devices": 1, "data.eval_fraction": 0.3, "train.steps": 2, "checkpoint.every": 0}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return small_task.write(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def run(task):
  """A run of two steps, with 10 of 32 rows held out."""
  train.execute(small_task.configured(task, **SMALL), task / "run")
  return task / "run"


def opened(workdir, **given):
  return setup.reopen(configure.get_config(str(workdir / "config.json")), workdir, **given)


def agrees(summary, workdir):
  last, first = (read_metrics(workdir / "metrics.jsonl")[i] for i in (-1, 0))
  for name, key in (
    ("eval_loss", "loss"),
    ("eval_accuracy", "rewards/accuracies"),
    ("eval_margin", "rewards/margins"),
  ):
    if f"eval/{key}" in last:
      np.testing.assert_allclose(summary[name], last[f"eval/{key}"], rtol=1e-5, atol=1e-6)
      before = summary[f"{name}_before"]
      np.testing.assert_allclose(before, first[f"eval/{key}"], rtol=1e-5, atol=1e-6)


def test_a_run_is_evaluated_to_its_own_numbers(task, run):
  summary = reevaluation.measure(opened(run))
  agrees(summary, run)
  assert summary["pairs"] == 10 and summary["trained_on"] == 0 and "in_training" not in summary
  assert summary["verdict"] == json.loads((run / "result.json").read_text())["result"]
  low, high = summary["eval_accuracy_interval"]
  last = read_metrics(run / "metrics.jsonl")[-1]
  assert last["eval/pairs"] == 10
  np.testing.assert_allclose(low, last["eval/rewards/accuracies_low"])
  np.testing.assert_allclose(high, last["eval/rewards/accuracies_high"])
  assert (summary["model"], summary["reference"]) == (str(run / "export"), str(task / "base"))
  # By the end of training, what was evaluated is what is on the list.
  lines = (run / "held_out" / "rows.jsonl").read_text().splitlines()
  rows = [json.loads(line)["row"] for line in lines]
  assert sorted(verdict.read(run, verdict.AFTER).row_B.tolist()) == rows
  ledger = json.loads((run / "data.json").read_text())
  assert ledger["held_out"] == {"examples": 10, "evaluated": 10}


def test_a_run_that_began_before_rows_were_written_is_found_by_its_seed(run):
  old = run.with_name("old")
  shutil.copytree(run, old)
  (old / "held_out" / "rows.jsonl").unlink()
  agrees(reevaluation.measure(opened(old)), run)
  with pytest.raises(UserError, match=r"began before held-out rows were written .*out --data"):
    opened(old, data=str(run.with_name("pairs.jsonl")))


def test_what_has_moved_is_named_or_refused(task, run, tmp_path):
  lines = (task / "pairs.jsonl").read_text().splitlines()
  other = tmp_path / "other.jsonl"
  other.write_text("\n".join(reversed(lines)))
  found = opened(run, data=str(other)).run.data.rows.held_out
  # Each once: rows that were trained on too are counted.
  assert found[0].file == str(other) and len(found) == 10
  other.write_text("\n".join(lines[8:]))
  with pytest.raises(UserError, match=r"other.jsonl has changed: \d of the 10 held-out rows"):
    opened(run, data=str(other))
  config = configure.get_config(str(run / "config.json"))
  for field, flag in (("data.path", "--data"), ("model.path", "--reference")):
    moved = config.copy_and_resolve_references()
    moved.update_from_flattened_dict({field: "gone"})
    with pytest.raises(UserError, match=rf"{field}=gone, which the run .* now: {flag}=PATH"):
      setup.reopen(moved, run)
  with pytest.raises(UserError, match=r"--model: there is no folder gone"):
    opened(run, model="gone")
  unfinished = tmp_path / "unfinished"
  shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("export"))
  with pytest.raises(UserError, match=r"has no export yet; .*dpo-jax convert --workdir="):
    opened(unfinished)
  none = tmp_path / "none"
  shutil.copytree(run, none)
  (none / "held_out" / "rows.jsonl").write_text("")
  with pytest.raises(UserError, match=r"held out no rows; name some"):
    opened(none)


@pytest.mark.parametrize(
  ("place", "says"),
  [("run/export", "is a model folder; its run is "), ("gone", "does not exist"), (".", "holds no")],
)
def test_a_folder_that_is_no_run_is_refused(task, run, place, says):
  with pytest.raises(UserError, match=says):
    setup.check_run(task / place)


class Flags(dict):
  """Stands for the flags of the command; those that are given have values."""

  def __init__(self, **given):
    names = ("workdir", "model", "reference", "data", "beta", "max_length", "fields", "verdict")
    usual = dict.fromkeys((*names, "train_on", "on_bad_row", "reward")) | {"loss": "sigmoid"}
    for name, value in (usual | given).items():
      self[name] = types.SimpleNamespace(value=value, present=int(name in given))

  def __getattr__(self, name):
    return self[name].value


def test_the_command_shows_a_run_with_its_limits(run, monkeypatch, capsys):
  monkeypatch.setattr(command, "FLAGS", Flags(workdir=str(run)))
  command._check_flags()
  config = json.loads((run / "config.json").read_text())
  config["data"]["eval_limit"] = 4
  limited = run.with_name("limited")
  shutil.copytree(run, limited)
  (limited / "config.json").write_text(json.dumps(config))
  monkeypatch.setattr(command, "FLAGS", Flags(workdir=str(limited)))
  summary, title, notes = command._of_run()
  assert title == f"Held-out rows of {limited}: 10 pairs of {summary['data']}"
  assert notes[0].startswith("training evaluated the first of them alone (data.eval_limit): 4 pair")
  assert notes[1] == summary["verdict"] and notes[1].startswith("held out (10 pairs): ")
  # The first four are those that training evaluated.
  found = verdict.read(run, verdict.AFTER)
  first = found.loss_B[np.argsort(found.row_B)][:4]
  np.testing.assert_allclose(summary["in_training"]["eval_loss"], first.mean(), rtol=1e-5)


def test_the_command_counts_rows_that_were_trained_on(task, run, monkeypatch):
  models = {"model": str(run / "export"), "reference": str(task / "base")}
  monkeypatch.setattr(command, "FLAGS", Flags(**models, data=str(task / "pairs.jsonl")))
  monkeypatch.setattr(command.row_flags, "read_options", dict)
  summary, title, notes = command._of_file()
  assert title == f"On {task / 'pairs.jsonl'}: 32 pairs"
  assert (summary["pairs"], summary["trained_on"]) == (32, 22)
  assert notes[0].startswith(f"22 of 32 rows were trained on by this model (run {run}); the others")
  # Those are the ones that the run held out.
  last = read_metrics(run / "metrics.jsonl")[-1]
  others = summary["not_trained_on"]
  assert others["pairs"] == 10
  np.testing.assert_allclose(others["eval_accuracy"], last["eval/rewards/accuracies"], rtol=1e-5)
  np.testing.assert_allclose(others["eval_loss"], last["eval/loss"], rtol=1e-4)


@pytest.mark.parametrize(
  ("given", "says"),
  [
    ({}, r"--model is required, or --workdir=RUN"),
    ({"model": "a", "reference": "b"}, r"--data is required"),
    ({"workdir": "a", "beta": 0.1}, r"--beta: with --workdir it is that of the run"),
  ],
)
def test_flags_that_are_missing_or_of_no_use(given, says, monkeypatch):
  monkeypatch.setattr(command, "FLAGS", Flags(**given))
  with pytest.raises(UserError, match=says):
    command._check_flags()


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"loss.name": "simpo"},
    {"loss.name": "bco_pair"},
    {"reference.sync_every": 1},
    {"lora.rank": 2},
    {"model.compute_dtype": "bfloat16", "model.param_dtype": "bfloat16"},
    {"parallel.devices": 2, "train.accumulate": 2},
  ],
)
def test_every_kind_of_run_is_evaluated_to_its_own_numbers(task, tmp_path, changes):
  train.execute(small_task.configured(task, **SMALL | changes), tmp_path / "run")
  summary = reevaluation.measure(opened(tmp_path / "run"))
  agrees(summary, tmp_path / "run")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert summary["verdict"] == result["result"]
