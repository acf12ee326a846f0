"""Every family gives the logits that transformers computed, and the same ones in all layouts."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.data import collate, packing
from dpo_jax.generation import sampler
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.logprobs import logits, make_logps_fn
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError
from tests.golden import cases
from tests.support import tiny
from tests.support.paths import GOLDEN
from tests.support.whole_rows import whole_rows

CASES = pytest.mark.parametrize("case", cases.CASES)
# One case of every family: the last, which has the most unusual options.
FAMILIES = {families.from_hf(fields).family: case for case, fields in cases.CASES.items()}


def config_of(case):
  return families.from_hf(cases.CASES[case])


@functools.cache
def model(case):
  """Reads a configuration and parameters from a folder with the tensors of released models."""
  import tempfile

  config = config_of(case)
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root)
    (folder / "config.json").write_text(json.dumps(cases.CASES[case]))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformer.param_shapes(config))
    hf_checkpoint.save(folder / "shapes", config, params)
    file = folder / "shapes" / "model.safetensors"
    tensors = {name: cases.weight(name, shape) for name, shape in shapes(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return hf_checkpoint.load(folder)


def shapes(file):
  from safetensors import safe_open

  with safe_open(file, "np") as tensors:
    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


@functools.cache
def hidden_fn(case):
  """Returns the forward pass, compiled once for sequences in rows of one shape."""
  return jax.jit(transformer.build(config_of(case)).hidden)


def logits_of(case, ids_NL):
  """Computes the logits [N, L, V] of whole sequences."""
  config, params = model(case)
  hidden_NLD = hidden_fn(case)(params, whole_rows(ids_NL))
  return np.asarray(logits(hidden_NLD, transformer.head(config, params)))


@CASES
def test_logits_are_those_of_transformers(case):
  """Errors are at most 1e-4 in float32, for logits with standard deviations of 1 to 4."""
  found = logits_of(case, cases.IDS_NL)[:, ::3]
  expected = np.load(GOLDEN)[case]
  assert expected.std() > 0.9
  np.testing.assert_allclose(found, expected, atol=1e-4)


@CASES
def test_config_json_both_ways(case):
  config = config_of(case)
  assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_folders_come_back_bit_for_bit(case, tmp_path):
  config, params = model(case)
  hf_checkpoint.save(tmp_path / "copy", config, params)
  again, found = hf_checkpoint.load(tmp_path / "copy")
  assert again == config
  for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_shared_prompts_equal_separate_rows(case):
  """Sequences are longer than the windows, and branches stand far behind their prompts in a row."""
  config, params = model(case)
  examples = tiny.pairs(5, vocab=config.vocab, longest=12)
  sizes = packing.Sizes(rows=10, rows_step=10, scored=12, slots=8)
  lay_out = functools.partial(collate.collate, examples, row_length=48)
  padded = lay_out(layout="padded", sizes=sizes._replace(slots=1))
  shared = lay_out(layout="shared", sizes=sizes)
  # Both are groups of rows of one batch, so one program is compiled, not two.
  batch = jax.tree.map(lambda x, y: np.concatenate([x, y]), with_slots(padded, 8), shared)
  logps_NS = np.asarray(jax.jit(make_logps_fn(transformer.build(config)))(params, batch))

  def by_row(rows_NS, logps_NS):
    pairs = zip(rows_NS.reshape(-1, 2), logps_NS.reshape(-1, 2), strict=True)
    return np.array(
      [logps for row, logps in sorted((r[0], tuple(x)) for r, x in pairs) if row >= 0]
    )

  separate = by_row(padded.row_NS, logps_NS[:10, :1])
  assert separate.shape == (5, 2)
  np.testing.assert_allclose(by_row(shared.row_NS, logps_NS[10:]), separate, rtol=1e-5)


def with_slots(batch, slots):
  """Adds empty slots behind the only slot of every row."""
  empty = {"weight_NS": 0, "score_NS": 0, "row_NS": -1}
  more = ((0, 0), (0, slots - 1))
  widened = {
    name: np.pad(getattr(batch, name), more, constant_values=x) for name, x in empty.items()
  }
  return batch._replace(**widened)


@pytest.mark.parametrize("case", ["gpt2", "qwen2 windows", "gemma3", "smollm3", "mixtral"])
def test_a_token_at_a_time_equals_the_whole(case):
  """Greedy answers from the cache are the argmax of the logits of the whole text."""
  config, params = model(case)
  prompts = [cases.IDS_NL[0, :7].tolist(), cases.IDS_NL[1, :4].tolist()]
  completions = sampler.generate(config, params, prompts, max_tokens=9, temperature=0)
  texts = [prompt + answer for prompt, (answer,) in zip(prompts, completions, strict=True)]
  # In rows of the shape of the other tests, for which the forward pass is compiled already.
  ids_NL = np.zeros_like(cases.IDS_NL)
  for ids_L, text in zip(ids_NL, texts, strict=True):
    ids_L[: len(text)] = text
  rows = zip(prompts, texts, logits_of(case, ids_NL), strict=True)
  for prompt, text, logits_LV in rows:
    found = logits_LV[len(prompt) - 1 : len(text) - 1].argmax(-1)
    assert text[len(prompt) :] == found.tolist()


def refused(fields, message):
  with pytest.raises(UserError, match=message) as caught:
    families.from_hf(fields)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("case", "fields", "message"),
  [
    ("llama", {"model_type": "falcon"}, "'falcon' is not known; known are gemma, gemma2, "),
    ("llama", {"sliding_window": 5}, "sliding_window = 5 is not supported for llama; only null is"),
    ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types = .* only null is"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved = True is not supported for llama"),
    ("llama", {"is_causal": False}, "is_causal = False is not supported for llama; only True is"),
    ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads = .* only {} is"),
    ("llama", {"quantization": {"bits": 4}}, "has quantization: quantised weights are not"),
    (
      "llama",
      {"architectures": ["LlamaForSequenceClassification"]},
      "gives scores and no log-prob",
    ),
    (
      "llama",
      {"rope_scaling": cases.YARN, "rope_parameters": {"rope_theta": 5e5}},
      "rope_scaling and rope_parameters differ",
    ),
    ("mistral", {"attention_bias": True}, "attention_bias = True is not supported for mistral"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "all layers of mistral have the window"),
    ("gpt2", {"hidden_size": 8}, "n_embd is 24 and hidden_size is 8; the two name the same"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must name 3 layers"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types must name 3 layers"),
    (
      "qwen2",
      {"layer_types": ["sliding_attention"] * 3},
      "layer_types has sliding_attention, but use_sliding_window is false",
    ),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be 1 or more"),
    (
      "gemma",
      {"hidden_activation": "relu"},
      "hidden_act is 'gelu_pytorch_tanh' and hidden_activat",
    ),
    ("gemma3", {"rope_scaling": {"type": "linear", "factor": 2}}, "write it as rope_type"),
    ("gemma3 nested", {"rope_parameters": {"rope_theta": 5e5}}, "needs an object for each of"),
    (
      "smollm3",
      {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False, "sliding_window": 5},
      "layer_types has sliding_attention, but use_sliding_window is false",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not"),
    ("phi3", {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope' is not"),
    ("phi3", {"rope_scaling": cases.YARN}, "rope type 'yarn' is not supported for phi3"),
    ("phi3", {"partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1.5; it must lie in"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must contain 3 times 0 or 1"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mix layers with and without experts"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "chooses 9 of 6 experts"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
    (
      "llama yarn",
      {"rope_scaling": cases.YARN | {"low_freq_factor": 1.0}},
      "'yarn' takes .* 'low_",
    ),
    ("llama yarn", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "change with the length"),
  ],
)
def test_what_would_not_be_honoured_is_refused_by_name(case, fields, message):
  refused(cases.CASES[case] | fields, message)


@pytest.mark.parametrize(
  ("case", "fields"),
  [
    # As they stand in published files.
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 2}),
    ("llama", {"unsloth_fixed": True, "unsloth_version": "2024.12.4", "_attn_implementation": "x"}),
    ("llama", {"transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 9}),
    ("llama biases", {"num_key_value_heads": None}),
    ("llama", {"rope_scaling": None, "rope_parameters": None, "quantization_config": {}}),
    ("llama", {"layer_types": ["full_attention"] * 3, "auto_map": {"AutoConfig": "a.B"}}),
    ("qwen2", {"use_mrope": False, "sliding_window": None, "dtype": "bfloat16"}),
    ("phi3", {"attention_bias": False, "original_max_position_embeddings": 64}),
    ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2}),
    ("gemma", {"hidden_act": "gelu"}),
    ("gemma2", {"hidden_act": "gelu", "cache_implementation": "hybrid"}),
    ("gpt2", {"n_ctx": 64, "task_specific_params": {"text-generation": {}}, "output_past": True}),
    ("gpt2", {"summary_type": "cls_index", "num_hidden_layers": 3, "max_position_embeddings": 64}),
  ],
)
def test_fields_of_published_files_that_change_nothing(case, fields):
  given = cases.CASES[case]
  assert families.from_hf(given | fields) == families.from_hf(given)
  assert families.unknown_fields(given | fields) == []


def test_a_field_that_nobody_knows_is_named_and_changes_nothing():
  given = cases.CASES["llama llama3"]
  more = {"residual_multiplier": 0.2, "rope_scaling": cases.LLAMA3 | {"finetuned": True}}
  assert families.from_hf(given | more) == families.from_hf(given)
  assert families.unknown_fields(given | more) == [
    "rope_parameters.finetuned",
    "residual_multiplier",
  ]


def test_a_misspelt_field_of_a_model_from_scratch_is_refused():
  given = cases.CASES["llama"]
  assert families.from_scratch(given) == families.from_hf(given)
  with pytest.raises(UserError, match=r"model\.scratch\.hiden_act is no field of a llama model"):
    families.from_scratch(given | {"hiden_act": "relu"})


def test_what_a_file_leaves_out_has_the_value_of_its_family():
  def without(case, *names):
    return families.from_hf({k: v for k, v in cases.CASES[case].items() if k not in names})

  assert without("mistral", "sliding_window").windows == (4096,) * 3
  assert without("gemma2", "sliding_window").windows == (4096, 0, 4096)
  assert families.from_hf(cases.CASES["llama"] | {"head_dim": None}).head_width == 24 // 4
  # The positions that a model was first trained on, where only their number now is stated.
  fields = cases.CASES["llama yarn"] | {"rope_scaling": {"type": "yarn", "factor": 2.0}}
  assert families.from_hf(fields).rope_scaling.original_positions == 64


def test_yarn_with_both_factors_of_its_magnitude():
  # (0.1 * 0.5 * log 4 + 1) / (0.1 * 1.5 * log 4 + 1); one alone changes nothing.
  both = cases.YARN | {"mscale": 0.5, "mscale_all_dim": 1.5}
  found = families.from_hf(cases.CASES["llama yarn"] | {"rope_scaling": both}).rope_scaling
  np.testing.assert_allclose(
    found.magnitude, (0.05 * np.log(4) + 1) / (0.15 * np.log(4) + 1), rtol=1e-12
  )
  alone = cases.CASES["llama yarn"] | {"rope_scaling": cases.YARN | {"mscale": 0.5}}
  assert families.from_hf(alone) == config_of("llama yarn")


def test_experts_divide_the_work_of_one_part_among_them():
  """A mixture of identical experts, whose weights sum to 1, is one feed-forward part."""
  config, params = model("mixtral")
  layers = dict(params["params"]["layers"])
  experts = dict(layers.pop("experts"))
  alike = {
    name: {"kernel": np.broadcast_to(experts[name]["kernel"][:, :1], experts[name]["kernel"].shape)}
    for name in ("gate", "up", "down")
  }
  mixed = params["params"] | {"layers": layers | {"experts": experts | alike}}
  one = {name: {"kernel": alike[name]["kernel"][:, 0]} for name in alike}
  plain = params["params"] | {"layers": layers | one}
  batch = whole_rows(cases.IDS_NL)

  def run(config, tree):
    return jax.jit(transformer.build(config).hidden)({"params": tree}, batch)

  expected = run(dataclasses.replace(config, experts=None), plain)
  np.testing.assert_allclose(run(config, mixed), expected, atol=1e-5)
