"""Llama."""

from __future__ import annotations

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families.fields import Fields, Tensor, head, rope, special_ids


def _llama_from(fields: Fields) -> ModelConfig:
  width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
  theta, scaling = rope(fields)
  attention_bias = bool(fields.get("attention_bias", False))
  return ModelConfig(
    family="llama",
    vocab=fields.size("vocab_size"),
    width=width,
    layers=fields.size("num_hidden_layers"),
    heads=heads,
    kv_heads=fields.size("num_key_value_heads", heads),
    head_width=fields.size("head_dim", width // heads),
    mlp_width=fields.size("intermediate_size"),
    max_positions=fields.size("max_position_embeddings", 2048),
    norm="rms",
    norm_eps=fields.number("rms_norm_eps", 1e-6),
    positions="rotary",
    activation=fields.activation("hidden_act", "silu"),
    gated=True,
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    mlp_bias=bool(fields.get("mlp_bias", False)),
    tied=bool(fields.get("tie_word_embeddings", False)),
    rope_theta=theta,
    rope_scaling=scaling,
    init_std=fields.number("initializer_range", 0.02),
    **special_ids(fields.fields),
  )


def _llama(config: ModelConfig) -> list[Tensor]:
  linear = {
    "self_attn.q_proj": ("query", config.qkv_bias),
    "self_attn.k_proj": ("key", config.qkv_bias),
    "self_attn.v_proj": ("value", config.qkv_bias),
    "self_attn.o_proj": ("out", config.out_bias),
    "mlp.gate_proj": ("gate", config.mlp_bias),
    "mlp.up_proj": ("up", config.mlp_bias),
    "mlp.down_proj": ("down", config.mlp_bias),
  }
  found = [Tensor("model.embed_tokens.weight", ("embed.embedding",))]
  for name, (leaf, bias) in linear.items():
    found.append(Tensor(f"model.layers.{{}}.{name}.weight", (f"layers.{leaf}.kernel",), True))
    if bias:
      found.append(Tensor(f"model.layers.{{}}.{name}.bias", (f"layers.{leaf}.bias",)))
  norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
  for name, leaf in norms.items():
    found.append(Tensor(f"model.layers.{{}}.{name}.weight", (f"layers.{leaf}.scale",)))
  found.append(Tensor("model.norm.weight", ("final_norm.scale",)))
  return found + head(config)
