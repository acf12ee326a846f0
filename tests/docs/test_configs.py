"""Every configuration builds, is locked, and names only fields that exist."""

import json

import pytest
from ml_collections import ConfigDict

from configs import controlled, llama_1b, llama_8b, preferences, qwen_0_5b
from dpo_jax import defaults, losses
from dpo_jax.structs import UserError
from tests.support.paths import ROOT

ALL = {
  "controlled:sft": controlled.get_config("sft"),
  "controlled:dpo": controlled.get_config("dpo"),
  "preferences": preferences.get_config(),
  "qwen_0_5b": qwen_0_5b.get_config(),
  "llama_1b": llama_1b.get_config(),
  "llama_8b:lora": llama_8b.get_config("lora"),
  "llama_8b:fsdp": llama_8b.get_config("fsdp"),
}


def fields(section: ConfigDict, prefix: str = "") -> set[str]:
  """Dotted names of every leaf, the free-form model.scratch left out."""
  names: set[str] = set()
  for key, value in section.items():
    name = f"{prefix}{key}"
    if name == "model.scratch":
      continue
    names |= fields(value, f"{name}.") if isinstance(value, ConfigDict) else {name}
  return names


@pytest.mark.parametrize("name", ALL)
def test_a_config_is_the_defaults_with_other_values(name):
  assert fields(ALL[name]) == fields(defaults.get_config())
  assert ALL[name].is_locked
  json.loads(ALL[name].to_json_best_effort())


@pytest.mark.parametrize("name", ALL)
def test_its_loss_resolves(name):
  given = {k: v for k, v in ALL[name].loss.items() if k != "name" and v is not None}
  assert callable(losses.resolve(ALL[name].loss.name, **given))


def test_the_loss_section_has_a_place_for_every_argument_of_every_loss():
  known = {key for name in losses.LOSSES for key in losses.arguments(name)}
  assert set(defaults.loss("sigmoid")) == known | losses.modifiers().keys() | {"name"}


def test_every_field_is_read_by_the_training_loop():
  """A declared field that nothing reads is a setting silently ignored."""
  door = (ROOT / "dpo_jax" / "training" / "setup").glob("*.py")
  source = "".join(path.read_text() for path in (*door, ROOT / "dpo_jax" / "train.py"))
  # Passed on as they are.
  whole = ("parallel.", "optimizer.", "loss.", "lora.", "on_policy.", "data.fields.")
  for name in fields(defaults.get_config()):
    if not name.startswith(whole):
      assert name in source or f".{name.split('.')[-1]}" in source, name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_a_config_opens_with_the_command_that_runs_it(path):
  text = path.read_text()
  assert text.startswith('"""') and f"--config={path.stem}" in text.split('"""')[1]


def test_an_unknown_stage_is_one_line():
  with pytest.raises(UserError, match="sft, dpo or on_policy"):
    controlled.get_config("rlhf")
