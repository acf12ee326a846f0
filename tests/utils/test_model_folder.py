"""What is named as a model folder and is none: what it is, and what to name instead."""

import json

import pytest

from dpo_jax.commands import console
from dpo_jax.data import readers
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.hf import checkpoint
from dpo_jax.structs import UserError
from dpo_jax.utils import model_folder, workdir


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A finished run, a model and the hub's cache of another, by relative paths."""
  monkeypatch.chdir(tmp_path)
  for name in ("runs/mine/checkpoints", "runs/mine/export", "model", "cache/snapshots/ab12"):
    (tmp_path / name).mkdir(parents=True)
  for name in ("runs/mine/export", "model", "cache/snapshots/ab12"):
    (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / name / "model.safetensors").touch()
  (tmp_path / "runs/mine/config.json").write_text("{}")
  (tmp_path / "model.gguf").touch()
  return tmp_path


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("Qwen/Qwen2.5-0.5B", "`hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B`"),
    ("runs/mine", "runs/mine is the folder of a run; its model is runs/mine/export"),
    ("runs/gone", "there is no folder runs/gone"),  # runs is a folder here: no name of the hub
    ("cache", "did you mean cache/snapshots/ab12?"),
    ("modle", "there is no folder modle; did you mean model?"),
    ("hf:Qwen/Qwen2.5-0.5B", "`hf download Qwen/Qwen2.5-0.5B --local-dir"),
    ("https://huggingface.co/Qwen/Qwen2.5-0.5B", "`hf download Qwen/Qwen2.5-0.5B --local-dir"),
    ("runs/mine/checkpoints", "a part of the run runs/mine; write a checkpoint of it as a model"),
    ("model/model.safetensors", "is a file; name its folder"),
    ("model.gguf", "is GGUF, which is not read"),
    ("runs", "runs has no config.json"),
  ],
)
def test_a_path_without_a_model_is_told_what_it_is(run, path, words):
  assert words in model_folder.instead(path)
  with pytest.raises(UserError) as error:
    checkpoint.read_config(path)
  assert words in str(error.value)


def test_a_run_that_has_not_ended_is_converted(run):
  (run / "runs/mine/export").rename(run / "elsewhere")
  assert "dpo-jax convert --workdir runs/mine --out DIR" in model_folder.instead("runs/mine")
  assert "convert" in console.COMMANDS


def test_a_tokenizer_of_a_run_or_of_the_hub_is_named(run):
  with pytest.raises(UserError, match="its model is runs/mine/export"):
    load_tokenizer("runs/mine")
  with pytest.raises(UserError, match="hf download"):
    load_tokenizer("Qwen/Qwen2.5-0.5B")


def test_a_model_is_no_workdir(run):
  with pytest.raises(UserError, match=r"--workdir=model is a model folder; a run writes into"):
    workdir.check(run.joinpath("model").relative_to(run), "{}")
  with pytest.raises(UserError, match=r"export is a model folder; its run is .*runs/mine"):
    workdir.check(run / "runs/mine/export", "{}")


def test_a_model_or_a_name_of_the_hub_is_no_file_of_rows(run):
  with pytest.raises(UserError, match="model is a model folder; name a file of rows"):
    readers.files("model")
  with pytest.raises(UserError, match="of the Hugging Face hub is named hf:trl-lib/ultra"):
    readers.files("trl-lib/ultra")
  with pytest.raises(UserError, match=r"no data file data/pairs\.jsonl$"):
    readers.files("data/pairs.jsonl")


def test_positions_of_a_folder(tmp_path):
  assert model_folder.positions(tmp_path) is None
  for fields, count in (
    ({"max_position_embeddings": 2048}, 2048),
    ({"n_positions": 1024}, 1024),
    ({"model_type": "llama"}, None),
    ([], None),
  ):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert model_folder.positions(tmp_path) == count
