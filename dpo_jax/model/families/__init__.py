"""The families of decoders: what each writes in `config.json` and how it names its tensors."""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import ModelConfig, RopeScaling
from dpo_jax.model.families import gpt2, llama
from dpo_jax.model.families.fields import ACTIVATIONS, Fields, Tensor
from dpo_jax.structs import UserError

FAMILIES = {"llama": llama._llama_from, "gpt2": gpt2._gpt2_from}


def from_hf(fields: dict[str, Any]) -> ModelConfig:
  """Reads the contents of a `config.json`.

  Raises:
    UserError: an unknown architecture, a missing size, or a field that would not be honoured.
  """
  family = fields.get("model_type")
  if family not in FAMILIES:
    raise UserError(
      f"config.json: model_type {family!r} is not known; known are {', '.join(sorted(FAMILIES))}"
    )
  read = Fields(fields)
  config = FAMILIES[family](read)
  read.refuse_rest()
  return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """The contents of a `config.json`; `from_hf` of it is `config` again."""
  activation = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
  eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
  common = {
    "model_type": config.family,
    "vocab_size": config.vocab,
    "tie_word_embeddings": config.tied,
    "initializer_range": config.init_std,
    "bos_token_id": config.bos_id,
    "eos_token_id": eos,
    "pad_token_id": config.pad_id,
  }
  if config.family == "gpt2":
    return common | {
      "architectures": ["GPT2LMHeadModel"],
      "n_embd": config.width,
      "n_layer": config.layers,
      "n_head": config.heads,
      "n_inner": config.mlp_width,
      "n_positions": config.max_positions,
      "layer_norm_epsilon": config.norm_eps,
      "activation_function": activation,
    }
  return common | {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_width,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": activation,
    "attention_bias": config.qkv_bias,
    "mlp_bias": config.mlp_bias,
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
  }


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  fields = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "llama3":
    fields |= {
      "low_freq_factor": scaling.low_factor,
      "high_freq_factor": scaling.high_factor,
      "original_max_position_embeddings": scaling.original_positions,
    }
  return fields


def tensors(config: ModelConfig) -> list[Tensor]:
  """Every tensor of the model's folder."""
  return {"llama": llama._llama, "gpt2": gpt2._gpt2}[config.family](config)
