"""Every `config.json` is read as transformers reads it: published ones, and variants of small ones.

bash scripts/test.sh -m parity     after the one command of CONTRIBUTING that adds transformers
"""

import copy
import dataclasses
import importlib
import json
import pathlib
import re

import pytest

transformers = pytest.importorskip("transformers", reason="not installed; see CONTRIBUTING")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from dpo_jax.model import families  # noqa: E402
from dpo_jax.model.families import fields as names  # noqa: E402
from dpo_jax.structs import UserError  # noqa: E402
from tests.golden import cases  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def theirs(fields):
  """Returns transformers' configuration; the fields are copied, because it writes into them."""
  given = copy.deepcopy(fields)
  return CONFIG_MAPPING[given.pop("model_type")](**given)


def assert_same(fields):
  """Checks that both read the same numbers from a file."""
  ours, their = families.from_hf(fields), theirs(fields)
  known = {field.name for field in dataclasses.fields(their)} | set(their.attribute_map)

  def get(name):
    # Transformers keeps every field of the file as an attribute; its code reads these alone.
    return getattr(their, name) if name in known | {"head_dim"} and hasattr(their, name) else None

  heads = get("num_attention_heads")
  head_width = get("head_dim") or get("hidden_size") // heads
  inner = get("n_inner") or 4 * get("hidden_size")
  gpt2 = ours.family == "gpt2"
  expected = {
    "vocab": get("vocab_size"),
    "width": get("hidden_size"),
    "layers": get("num_hidden_layers"),
    "heads": heads,
    "kv_heads": heads if gpt2 else get("num_key_value_heads"),
    "head_width": head_width,
    "mlp_width": inner if gpt2 else get("moe_intermediate_size") or get("intermediate_size"),
    "norm_eps": get("layer_norm_epsilon") if gpt2 else get("rms_norm_eps"),
    "tied": get("tie_word_embeddings"),
    "attention_cap": get("attn_logit_softcapping") or 0.0,
    "logit_cap": get("final_logit_softcapping") or 0.0,
    "activation": names.ACTIVATIONS[
      get("activation_function") if gpt2 else get("hidden_activation") or get("hidden_act")
    ],
  }
  # Which layers have a window is a list in some families, and one number for all in the others.
  kinds = get("layer_types") or ["sliding_attention"] * ours.layers
  window = get("sliding_window") or 0
  windows = tuple(window * (kind == "sliding_attention") for kind in kinds)
  expected["windows"] = windows if any(windows) else ()
  if get("query_pre_attn_scalar"):
    expected["attention_scale"] = their.query_pre_attn_scalar**-0.5
  if not gpt2:
    tables = get("rope_parameters")
    table = tables.get("full_attention") or tables
    expected["rope_theta"] = table["rope_theta"]
    assert (ours.rope_scaling.kind if ours.rope_scaling else "default") == table["rope_type"]
    share = table.get("partial_rotary_factor", 1.0)
    assert (ours.rotary_width or ours.head_width) == int(head_width * share)
    if ours.rope_scaling:
      assert ours.rope_scaling.factor == table["factor"]
    if ours.rope_scaling and table["rope_type"] != "linear":
      original = table["original_max_position_embeddings"]
      assert ours.rope_scaling.original_positions == original
    if "sliding_attention" in tables:
      expected["local_theta"] = tables["sliding_attention"]["rope_theta"]
  if get("no_rope_layers"):
    rotary = tuple("main" if x else "none" for x in their.no_rope_layers)
    expected["rotary_layers"] = rotary if "none" in rotary else ()
  found = {name: getattr(ours, name) for name in expected}
  assert found == expected


@pytest.mark.parametrize("case", cases.CASES)
def test_small_files_are_read_as_transformers_reads_them(case):
  assert_same(cases.CASES[case])


SIZES = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 32, "vocab_size": 50}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"num_key_value_heads": 4},
    {"sliding_window": None},
    {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3e4},
    {"rope_scaling": cases.LLAMA3, "max_position_embeddings": 128},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 128},
    {"hidden_act": "gelu"},
    {"hidden_activation": "gelu"},
    {"sliding_window_pattern": 2},
    {"_sliding_window_pattern": 2},
    {"rope_local_base_freq": 5e3},
    {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0},
    {"num_experts": 4, "num_experts_per_tok": 2},
    {"layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window": 4},
    {"layer_types": ["full_attention"] * 6},
  ],
  ids=str,
)
def test_left_out_and_unusual_fields_are_read_alike_or_refused(family, fields):
  sizes = SIZES if family != "gpt2" else {"vocab_size": 50, "n_layer": 6}
  fields = {"model_type": family, "intermediate_size": 32} | sizes | fields
  try:
    families.from_hf(fields)
  except UserError as error:
    assert any(name in str(error) for name in fields) or "rope type" in str(error)
    return
  assert_same(fields)


def published(shared_data):
  for file in sorted((shared_data / "hub_configs").glob("*/config.json")):
    fields = json.loads(file.read_text())
    if fields.get("model_type") in families.FAMILIES:
      yield file.parent.name, fields


def test_published_files_are_read_as_transformers_reads_them(shared_data):
  count = 0
  for name, fields in published(shared_data):
    try:
      families.from_hf(fields)
    except UserError:
      continue  # tests/hf/test_published_configs.py lists these with their reasons
    count += 1
    try:
      assert_same(fields)
    except AssertionError as error:
      raise AssertionError(f"{name}: {error}") from error
  assert count >= 70


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_field_that_transformers_reads_is_known_here(family):
  """Fields of its configuration class and of its modelling code: none is passed over."""
  kind = CONFIG_MAPPING[family]
  fields = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
  module = importlib.import_module(kind.__module__)
  code = pathlib.Path(module.__file__.replace("configuration_", "modeling_")).read_text()
  fields |= set(re.findall(r"config\.(\w+)", code))
  fields |= set(re.findall(r"getattr\(\s*(?:self\.)?config,\s*['\"](\w+)", code))
  # Gemma 3's module also has the model of images; methods and private settings are no fields.
  fields -= {"get_text_config", "text_config", "vision_config", "mm_tokens_per_image"}
  given = {name: cases.CASES[case] for name, case in EXAMPLES.items()}[family]
  # A value that no reader understands is refused by whoever reads it.
  passed = [
    name for name in sorted(fields - set(given)) if name in unknown(given | {name: "no such value"})
  ]
  assert passed == []


EXAMPLES = {fields["model_type"]: case for case, fields in cases.CASES.items()}


def unknown(fields):
  try:
    return families.unknown_fields(fields)
  except UserError:
    return []
