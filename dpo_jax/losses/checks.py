"""Refuses losses, arguments and modifiers that do not belong together, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.losses.declaration import Declaration, Range, contains, declarations, in_words
from dpo_jax.losses.divergences import DIVERGENCES
from dpo_jax.structs import UserError

# What `resolve` takes in addition to arguments of losses, with types.
MODIFIERS: dict[str, type] = {
  "sft_weight": float,
  "ld_alpha": float,
  "wpo": bool,
  "link": str,
  "link_alpha": float,
  "reference_free": bool,
  "running_decay": float,
}


def _joined(losses: Sequence[Declaration]) -> str:
  return "+".join(loss.name for loss in losses)


def check_known(losses: Sequence[Declaration], options: Mapping[str, Any]) -> None:
  """Refuses arguments that none of the losses reads."""
  known = {key for loss in losses for key in loss.arguments}
  # A setting that nothing reads would be ignored in silence, such as label_smoothing of sigmoid.
  for key, value in options.items():
    if key not in known and key not in MODIFIERS:
      takes = f"reads {', '.join(sorted(known))}" if known else "reads no argument"
      readers = [one.name for one in declarations() if key in one.arguments]
      others = f". Losses that read {key}: {', '.join(readers)}" if 0 < len(readers) < 6 else ""
      raise UserError(
        f"loss {_joined(losses)!r} does not read {key} = {value!r}; it {takes}. Leave {key} out (or"
        f" undo it: --config.loss.{key}=None){others}"
      )


def check_sum(losses: Sequence[Declaration]) -> None:
  """Refuses sums whose terms read different examples, repeat a loss, or differ in their rewards."""
  if len(losses) == 1:
    return
  for loss in losses:
    if loss.kind not in ("pairs", "text"):
      raise UserError(
        f"loss {loss.name!r} is computed from another kind of example and cannot be a term of a"
        " sum; train with it alone"
      )
  if len({loss.name for loss in losses}) < len(losses):
    raise UserError(f"loss.name {_joined(losses)!r} contains a loss twice; add their weights")
  # `sft` alone combines with either kind: it reports no reward.
  if len({loss.reference for loss in losses if loss.kind != "text"}) > 1:
    raise UserError(
      f"loss.name {_joined(losses)!r} mixes losses with and without a reference; their rewards"
      " would not be the same quantity"
    )


_MODIFIER_RANGES: dict[str, Range] = {
  "sft_weight": "[0, inf)",
  "ld_alpha": "[0, 1]",
  "link_alpha": "(0, 1)",
  "running_decay": "[0, 1)",
}


def check_ranges(losses: Sequence[Declaration], options: Mapping[str, Any]) -> None:
  """Refuses values outside the range of their argument, in any of the losses that read it."""
  for key, value in options.items():
    readers = [loss for loss in losses if key in loss.ranges]
    allowed = [loss.ranges[key] for loss in readers] or (
      [_MODIFIER_RANGES[key]] if key in _MODIFIER_RANGES else []
    )
    for one in allowed:
      if not contains(one, value):
        usual = f" (the default is {readers[0].arguments[key]})" if readers else ""
        raise UserError(f"loss.{key} is {value!r}; it must be {in_words(one)}{usual}")


def check_combination(losses: Sequence[Declaration], extra: Mapping[str, Any]) -> None:
  """Refuses modifiers that would be ignored, or would change the meaning of a loss."""

  def refuse(key: str, why: str) -> None:
    raise UserError(f"loss.{key} = {extra[key]!r} does not combine with {_joined(losses)}: {why}")

  # In a sum every term is of pairs, or sft, by `check_sum`.
  wrong_kind = losses[0].kind != "pairs" if len(losses) == 1 else False
  for key in ("sft_weight", "ld_alpha", "wpo", "link", "link_alpha", "reference_free"):
    # 0.0 is a value; False and None are the modifier left out.
    if wrong_kind and extra.get(key) is not None and extra[key] is not False:
      refuse(key, "it modifies losses of pairs")
  if extra.get("ld_alpha") is not None and (
    extra.get("sft_weight") or any(loss.likelihood for loss in losses)
  ):
    refuse("ld_alpha", "it would also reduce the weight of tokens in the supervised term")
  for loss in losses:
    if extra.get("sft_weight") and loss.likelihood:
      refuse("sft_weight", f"{loss.name} contains that term; set its weight there")
    if extra.get("ld_alpha") is not None and loss.averages:
      refuse(
        "ld_alpha", f"{loss.name} averages over tokens, which already removes the effect of length"
      )
    if extra.get("wpo") and loss.batch_wide:
      refuse(
        "wpo",
        f"{loss.name} compares pairs of the whole batch, where the weight of one pair has no"
        " meaning",
      )
    if extra.get("reference_free") and not loss.reference and loss.kind != "text":
      refuse("reference_free", f"{loss.name} does not read a reference anyway")
    if extra.get("reference_free") and loss.reference and not loss.uniform_reference:
      refuse("reference_free", f"{loss.name} needs the ratio to a reference")
    if extra.get("link") and not loss.margin and loss.kind != "text":
      takes = sorted(one.name for one in declarations() if one.margin)
      refuse("link", f"it replaces the log-ratio only in {', '.join(takes)}")
  if extra.get("link") and extra["link"] not in DIVERGENCES:
    raise UserError(f"loss.link is {extra['link']!r}; known: {', '.join(DIVERGENCES)}")
  if extra.get("link") and extra.get("reference_free"):
    refuse("link", "without a reference there is no ratio; leave out reference_free")
  if extra.get("link_alpha") is not None and extra.get("link") != "alpha":
    refuse("link_alpha", "only loss.link=alpha reads it")
  if extra.get("running_decay") is not None and not any(loss.running for loss in losses):
    running = [one.name for one in declarations() if one.running]
    refuse("running_decay", f"only {', '.join(running)} read it")
