"""A work folder belongs to one configuration with its data, and is refused to others."""

import datetime
import json
import os

import pytest

from dpo_jax.structs import UserError
from dpo_jax.utils import workdir

CONFIG = json.dumps({"seed": 0, "loss": {"name": "sigmoid", "beta": 0.1}})
LEDGER = {"rows": 3, "dropped": {"equal completions": 1}}
INPUTS = {"the rows": "1", "the weights": "2"}
BEGAN = datetime.datetime(2026, 11, 7, 9, 5)


def claim(folder, config=CONFIG, ledger=LEDGER, inputs=INPUTS, **more):
  workdir.claim(folder, config, ledger, inputs, began=BEGAN, **more)


def read(folder, name):
  return json.loads((folder / name).read_text())


def test_the_same_run_may_come_again(tmp_path):
  for _ in range(2):
    workdir.check(tmp_path / "run", CONFIG)
    claim(tmp_path / "run")
  assert read(tmp_path / "run", "config.json") == json.loads(CONFIG)
  assert read(tmp_path / "run", "data.json") == LEDGER
  record = {"version": workdir.VERSION, "began": "2026-11-07T09:05:00", "inputs": INPUTS}
  assert read(tmp_path / "run", "inputs.json") == record
  assert workdir.began(tmp_path / "run") == BEGAN


def test_another_configuration_is_refused_and_nothing_is_overwritten(tmp_path):
  claim(tmp_path)
  other = CONFIG.replace("0.1", "0.5")
  with pytest.raises(UserError, match=r"loss\.beta was 0\.1, now 0\.5"):
    workdir.check(tmp_path, other)
  assert json.loads((tmp_path / "config.json").read_text())["loss"]["beta"] == 0.1


def test_a_field_without_a_value_is_called_not_set(tmp_path):
  """A loss that is given no β has its own."""
  claim(tmp_path, CONFIG.replace("0.1", "null"))
  with pytest.raises(UserError, match=r"loss\.beta was not set, now 0\.1"):
    workdir.check(tmp_path, CONFIG)


def test_one_process_at_a_time(tmp_path):
  said = r"is being trained into by another process \(process \d+ on"
  with workdir.lock(tmp_path), pytest.raises(UserError, match=said), workdir.lock(tmp_path):
    pass
  with workdir.lock(tmp_path):
    pass


def test_a_folder_that_may_not_be_written_is_refused_before_anything(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
  with pytest.raises(UserError, match=rf"--workdir=.*: {tmp_path} may not be written to"):
    workdir.check(tmp_path / "run", CONFIG)
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="file is a file, and nothing can lie in it"):
    workdir.check(tmp_path / "file" / "run", CONFIG)


def test_a_run_is_moved_aside_by_the_next_free_number(tmp_path):
  run = tmp_path / "run"
  for number in (1, 2):
    claim(run)
    workdir.check_set_aside(run, {"data.path": "elsewhere.jsonl", "lora.path": ""})
    assert workdir.set_aside(run) == tmp_path / f"run.old-{number}"
    assert not run.exists() and (tmp_path / f"run.old-{number}" / "config.json").is_file()


def test_what_is_no_run_or_is_read_is_not_moved(tmp_path):
  (tmp_path / "notes.txt").touch()
  with pytest.raises(UserError, match=r"^--overwrite: .* no config\.json, so it is no run"):
    workdir.check_set_aside(tmp_path, {})
  claim(tmp_path)
  for named in (tmp_path / "export", f"elsewhere.jsonl,{tmp_path}/more.jsonl"):
    with pytest.raises(UserError, match=r"would move .* and model\.path=.* lies in it"):
      workdir.check_set_aside(tmp_path, {"model.path": str(named)})


def test_what_changed_is_named(tmp_path):
  claim(tmp_path)
  assert workdir.changed_inputs(tmp_path, INPUTS, LEDGER) == ([], True)
  # Another reason for a row that is dropped anyway changes nothing that is learned.
  assert workdir.changed_inputs(tmp_path, INPUTS, LEDGER | {"dropped": {}}) == ([], True)
  other = {"the rows": "9", "the template": "3"}
  found = workdir.changed_inputs(tmp_path, other, LEDGER)
  assert found == (["the rows", "the weights", "the template"], True)


def test_a_run_that_began_before_there_were_digests_has_its_counts(tmp_path):
  claim(tmp_path)
  (tmp_path / "inputs.json").unlink()
  assert workdir.changed_inputs(tmp_path, INPUTS, LEDGER) == ([], False)
  # A count that did not exist then says nothing.
  assert workdir.changed_inputs(tmp_path, INPUTS, LEDGER | {"sources": 2}) == ([], False)
  found, checked = workdir.changed_inputs(tmp_path, INPUTS, LEDGER | {"rows": 4})
  assert (found, checked) == (["the data (rows was 3, now 4)"], False)
  # It began when its configuration was written.
  os.utime(tmp_path / "config.json", (0, BEGAN.timestamp()))
  assert workdir.began(tmp_path) == BEGAN
  claim(tmp_path)  # from here on it has digests
  assert workdir.changed_inputs(tmp_path, {}, LEDGER) == ([*INPUTS], True)
  assert "changes" not in {k for k, v in read(tmp_path, "inputs.json").items() if v}


def test_what_was_accepted_is_recorded_with_what_was_there_before(tmp_path):
  claim(tmp_path)
  claim(tmp_path, ledger={"rows": 4}, inputs=INPUTS | {"the rows": "9"}, step=12)
  record = read(tmp_path, "inputs.json")
  assert record["inputs"]["the rows"] == "9" and record["began"] == BEGAN.isoformat()
  (change,) = record["changes"]
  assert change == {
    "after_step": 12,
    "changed": ["the rows"],
    "inputs_before": INPUTS,
    "data_before": LEDGER,
  }
  assert read(tmp_path, "data.json") == {"rows": 4}
  claim(tmp_path, ledger=LEDGER, step=20)  # and back
  assert [c["after_step"] for c in read(tmp_path, "inputs.json")["changes"]] == [12, 20]


def test_a_run_may_be_given_more_steps_and_keeps_the_number(tmp_path):
  config = json.loads(CONFIG) | {"train": {"steps": 0, "epochs": 1.0, "batch_size": 8}}
  longer = config | {"train": config["train"] | {"epochs": 2.0}}
  claim(tmp_path, json.dumps(config))
  workdir.check(tmp_path, json.dumps(longer))
  claim(tmp_path, json.dumps(longer), step=7)
  assert read(tmp_path, "config.json") == longer
  (change,) = read(tmp_path, "inputs.json")["changes"]
  assert change == {"after_step": 7, "changed": ["train.epochs was 1.0, now 2.0"]}
  with pytest.raises(UserError, match=r"train\.batch_size was 8, now 4"):
    workdir.check(tmp_path, json.dumps(config | {"train": {"batch_size": 4}}))


def test_a_field_that_came_later_had_its_default(tmp_path):
  claim(tmp_path)
  now = json.loads(CONFIG)
  now["loss"]["later"], now["new"] = 1, {"field": "a"}
  defaults = json.dumps(now)
  workdir.check(tmp_path, defaults, defaults)
  now["new"]["field"] = "b"
  with pytest.raises(UserError, match=r"new\.field was 'a', now 'b'"):
    workdir.check(tmp_path, json.dumps(now), defaults)


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
  (tmp_path / name).write_text("mine")
  with pytest.raises(UserError, match="no run to resume"):
    workdir.check(tmp_path, CONFIG)
  assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="is a file"):
    workdir.check(tmp_path / "file", CONFIG)


def test_a_run_that_names_no_folder_has_its_own_again_and_never_another(tmp_path):
  config = json.dumps(json.loads(CONFIG) | {"train": {"steps": 6}})

  def choose(config=config):
    return workdir.choose("/models/tiny", "sigmoid", config, parent=tmp_path / "runs")

  first, other = tmp_path / "runs" / "tiny-sigmoid", config.replace("0.1", "0.5")
  assert choose() == first
  claim(first, config)
  assert choose() == first  # the same command resumes
  second = choose(other)
  assert second == tmp_path / "runs" / "tiny-sigmoid-2"
  claim(second, other)
  assert (choose(), choose(other)) == (first, second)
  # Longer training is a run of its own, and so is a folder that belongs to something else.
  longer = config.replace("6", "9")
  assert choose(longer).name == "tiny-sigmoid-3"
  (tmp_path / "runs" / "tiny-sigmoid-3").mkdir()
  (tmp_path / "runs" / "tiny-sigmoid-3" / "export").touch()
  assert choose(longer).name == "tiny-sigmoid-4"


def test_the_folder_is_named_after_the_model_and_the_loss(tmp_path):
  for model, loss, name in (
    ("runs/mine/export", "ipo", "mine-ipo"),
    ("Qwen2.5-0.5B", "0.8*sigmoid + 0.2*sft", "Qwen2.5-0.5B-0.8-sigmoid-+-0.2-sft"),
    ("a", "module:function", "a-module-function"),
  ):
    assert workdir.choose(model, loss, CONFIG, parent=tmp_path).name == name
