"""Fields and names of tensors that Llama and the families derived from it have in common."""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families.fields import Fields, Tensor, activation_name, head, special_ids
from dpo_jax.model.families.rope import read_rope, write_rope
from dpo_jax.structs import UserError

KINDS = ("full_attention", "sliding_attention")


def read_common(fields: Fields, **defaults: Any) -> dict[str, Any]:
  """Reads the arguments of `ModelConfig` whose fields have the same names in all these families.

  Args:
    fields: fields of the `config.json`.
    **defaults: values of fields that are absent, where the family differs from Llama.
  """
  # Null means a key/value head for each head; a field that is absent, the family's number.
  if "kv_heads" in defaults:
    fields.default(num_key_value_heads=defaults["kv_heads"])
  width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
  # Some models have heads that do not add up to the width.
  head_width = fields.size("head_dim", defaults.get("head_dim", width // heads))
  rope = read_rope(fields, head_width, defaults.get("rope_theta", 10000.0))
  return {
    "family": fields.fields["model_type"],
    "vocab": fields.size("vocab_size"),
    "width": width,
    "layers": fields.size("num_hidden_layers"),
    "heads": heads,
    "kv_heads": fields.size("num_key_value_heads", heads),
    "head_width": head_width,
    "mlp_width": fields.size("intermediate_size"),
    "max_positions": fields.size("max_position_embeddings", 2048),
    "norm": "rms",
    "norm_eps": fields.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
    "positions": "rotary",
    "activation": fields.activation("hidden_act", "silu"),
    "gated": True,
    # A family that has biases, or a field for them, replaces these three.
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "tied": bool(fields.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False))),
    "init_std": fields.number("initializer_range", 0.02),
    **rope,
    **special_ids(fields.fields),
  }


def read_windows(fields: Fields, *, sliding: list[bool] | None = None) -> tuple[int, ...]:
  """Reads the attention window of every layer; () if no layer has one.

  Args:
    fields: fields of the `config.json`.
    sliding: per layer, whether it has the window, for files without `layer_types`; None for
      families whose layers all have the window, in which `layer_types` may not say otherwise.
  """
  layers = fields.size("num_hidden_layers")
  kinds = fields.get("layer_types")
  if kinds is not None and (
    not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS)
  ):
    raise UserError(
      f"config.json: layer_types must name {layers} layers, each {' or '.join(KINDS)}; it is"
      f" {str(kinds)[:80]}"
    )
  window = fields.get("sliding_window")
  if window is None:
    # Layers without a window in spite of their type would give other log-probs.
    if kinds and KINDS[1] in kinds:
      raise UserError("config.json: layer_types has sliding_attention, but sliding_window is null")
    return ()
  window = fields.size("sliding_window")
  if window < 1:
    # 0 would mean "sees everything" in `ModelConfig`, the opposite of what the file says.
    raise UserError(f"config.json: sliding_window is {window}; it must be 1 or more, or null")
  if sliding is None and kinds and KINDS[0] in kinds:
    family = fields.fields["model_type"]
    raise UserError(
      f"config.json: layer_types has full_attention, but all layers of {family} have the window,"
      f" {window}; set sliding_window to null if the model was trained without it"
    )
  if kinds is not None:
    sliding = [kind == KINDS[1] for kind in kinds]
  windows = tuple(window if has_window else 0 for has_window in sliding or [True] * layers)
  return windows if any(windows) else ()


def write_common(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_common` reads."""
  return {
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_width,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": activation_name(config),
    **write_rope(config),
  }


def write_windows(config: ModelConfig, *, typed: bool) -> dict[str, Any]:
  """Returns `sliding_window` and, if the family has it (`typed`), `layer_types`."""
  # In these families all windows of a model have one size.
  window = max(config.windows, default=0) or None
  kinds = [KINDS[w > 0] for w in config.windows or [0] * config.layers]
  return {"sliding_window": window} | ({"layer_types": kinds} if typed else {})


def norms(config: ModelConfig) -> dict[str, str]:
  """Maps the norms of a layer from their names on disk to their names here."""
  # One name has two meanings on disk: with norms before the parts only, the norm before the
  # feed-forward part is called "post_attention_layernorm"; else the norm after attention is.
  if not config.post_norms:
    return {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
  after = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
  }
  if not config.pre_norms:
    return after
  return {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm"} | after


ATTENTION = {
  "self_attn.q_proj": ("query",),
  "self_attn.k_proj": ("key",),
  "self_attn.v_proj": ("value",),
  "self_attn.o_proj": ("out",),
}
MLP = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",), "mlp.down_proj": ("down",)}


def tensors(config: ModelConfig, linear: dict[str, tuple[str, ...]] | None = None) -> list[Tensor]:
  """Lists every tensor on disk.

  Args:
    config: the model.
    linear: names on disk of a layer's linear maps, each with the maps of this package that it
      joins; Llama's by default.
  """
  # Maps that are not listed here belong to the feed-forward part.
  biased = {"query": config.qkv_bias, "key": config.qkv_bias, "value": config.qkv_bias}
  biased |= {"out": config.out_bias}
  found = [Tensor("model.embed_tokens.weight", ("embed.embedding",))]
  for name, leaves in (linear or ATTENTION | MLP).items():
    kernels = tuple(f"layers.{leaf}.kernel" for leaf in leaves)
    found.append(Tensor(f"model.layers.{{}}.{name}.weight", kernels, True))
    # Maps that share a tensor agree about having a bias.
    if biased.get(leaves[0], config.mlp_bias):
      biases = tuple(f"layers.{leaf}.bias" for leaf in leaves)
      found.append(Tensor(f"model.layers.{{}}.{name}.bias", biases))
  scales = norms(config)
  if config.qk_norm:
    scales |= {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}
  for name, leaf in scales.items():
    found.append(Tensor(f"model.layers.{{}}.{name}.weight", (f"layers.{leaf}.scale",)))
  found.append(Tensor("model.norm.weight", ("final_norm.scale",)))
  return found + head(config)
