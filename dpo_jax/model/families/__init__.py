"""The families of decoders: the fields of their `config.json` and the names of their tensors.

Every field of a `config.json` is honoured, or known to have no effect on log-probs, or refused by
name: half a configuration would give wrong log-probs and no error. A field that transformers does
not know either has no effect there; `unknown_fields` lists such, for a command to report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import common, gemma, gpt2, llama, moe
from dpo_jax.model.families.fields import Fields, Tensor
from dpo_jax.structs import UserError

__all__ = ["FAMILIES", "Tensor", "from_hf", "from_scratch", "tensors", "to_hf", "unknown_fields"]


class Family(NamedTuple):
  """One family, known by its `model_type`.

  Attributes:
    architecture: the class of transformers that loads it.
    read: (fields of a `config.json`) -> configuration.
    write: (configuration) -> the fields that `read` reads, without those that `to_hf` writes for
      all families.
    tensors: (configuration) -> the tensors of the model's folder.
  """

  architecture: str
  read: Callable[[Fields], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]
  tensors: Callable[[ModelConfig], list[Tensor]] = common.tensors


FAMILIES = {
  "gpt2": Family("GPT2LMHeadModel", gpt2.read_gpt2, gpt2.write_gpt2, gpt2.gpt2_tensors),
  "llama": Family("LlamaForCausalLM", llama.read_llama, llama.write_llama),
  "mistral": Family("MistralForCausalLM", llama.read_mistral, llama.write_mistral),
  "qwen2": Family("Qwen2ForCausalLM", llama.read_qwen2, llama.write_qwen2),
  "qwen3": Family("Qwen3ForCausalLM", llama.read_qwen3, llama.write_qwen3),
  "phi3": Family("Phi3ForCausalLM", llama.read_phi3, llama.write_mistral, llama.phi3_tensors),
  "olmo2": Family("Olmo2ForCausalLM", llama.read_olmo2, llama.write_olmo2),
  "smollm3": Family("SmolLM3ForCausalLM", llama.read_smollm3, llama.write_smollm3),
  "gemma": Family("GemmaForCausalLM", gemma.read_gemma, gemma.write_gemma),
  "gemma2": Family("Gemma2ForCausalLM", gemma.read_gemma2, gemma.write_gemma2),
  "gemma3_text": Family("Gemma3ForCausalLM", gemma.read_gemma3, gemma.write_gemma3),
  "mixtral": Family("MixtralForCausalLM", moe.read_mixtral, moe.write_mixtral, moe.mixtral_tensors),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM", moe.read_qwen3_moe, moe.write_qwen3_moe, moe.qwen3_moe_tensors
  ),
}


def from_hf(fields: dict[str, Any]) -> ModelConfig:
  """Returns the configuration that the contents of a `config.json` describe.

  Raises:
    UserError: an unknown architecture, a missing size, or a field that would not be honoured.
  """
  return _read(fields)[0]


def from_scratch(fields: dict[str, Any]) -> ModelConfig:
  """Returns the configuration that a run's own fields describe, none of which may be unknown.

  Raises:
    UserError: as `from_hf`, or a field is not known, which in a run's own fields is a mistake.
  """
  config, unknown = _read(fields)
  if unknown:
    raise UserError(
      f"model.scratch.{unknown[0]} is no field of a {config.family} model; correct its name or"
      " leave it out"
    )
  return config


def unknown_fields(fields: dict[str, Any]) -> list[str]:
  """Lists the fields of a `config.json` that transformers passes over for its family, too."""
  return _read(fields)[1]


def _read(fields: dict[str, Any]) -> tuple[ModelConfig, list[str]]:
  """Returns the configuration, and the names of fields that are not known."""
  family = fields.get("model_type")
  if family not in FAMILIES:
    raise UserError(
      f"config.json: model_type {family!r} is not known; known are {', '.join(sorted(FAMILIES))}"
    )
  _check_architecture(fields)
  # A copy, because some readers fill in the defaults of their family.
  read = Fields(dict(fields))
  config = FAMILIES[family].read(read)
  read.refuse_rest()
  return config, read.unknown


def _check_architecture(fields: dict[str, Any]) -> None:
  """Refuses a classifier: it has no head that gives log-probs of tokens."""
  names = fields.get("architectures") or []
  for name in names if isinstance(names, list) else [names]:
    if str(name).endswith(("Classification", "QuestionAnswering", "RewardModel")):
      raise UserError(
        f"config.json: architectures names {name}, whose head gives scores and no log-probs of"
        " tokens; use a causal language model"
      )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Returns the contents of a `config.json`, from which `from_hf` makes the same configuration."""
  # Most readers expect a single id as a number, several as a list.
  eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
  family = FAMILIES[config.family]
  return {
    "model_type": config.family,
    "architectures": [family.architecture],
    "vocab_size": config.vocab,
    "tie_word_embeddings": config.tied,
    "initializer_range": config.init_std,
    "bos_token_id": config.bos_id,
    "eos_token_id": eos,
    "pad_token_id": config.pad_id,
    **family.write(config),
  }


def tensors(config: ModelConfig) -> list[Tensor]:
  """Lists every tensor of the model's folder."""
  return FAMILIES[config.family].tensors(config)
