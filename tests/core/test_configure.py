"""Configurations from YAML, JSON and plain arguments: the same fields, or a line that says why."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

import dpo_jax
from configs import preferences
from dpo_jax import api, configure, defaults
from dpo_jax.distributed import preemption
from dpo_jax.structs import UserError
from dpo_jax.utils import field_docs, field_names
from tests.support.paths import ROOT


def built(**fields) -> dict:
  return configure.update(defaults.get_config(), fields).to_dict()


def test_a_yaml_file_has_the_sections_and_names_of_the_flags(tmp_path):
  path = tmp_path / "my.yaml"
  path.write_text(
    """
model: MODEL_DIR           # short names, as on the command line
loss: {name: ipo, beta: 1e-1}
optimizer:
  learning_rate: 1e-6      # YAML 1.1 reads this as a text
  schedule: cosine
checkpoint.every: 1e2
data:
  path: [a.jsonl, b.jsonl]
  fields: {prompt: question}
  template: {enable_thinking: false}
parallel: {offload_optimizer: true}
"""
  )
  expected = defaults.get_config()
  expected.model.path = "MODEL_DIR"
  expected.loss.name, expected.loss.beta = "ipo", 0.1
  expected.optimizer.learning_rate, expected.optimizer.schedule = 1e-6, "cosine"
  expected.checkpoint.every = 100
  expected.data.path, expected.data.fields.prompt = "a.jsonl,b.jsonl", "question"
  expected.data.template = '{"enable_thinking": false}'
  expected.parallel.offload_optimizer = True
  assert configure.get_config(str(path)).to_dict() == expected.to_dict()


def test_the_config_json_of_a_run_is_a_configuration(tmp_path):
  config = preferences.get_config("model=DIR,data=FILE,loss=ipo,beta=0.5")
  (tmp_path / "config.json").write_text(config.to_json_best_effort())
  assert configure.get_config(str(tmp_path / "config.json")).to_dict() == config.to_dict()
  (tmp_path / "config.json").write_text('{"seed": 1, "seed": 2}')
  with pytest.raises(UserError, match="seed is given twice"):
    configure.get_config(str(tmp_path / "config.json"))


def test_none_is_a_word_in_files_and_in_python(tmp_path):
  # Every field whose documentation lists none among its values is known as one.
  listed = [
    name for name, it in field_docs.read().items() if re.search(r"(: |, )none,", it.meaning)
  ]
  assert listed == [*field_names.NONE_IS_A_VALUE] == ["model.remat"]
  for name, text in (("a.yaml", "model: {remat: none}"), ("a.json", '{"model.remat": "none"}')):
    (tmp_path / name).write_text(text)
    assert configure.get_config(str(tmp_path / name)).model.remat == "none"
  config = configure.update(defaults.get_config(), {"model.remat": "none"})
  assert config.model.remat == "none"
  # As a run stores it, and reads it again to be resumed.
  (tmp_path / "config.json").write_text(config.to_json_best_effort())
  assert configure.get_config(str(tmp_path / "config.json")).to_dict() == config.to_dict()
  with pytest.raises(UserError, match=r"model.remat has no value; .*, or write 'none'"):
    built(model={"remat": None})


def test_every_short_name_sets_its_field_and_is_in_the_documentation():
  for short, field in field_names.SHORT.items():
    value = "x" if isinstance(_at(built(), field), str) else 7
    assert _at(built(**{short: value}), field) == value
    assert re.search(rf"\b{short}\b", api.fit.__doc__ or "")


def _at(config: dict, field: str):
  for part in field.split("."):
    config = config[part]
  return config


def test_values_of_python_are_taken_as_they_are_meant():
  found = built(lr=np.float32(0.5), steps=np.int64(3), model=pathlib.Path("a"), beta=None)
  assert (found["optimizer"]["learning_rate"], found["train"]["steps"]) == (0.5, 3)
  assert (found["model"]["path"], found["loss"]["beta"]) == ("a", None)
  scratch = {"model_type": "llama", "rope": {"theta": 1}}
  assert built(**{"model.scratch": scratch})["model"]["scratch"] == scratch
  assert built(model={"scratch": scratch})["model"]["scratch"] == scratch
  # As a whole, also where the configuration has such fields already.
  config = configure.update(configure.load("controlled:sft"), {"model.scratch": scratch})
  assert config.model.scratch.to_dict() == scratch
  mix = {"a": "a.jsonl", "b": {"path": "b.jsonl", "weight": 2}}
  assert built(data={"mix": mix})["data"]["mix"] == mix


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (
      "learning_rate: 3",
      "no field learning_rate; did you mean optimizer.learning_rate (short: lr)?",
    ),
    ("loss: {bta: 1}", "there is no field loss.bta; did you mean loss.beta"),
    ("per_device_train_batch_size: 4", "did you mean train.batch_size (short: batch_size)?"),
    ("dataset_mixture: {datasets: [{id: a}]}", "no field dataset_mixture; did you mean data.mix?"),
    ("model_kwargs: {}", "there is no field model_kwargs"),
    ("overwrite_output_dir: true", "write --overwrite on the command line"),
    (
      "bf16: true\nlr_scheduler_type: cosine",
      "too; with another name here: lr_scheduler_type (opt",
    ),
    ("logging_steps: 1", "every step is written to metrics.jsonl"),
    ("workdir: x", "the folder of the run is named on the command line, --workdir=DIR"),
    ("zzz: 1", "there are: checkpoint, data, "),
    ("loss: {beta: 1, beta: 2}", "beta is given twice, line 1"),
    ("loss: {beta: 1}\nbeta: 2", "loss.beta is given twice; keep one"),
    ("optimizer: {schedule: off}", "write the word in quotes"),
    ("train: {steps: 1.5}", "train.steps is 1.5; it must be an integer"),
    ("train: {steps: yes}", "train.steps is True; it must be an integer"),
    ("lora:", "lora has no value; leave it out for its usual fields"),
    ("train: {steps: }", "train.steps has no value; leave it out for 0"),
    ("model: {remat: true}", "model.remat is True; it must be auto, none, dots or full"),
    (
      "checkpoint: {every: 0.5}",
      "is 0.5; it must be an integer, a number of steps: neither a share",
    ),
    ("eval: {every: epoch}", "is 'epoch'; it must be an integer, a number of steps"),
    ("beta: little", "loss.beta is 'little'; it must be a number"),
    ("data: {balance: 1}", "data.balance is 1; it must be true or false"),
    ("train: 3", "train is 3; it must be a section"),
    ("train.steps.x: 3", "train.steps has no fields of its own"),
    ("1: 2", "1 is not the name of a field"),
    ("- a", "contains a list; it must have lines `field: value`"),
    ("a: [", "is not YAML: "),
    ("seed: 1\n\tsteps: 2", "line 2"),
  ],
)
def test_what_a_file_gets_wrong_is_one_line(tmp_path, text, words):
  path = tmp_path / "bad.yaml"
  path.write_text(text)
  with pytest.raises(UserError) as error:
    configure.get_config(str(path))
  line = str(error.value)
  assert words in line and line.startswith(str(path)) and "\n" not in line


def test_a_file_that_is_no_text_is_refused(tmp_path):
  (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xff")
  with pytest.raises(UserError, match=r"bad\.yaml cannot be read"):
    configure.get_config(str(tmp_path / "bad.yaml"))


def test_fit_refuses_at_once_and_leaves_the_given_configuration(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = preferences.get_config()
  for fields, words in (
    ({"output_dir": "x"}, r"there is no field output_dir; did you mean workdir\?"),
    ({"config": "preference"}, r"config=preference: no such file; did you mean 'preferences'"),
    ({"config": "qwen_0_5b:x"}, "config=qwen_0_5b:x: it takes no argument behind a colon"),
    ({"config": 3}, "config is 3; it must be a name, a file or a ConfigDict"),
    ({"config": pathlib.Path("none.yaml")}, r"none\.yaml"),
    (
      {"config": ConfigDict({"model": {}, "seed": 1})},
      "config has no checkpoint, data, .*begin wit",
    ),
    ({"workdir": 3}, "workdir is 3; it must be the path of a folder"),
    ({"config": config, "loss": "ipo"}, r"model\.path is empty; name a Hugging Face folder"),
    ({"model": "Qwen/Qwen2.5-0.5B", "data": "x"}, "`hf download Qwen/Qwen2.5-0.5B --local-dir"),
  ):
    with pytest.raises(UserError, match=words):
      dpo_jax.fit(**fields)
  assert config.loss.name == "sigmoid" and isinstance(config, ConfigDict)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("status", "raised"), [(130, KeyboardInterrupt), (75, SystemExit)])
def test_ctrl_c_in_fit_is_that_of_python(monkeypatch, status, raised):
  def stop(*_, **__):
    raise preemption.Stopped(3, status)

  monkeypatch.setattr("dpo_jax.train.execute", stop)
  with pytest.raises(raised) as error:
    dpo_jax.fit(model="m", data="d")
  assert status == 75 or str(error.value) == "stopped and saved at step 3"


def test_importing_the_package_loads_nothing():
  show = (
    "import json, sys, dpo_jax; before = 'jax' in sys.modules, 'numpy' in sys.modules\n"
    "try: dpo_jax.train\n"
    "except AttributeError as error: print(json.dumps([before, str(error)]))"
  )
  done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, check=True)
  before, said = json.loads(done.stdout)
  assert before == [False, False] and "dpo_jax.fit(…) trains from Python" in said
