"""Every family against logits that transformers computed, and against itself in other layouts."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax import sampling
from dpo_jax.data import layout
from dpo_jax.logprobs import logits, make_logps_fn
from dpo_jax.model import families, hf, transformer
from dpo_jax.structs import TokenBatch, UserError
from tests import tiny
from tests.golden import cases

GOLDEN = pathlib.Path(__file__).parent / "golden" / "logits.npz"
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
    hf.save(folder / "shapes", config, params)
    file = folder / "shapes" / "model.safetensors"
    tensors = {name: cases.weight(name, shape) for name, shape in shapes(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return hf.load(folder)


def shapes(file):
  from safetensors import safe_open

  with safe_open(file, "np") as tensors:
    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def whole_rows(ids_NL):
  zeros = np.zeros_like(ids_NL)
  position_NL = np.broadcast_to(np.arange(ids_NL.shape[1], dtype=np.int32), ids_NL.shape)
  empty = np.zeros((len(ids_NL), 2), np.float32)
  return TokenBatch(
    ids_NL,
    position_NL,
    zeros,
    zeros,
    zeros,
    zeros,
    zeros.astype(np.float32),
    zeros[:1],
    empty,
    empty,
    empty.astype(np.int32),
  )


@functools.cache
def hidden_fn(case):
  """The forward pass, compiled once for texts in rows of one shape."""
  return jax.jit(transformer.build(config_of(case)).hidden)


def logits_of(case, ids_NL):
  """Logits [N, L, V] of whole texts."""
  config, params = model(case)
  hidden_NLD = hidden_fn(case)(params, whole_rows(ids_NL))
  return np.asarray(logits(hidden_NLD, transformer.head(config, params)))


@CASES
def test_logits_are_those_of_transformers(case):
  """Largest error in float32, of logits whose standard deviation is 1 to 4."""
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
  hf.save(tmp_path / "copy", config, params)
  again, found = hf.load(tmp_path / "copy")
  assert again == config
  for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_shared_prompts_equal_separate_rows(case):
  """Texts are longer than the windows, and branches lie further from the prompt than they are."""
  config, params = model(case)
  examples = tiny.pairs(5, vocab=config.vocab, longest=12)
  sizes = layout.Sizes(rows=10, rows_step=10, scored=12, slots=8)
  lay_out = functools.partial(layout.collate, examples, row_length=48)
  padded = lay_out(layout="padded", sizes=sizes._replace(slots=1))
  shared = lay_out(layout="shared", sizes=sizes)
  # As two groups of rows of one batch, which compiles once.
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
  """Rows of one slot with empty slots behind it."""
  empty = {"weight_NS": 0, "grade_NS": 0, "row_NS": -1}
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
  answers = sampling.generate(config, params, prompts, max_tokens=9, temperature=0)
  texts = [prompt + answer for prompt, (answer,) in zip(prompts, answers, strict=True)]
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
  run = lambda config, tree: jax.jit(transformer.build(config).hidden)({"params": tree}, batch)
  expected = run(dataclasses.replace(config, experts=None), plain)
  np.testing.assert_allclose(run(config, mixed), expected, atol=1e-5)
