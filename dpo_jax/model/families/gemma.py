"""Gemma 1, 2 and 3 (text): scaled embeddings, norms with scale 1 + w, caps, alternating windows."""

from __future__ import annotations

import math
from typing import Any

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families.common import (
  KINDS,
  read_common,
  read_windows,
  write_common,
  write_windows,
)
from dpo_jax.model.families.fields import Fields, activation_name
from dpo_jax.model.families.rope import read_objects, read_table
from dpo_jax.structs import UserError


def _read(fields: Fields, **defaults: Any) -> dict[str, Any]:
  """Reads the arguments of `ModelConfig` that the three have in common."""
  bias = bool(fields.get("attention_bias", False))
  found = read_common(fields, head_dim=256, tie_word_embeddings=True, **defaults)
  if fields.get("use_bidirectional_attention", False):
    raise UserError(
      "config.json: use_bidirectional_attention = True is not supported; use a causal model"
    )
  return found | {
    "activation": _activation(fields),
    "qkv_bias": bias,
    "out_bias": bias,
    # Norms store w and multiply by 1 + w.
    "norm_offset": 1.0,
    "embed_scale": math.sqrt(found["width"]),
  }


def _activation(fields: Fields) -> str:
  """Reads the activation, which Gemma 1 calls hidden_act and later ones hidden_activation."""
  default = "gelu_pytorch_tanh"
  act, activation = (fields.get(name, default) for name in ("hidden_act", "hidden_activation"))
  if fields.fields["model_type"] != "gemma":
    # Transformers does not read their hidden_act.
    return fields.activation("hidden_activation", default)
  # The first files of Gemma 1 say "gelu" and mean its approximation by tanh, as the models were
  # trained; so they are read by transformers.
  found = {default if name == "gelu" else name for name in (act, activation)}
  if len(found) > 1 and fields.fields.get("hidden_activation") is not None:
    raise UserError(
      f"config.json: hidden_act is {act!r} and hidden_activation {activation!r}; keep the one that"
      " the model was trained with"
    )
  fields.fields["hidden_act"] = default if act == "gelu" else act
  return fields.activation("hidden_act", default)


def _write(config: ModelConfig) -> dict[str, Any]:
  return write_common(config) | {"attention_bias": config.qkv_bias}


def read_gemma(fields: Fields) -> ModelConfig:
  return ModelConfig(**_read(fields, kv_heads=16))


def write_gemma(config: ModelConfig) -> dict[str, Any]:
  return _write(config)


def _capped(fields: Fields) -> dict[str, Any]:
  """Reads what Gemma 2 and 3 have in common besides: caps, scale of scores, norms of outputs."""
  return {
    "attention_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
    "attention_cap": fields.number("attn_logit_softcapping", 0.0),
    "logit_cap": fields.number("final_logit_softcapping", 0.0),
    "post_norms": True,
  }


def _write_capped(config: ModelConfig) -> dict[str, Any]:
  fields = _write(config) | {
    # In every released model this is a whole number, which the two roundings may miss by a little.
    "query_pre_attn_scalar": _whole(config.attention_scale**-2),
    "attn_logit_softcapping": config.attention_cap or None,
    "final_logit_softcapping": config.logit_cap or None,
    "hidden_activation": activation_name(config),
  }
  # `write_common` wrote the activation under the name that Gemma 2 and 3 do not read.
  del fields["hidden_act"]
  return fields | write_windows(config, typed=True)


def _whole(x: float) -> float | int:
  """Returns the whole number next to x if x differs from it by rounding alone, else x."""
  return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x


def read_gemma2(fields: Fields) -> ModelConfig:
  # Transformers fills in these values where a file does not state them.
  fields.default(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096)
  sliding = [layer % 2 == 0 for layer in range(fields.size("num_hidden_layers"))]
  own: dict[str, Any] = _capped(fields) | {"windows": read_windows(fields, sliding=sliding)}
  return ModelConfig(**_read(fields, kv_heads=4) | own)


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
  return _write_capped(config)


def read_gemma3(fields: Fields) -> ModelConfig:
  every = fields.size("sliding_window_pattern", 6)
  fields.default(sliding_window=4096)
  sliding = [(layer + 1) % every != 0 for layer in range(fields.size("num_hidden_layers"))]
  windows = read_windows(fields, sliding=sliding)
  # Layers with a window have a rotary table of their own.
  names = tuple("local" if window else "main" for window in windows)
  local = fields.number("rope_local_base_freq", 10000.0)
  own: dict[str, Any] = _capped(fields) | {
    "windows": windows,
    "qk_norm": "head",
    "local_theta": local,
    "rotary_layers": names if "local" in names else (),
  }
  # Newer files have one rotary table per kind of layer, older ones `rope_scaling` for those that
  # see everything.
  scaling, tables = read_objects(fields)
  if "type" in scaling and "rope_type" not in scaling:
    # Releases of transformers differ: newer ones pass over the older name here, and scale nothing.
    raise UserError(
      f"config.json: rope_scaling has type {scaling['type']!r}; for gemma3_text write it as"
      " rope_type"
    )
  if not tables:
    return ModelConfig(**_read(fields, rope_theta=1e6, kv_heads=4) | own)
  if not set(tables) <= set(KINDS):
    raise UserError(
      f"config.json: rope_parameters has {sorted(tables)}; gemma3_text needs an object for each of"
      f" {', '.join(KINDS)}"
    )
  return ModelConfig(**_by_kind(fields, scaling, tables) | own)


def _by_kind(fields: Fields, scaling: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
  """Reads `rope_parameters` of newer files, which have one object for each kind of layer."""
  # The reader of a single table must not see these objects; what it reads counts as read.
  other = ("rope_parameters", "rope_scaling")
  plain = Fields({name: value for name, value in fields.fields.items() if name not in other})
  found = _read(plain, rope_theta=1e6, kv_heads=4)
  fields.read |= plain.read
  fields.unknown += plain.unknown
  full, sliding = (tables.get(kind) or {} for kind in KINDS)
  # As in transformers: fields of the older spelling replace those of the newer one.
  full = full | scaling
  found |= read_table(full, fields, found["head_width"], found["rope_theta"])
  base = fields.number("rope_local_base_freq", 10000.0)
  local = read_table(dict(sliding), fields, found["head_width"], base)
  if local["rope_scaling"] is not None:
    raise UserError(
      "config.json: rope_parameters stretch sliding_attention, which is not supported; use a model"
      " that stretches full_attention alone"
    )
  return found | {"local_theta": local["rope_theta"]}


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
  return _write_capped(config) | {"rope_local_base_freq": config.local_theta}
