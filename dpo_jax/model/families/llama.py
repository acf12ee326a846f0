"""Llama and its nearest relatives: Mistral, Qwen2, Qwen3, Phi-3, OLMo-2, SmolLM3."""

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
  bias = bool(fields.get("attention_bias", False))
  own = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(fields.get("mlp_bias", False))}
  return ModelConfig(**read_common(fields) | own)


def write_llama(config: ModelConfig) -> dict[str, Any]:
  biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
  return write_common(config) | biases


def read_mistral(fields: Fields) -> ModelConfig:
  return ModelConfig(**read_common(fields), windows=read_windows(fields))


def write_mistral(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | write_windows(config, typed=False)


def qwen_windows(fields: Fields) -> tuple[int, ...]:
  """Of Qwen's layers: a window from layer `max_window_layers` on, if it is used at all."""
  first = fields.size("max_window_layers", 28)
  sliding = [layer >= first for layer in range(fields.size("num_hidden_layers"))]
  windows = read_windows(fields, sliding=sliding)
  if fields.get("use_sliding_window", False):
    return windows
  if KINDS[1] in fields.get("layer_types", []):
    raise UserError(
      "config.json: layer_types has sliding_attention, but use_sliding_window is false; make them"
      " agree"
    )
  return ()


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
  window = {"use_sliding_window": any(config.windows), "max_window_layers": config.layers}
  return window | write_windows(config, typed=True)


def read_qwen2(fields: Fields) -> ModelConfig:
  return ModelConfig(**read_common(fields) | {"qkv_bias": True}, windows=qwen_windows(fields))


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | write_qwen_windows(config)


def read_qwen3(fields: Fields) -> ModelConfig:
  bias = bool(fields.get("attention_bias", False))
  own = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "head", "windows": qwen_windows(fields)}
  return ModelConfig(**read_common(fields, head_dim=128) | own)


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | write_qwen_windows(config) | {"attention_bias": config.qkv_bias}


def read_phi3(fields: Fields) -> ModelConfig:
  fields.get("original_max_position_embeddings")  # read by the stretch "longrope" alone, refused
  config = ModelConfig(**read_common(fields, rms_norm_eps=1e-5), windows=read_windows(fields))
  if config.rope_scaling is not None:
    # There "yarn" and "su" are names of the stretch that depends on the length of a text.
    raise UserError(
      f"config.json: rope type {config.rope_scaling.kind!r} is not supported for phi3; use a model"
      " without rope_scaling"
    )
  return config


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
  own = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "all"}
  own |= {"pre_norms": False, "post_norms": True}
  return ModelConfig(**read_common(fields, rms_norm_eps=1e-5) | own)


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | {"attention_bias": config.qkv_bias}


def read_smollm3(fields: Fields) -> ModelConfig:
  bias = bool(fields.get("attention_bias", False))
  own = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(fields.get("mlp_bias", False))}
  layers = fields.size("num_hidden_layers")
  every = fields.size("no_rope_layer_interval", 4)
  turned = fields.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
  if not isinstance(turned, list) or len(turned) != layers or not set(turned) <= {0, 1}:
    raise UserError(
      f"config.json: no_rope_layers must hold {layers} times 0 or 1, one a layer; it is"
      f" {str(turned)[:80]}"
    )
  if not all(turned):
    own["rotary_layers"] = tuple("main" if here else "none" for here in turned)
  windows = read_windows(fields, sliding=[not here for here in turned])
  if fields.get("use_sliding_window", False):
    own["windows"] = windows
  return ModelConfig(**read_common(fields, rope_theta=2e6, tie_word_embeddings=True) | own)


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
  turned = [int(name == "main") for name in config.rotary_layers or ["main"] * config.layers]
  own = {"no_rope_layers": turned, "use_sliding_window": any(config.windows)}
  return write_llama(config) | own | write_windows(config, typed=True)
