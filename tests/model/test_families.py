"""Every family against logits that transformers computed, and against itself in other layouts."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.data import collate
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
# One of every family, that with the most unusual options.
FAMILIES = {families.from_hf(fields).family: case for case, fields in cases.CASES.items()}


def config_of(case):
  return families.from_hf(cases.CASES[case])


@functools.cache
def model(case):
  """(config, parameters) read from a folder of tensors as they lie on disk."""
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


@CASES
def test_logits_are_those_of_transformers(case):
  """Largest error in float32, of logits whose standard deviation is 1 to 4."""
  config, params = model(case)
  built = transformer.build(config)
  hidden_NLD = jax.jit(built.hidden)(params, whole_rows(cases.IDS_NL))
  found = logits(hidden_NLD, built.head(params))[:, ::3]
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
  """Texts are longer than the windows, and branches lie further from the prompt than they are."""
  config, params = model(case)
  logps_fn = jax.jit(make_logps_fn(transformer.build(config)))
  examples = tiny.pairs(5, vocab=config.vocab, longest=12)

  def by_row(name):
    batch = collate.collate(examples, layout=name, row_length=48)
    pairs = zip(batch.row_NS.reshape(-1, 2), logps_fn(params, batch).reshape(-1, 2), strict=True)
    return np.array(
      [logps for row, logps in sorted((r[0], tuple(x)) for r, x in pairs) if row >= 0]
    )

  separate = by_row("padded")
  assert separate.shape == (5, 2)
  np.testing.assert_allclose(by_row("shared"), separate, rtol=1e-5)


@pytest.mark.parametrize("case", ["gpt2", "qwen2 windows", "gemma3", "smollm3", "mixtral"])
def test_a_token_at_a_time_equals_the_whole(case):
  """Greedy answers from the cache are the argmax of the logits of the whole text."""
  config, params = model(case)
  prompts = [cases.IDS_NL[0, :7].tolist(), cases.IDS_NL[1, :4].tolist()]
  completions = sampler.generate(config, params, prompts, max_tokens=9, temperature=0)
  built = transformer.build(config)
  for prompt, (answer,) in zip(prompts, completions, strict=True):
    text = prompt + answer
    padded_NL = np.array([text + [0] * (16 - len(text))], np.int32)
    hidden_NLD = jax.jit(built.hidden)(params, whole_rows(padded_NL))
    logits_LV = np.asarray(logits(hidden_NLD, built.head(params)))[0]
    assert answer == logits_LV[len(prompt) - 1 : len(text) - 1].argmax(-1).tolist()


def refused(fields, message):
  with pytest.raises(UserError, match=message) as caught:
    families.from_hf(fields)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("case", "fields", "message"),
  [
    ("llama", {"model_type": "falcon"}, "'falcon' is not known; known are gemma, gemma2, "),
    ("llama", {"sliding_window": 5}, "sliding_window = 5 is not honoured for llama"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must name 3 layers"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types must name 3 layers"),
    (
      "qwen2",
      {"layer_types": ["sliding_attention"] * 3},
      "layer_types has sliding_attention, but use_sliding_window is false",
    ),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be 1 or more"),
    ("gemma", {"hidden_act": "gelu"}, "'gelu' is ambiguous for Gemma; write gelu_pytorch_tanh"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not"),
    ("phi3", {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope' is not"),
    ("phi3", {"rope_scaling": cases.YARN}, "rope type 'yarn' is not supported for phi3"),
    ("phi3", {"partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1.5; it must lie in"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 3 times 0 or 1"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mix layers with and without experts"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "chooses 9 of 6 experts"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
    ("llama yarn", {"rope_scaling": cases.YARN | {"mscale": 1.0}}, "'yarn' takes .* 'mscale'"),
  ],
)
def test_what_would_not_be_honoured_is_refused_by_name(case, fields, message):
  refused(cases.CASES[case] | fields, message)


def test_experts_divide_the_work_of_one_part_among_them():
  """Experts that are all alike, weights that sum to 1: a mixture is one feed-forward part."""
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
  run = lambda config, tree: transformer.build(config).hidden({"params": tree}, batch)
  expected = run(dataclasses.replace(config, experts=None), plain)
  np.testing.assert_allclose(run(config, mixed), expected, atol=1e-5)
