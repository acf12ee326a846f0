"""What a decoder is made of, and its translation from and to a Hugging Face `config.json`.

One record describes every family: what differs between them is data here, not code in the
decoder. A field of `config.json` that is neither read nor known to be without effect on the
forward pass is refused by name, because honouring half a configuration gives wrong log-probs and
no error.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dpo_jax.structs import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the positions a model was first trained on.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" only the slow ones.
    factor: the stretch.
    low_factor, high_factor, original_positions: bounds of the "llama3" ramp between frequencies
      that are stretched and frequencies that are kept.
  """

  kind: str
  factor: float
  low_factor: float = 1.0
  high_factor: float = 4.0
  original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only language model.

  Attributes:
    family: the Hugging Face `model_type`; names of the tensors on disk follow it.
    vocab: number of token ids.
    width: size of the residual stream.
    layers: number of blocks.
    heads, kv_heads, head_width: query heads, key/value heads (a divisor) and the size of each.
    mlp_width: hidden size of the feed-forward part.
    max_positions: positions the model was built for; with learned positions, a hard limit.
    norm: "rms" (scale only) or "layer" (mean removed, scale and bias).
    norm_eps: added to the variance.
    positions: "rotary" or "learned".
    rope_theta, rope_scaling: base and stretch of rotary frequencies.
    activation: a name in `ACTIVATIONS` of the transformer.
    gated: SwiGLU-like, `down(act(gate(x)) * up(x))`, or plain, `down(act(up(x)))`.
    qkv_bias, out_bias, mlp_bias: which linear maps carry a bias.
    tied: the head is the embedding table.
    init_std: standard deviation of initial weights.
    bos_id, eos_ids, pad_id: special ids that the model's folder names; None or () without.
  """

  family: str
  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  mlp_width: int
  max_positions: int
  norm: str
  norm_eps: float
  positions: str
  activation: str
  gated: bool
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  tied: bool
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  init_std: float = 0.02
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None

  def __post_init__(self) -> None:
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
    for name in (*sizes, "max_positions"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model {name} is {value!r}; it must be a positive whole number")
    if self.heads % self.kv_heads:
      raise UserError(
        f"model has {self.heads} heads and {self.kv_heads} key/value heads; "
        "the second must divide the first"
      )
    if self.positions == "rotary" and self.head_width % 2:
      raise UserError(f"model head width {self.head_width} is odd; rotary positions need it even")
    numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
    if self.rope_scaling is not None:
      numbers |= {k: v for k, v in vars(self.rope_scaling).items() if k != "kind"}
    for name, value in numbers.items():
      if not _is_number(value) or not 0 < value < math.inf:
        raise UserError(f"model {name} is {value!r}; it must be a finite number above 0")
    scaling = self.rope_scaling
    if scaling and scaling.kind == "llama3" and not scaling.low_factor < scaling.high_factor:
      raise UserError(
        f"model low_factor is {scaling.low_factor} and high_factor {scaling.high_factor};"
        " the second must be above the first"
      )


def _is_number(value: object) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


# Names of activations on disk and here. "gelu" there is the exact one.
_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
}

# Fields without effect on the forward pass: provenance, training-time dropout (preference
# training runs without it), caching, generation defaults, kernels that compute the same.
_HARMLESS = frozenset(
  [
    "_name_or_path",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "attn_implementation",
    "_attn_implementation_autoset",
    "initializer_range",
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "hidden_dropout",
    "task_specific_params",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "num_beams",
    "gradient_checkpointing",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_dict_in_generate",
    "id2label",
    "label2id",
    "problem_type",
    "finetuning_task",
    "prefix",
    "tokenizer_class",
    "model_type",
    "tie_word_embeddings",
    "n_ctx",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "reorder_and_upcast_attn",
    "keys_to_ignore_at_inference",
    "base_model_tp_plan",
    "base_model_pp_plan",
  ]
)

# Fields with an effect that is not offered: only these values leave the forward pass as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "pretraining_tp": (1,),
  "scale_attn_weights": (True,),
  "scale_attn_by_inverse_layer_idx": (False,),
  "add_cross_attention": (False,),
  "is_decoder": (False, True),
  "is_encoder_decoder": (False,),
  "partial_rotary_factor": (1, 1.0),
  "use_sliding_window": (False,),
}


class _Fields:
  """A `config.json` being read: remembers what was asked for, so that the rest can be refused."""

  def __init__(self, fields: dict[str, Any]):
    self.fields = fields
    self.read: set[str] = set()

  def get(self, name: str, default: Any = None) -> Any:
    self.read.add(name)
    value = self.fields.get(name)
    return default if value is None else value

  def size(self, name: str, default: int | None = None) -> int:
    value = self.get(name, default)
    if value is None:
      raise UserError(f"config.json has no {name!r}; the model folder is incomplete")
    if not isinstance(value, int) or isinstance(value, bool):
      raise UserError(f"config.json: {name} is {value!r}; it must be a whole number")
    return value

  def number(self, name: str, default: float) -> float:
    value = self.get(name, default)
    if not _is_number(value):
      raise UserError(f"config.json: {name} is {value!r}; it must be a number")
    return float(value)

  def activation(self, name: str, default: str) -> str:
    value = self.get(name, default)
    if value not in _ACTIVATIONS:
      raise UserError(
        f"config.json: {name} {value!r} is not known; known are {', '.join(sorted(_ACTIVATIONS))}"
      )
    return _ACTIVATIONS[value]

  def refuse_rest(self) -> None:
    """Every other field must be harmless or hold its neutral value."""
    for name, value in self.fields.items():
      if name in self.read or name in _HARMLESS or value is None:
        continue
      if name not in _NEUTRAL:
        raise UserError(
          f"config.json: {name} = {value!r} is not honoured for {self.fields['model_type']}; "
          "remove the field if it changes nothing in the forward pass, else use another model"
        )
      if value not in _NEUTRAL[name]:
        raise UserError(
          f"config.json: {name} = {value!r} is not supported; only {_NEUTRAL[name][0]!r} is"
        )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
  """Base and stretch of rotary positions, from the older fields or from `rope_parameters`."""
  scaling: dict[str, Any] = {}
  for name in ("rope_scaling", "rope_parameters"):
    given = fields.get(name, {})
    if not isinstance(given, dict):
      raise UserError(f"config.json: {name} is {given!r}; it must be an object or null")
    scaling |= given
  theta = fields.number("rope_theta", 10000.0)
  inner = scaling.pop("rope_theta", None)
  theta = theta if inner is None else inner
  kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
  scaling.pop("type", None)
  known = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
      "factor": "factor",
      "low_freq_factor": "low_factor",
      "high_freq_factor": "high_factor",
      "original_max_position_embeddings": "original_positions",
    },
  }
  if kind not in known:
    raise UserError(f"config.json: rope type {kind!r} is not known; known are {', '.join(known)}")
  names = known[kind]
  if set(scaling) != set(names):
    raise UserError(
      f"config.json: rope type {kind!r} takes {sorted(names)}, but {sorted(scaling)} are given"
    )
  if kind == "default":
    return theta, None
  return theta, RopeScaling(kind, **{names[name]: value for name, value in scaling.items()})


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
  eos = fields.get("eos_token_id")
  return {
    "bos_id": fields.get("bos_token_id"),
    "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    "pad_id": fields.get("pad_token_id"),
  }


def _llama_from(fields: _Fields) -> ModelConfig:
  width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
  theta, scaling = _rope(fields)
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
    **_special_ids(fields.fields),
  )


def _gpt2_from(fields: _Fields) -> ModelConfig:
  width, heads = fields.size("n_embd", 768), fields.size("n_head", 12)
  return ModelConfig(
    family="gpt2",
    vocab=fields.size("vocab_size"),
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
    **_special_ids(fields.fields),
  )


FAMILIES = {"llama": _llama_from, "gpt2": _gpt2_from}


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
  read = _Fields(fields)
  config = FAMILIES[family](read)
  read.refuse_rest()
  return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """The contents of a `config.json`; `from_hf` of it is `config` again."""
  activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
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
