"""A `config.json` being read: what is asked for, what is harmless, and what must be refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from dpo_jax.model.config import ModelConfig, is_number
from dpo_jax.structs import UserError


class Tensor(NamedTuple):
  """A tensor on disk.

  Attributes:
    name: its name; `{}` stands for the layer where there is one, a second `{}` for the expert.
    leaves: dotted paths in `params["params"]`, joined along their last axis.
    transposed: lies as [out, in] on disk, while kernels here are [in, out].
  """

  name: str
  leaves: tuple[str, ...]
  transposed: bool = False


def head(config: ModelConfig) -> list[Tensor]:
  """The unembedding, where it is not the embedding."""
  return [] if config.tied else [Tensor("lm_head.weight", ("head.embedding",))]


# Names of activations on disk and here. "gelu" there is the exact one.
ACTIVATIONS = {
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
    "embedding_dropout",
    "cache_implementation",
    "output_router_logits",
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
  "router_jitter_noise": (0.0,),
}


class Fields:
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
    if not is_number(value):
      raise UserError(f"config.json: {name} is {value!r}; it must be a number")
    return float(value)

  def activation(self, name: str, default: str) -> str:
    value = self.get(name, default)
    if value not in ACTIVATIONS:
      raise UserError(
        f"config.json: {name} {value!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}"
      )
    return ACTIVATIONS[value]

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


def activation_name(config: ModelConfig) -> str:
  """Of the model's activation in a `config.json`."""
  names = [name for name, ours in ACTIVATIONS.items() if ours == config.activation]
  # The newer families know the approximate form by its newer name.
  return names[-1] if config.activation == "gelu_tanh" and config.family != "gpt2" else names[0]


def special_ids(fields: dict[str, Any]) -> dict[str, Any]:
  eos = fields.get("eos_token_id")
  return {
    "bos_id": fields.get("bos_token_id"),
    "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    "pad_id": fields.get("pad_token_id"),
  }
