"""A work folder belongs to one configuration with its data, and is refused to others."""

import json
import os

import pytest

from dpo_jax.structs import UserError
from dpo_jax.utils import workdir

CONFIG = json.dumps({"seed": 0, "loss": {"name": "sigmoid", "beta": 0.1}})
LEDGER = {"rows": 3, "dropped": {"equal answers": 1}}


def test_the_same_run_may_come_again(tmp_path):
  for _ in range(2):
    workdir.check(tmp_path / "run", CONFIG)
    workdir.claim(tmp_path / "run", CONFIG, LEDGER)
  assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(CONFIG)
  assert json.loads((tmp_path / "run" / "data.json").read_text()) == LEDGER


def test_another_configuration_is_refused_and_nothing_is_overwritten(tmp_path):
  workdir.claim(tmp_path, CONFIG, LEDGER)
  other = CONFIG.replace("0.1", "0.5")
  with pytest.raises(UserError, match=r"loss\.beta was 0\.1, now 0\.5"):
    workdir.check(tmp_path, other)
  assert json.loads((tmp_path / "config.json").read_text())["loss"]["beta"] == 0.1


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
  with pytest.raises(UserError, match="file is no folder"):
    workdir.check(tmp_path / "file" / "run", CONFIG)


def test_changed_data_are_refused(tmp_path):
  workdir.claim(tmp_path, CONFIG, LEDGER)
  with pytest.raises(UserError, match="rows was 3, now 4"):
    workdir.claim(tmp_path, CONFIG, LEDGER | {"rows": 4})


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
