"""Reading a `config.json`: which fields are read, which have no effect, and which are refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from dpo_jax.model.config import ModelConfig, is_number
from dpo_jax.structs import UserError


class Tensor(NamedTuple):
  """A tensor on disk, or one for every layer, or for every expert of every layer.

  Attributes:
    name: its name; a first `{}` stands for the number of the layer, a second one for that of the
      expert.
    leaves: dotted paths in `params["params"]` of the leaves that it contains, joined along their
      last axis.
    transposed: whether it is stored as [out, in]; kernels here are [in, out].
  """

  name: str
  leaves: tuple[str, ...]
  transposed: bool = False


def head(config: ModelConfig) -> list[Tensor]:
  """Lists the tensor of the unembedding, if it is not the embedding."""
  return [] if config.tied else [Tensor("lm_head.weight", ("head.embedding",))]


# Names of activations on disk and here. On disk "gelu" is the exact one, and "gelu_new" and
# "gelu_pytorch_tanh" are two names of its approximation by tanh.
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

# Fields whose effect is not supported, with the values that leave the forward pass unchanged.
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
  """The fields of a `config.json`. It records which are read, so that the rest can be refused."""

  def __init__(self, fields: dict[str, Any]):
    self.fields = fields
    self.read: set[str] = set()

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a field, or the default if it is absent or null."""
    self.read.add(name)
    value = self.fields.get(name)
    # Files write null for "not set", so it means the same as an absent field.
    return default if value is None else value

  def size(self, name: str, default: int | None = None) -> int:
    """Returns a whole number; without a default the field is required."""
    value = self.get(name, default)
    if value is None:
      raise UserError(f"config.json has no {name!r}; the model folder is incomplete")
    if not isinstance(value, int) or isinstance(value, bool):
      raise UserError(f"config.json: {name} is {value!r}; it must be a whole number")
    return value

  def number(self, name: str, default: float) -> float:
    """Returns a real number."""
    value = self.get(name, default)
    if not is_number(value):
      raise UserError(f"config.json: {name} is {value!r}; it must be a number")
    return float(value)

  def activation(self, name: str, default: str) -> str:
    """Returns our name of an activation."""
    value = self.get(name, default)
    if value not in ACTIVATIONS:
      raise UserError(
        f"config.json: {name} {value!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}"
      )
    return ACTIVATIONS[value]

  def refuse_rest(self) -> None:
    """Refuses a field that was not read, unless it or its value has no effect.

    Raises:
      UserError: names the first such field.
    """
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
  """Returns the name of the model's activation in a `config.json`."""
  names = [name for name, ours in ACTIVATIONS.items() if ours == config.activation]
  # The table lists the older name first. Only GPT-2 uses "gelu_new".
  return names[-1] if config.activation == "gelu_tanh" and config.family != "gpt2" else names[0]


def special_ids(fields: dict[str, Any]) -> dict[str, Any]:
  """Reads the arguments of `ModelConfig` for special ids."""
  # "eos_token_id" may be one id or a list of ids.
  eos = fields.get("eos_token_id")
  return {
    "bos_id": fields.get("bos_token_id"),
    "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    "pad_id": fields.get("pad_token_id"),
  }
