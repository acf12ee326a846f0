"""Published `config.json` files of known families load, or are refused for a reason that holds.

`tests/parity/test_configs.py` compares what is read with transformers.
"""

import json

import pytest

from dpo_jax.model import families
from dpo_jax.structs import UserError

QUANTISED = "quantised weights are not supported"
BY_LENGTH = "its frequencies change with the length of a sequence"
# The files of known families that are refused, and why. All others load.
REFUSED = {
  "Qwen__Qwen3-30B-A3B-FP8": QUANTISED,
  "Qwen__Qwen3-32B-FP8": QUANTISED,
  "Qwen__Qwen3-32B-FP8-Static-PerTensor": QUANTISED,
  "Qwen__Qwen3-8B-FP8": QUANTISED,
  "Skywork__Skywork-Reward-Llama-3.1-8B-v0.2": "gives scores and no log-probs of tokens",
  "TheBloke__Wizard-Vicuna-30B-Uncensored-GPTQ": QUANTISED,
  "gh-DeveloperZeeshu__qwen2.5-3b-unsloth-bnb-4bit": QUANTISED,
  "gh-jeevanchaps__Meta-Llama3.1-8B-Instruct": QUANTISED,
  "gh-roshinpv__qwen2.5-14b-int4": QUANTISED,
  "lmstudio-or-mlx__Qwen3-14B-MLX-4bit": QUANTISED,
  "meta-llama__Llama-3.1-405B-Instruct-FP8": QUANTISED,
  "microsoft__Phi-3-mini-128k-instruct": BY_LENGTH,
  "microsoft__Phi-3-mini-128k-instruct_first-release": BY_LENGTH,
  "microsoft__Phi-3.5-mini-instruct": BY_LENGTH,
}


def test_published_files_load_or_are_refused_for_a_stated_reason(shared_data):
  refused, loaded = {}, 0
  for file in sorted((shared_data / "hub_configs").glob("*/config.json")):
    name, fields = file.parent.name, json.loads(file.read_text())
    try:
      config = families.from_hf(fields)
    except UserError as error:
      if fields.get("model_type") in families.FAMILIES:
        refused[name] = str(error)
      else:
        assert "is not known; known are" in str(error)
      continue
    loaded += 1
    assert families.from_hf(families.to_hf(config)) == config
    assert families.unknown_fields(fields) == [], name
  assert refused.keys() == REFUSED.keys()
  for name, error in refused.items():
    assert REFUSED[name] in error, (name, error)
  assert loaded == 76


def test_files_that_lie_under_a_refused_field_load_without_it(shared_data):
  """The quantised ones are refused for that alone: every other field of theirs is understood."""
  for name, reason in REFUSED.items():
    fields = json.loads((shared_data / "hub_configs" / name / "config.json").read_text())
    if reason == QUANTISED:
      families.from_hf(
        {k: v for k, v in fields.items() if k not in ("quantization_config", "quantization")}
      )
    else:
      with pytest.raises(UserError, match=reason):
        families.from_hf(fields)
