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

# Fields without effect on log-probs, by the reason. Checked against transformers 5.24: the class of
# each family's configuration, its modelling code, and the code that all families share.
_NO_EFFECT: dict[str, tuple[str, ...]] = {
  "where the folder comes from, and who may load it": (
    *("_name_or_path", "name_or_path", "_commit_hash", "model_type", "architectures", "auto_map"),
    *("transformers_version", "unsloth_version", "unsloth_fixed", "is_llama_config"),
    *("tokenizer_class", "transformers.js_config", "tf_legacy_loss", "use_bfloat16"),
  ),
  "the type of the numbers: the weights' files state their own": ("torch_dtype", "dtype"),
  "dropout and initial weights: not used in a forward pass of trained weights": (
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"),
    *("embedding_dropout", "initializer_range", "gradient_checkpointing"),
  ),
  "how the same numbers are computed: kernels, caches, slices, placement": (
    *("use_cache", "cache_implementation", "output_past", "attn_implementation"),
    *("_attn_implementation", "_attn_implementation_autoset", "experts_implementation"),
    # Up to 4.56, transformers computed the slices of a product one after the other.
    *("pretraining_tp", "chunk_size_feed_forward", "reorder_and_upcast_attn", "torchscript"),
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "device_map"),
  ),
  "what is returned besides logits": (
    *("output_attentions", "output_hidden_states", "output_scores", "output_router_logits"),
    *("return_dict", "return_dict_in_generate", "keys_to_ignore_at_inference"),
  ),
  # The head reads neither; ids count for the tokenizer and for generation, see `special_ids`.
  "ids and texts of special tokens": (
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "image_token_id"),
  ),
  "settings of generation, which its own commands state": (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "max_length", "min_length", "max_new_tokens", "num_beams", "num_beam_groups"),
    *("num_return_sequences", "early_stopping", "diversity_penalty", "length_penalty"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("exponential_decay_length_penalty", "remove_invalid_values", "prefix"),
    *("task_specific_params", "assistant_confidence_threshold", "assistant_lookbehind"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"),
  ),
  "heads of classifiers, which this package does not have": (
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("classifier_dropout", "summary_activation", "summary_first_dropout", "summary_last_dropout"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
  ),
  # `max_position_embeddings` is what counts; the tensors' shapes would show another.
  "older copies of other fields": ("n_ctx", "max_sequence_length", "_sliding_window_pattern"),
  # Text has one position per token, with which "mrope" is the ordinary rotation.
  "positions of images": ("use_mrope",),
  "settings of encoders": ("tie_encoder_decoder", "cross_attention_hidden_size"),
  "every family reads it": ("tie_word_embeddings",),
}
_HARMLESS = frozenset(name for names in _NO_EFFECT.values() for name in names)

# Fields whose effect is not supported, with the values that leave the forward pass unchanged. These
# are refused wherever they stand, unless the reader of the family knows them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "scale_attn_weights": (True,),
  "scale_attn_by_inverse_layer_idx": (False,),
  "add_cross_attention": (False,),
  "is_decoder": (False, True),
  "is_encoder_decoder": (False,),
  "is_causal": (True,),
  "use_bidirectional_attention": (False,),
  "router_jitter_noise": (0.0,),
  # For a family without rotary positions.
  "rope_scaling": (),
  "rope_parameters": (),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "rope_interleaved": (False,),
  "pruned_heads": ({},),
  "use_sliding_window": (False,),
  # Transformers' cache keeps only so many positions, whatever the family.
  "sliding_window": (),
  "attention_chunk_size": (),
  "kv_sharing_modes": (),
  "per_layer_config": (),
  "transformers_weights": (),
}
# Weights that are stored in another form than as numbers of floating point.
_QUANTISED = ("quantization_config", "quantization", "compression_config")


class Fields:
  """The fields of a `config.json`. It records which are read, so that the rest can be refused.

  Attributes:
    fields: the fields by name.
    read: names of fields that the family's reader knows.
    unknown: names of fields that neither this package nor transformers knows for this family.
  """

  def __init__(self, fields: dict[str, Any]):
    self.fields = fields
    self.read: set[str] = set()
    self.unknown: list[str] = []

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

  def default(self, **defaults: Any) -> None:
    """Fills in fields that are absent; one that is null stays so."""
    self.fields = defaults | self.fields

  def alias(self, name: str, other: str) -> None:
    """Takes the value of a field from another name of it, if the file has that one alone.

    Raises:
      UserError: the file has both, and they differ.
    """
    self.read.add(other)
    given = self.fields.get(other)
    if given is None:
      return
    if self.fields.get(name) not in (None, given):
      raise UserError(
        f"config.json: {name} is {self.fields[name]!r} and {other} is {given!r}; the two name the"
        " same, make them agree"
      )
    self.fields[name] = given

  def refuse_rest(self) -> None:
    """Refuses a field that was not read and whose value is known to have an effect.

    Raises:
      UserError: names the first field that has an effect.
    """
    family = self.fields["model_type"]
    for name, value in self.fields.items():
      if name in self.read or name in _HARMLESS or value is None:
        continue
      if name in _QUANTISED:
        if not value:
          continue
        raise UserError(
          f"config.json has {name}: quantised weights are not supported; name the folder of the"
          " model's floating-point weights"
        )
      if name == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
        continue
      if name not in _NEUTRAL and name != "layer_types":
        self.unknown.append(name)
      elif value not in _NEUTRAL.get(name, ()):
        neutral = repr(*_NEUTRAL[name][:1]) if _NEUTRAL.get(name) else "null"
        raise UserError(
          f"config.json: {name} = {str(value)[:60]} is not supported for {family};"
          f" only {neutral} is"
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
