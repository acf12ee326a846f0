"""Small models of every family, their left-out options exercised; weights are a function of names.

Written out as `config.json` says it, so that both sides read the same file.
"""

import zlib

import numpy as np

SIZES = {
  "vocab_size": 40,
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 20,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 40,
  "n_embd": 24,
  "n_layer": 3,
  "n_head": 4,
  "n_positions": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def _case(family: str, **fields) -> dict:
  return SIZES | {"model_type": family} | fields


CASES = {
  "gpt2": GPT2,
  "gpt2 untied": GPT2
  | {"tie_word_embeddings": False, "n_inner": 20, "activation_function": "gelu"},
  "llama": _case("llama", tie_word_embeddings=True),
  "llama biases": _case("llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4),
  "llama one key head": _case("llama", num_key_value_heads=1, rope_theta=5e5),
  "llama linear": _case("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
  "llama llama3": _case("llama", rope_scaling=LLAMA3),
  "llama yarn": _case("llama", rope_scaling=YARN),
  "mistral": _case("mistral", sliding_window=5),
  "mistral without window": _case("mistral", sliding_window=None),
  "qwen2": _case("qwen2", use_sliding_window=False, sliding_window=5, max_window_layers=1),
  "qwen2 windows": _case("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
  "qwen3": _case("qwen3", tie_word_embeddings=True),
  "qwen3 yarn": _case("qwen3", rope_scaling=YARN | {"attention_factor": 1.1}, attention_bias=True),
  "gemma": _case("gemma", hidden_act="gelu_pytorch_tanh"),
  "gemma2": _case("gemma2", sliding_window=5, query_pre_attn_scalar=24),
  "gemma3": _case(
    "gemma3_text",
    sliding_window=5,
    layer_types=ALTERNATING,
    query_pre_attn_scalar=12,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling={"rope_type": "linear", "factor": 8.0},
  ),
  "gemma3 nested": _case(
    "gemma3_text",
    sliding_window=5,
    layer_types=ALTERNATING,
    final_logit_softcapping=30.0,
    rope_parameters={
      "full_attention": {"rope_type": "default", "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  ),
  "phi3": _case("phi3", sliding_window=5),
  "phi3 half turned": _case("phi3", sliding_window=None, partial_rotary_factor=0.5),
  "olmo2": _case("olmo2"),
  "smollm3": _case("smollm3", no_rope_layer_interval=2, no_rope_layers=[1, 0, 1]),
  "mixtral": _case("mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
  "qwen3_moe": _case(
    "qwen3_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=True
  ),
  "qwen3_moe not rescaled": _case(
    "qwen3_moe", num_experts=4, num_experts_per_tok=1, moe_intermediate_size=12
  ),
}
IDS_NL = np.random.default_rng(0).integers(3, 40, (2, 19)).astype(np.int32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The numbers of a tensor on disk: of its name and shape, large enough for errors to show."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  spread = 0.5 if "embed" in name or "lm_head" in name else 0.35
  center = 0.0 if len(shape) > 1 or name.endswith("bias") else 0.5
  return (center + rng.normal(0, spread, shape)).astype(np.float32)
