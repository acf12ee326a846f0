"""Recognizes the format in which rows are written, and reads rows as preferences.

The format of a file is recognized from its first row, or from the names that a field map assigns to
other fields. `formats` lists the formats and says what each means.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from dpo_jax.data import fields as row_fields
from dpo_jax.data import formats
from dpo_jax.data.fields import Conversation, Messages, Preference, Row, RowError
from dpo_jax.data.formats import Format
from dpo_jax.structs import UserError

# The kinds of training, and the kinds of rows that each accepts; the first that matches is used.
ACCEPTED_ROWS = {
  "pairs": ("pairs",),
  "text": ("pairs", "text"),
  "unpaired": ("unpaired", "pairs"),
  "ranked": ("ranked", "pairs"),
}
KINDS = tuple(ACCEPTED_ROWS)

# Error texts about rows of another kind than the loss needs.
_WHICH_LOSS = {
  "pairs": "rows with chosen and rejected are pairs",
  "text": "single completions without a label are for loss sft",
  "unpaired": "single completions with a label are for loss kto",
  "ranked": "lists of ranked completions are for loss plackett_luce",
}


def detect(row: Row, fields: dict[str, str] | None = None, *, kind: str = "pairs") -> Format:
  """Recognizes the format of a data set from one of its rows.

    kind        accepted rows                      each row gives
    "pairs"     chosen and rejected                both completions
    "text"      a completion without a label       the completion
                chosen and rejected                chosen
    "unpaired"  a completion and a label           the completion; its score is 1 if desirable, or 0
                chosen and rejected                both, with scores 1 and 0, each on its own
    "ranked"    completions, best first or scored  all of them
                chosen and rejected                both

  Ranked rows are not accepted as pairs: best against worst would be a guess at what was meant. The
  scores of pairs and ranked completions are those of the row, or its margin: see
  `fields.read_pair_scores`.

  Args:
    row: usually the first.
    fields: field map from our field names (prompt, chosen, rejected, …) to those of the row.
    kind: of the table.

  Returns:
    The format; its `convert` takes rows as they are in the file.

  Raises:
    UserError: the row is of another kind or unknown format, or lacks a field of the map.
  """
  fields = _without_empty(fields)
  row = _apply_field_map(row, fields)
  for of in ACCEPTED_ROWS[kind]:
    if found := _find_format(row, of):
      # `convert` is bound to the field map, so that no caller can forget to apply it.
      return found._replace(convert=functools.partial(_convert, found, of, fields, kind))
  of = next((of for of in KINDS if _find_format(row, of)), None)
  needed = _list_fields(*ACCEPTED_ROWS[kind])
  if of:
    raise UserError(f"the row has fields {_field_names(row)}: {_WHICH_LOSS[of]}; needed: {needed}")
  raise _unknown_format(row, needed)


def detect_kind(row: Row, fields: dict[str, str] | None = None) -> str:
  """Recognizes the kind of a row: a key of the table of `detect`."""
  row = _apply_field_map(row, _without_empty(fields))
  # The order is important: a row may have the fields of several kinds, and counts as the most
  # particular one.
  for of in ("unpaired", "ranked", "pairs", "text"):
    if _find_format(row, of):
      return of
  raise _unknown_format(row, _list_fields(*KINDS))


def _without_empty(fields: dict[str, str] | None) -> dict[str, str]:
  # A configuration has every name of the map; those that are not set are empty.
  return {ours: theirs for ours, theirs in (fields or {}).items() if theirs}


def _find_format(row: Row, kind: str) -> Format | None:
  return next((one for one in formats.FORMATS[kind] if one.matches(row)), None)


def _unknown_format(row: Row, needed: str) -> UserError:
  return UserError(
    f"the row has fields {_field_names(row)}; needed: {needed}; the field map (data.fields) assigns"
    " prompt, chosen, rejected and the others to fields of other names"
  )


def _list_fields(*kinds: str) -> str:
  known = [" + ".join(one.fields) for kind in kinds for one in formats.FORMATS[kind]]
  return "; ".join(dict.fromkeys(known))


def _field_names(row: Row) -> str:
  return ", ".join(sorted(row)) or "no fields"


def _apply_field_map(row: Row, fields: dict[str, str]) -> Row:
  """Returns the row under our field names; columns joined by + become a list of their values."""
  found, used = {}, set(fields)
  for ours, theirs in fields.items():
    # A column whose own name contains a plus is that column.
    names = [theirs] if theirs in row else theirs.split("+")
    for name in names:
      if name not in row:
        raise UserError(
          f"the field map's {ours}={theirs} is not in the row, which has {_field_names(row)}"
        )
    found[ours] = [row[name] for name in names] if len(names) > 1 else row[names[0]]
    used |= set(names)
  # Fields under either name are left out: an old `prompt` that the map replaces must not be read.
  return {name: value for name, value in row.items() if name not in used} | found


def _convert(
  row_format: Format, of: str, fields: dict[str, str], kind: str, row: Row
) -> Preference:
  """Converts a row of kind `of` to what the table of `detect` says for training of kind `kind`.

  Raises:
    RowError: a completion is empty, or two are equal: nothing can be learned from the row.
  """
  row = _apply_field_map(row, fields)
  preference = row_format.convert(row)
  preference = preference._replace(
    prompt=row_fields.with_tools(preference.prompt, row),
    weight=preference.weight * row_fields.read_weight(row),
  )
  if of == "pairs" and kind == "text":
    preference = preference._replace(completions=preference.completions[:1])
  elif of == "pairs":
    known = preference.scores or row_fields.read_pair_scores(row)
    # As unpaired completions, chosen is desirable and rejected is not, whatever their scores.
    preference = preference._replace(scores=(1.0, 0.0) if kind == "unpaired" else known)
  if not all(_has_text(completion) for completion in preference.completions):
    raise RowError("empty answer")
  if any(one == other for one, other in itertools.combinations(preference.completions, 2)):
    raise RowError("equal answers")
  return preference


def _has_text(completion: Any) -> bool:
  """Returns True unless a completion is empty or white space; a tool call counts as text."""
  if isinstance(completion, str):
    return bool(completion.strip())
  if completion and isinstance(completion[0], dict):
    return any(message.get("tool_calls") or _has_text(message["content"]) for message in completion)
  return bool(completion)


# --- prompts alone -------------------------------------------------------------------------------


def read_prompt(row: Row) -> str | Messages | Conversation:
  """Returns the `prompt` of a row to sample from, with its `tools` if it has any.

  Raises:
    UserError: it is missing, empty, neither text nor messages, or no valid Unicode.
  """
  prompt = row.get("prompt")
  if "prompt" not in row:
    raise UserError(f"field 'prompt' is missing; the row has {_field_names(row)}")
  if not isinstance(prompt, (str, list)):
    raise UserError(
      f"field 'prompt' is {row_fields.shorten(prompt)}; it must be a text or a list of messages"
    )
  if not prompt:
    what = "text" if isinstance(prompt, str) else "list"
    raise UserError(f"field 'prompt' is an empty {what}; fill it, or leave the row out")
  try:
    if isinstance(prompt, str):
      content = row_fields.check_unicode(prompt)
    else:
      content = row_fields.read_messages(prompt, "prompt", role="user")
    found: Any = row_fields.with_tools(content, row)
    return found
  except RowError as error:
    # There is no ledger of prompts to count a dropped row in, so a bad one stops the command.
    raise UserError(f"field 'prompt': {error}") from None
