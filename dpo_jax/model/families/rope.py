"""Reading and writing the rotary positions of a `config.json`.

Older files have the fields `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.
"""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import ModelConfig, RopeScaling, is_number
from dpo_jax.model.families.fields import Fields
from dpo_jax.structs import UserError

# Required and optional fields of every kind of scaling, with their names in `RopeScaling`.
REQUIRED = {
  "default": {},
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    "original_max_position_embeddings": "original_positions",
  },
  "yarn": {"factor": "factor", "original_max_position_embeddings": "original_positions"},
}
OPTIONAL = {
  "yarn": {
    "beta_slow": "low_factor",
    "beta_fast": "high_factor",
    "attention_factor": "magnitude",
    "truncate": "whole",
  }
}


def read_rope(fields: Fields, head_width: int, theta: float) -> dict[str, Any]:
  """Reads the arguments of `ModelConfig` for rotary positions.

  Args:
    fields: fields of the `config.json`.
    head_width: size of a head, which may be rotated only in part.
    theta: the base if the file states none.
  """
  given: dict[str, Any] = {}
  for name in ("rope_scaling", "rope_parameters"):
    more = fields.get(name, {})
    if not isinstance(more, dict):
      raise UserError(f"config.json: {name} is {more!r}; it must be an object or null")
    # Where a file has both spellings, the newer one counts.
    given |= more
  return read_table(given, fields, head_width, fields.number("rope_theta", theta))


def read_table(
  given: dict[str, Any], fields: Fields, head_width: int, theta: float
) -> dict[str, Any]:
  """Reads one object of `rope_parameters`; `theta` is the base if it states none.

  The share of rotated dimensions may also be a field of the file itself.
  """
  given = {name: value for name, value in given.items() if value is not None}
  found = given.pop("rope_theta", theta)
  share = given.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
  if not is_number(share) or not 0 < share <= 1:
    raise UserError(f"config.json: partial_rotary_factor is {share!r}; it must lie in (0, 1]")
  rotated = int(head_width * share)
  known = {"rope_theta": found, "rotary_width": 0 if rotated == head_width else rotated}
  return known | {"rope_scaling": _scaling(given)}


def _scaling(given: dict[str, Any]) -> RopeScaling | None:
  """Reads the scaling from what is left of a table's object; None for none."""
  older = given.pop("type", None)
  kind = given.pop("rope_type", None) or older or "default"
  if kind not in REQUIRED:
    raise UserError(
      f"config.json: rope type {kind!r} is not known; known are {', '.join(REQUIRED)}"
    )
  needed, allowed = REQUIRED[kind], OPTIONAL.get(kind, {})
  # No field may be left over: each changes the frequencies in one of the kinds.
  if not set(needed) <= set(given) <= set(needed) | set(allowed):
    also = f" and may take {sorted(allowed)}" if allowed else ""
    raise UserError(
      f"config.json: rope type {kind!r} takes {sorted(needed)}{also}, but {sorted(given)} are given"
    )
  if kind == "default":
    return None
  names = needed | allowed
  found: dict[str, Any] = {names[name]: value for name, value in given.items()}
  # The paper's values for "yarn"; for "llama3" both bounds are required.
  bounds: dict[str, Any] = {"low_factor": 1.0, "high_factor": 32.0} if kind == "yarn" else {}
  return RopeScaling(kind, **(bounds | found))


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """Returns the older fields, which every release of transformers reads."""
  fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
  scaling = config.rope_scaling
  if scaling is not None:
    names = REQUIRED[scaling.kind] | OPTIONAL.get(scaling.kind, {})
    values = {name: getattr(scaling, ours) for name, ours in names.items()}
    # 0 stands for the paper's formula, which a reader applies if the field is absent.
    if not scaling.magnitude:
      values.pop("attention_factor", None)
    fields["rope_scaling"] = {"rope_type": scaling.kind} | values
  if config.rotary_width:
    fields["partial_rotary_factor"] = config.rotary_width / config.head_width
  return fields
