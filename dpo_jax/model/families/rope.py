"""Reading and writing the rotary positions of a `config.json`.

Older files have the fields `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.
"""

from __future__ import annotations

import math
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
    "mscale": "",  # these two are read by `_magnitude`
    "mscale_all_dim": "",
  },
  # These two kinds do not look at it.
  "default": {"original_max_position_embeddings": ""},
  "linear": {"original_max_position_embeddings": ""},
}
# A field of any kind is refused where the kind does not take it: the file is not what it seems.
KNOWN = {"short_factor", "long_factor", "mrope_section"}.union(
  *REQUIRED.values(), *OPTIONAL.values()
)
# Kinds whose frequencies change with the length of the sequence. Rows of other lengths that share
# a batch would need tables of their own.
BY_LENGTH = ("dynamic", "longrope", "su")


def read_rope(fields: Fields, head_width: int, theta: float) -> dict[str, Any]:
  """Reads the arguments of `ModelConfig` for rotary positions.

  Args:
    fields: fields of the `config.json`.
    head_width: size of a head, which may be rotated only in part.
    theta: the base if the file states none.
  """
  older, newer = read_objects(fields)
  base = fields.number("rope_theta", theta)
  # Transformers takes the older object where a file has both, and drops the newer one whole.
  if older and newer and _spelled(older, base) != _spelled(newer, base):
    raise UserError(
      "config.json: rope_scaling and rope_parameters differ; remove the one that the model was not"
      " trained with"
    )
  return read_table(older or newer, fields, head_width, base)


def _spelled(given: dict[str, Any], theta: float) -> dict[str, Any]:
  """Returns an object without null fields, and with the newer name of the kind."""
  plain = {name: value for name, value in given.items() if value is not None and name != "type"}
  kind = given.get("rope_type") or given.get("type") or "default"
  return {"rope_theta": theta} | plain | {"rope_type": kind}


def read_objects(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the objects `rope_scaling` and `rope_parameters`; {} for one that is absent or null."""
  found = []
  for name in ("rope_scaling", "rope_parameters"):
    value = fields.get(name, {})
    if not isinstance(value, dict):
      raise UserError(f"config.json: {name} is {value!r}; it must be an object or null")
    found.append(value)
  return found[0], found[1]


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
  older = given.pop("type", None)
  kind = given.pop("rope_type", None) or older or "default"
  if kind in ("llama3", "yarn") and fields.get("max_position_embeddings"):
    given.setdefault("original_max_position_embeddings", fields.size("max_position_embeddings"))
  for name in sorted(set(given) - KNOWN):
    given.pop(name)
    fields.unknown.append(f"rope_parameters.{name}")
  return known | {"rope_scaling": _scaling(kind, given)}


def _scaling(kind: str, given: dict[str, Any]) -> RopeScaling | None:
  """Reads the scaling from what is left of a table's object; None for none."""
  if kind in BY_LENGTH:
    raise UserError(
      f"config.json: rope type {kind!r} is not supported: its frequencies change with the length of"
      " a sequence; use a model without it"
    )
  if kind not in REQUIRED:
    raise UserError(
      f"config.json: rope type {kind!r} is not known; known are {', '.join(REQUIRED)}"
    )
  needed, allowed = REQUIRED[kind], OPTIONAL.get(kind, {})
  # No field may be left over: each changes the frequencies in one of the kinds.
  if not set(needed) <= set(given) <= set(needed) | set(allowed):
    more = sorted(name for name, ours in allowed.items() if ours)
    also = f" and may take {more}" if more else ""
    raise UserError(
      f"config.json: rope type {kind!r} takes {sorted(needed)}{also}, but {sorted(given)} are given"
    )
  if kind == "default":
    return None
  names = {name: ours for name, ours in (needed | allowed).items() if ours}
  found: dict[str, Any] = {names[name]: given[name] for name in names if name in given}
  found |= _magnitude(given)
  # The paper's values for "yarn"; for "llama3" both bounds are required.
  bounds: dict[str, Any] = {"low_factor": 1.0, "high_factor": 32.0} if kind == "yarn" else {}
  return RopeScaling(kind, **(bounds | found))


def _magnitude(given: dict[str, Any]) -> dict[str, float]:
  """Reads the factor of cosine and sine from the two fields that DeepSeek's files have for it."""
  above, below = given.get("mscale"), given.get("mscale_all_dim")
  # As in transformers: one alone changes nothing, and the factor itself counts more than both.
  if not above or not below or "attention_factor" in given:
    return {}
  for value in (above, below, given["factor"]):
    if not is_number(value):
      raise UserError(f"config.json: yarn has a factor or mscale of {value!r}; write a number")
  growth = 0.1 * math.log(max(given["factor"], 1))
  return {"magnitude": (above * growth + 1) / (below * growth + 1)}


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """Returns the older fields, which every release of transformers reads."""
  fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
  scaling = config.rope_scaling
  if scaling is not None:
    names = REQUIRED[scaling.kind] | OPTIONAL.get(scaling.kind, {})
    values = {name: getattr(scaling, ours) for name, ours in names.items() if ours}
    # 0 stands for the paper's formula, which a reader applies if the field is absent.
    if not scaling.magnitude:
      values.pop("attention_factor", None)
    fields["rope_scaling"] = {"rope_type": scaling.kind} | values
  if config.rotary_width:
    fields["partial_rotary_factor"] = config.rotary_width / config.head_width
  return fields
