"""Mixtures of experts: Mixtral and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import Experts, ModelConfig
from dpo_jax.model.families.common import (
  ATTENTION,
  read_common,
  read_windows,
  tensors,
  write_common,
  write_windows,
)
from dpo_jax.model.families.fields import Fields, Tensor
from dpo_jax.structs import UserError


def read_mixtral(fields: Fields) -> ModelConfig:
  fields.alias("num_local_experts", "num_experts")
  experts = Experts(
    count=fields.size("num_local_experts", 8),
    chosen=fields.size("num_experts_per_tok", 2),
    rescaled=True,  # Mixtral takes the softmax over the chosen experts alone, which is the same
    balance=fields.number("router_aux_loss_coef", 0.001),
  )
  common = read_common(fields, rms_norm_eps=1e-5, rope_theta=1e6, kv_heads=8)
  return ModelConfig(**common, windows=read_windows(fields), experts=experts)


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
  experts = config.experts
  assert experts is not None
  own: dict[str, Any] = {
    "num_local_experts": experts.count,
    "num_experts_per_tok": experts.chosen,
  }
  own |= {"router_aux_loss_coef": experts.balance}
  return write_common(config) | write_windows(config, typed=False) | own


def read_qwen3_moe(fields: Fields) -> ModelConfig:
  if fields.get("mlp_only_layers", []) or fields.size("decoder_sparse_step", 1) != 1:
    raise UserError(
      "config.json: mlp_only_layers and decoder_sparse_step mix layers with and without experts,"
      " which is not supported; use a model with experts in every layer"
    )
  fields.alias("num_experts", "num_local_experts")
  experts = Experts(
    count=fields.size("num_experts", 128),
    chosen=fields.size("num_experts_per_tok", 8),
    rescaled=bool(fields.get("norm_topk_prob", False)),
    balance=fields.number("router_aux_loss_coef", 0.001),
  )
  bias = bool(fields.get("attention_bias", False))
  # Files of Qwen3-MoE state these two, but only its dense relatives and files with
  # use_sliding_window use them. Reading them keeps them from being refused.
  fields.size("max_window_layers", 0)
  fields.default(sliding_window=4096)
  windows = read_windows(fields) if fields.get("use_sliding_window", False) else ()
  fields.get("sliding_window")
  own: dict[str, Any] = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "head", "windows": windows}
  common = read_common(fields, kv_heads=4)
  own |= {"experts": experts, "mlp_width": fields.size("moe_intermediate_size", 768)}
  return ModelConfig(**common | own)


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
  experts = config.experts
  assert experts is not None
  own: dict[str, Any] = {
    "num_experts": experts.count,
    "num_experts_per_tok": experts.chosen,
    "norm_topk_prob": experts.rescaled,
    "router_aux_loss_coef": experts.balance,
    "moe_intermediate_size": config.mlp_width,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": config.qkv_bias,
    "use_sliding_window": any(config.windows),
  }
  return write_common(config) | write_windows(config, typed=False) | own


def _tensors(config: ModelConfig, part: str, names: dict[str, str]) -> list[Tensor]:
  """Lists every tensor on disk.

  Args:
    config: the model.
    part: name on disk of a layer's mixture of experts.
    names: names on disk of an expert's maps, with those of this package.
  """
  found = tensors(config, ATTENTION)
  place = f"model.layers.{{}}.{part}."
  found.append(Tensor(f"{place}gate.weight", ("layers.experts.router.kernel",), True))
  for name, leaf in names.items():
    leaves = (f"layers.experts.{leaf}.kernel",)
    found.append(Tensor(f"{place}experts.{{}}.{name}.weight", leaves, True))
  return found


def mixtral_tensors(config: ModelConfig) -> list[Tensor]:
  return _tensors(config, "block_sparse_moe", {"w1": "gate", "w3": "up", "w2": "down"})


def qwen3_moe_tensors(config: ModelConfig) -> list[Tensor]:
  return _tensors(config, "mlp", {f"{leaf}_proj": leaf for leaf in ("gate", "up", "down")})
