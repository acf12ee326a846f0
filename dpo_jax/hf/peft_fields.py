"""Reading an `adapter_config.json`: which fields are supported, and which modules it names.

Checked against PEFT 0.21: `LoraConfig`, `LoraLayer.update_layer`, `check_target_module_exists`.
"""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any

from dpo_jax.structs import UserError
from dpo_jax.utils import messages

# Fields that `peft` reads: rank, scale, and which modules have an adapter.
READ = (
  *("r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern"),
  *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
  "base_model_name_or_path",
)
# Fields without effect on what a trained adapter computes, by the reason.
_NO_EFFECT: dict[str, tuple[str, ...]] = {
  "where the folder comes from": ("auto_mapping", "revision", "peft_version", "task_type"),
  # These count when an adapter is made. Its tensors are in the folder.
  "how the adapter was initialized": ("eva_config", "loftq_config", "corda_config"),
  "how the adapter was initialized, too": ("lora_ga_config", "runtime_config"),
  "how modules are stored or divided": ("fan_in_fan_out", "megatron_config", "megatron_core"),
  "whether it is trained further": ("inference_mode",),
  # Both say more about fields that are refused.
  "settings of others": ("qalora_group_size", "ensure_weight_tying"),
  "fields of other libraries, and of PEFT before 0.3": ("enable_lora", "merge_weights"),
}
_HARMLESS = frozenset(READ).union(*_NO_EFFECT.values())
# Fields that change what an adapter computes, with the values that mean plain LoRA.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "lora_bias": (False,),
  "use_dora": (False,),
  "use_qalora": (False,),
  "modules_to_save": ([],),
  "trainable_token_indices": ([], {}),
  "target_parameters": ([],),
  "layer_replication": ([],),
  "alora_invocation_tokens": (),
  **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "velora_config"), ()),
  "monteclora_config": (),
}
# Initial values that leave the base as it is. The others, as "pissa", "olora" and "corda", subtract
# the adapter's initial product from the base's weights, so a folder of theirs is no adapter of the
# base that it names.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

MERGE = (
  "merge it with peft (PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(DIR)) and"
  " name DIR as the model"
)


def check(path: pathlib.Path, fields: dict[str, Any]) -> None:
  """Refuses an adapter that is not plain LoRA, and reports fields that PEFT does not know.

  Raises:
    UserError: names the field.
  """
  for name, neutral in _NEUTRAL.items():
    value = fields.get(name)
    if value is not None and value not in neutral:
      only = repr(neutral[0]) if neutral else "null"
      way = "" if name in ("peft_type", "alora_invocation_tokens") else f"; {MERGE}"
      raise UserError(f"{path}: {name} is {_short(value)}; only {only} is supported{way}")
  start = fields.get("init_lora_weights", True)
  if start is not None and start not in _PLAIN_STARTS:
    raise UserError(
      f"{path}: init_lora_weights is {_short(start)}, which changes the base's weights as well, so"
      f" the adapter alone is not what was trained; {MERGE}"
    )
  names = set(fields) - _HARMLESS - set(_NEUTRAL) - {"init_lora_weights"}
  _report_unknown(path, ", ".join(sorted(name for name in names if fields[name])))


@functools.cache  # once per folder: a command reads it several times
def _report_unknown(path: pathlib.Path, names: str) -> None:
  if names:
    messages.warn(f"{path}: passed over, as PEFT does: {names}")


def has_adapter(fields: dict[str, Any], module: str) -> bool:
  """Returns whether PEFT gives a module an adapter; it passes over the tensors of any other."""
  target, excluded = fields.get("target_modules"), fields.get("exclude_modules") or []
  if _matches(excluded, module):
    return False
  # Without the field, PEFT takes the modules that suit the family.
  if target is None or target == "all-linear":
    return True
  if not _matches(target, module):
    return False
  layers = fields.get("layers_to_transform")
  if isinstance(target, str) or layers is None or layers == [] or module in target:
    return True
  patterns = fields.get("layers_pattern") or [r"[^.]*"]
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    found = re.match(rf".*?\.{pattern}\.(\d+)\.", module)
    if found:
      return int(found[1]) in (layers if isinstance(layers, list) else [layers])
  return False


def _matches(names: str | list[str], module: str) -> bool:
  """Returns whether a module is named: by a pattern of all its name, or by the ends of names."""
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(f".{module}".endswith(f".{name}") for name in names)


def explain_tensor(name: str) -> str:
  """Returns what a tensor is that a folder of plain LoRA does not have; "" if that is not known."""
  if "lora_magnitude_vector" in name:
    return "a magnitude of DoRA"
  if "lora_embedding_" in name or re.search(r"(^|\.)(embed_tokens|wte|lm_head)\.lora_", name):
    return "an adapter of the embedding or the head"
  if re.search(r"(^|\.)(embed_tokens|wte|lm_head)\.", name):
    return "an embedding or a head, which takes the place of the base's"
  if "lora_" not in name:
    return "a whole tensor, which takes the place of the base's"
  return ""


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:60] + "…"
