"""A leading ~ is the home folder, in flags and fields, and never a folder of that name."""

import pytest

from configs import preferences
from dpo_jax.structs import UserError
from dpo_jax.utils import paths


@pytest.fixture(autouse=True)
def home(monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")


@pytest.mark.parametrize(
  ("written", "found"),
  [
    ("~/runs/x", "/home/someone/runs/x"),
    ("~", "/home/someone"),
    ("~/a.jsonl,~/b.jsonl", "/home/someone/a.jsonl,/home/someone/b.jsonl"),
    ("", ""),
    ("runs/x", "runs/x"),
    ("runs/~x", "runs/~x"),
    ("./~", "./~"),
    ("$HOME/x", "$HOME/x"),  # the shell's
  ],
)
def test_what_a_path_means(written, found):
  assert paths.expand(written) == found


def test_a_home_folder_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match=r"no home folder ~nobody_here; .* \./~nobody_here/x for"):
    paths.expand("~nobody_here/x")


def test_every_field_that_is_a_path_is_expanded():
  config = preferences.get_config("model=~/m,data=~/d.jsonl")
  config.reference.store = "~/store"
  paths.expand_fields(config)
  assert config.model.path == "/home/someone/m"
  assert config.data.path == "/home/someone/d.jsonl"
  assert config.reference.store == "/home/someone/store"
  config = preferences.get_config()
  with config.unlocked():
    config.data.mix = {"a": "~/a.jsonl", "b": {"path": "~/b.jsonl", "weight": 0.5}}
  paths.expand_fields(config)
  found = {"a": "/home/someone/a.jsonl", "b": {"path": "/home/someone/b.jsonl", "weight": 0.5}}
  assert config.data.mix.to_dict() == found
  config.lora.path = "~nobody_here/a"
  with pytest.raises(UserError, match=r"^lora\.path=~nobody_here/a: no home folder"):
    paths.expand_fields(config)


def test_no_field_that_is_a_path_is_forgotten():
  """Fields named after paths, in every section."""
  config = preferences.get_config()
  named = {
    f"{section}.{name}"
    for section in config
    if hasattr(config[section], "keys")
    for name in config[section]
    if name.endswith("path") or name in ("store", "tokenizer")
  }
  assert named == set(paths.FIELDS)
