"""Generation against transformers' own, on small random models: `pytest -m parity`."""

import numpy as np
import pytest

from dpo_jax.generation import decoding, sampler
from dpo_jax.hf import checkpoint as hf_checkpoint

torch = pytest.importorskip("torch", reason="parity needs torch, which is no requirement")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SMALL = {
  "vocab_size": 97,
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "initializer_range": 0.3,
  "max_position_embeddings": 128,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
# Name: model_type and what its configuration says.
MODELS = {
  "llama": ("llama", SMALL | {"num_key_value_heads": 2}),
  "llama, tied": ("llama", SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
  "mistral, a window": ("mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 7}),
  "qwen3": ("qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 12}),
  "gemma2, every other layer has a window": (
    "gemma2",
    SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
  ),
  "gemma3": (
    "gemma3_text",
    SMALL
    | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "sliding_window_pattern": 2},
  ),
  "mixtral": (
    "mixtral",
    SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
  ),
  "gpt2": ("gpt2", GPT2 | {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}),
}
PROMPTS = [[1, 5, 9], [7], [1, *range(20, 40)], [1, 3, 3, 60, 61], list(range(10, 19))]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
  model_type, fields = MODELS[name]
  torch.manual_seed(0)
  theirs = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(model_type, **fields)
  ).eval()
  theirs.save_pretrained(tmp_path)
  config, params = hf_checkpoint.load(tmp_path)
  # Together here, one by one there; more than the first cache holds.
  found = sampler.generate(
    config, params, PROMPTS, max_tokens=80, temperature=0, eos_ids=config.eos_ids
  )
  for prompt, (ids,) in zip(PROMPTS, found, strict=True):
    with torch.no_grad():
      (whole,) = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=80, do_sample=False, pad_token_id=0
      ).tolist()
    assert ids == whole[len(prompt) :]


@pytest.mark.parametrize(
  "knobs",
  [
    {"min_p": 0.05},
    {"temperature": 0.7, "min_p": 0.2},
    {"temperature": 1.6, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 7},
    {"top_p": 0.6},
  ],
  ids=str,
)
def test_what_is_left_of_a_distribution(knobs):
  logits_RV = np.random.default_rng(0).normal(0, 2, (64, 97)).astype(np.float32)
  library = transformers.generation.logits_process
  # The order of transformers' own pipeline.
  chain = [library.TemperatureLogitsWarper(float(knobs.get("temperature", 1.0)))]
  for knob, warper in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
    if knob in knobs:
      chain.append(getattr(library, f"{warper}LogitsWarper")(knobs[knob]))
  theirs = torch.tensor(logits_RV)
  for warper in chain:
    theirs = warper(None, theirs)
  ours = logits_RV / knobs.get("temperature", 1.0)
  ours = decoding._apply_top_k_top_p(ours, knobs.get("top_k", 0), knobs.get("top_p", 1.0))
  ours = decoding._apply_min_p(ours, knobs.get("min_p", 0.0))
  left = lambda x_RV: torch.softmax(torch.tensor(np.asarray(x_RV)), dim=-1).numpy()
  np.testing.assert_allclose(left(ours), left(theirs.numpy()), atol=1e-6)
  assert (np.isfinite(np.asarray(ours)) == np.isfinite(theirs.numpy())).all()
