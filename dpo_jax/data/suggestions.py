"""Suggests a field map for rows whose fields have other names."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from dpo_jax.data.fields import Row
from dpo_jax.data.formats import FORMATS, Format

# Names under which public data sets have these fields, in small letters, the likeliest first.
_ALIASES = {
  "prompt": (
    *("question", "query", "instruction", "input", "user", "user_input", "problem", "history"),
    *("post", "context", "conversation", "prompt_text", "trajectory", "context_messages"),
    *("prompts", "input_text", "source"),
  ),
  "chosen": (
    *("preferred", "chosen_response", "response_chosen", "preferred_output", "preferred_response"),
    *("better", "good", "accepted", "winner", "positive", "pos", "win", "y_w", "chosen_answer"),
    *("answer_chosen", "text_chosen", "chosen_responses", "chosen_conversations", "pos_resp"),
    *("response_j", "chosen_output", "pos_answer", "positive_answer", "good_response"),
    # Where another name says rejected, these are what was chosen.
    *("response", "output", "answer", "completion"),
  ),
  "rejected": (
    *("dispreferred", "rejected_response", "response_rejected", "non_preferred_output"),
    *("worse", "bad", "loser", "negative", "neg", "lose", "y_l", "rejected_answer"),
    *("answer_rejected", "dispreferred_response", "non_preferred", "text_rejected"),
    *("rejected_responses", "rejected_conversations", "neg_resp", "response_k", "rejected_output"),
    *("neg_answer", "negative_answer", "bad_response", "rejected_completion"),
  ),
  "preference": (
    *("winner_model_a+winner_model_b+winner_tie", "winner", "better_response_id"),
    *("safer_response_id", "preference_strength", "overall_preference"),
    *("label", "labels", "verdict", "choice", "preferred", "better"),
    *("human_preference", "judgement", "judgment", "comparison"),
  ),
  "answers": ("responses", "completions", "candidates", "generations", "outputs", "replies"),
  "scores": ("rewards", "ratings", "rating", "score", "reward_scores"),
  "input": ("context",),
  "output": ("response", "answer", "completion"),
  "completion": (
    *("response", "output", "answer", "assistant", "reply", "target", "generation"),
    "output_text",
  ),
  "label": (
    *("thumbs_up", "is_good", "liked", "desirable", "binary_label", "feedback", "correct"),
    *("is_safe", "is_correct"),
  ),
  "messages": ("conversation", "dialog", "dialogue", "chat"),
  "text": ("content", "document"),
}
# Fields that a format need not have, and that change what its rows mean.
_OPTIONAL = {"answers": "scores", "instruction": "input"}
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
  ("answer1", "answer2"),
  ("candidate_0", "candidate_1"),
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
  names = {name.strip().lower(): name for name in row}
  fitting = [
    (-len(one.fields), len(set(found) & set(one.fields)), number, found)
    for number, one in enumerate(one for kind in kinds for one in FORMATS[kind])
    if (found := _map_of(one, names)) is not None
  ]
  if not fitting:
    return ""
  best = min(fitting)[-1]  # the format with the most fields, and of these the fewest to map
  looks = ", ".join(f"`{theirs}` looks like {_article(ours)}" for ours, theirs in best.items())
  flags = " ".join(
    shlex.quote(f"--config.data.fields.{ours}={theirs}") for ours, theirs in best.items()
  )
  pairs = shlex.quote(",".join(f"{ours}={theirs}" for ours, theirs in best.items()))
  return f"{looks}: {flags} (in other commands: --fields {pairs})"


def missing(row: Row, fields: Iterable[str]) -> list[str]:
  """Returns which fields of a format a row has under no name that is known."""
  names = {name.strip().lower() for name in row}
  return [one for one in fields if one not in names and not names & {*_ALIASES.get(one, ())}]


def _map_of(row_format: Format, names: dict[str, str]) -> dict[str, str] | None:
  """Returns the fields to map so that a row has a format, or None if it lacks one of them."""
  found: dict[str, str] = {}
  optional = [_OPTIONAL[one] for one in row_format.fields if one in _OPTIONAL]
  for field in (*row_format.fields, *optional):
    if field in names:
      if names[field] != field:  # other letters, or spaces around it
        found[field] = names[field]
      continue
    taken = {*found.values(), *row_format.fields}
    options: Iterable[str] = _ALIASES.get(field, ())
    if field in ("answer_a", "answer_b"):
      # Both from one pair of names: response_1 is the second beside response_0.
      side = ("answer_a", "answer_b").index(field)
      options = [pair[side] for pair in _SIDES if all(name in names for name in pair)]
    theirs = next((known for one in options if (known := _columns(one, names, taken))), None)
    if theirs is not None:
      found[field] = theirs
    elif field not in optional:
      return None
  return found or None


def _columns(wanted: str, names: dict[str, str], taken: set[str]) -> str | None:
  """Returns the columns that a name, or several joined by +, stand for; None if one is taken."""
  known = [names.get(one, "") for one in wanted.split("+")]
  return "+".join(known) if all(one and one not in taken for one in known) else None


def _article(field: str) -> str:
  return {"prompt": "a prompt", "label": "a label"}.get(field, field)
