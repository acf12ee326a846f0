"""GPT-2: learned positions, layer norms, and linear maps stored as [in, out]."""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families.fields import Fields, Tensor, activation_name, head, special_ids

# Names of GPT-2's sizes, and those of other families, which transformers understands as well.
ALIASES = {
  "n_embd": "hidden_size",
  "n_layer": "num_hidden_layers",
  "n_head": "num_attention_heads",
  "n_positions": "max_position_embeddings",
}


def read_gpt2(fields: Fields) -> ModelConfig:
  for name, other in ALIASES.items():
    fields.alias(name, other)
  # Defaults are those of GPT-2 small, as in transformers.
  width, heads = fields.size("n_embd", 768), fields.size("n_head", 12)
  return ModelConfig(
    family="gpt2",
    vocab=fields.size("vocab_size", 50257),
    width=width,
    layers=fields.size("n_layer", 12),
    heads=heads,
    kv_heads=heads,
    head_width=width // heads,
    mlp_width=fields.size("n_inner", 4 * width),
    max_positions=fields.size("n_positions", 1024),
    norm="layer",
    norm_eps=fields.number("layer_norm_epsilon", 1e-5),
    positions="learned",
    activation=fields.activation("activation_function", "gelu_new"),
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=bool(fields.get("tie_word_embeddings", True)),
    init_std=fields.number("initializer_range", 0.02),
    **special_ids(fields.fields),
  )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
  return {
    "n_embd": config.width,
    "n_layer": config.layers,
    "n_head": config.heads,
    "n_inner": config.mlp_width,
    "n_positions": config.max_positions,
    "layer_norm_epsilon": config.norm_eps,
    "activation_function": activation_name(config),
  }


def gpt2_tensors(config: ModelConfig) -> list[Tensor]:
  # GPT-2's linear maps are stored as [in, out], like kernels here, so no tensor is transposed.
  # Query, key and value are one tensor, joined along its columns.
  linear = {
    "attn.c_attn": ("query", "key", "value"),
    "attn.c_proj": ("out",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
  }
  found = [
    Tensor("transformer.wte.weight", ("embed.embedding",)),
    Tensor("transformer.wpe.weight", ("positions.embedding",)),
  ]
  for name, leaves in linear.items():
    for on_disk, here in (("weight", "kernel"), ("bias", "bias")):
      paths = tuple(f"layers.{leaf}.{here}" for leaf in leaves)
      found.append(Tensor(f"transformer.h.{{}}.{name}.{on_disk}", paths))
  norms = {
    "h.{}.ln_1": "layers.attention_norm",
    "h.{}.ln_2": "layers.mlp_norm",
    "ln_f": "final_norm",
  }
  for name, leaf in norms.items():
    for on_disk, here in (("weight", "scale"), ("bias", "bias")):
      found.append(Tensor(f"transformer.{name}.{on_disk}", (f"{leaf}.{here}",)))
  return found + head(config)
