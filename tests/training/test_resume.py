"""A run that is resumed: refused with other inputs, and given more steps where that is the same."""

import datetime
import sys
import types

import pytest

from configs import preferences
from dpo_jax.structs import UserError
from dpo_jax.training import datasets
from dpo_jax.training.setup import description, resume
from dpo_jax.utils import workdir as workdirs

LEDGER = {"rows": 40}
INPUTS = {"the rows (a.jsonl)": "1", "the weights at model.path=m": "2"}


def configured(**changes):
  config = preferences.get_config("model=m,data=a.jsonl")
  config.train.update(epochs=2.0, batch_size=8)
  config.update_from_flattened_dict(changes)
  return config


def described(config):
  """The parts of a description that are read: 40 examples in batches of 8, 5 steps an epoch."""
  settings = datasets.BatchSettings(8, 1, 0, True)
  data = types.SimpleNamespace(examples=range(40), settings=settings, sampler=None)
  steps = description.steps_of(config.train.steps, config.train.epochs, data)
  return types.SimpleNamespace(data=data, ledger=LEDGER, steps=steps)


def begun(folder, config, done=0):
  """A run in a folder, with a checkpoint after so many steps."""
  text = config.to_json_best_effort()
  workdirs.claim(folder, text, LEDGER, INPUTS, began=datetime.datetime(2026, 11, 7))
  if done:
    (folder / "checkpoints" / str(done)).mkdir(parents=True)


def check(folder, config, inputs=INPUTS, accept=False):
  resume.check_resumed(config, folder, described(config), inputs, accept=accept)


def test_a_new_folder_and_the_same_inputs_pass(tmp_path):
  check(tmp_path / "new", configured())
  begun(tmp_path, configured())
  check(tmp_path, configured())


def test_other_inputs_are_refused_by_name_and_accepted_by_a_flag(tmp_path, capsys):
  begun(tmp_path, configured(), done=10)  # a finished run, too
  other = INPUTS | {"the weights at model.path=m": "3"}
  with pytest.raises(UserError, match=r"began: the weights at model\.path=m\. .*--accept_changes"):
    check(tmp_path, configured(), other)
  check(tmp_path, configured(), other, accept=True)
  assert "goes on although this changed: the weights at model.path=m" in capsys.readouterr().err


def test_a_loss_of_ones_own_is_known_by_its_code(tmp_path, monkeypatch):
  module, path = types.ModuleType("mine_of_a_run"), tmp_path / "mine_of_a_run.py"
  module.__file__ = str(path)
  monkeypatch.setitem(sys.modules, "mine_of_a_run", module)
  found = []
  for code in ("return 1", "return 2", "return 1"):
    path.write_text(code)
    found.append(resume.code_of("0.5*sigmoid + 0.5*mine_of_a_run:mine"))
  assert [*found[0]] == ["the code of loss mine_of_a_run:mine"]
  assert found[0] == found[2] != found[1]
  assert resume.code_of("0.5*sigmoid + 0.5*ipo") == {}


def test_a_run_without_digests_goes_on_with_a_line(tmp_path, capsys):
  begun(tmp_path, configured())
  (tmp_path / "inputs.json").unlink()
  check(tmp_path, configured())
  assert "could not be checked" in capsys.readouterr().err


@pytest.mark.parametrize("done", [0, 10])
def test_a_constant_rate_takes_more_epochs(tmp_path, capsys, done):
  constant = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 3}
  begun(tmp_path, configured(**constant), done)
  check(tmp_path, configured(**constant, **{"train.epochs": 4.0}))
  assert "goes on to step 20, in place of 10" in capsys.readouterr().err
  check(tmp_path, configured(**constant, **{"train.steps": 12}))


def test_a_rate_that_has_fallen_already_is_refused_with_the_way_on(tmp_path):
  begun(tmp_path, configured(), done=10)
  words = (
    r"train\.epochs asks for 20 steps, and the 10 steps .* learning rates for 10"
    r" \(optimizer\.schedule=linear\); .*--model=.*/export"
    r" --reference=m \(first: dpo-jax convert --workdir=.* --out=.*/export\)$"
  )
  with pytest.raises(UserError, match=words):
    check(tmp_path, configured(**{"train.epochs": 4.0}))


def test_a_warm_up_that_would_be_longer_is_another_rate(tmp_path):
  """None is a tenth of the steps: 1 of 10 and 2 of 20."""
  constant = {"optimizer.schedule": "constant"}
  begun(tmp_path, configured(**constant), done=10)
  with pytest.raises(UserError, match="learning rates for 10"):
    check(tmp_path, configured(**constant, **{"train.epochs": 4.0}))


def test_a_run_that_has_taken_no_step_may_have_any_length(tmp_path):
  begun(tmp_path, configured())
  check(tmp_path, configured(**{"train.epochs": 1.0}))


def test_fewer_steps_than_were_taken_are_refused(tmp_path):
  begun(tmp_path, configured(), done=10)
  with pytest.raises(UserError, match=r"asks for 5 steps, and the run in .* has taken 10"):
    check(tmp_path, configured(**{"train.epochs": 1.0}))


@pytest.mark.parametrize(
  ("count", "size", "steps", "words"),
  [
    (40, 8, 10, "40 examples to train on, 8 per update: 10 updates, 2 epochs"),
    # Ends of epochs at 10, 20, 30 and 40: of batches of 4, those at 10 and 30 lie within one.
    (10, 4, 10, "; 2 updates cross the end of an epoch and may use an example twice"),
    (10, 4, 3, "1.2 epochs; 1 update crosses the end of an epoch and may use an example twice"),
    (10, 4, 2, "2 updates, 0.8 epochs"),
    (7, 7, 1, "7 examples to train on, 7 per update: 1 update, 1 epoch"),
  ],
)
def test_how_often_data_are_used_is_said(count, size, steps, words):
  settings = datasets.BatchSettings(size, 1, 0, True)
  data = types.SimpleNamespace(examples=range(count), settings=settings, sampler=None)
  assert description.summarize(steps, data).endswith(words)
