"""Llama and its closest relatives: Mistral, Qwen2, Qwen3, Phi-3, OLMo-2, SmolLM3.

Each family has a reader of its `config.json` and a writer of the fields that the reader reads.
"""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families.common import (
  KINDS,
  read_common,
  read_windows,
  tensors,
  write_common,
  write_windows,
)
from dpo_jax.model.families.fields import Fields, Tensor
from dpo_jax.structs import UserError


def read_llama(fields: Fields) -> ModelConfig:
  # One field for all four maps of attention; Qwen2 has biases on three of them, see below.
  bias = bool(fields.get("attention_bias", False))
  own: dict[str, Any] = {
    "qkv_bias": bias,
    "out_bias": bias,
    "mlp_bias": bool(fields.get("mlp_bias", False)),
  }
  return ModelConfig(**read_common(fields) | own)


def write_llama(config: ModelConfig) -> dict[str, Any]:
  biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
  return write_common(config) | biases


def read_mistral(fields: Fields) -> ModelConfig:
  fields.default(sliding_window=4096)
  return ModelConfig(**read_common(fields, kv_heads=8), windows=read_windows(fields))


def write_mistral(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | write_windows(config, typed=False)


def qwen_windows(fields: Fields) -> tuple[int, ...]:
  """Reads the windows of Qwen's layers: from layer `max_window_layers` on, if they are enabled."""
  # Read before they are known to be enabled: a file with a broken field is refused either way, and
  # a field that is not read would be refused as unknown.
  fields.default(sliding_window=4096)
  first = fields.size("max_window_layers", 28)
  sliding = [layer >= first for layer in range(fields.size("num_hidden_layers"))]
  return enabled_windows(fields, read_windows(fields, sliding=sliding))


def enabled_windows(fields: Fields, windows: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the windows if `use_sliding_window` enables them, else ()."""
  if fields.get("use_sliding_window", False):
    return windows
  if KINDS[1] in fields.get("layer_types", []):
    raise UserError(
      "config.json: layer_types has sliding_attention, but use_sliding_window is false; make them"
      " agree"
    )
  return ()


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
  # `layer_types` says which layers have the window; `max_window_layers` counts only without it.
  window = {"use_sliding_window": any(config.windows), "max_window_layers": config.layers}
  return window | write_windows(config, typed=True)


def read_qwen2(fields: Fields) -> ModelConfig:
  # The biases of queries, keys and values are part of the architecture: no field states them.
  own: dict[str, Any] = {"qkv_bias": True, "windows": qwen_windows(fields)}
  return ModelConfig(**read_common(fields, kv_heads=32) | own)


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | write_qwen_windows(config)


def read_qwen3(fields: Fields) -> ModelConfig:
  bias = bool(fields.get("attention_bias", False))
  own: dict[str, Any] = {
    "qkv_bias": bias,
    "out_bias": bias,
    "qk_norm": "head",
    "windows": qwen_windows(fields),
  }
  return ModelConfig(**read_common(fields, head_dim=128, kv_heads=32) | own)


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | write_qwen_windows(config) | {"attention_bias": config.qkv_bias}


def read_phi3(fields: Fields) -> ModelConfig:
  # Only "longrope" scaling uses this field, and `read_rope` refuses that kind. In Phi-3's files
  # "yarn" is another name of it.
  fields.get("original_max_position_embeddings")
  config = ModelConfig(**read_common(fields, rms_norm_eps=1e-5), windows=read_windows(fields))
  if config.rope_scaling is not None:
    raise UserError(
      f"config.json: rope type {config.rope_scaling.kind!r} is not supported for phi3; use a model"
      " without rope_scaling"
    )
  return config


# Phi-3 stores joined maps: one product reads the input once instead of three times.
PHI3 = {
  "self_attn.qkv_proj": ("query", "key", "value"),
  "self_attn.o_proj": ("out",),
  "mlp.gate_up_proj": ("gate", "up"),
  "mlp.down_proj": ("down",),
}


def phi3_tensors(config: ModelConfig) -> list[Tensor]:
  return tensors(config, PHI3)


def read_olmo2(fields: Fields) -> ModelConfig:
  bias = bool(fields.get("attention_bias", False))
  own: dict[str, Any] = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "all"}
  # OLMo 2 normalises the outputs of attention and feed-forward part instead of their inputs.
  own |= {"pre_norms": False, "post_norms": True}
  return ModelConfig(**read_common(fields, rms_norm_eps=1e-5) | own)


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | {"attention_bias": config.qkv_bias}


def read_smollm3(fields: Fields) -> ModelConfig:
  bias = bool(fields.get("attention_bias", False))
  own: dict[str, Any] = {
    "qkv_bias": bias,
    "out_bias": bias,
    "mlp_bias": bool(fields.get("mlp_bias", False)),
  }
  layers = fields.size("num_hidden_layers")
  every = fields.size("no_rope_layer_interval", 4)
  # In spite of its name, a 1 in `no_rope_layers` is a layer with rotary positions.
  rotary = fields.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
  if not isinstance(rotary, list) or len(rotary) != layers or not set(rotary) <= {0, 1}:
    raise UserError(
      f"config.json: no_rope_layers must contain {layers} times 0 or 1, one per layer; it is"
      f" {str(rotary)[:80]}"
    )
  if not all(rotary):
    own["rotary_layers"] = tuple("main" if x else "none" for x in rotary)
  own["windows"] = enabled_windows(fields, read_windows(fields, sliding=[not x for x in rotary]))
  # Files of SmolLM3 have this field of Qwen's; which layers have a window follows from the others.
  fields.get("max_window_layers")
  defaults = {"rope_theta": 2e6, "tie_word_embeddings": True, "kv_heads": 4}
  return ModelConfig(**read_common(fields, **defaults) | own)


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
  rotary = [int(name == "main") for name in config.rotary_layers or ["main"] * config.layers]
  own: dict[str, Any] = {"no_rope_layers": rotary, "use_sliding_window": any(config.windows)}
  return write_llama(config) | own | write_windows(config, typed=True)
