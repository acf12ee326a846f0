"""Adapters of PEFT are read if they are plain LoRA, and refused by name if they compute more."""

import json
import pathlib

import pytest

from dpo_jax.hf import peft_fields
from dpo_jax.structs import UserError

FOLDER = pathlib.Path("adapter")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("init_lora_weights", start) for start in ("pissa", "pissa_niter_16", "olora", "corda")),
    *(("init_lora_weights", start) for start in ("loftq", "lora_ga")),
    ("alora_invocation_tokens", [1, 2]),
    ("use_dora", True),
    ("lora_bias", True),
    ("bias", "lora_only"),
    ("modules_to_save", ["embed_tokens", "lm_head"]),
    ("trainable_token_indices", {"embed_tokens": [3]}),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("layer_replication", [[0, 2]]),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}),
    ("kasa_config", {}),
    ("velora_config", {"scale": 1.0}),
    ("monteclora_config", {}),
    ("peft_type", "LOHA"),
  ],
)
def test_what_computes_more_than_plain_lora_is_refused_by_name(name, value):
  with pytest.raises(UserError, match=f"adapter: {name} is ") as error:
    peft_fields.check(FOLDER, {"peft_type": "LORA", name: value})
  assert "\n" not in str(error.value)
  peft_fields.check(FOLDER, {"peft_type": "LORA", name: None})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initial_values_that_leave_the_base_as_it_is(start):
  peft_fields.check(FOLDER, {"init_lora_weights": start, "eva_config": {"rho": 2.0}})


def test_a_field_that_peft_does_not_know_is_reported_once(capsys):
  fields = {"peft_type": "LORA", "r": 8, "my_note": "x", "empty": None, "peft_version": "0.18.1"}
  for _ in range(2):
    peft_fields.check(FOLDER / "noted", fields)
  assert (
    capsys.readouterr().err == f"warning: {FOLDER / 'noted'}: passed over, as PEFT does: my_note\n"
  )


Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, [Q, DOWN]),
    ({"target_modules": "all-linear"}, [Q, DOWN]),
    ({"target_modules": ["q_proj"]}, [Q]),
    ({"target_modules": ["self_attn.q_proj", "up_proj"]}, [Q]),
    ({"target_modules": ["proj"]}, []),
    ({"target_modules": r".*\.mlp\..*"}, [DOWN]),
    ({"target_modules": r"mlp\..*"}, []),  # a pattern matches the whole name
    ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, [DOWN]),
    ({"target_modules": ["q_proj", "down_proj"], "exclude_modules": ".*down.*"}, [Q]),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1, 3]}, [Q]),
    ({"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"}, [Q]),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, []),
    ({"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": ["h"]}, []),
    ({"target_modules": ["q_proj"], "layers_to_transform": []}, [Q]),
  ],
)
def test_modules_are_named_as_in_peft(fields, expected):
  found = [name for name in (Q, DOWN) if peft_fields.has_adapter(fields, name.format(3))]
  assert found == expected


def test_published_adapters_are_plain_or_refused(shared_data, capsys):
  refused = {}
  for file in sorted((shared_data / "hub_configs" / "adapters").glob("*/adapter_config.json")):
    try:
      peft_fields.check(file.parent, json.loads(file.read_text()))
    except UserError as error:
      refused[file.parent.name] = str(error)
  assert list(refused) == ["gh-AdityaGupta832342__Tiny-Llama-Finetuned-for-text-summarization"]
  (line,) = refused.values()
  assert "modules_to_save is ['lm_head', 'embed_tokens']; only [] is supported" in line
  assert capsys.readouterr().err == ""
