"""Rotary positions in `config.json`: the older fields, and the newer `rope_parameters`."""

from __future__ import annotations

from typing import Any

from dpo_jax.model.config import ModelConfig, RopeScaling, is_number
from dpo_jax.model.families.fields import Fields
from dpo_jax.structs import UserError

# Of every kind: fields that must be there, and fields that may, by their names here.
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
  """Arguments of `ModelConfig` on rotary positions.

  Args:
    fields: of the `config.json`.
    head_width: dimensions of a head, of which some may not turn.
    theta: the base where none is given.
  """
  given: dict[str, Any] = {}
  for name in ("rope_scaling", "rope_parameters"):
    more = fields.get(name, {})
    if not isinstance(more, dict):
      raise UserError(f"config.json: {name} is {more!r}; it must be an object or null")
    given |= more
  return read_table(given, fields, head_width, fields.number("rope_theta", theta))


def read_table(
  given: dict[str, Any], fields: Fields, head_width: int, theta: float
) -> dict[str, Any]:
  """What one object of `rope_parameters` says, beside the fields around it."""
  given = {name: value for name, value in given.items() if value is not None}
  found = given.pop("rope_theta", theta)
  share = given.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
  if not is_number(share) or not 0 < share <= 1:
    raise UserError(f"config.json: partial_rotary_factor is {share!r}; it must lie in (0, 1]")
  turned = int(head_width * share)
  known = {"rope_theta": found, "rotary_width": 0 if turned == head_width else turned}
  return known | {"rope_scaling": _scaling(given)}


def _scaling(given: dict[str, Any]) -> RopeScaling | None:
  older = given.pop("type", None)
  kind = given.pop("rope_type", None) or older or "default"
  if kind not in REQUIRED:
    raise UserError(
      f"config.json: rope type {kind!r} is not known; known are {', '.join(REQUIRED)}"
    )
  needed, allowed = REQUIRED[kind], OPTIONAL.get(kind, {})
  if not set(needed) <= set(given) <= set(needed) | set(allowed):
    also = f" and may take {sorted(allowed)}" if allowed else ""
    raise UserError(
      f"config.json: rope type {kind!r} takes {sorted(needed)}{also}, but {sorted(given)} are given"
    )
  if kind == "default":
    return None
  names = needed | allowed
  found = {names[name]: value for name, value in given.items()}
  bounds = {"low_factor": 1.0, "high_factor": 32.0} if kind == "yarn" else {}
  return RopeScaling(kind, **(bounds | found))


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """The older fields, which every release reads."""
  fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
  scaling = config.rope_scaling
  if scaling is not None:
    names = REQUIRED[scaling.kind] | OPTIONAL.get(scaling.kind, {})
    values = {name: getattr(scaling, ours) for name, ours in names.items()}
    if not scaling.magnitude:
      values.pop("attention_factor", None)
    fields["rope_scaling"] = {"rope_type": scaling.kind} | values
  if config.rotary_width:
    fields["partial_rotary_factor"] = config.rotary_width / config.head_width
  return fields
