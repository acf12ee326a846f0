"""Suggests a field map for rows whose fields have other names."""

from __future__ import annotations

from collections.abc import Iterable

from dpo_jax.data.fields import Row
from dpo_jax.data.formats import FORMATS, Format

# Names under which public data sets have these fields, in small letters, the likeliest first.
_ALIASES = {
  "prompt": (
    *("question", "query", "instruction", "input", "user", "user_input", "problem", "history"),
    *("post", "context", "conversation", "prompt_text", "source"),
  ),
  "chosen": (
    *("preferred", "chosen_response", "response_chosen", "preferred_output", "preferred_response"),
    *("better", "good", "accepted", "winner", "positive", "pos", "win", "y_w", "chosen_answer"),
    *("answer_chosen", "text_chosen"),
  ),
  "rejected": (
    *("dispreferred", "rejected_response", "response_rejected", "non_preferred_output"),
    *("worse", "bad", "loser", "negative", "neg", "lose", "y_l", "rejected_answer"),
    *("answer_rejected", "dispreferred_response", "non_preferred", "text_rejected"),
  ),
  "preference": (
    *("winner", "better_response_id", "safer_response_id", "preference_strength"),
    *("overall_preference", "label", "labels", "verdict", "choice", "preferred", "better"),
    *("human_preference", "judgement", "judgment"),
  ),
  "answers": ("responses", "completions", "candidates", "generations", "outputs", "replies"),
  "scores": ("rewards", "ratings", "rating", "score"),
  "completion": ("response", "output", "answer", "assistant", "reply", "target", "generation"),
  "label": ("thumbs_up", "is_good", "liked", "desirable", "binary_label", "feedback", "correct"),
  "messages": ("conversation", "dialog", "dialogue", "chat"),
  "text": ("content", "document"),
}
# Pairs of columns that contain two completions to compare.
_SIDES = (
  ("response_a", "response_b"),
  ("response_0", "response_1"),
  ("response_1", "response_2"),
  ("response1", "response2"),
  ("output_1", "output_2"),
  ("output_a", "output_b"),
  ("completion_a", "completion_b"),
  ("completion_1", "completion_2"),
  ("answer_0", "answer_1"),
  ("answer_1", "answer_2"),
  ("human_ref_a", "human_ref_b"),
  ("conversation_a", "conversation_b"),
  ("option_a", "option_b"),
  ("candidate_a", "candidate_b"),
  ("assistant_a", "assistant_b"),
)


def suggest(row: Row, kinds: Iterable[str]) -> str:
  """Returns a hint that maps fields of the row, such as "`question` looks like a prompt: …", or "".

  Args:
    row: its field names are compared without regard to capitals.
    kinds: of rows that would be accepted, the likeliest first.
  """
  names = {name.lower(): name for name in row}
  fitting = [
    (-len(one.fields), len(found), number, found)
    for number, one in enumerate(one for kind in kinds for one in FORMATS[kind])
    if (found := _map_of(one, names)) is not None
  ]
  if not fitting:
    return ""
  best = min(fitting)[-1]  # the format with the most fields, and of these the fewest to map
  looks = ", ".join(f"`{theirs}` looks like {_article(ours)}" for ours, theirs in best.items())
  flags = " ".join(f"--config.data.fields.{ours}={theirs}" for ours, theirs in best.items())
  pairs = ",".join(f"{ours}={theirs}" for ours, theirs in best.items())
  return f"{looks}: {flags} (for a script: --fields {pairs})"


def _map_of(row_format: Format, names: dict[str, str]) -> dict[str, str] | None:
  """Returns the fields to map so that a row has a format, or None if it lacks one of them."""
  found: dict[str, str] = {}
  for field in row_format.fields:
    if field in names:
      continue
    taken = {*found.values(), *row_format.fields}
    options: Iterable[str] = _ALIASES.get(field, ())
    if field in ("answer_a", "answer_b"):
      # Both from one pair of names: response_1 is the second beside response_0.
      side = ("answer_a", "answer_b").index(field)
      options = [pair[side] for pair in _SIDES if all(name in names for name in pair)]
    theirs = next((names[one] for one in options if one in names and names[one] not in taken), None)
    if theirs is None:
      return None
    found[field] = theirs
  return found or None


def _article(field: str) -> str:
  return {"prompt": "a prompt", "label": "a label"}.get(field, field)
