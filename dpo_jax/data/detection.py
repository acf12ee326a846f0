"""Recognizes the format in which the rows of a file are written, and reads rows as preferences.

What one row means may depend on the others: a 0 is a tie, the first or the second completion, a
missing prompt is a null or a transcript. So the first rows of a file are looked at together, and
all verdicts of a column. `formats` lists the formats and says what each means.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dpo_jax.data import canonical, formats, messages, suggestions, verdicts
from dpo_jax.data import fields as row_fields
from dpo_jax.data.fields import BadRow, Conversation, Messages, Preference, Row, RowError
from dpo_jax.data.formats import Format
from dpo_jax.structs import UserError

SAMPLE = 1024  # rows of a file from which its format is recognized
TRAIN_ON = ("assistant", "last")

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
  "text": "single completions without a label are for --loss sft",
  "unpaired": "single completions with a label are for --loss kto",
  "ranked": "lists of ranked completions are for --loss plackett_luce",
}
# And what it needs: fields of the usual format.
_FIELDS = {
  "pairs": ("prompt", "chosen", "rejected"),
  "text": ("prompt", "completion"),
  "unpaired": ("prompt", "completion", "label"),
  "ranked": ("prompt", "answers"),
}
_WHAT = {
  "pairs": "a pair",
  "text": "a text",
  "unpaired": "a labelled completion",
  "ranked": "a row of ranked completions",
}
_NEEDED = {
  kind: f"{_WHAT[kind]} has {', '.join(fields[:-1])} and {fields[-1]} (all formats: docs/data.md)"
  for kind, fields in _FIELDS.items()
}


class Reading(NamedTuple):
  """A way of reading the rows of a file; plain values, so that worker processes can receive it.

  Attributes:
    of, index: the format: its kind of rows, and its number in that table of `formats`.
    kind: the kind of training: see `detect`.
    fields: field map, our names to those of the rows.
    chat: whether text prompts become messages, since rows have a system message or a history.
    repeats: whether completions begin with their prompt, which is taken away.
    scores: whether the scores of pairs are read.
    train_on: "assistant" scores all that the assistant writes, "last" its last message alone.
    encoding: how verdicts are written; None if there are none.
    name: name of the format.
    notes: what a user should know about this reading.
  """

  of: str
  index: int
  kind: str
  fields: dict[str, str]
  chat: bool = False
  repeats: bool = False
  scores: bool = True
  train_on: str = "assistant"
  encoding: verdicts.Encoding | None = None
  name: str = ""
  notes: tuple[str, ...] = ()

  @property
  def format(self) -> Format:
    """The format that most rows have."""
    return formats.FORMATS[self.of][self.index]

  def canonical(self, row: Row) -> Row:
    """Returns a row of the file in the fields that `formats` knows."""
    row = canonical.plain(_apply_field_map(row, self.fields))
    if self.repeats:
      row = canonical.without_prompt(row)
    row = canonical.with_context(row, chat=self.chat)
    if self.encoding is not None and row.get(verdicts.FIELD) is not None:
      verdict = self.encoding.read(row[verdicts.FIELD])
      if verdict is None:
        raise RowError("no verdict")
      row = row | {verdicts.FIELD: verdict}
    return row

  def convert(self, row: Row) -> Preference:
    """Converts a row of the file to what the table of `detect` says.

    Raises:
      RowError: nothing can be learned from the row, such as an empty or equal completions.
      BadRow: a field of the row cannot be read.
    """
    row = self.canonical(row)
    preference = self._format_of(row).convert(row)
    preference = preference._replace(
      prompt=messages.with_tools(preference.prompt, row),
      weight=preference.weight * row_fields.read_weight(row),
    )
    if self.of == "pairs" and self.kind == "text":
      preference = preference._replace(
        completions=preference.completions[:1], token_weights=preference.token_weights[:1]
      )
    elif self.of == "pairs":
      known = preference.scores or (row_fields.read_pair_scores(row) if self.scores else ())
      # As unpaired completions, chosen is desirable and rejected is not, whatever their scores.
      preference = preference._replace(scores=(1.0, 0.0) if self.kind == "unpaired" else known)
    if not all(_has_text(completion) for completion in preference.completions):
      raise RowError("empty completion")
    if any(one == other for one, other in itertools.combinations(preference.completions, 2)):
      raise RowError("equal completions")
    return messages.last_alone(preference) if self.train_on == "last" else preference

  def _format_of(self, row: Row) -> Format:
    """Returns the format of a row: that of most rows, or another one with the same fields."""
    if self.format.matches(row):
      return self.format
    same = (one for one in formats.FORMATS[self.of] if one.fields == self.format.fields)
    # Without any, the conversion by the usual format says what the row lacks.
    return next((one for one in same if one.matches(row)), self.format)


def detect(
  rows: Row | Sequence[Row],
  fields: dict[str, str] | None = None,
  *,
  kind: str = "pairs",
  verdict: str = "",
  train_on: str = "assistant",
  scores: bool | None = None,
  every_row: Callable[[], Iterable[Row]] | None = None,
) -> Reading:
  """Recognizes how the rows of a file are read.

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
    rows: the first rows of the file, or one.
    fields: field map from our field names (prompt, chosen, rejected, …) to those of the rows.
    kind: of the table.
    verdict: encoding of verdicts; "" finds it out from all rows.
    train_on: see `Reading`.
    scores: whether scores of pairs are read; None reads them if all of `rows` have them.
    every_row: gives all rows of the file, for verdicts; by default these are `rows`.

  Returns:
    The reading; its `convert` takes rows as they are in the file.

  Raises:
    UserError: the rows are of another kind or unknown format, or lack a field of the map, or their
      verdicts can be read in two ways.
  """
  rows = [rows] if isinstance(rows, dict) else list(rows)
  fields = _without_empty(fields)
  mapped = [_apply_field_map(row, fields) for row in rows]
  _check_field_map(rows, fields)
  _check_input(mapped, fields)
  plain = _readable(mapped, canonical.plain)
  if {"message_id", "parent_id"} <= set(plain[0]):
    raise UserError(
      "the row is one message of a tree (message_id, parent_id); name the file that has a whole"
      " tree per row"
    )
  repeats = canonical.repeats_prompt(plain)
  chat = any(map(canonical.has_context, plain))
  known = _readable(plain, functools.partial(canonical.with_context, chat=chat))
  of, index, name = _vote(known, kind, plain[0])
  reading = Reading(of, index, kind, fields, chat, repeats, train_on=train_on, name=name)
  if of == "ranked":
    _check_ranked(mapped)
  encoding = None
  if reading.format.name == "compared":
    column = (_apply_field_map(row, fields) for row in (every_row() if every_row else rows))
    encoding = verdicts.find_encoding((row.get(verdicts.FIELD) for row in column), verdict, fields)
  reads_scores, about_scores = _whether_scores(plain, scores) if of == "pairs" else (True, "")
  notes = [
    encoding and f"verdicts are read as {encoding.describe()}",
    repeats and "the completions begin with their prompt, which is taken away",
    not repeats and canonical.note_repeated_prompts(plain),
    *_notes_on_marks(known),
    about_scores,
  ]
  return reading._replace(
    encoding=encoding, scores=reads_scores, notes=tuple(note for note in notes if note)
  )


def detect_kind(rows: Row | Sequence[Row], fields: dict[str, str] | None = None) -> str:
  """Recognizes the kind of the rows of a file: a key of the table of `detect`."""
  rows = [rows] if isinstance(rows, dict) else list(rows)
  fields = _without_empty(fields)
  plain = _readable([_apply_field_map(row, fields) for row in rows], canonical.plain)
  _check_field_map(rows, fields)
  chat = any(map(canonical.has_context, plain))
  known = _readable(plain, functools.partial(canonical.with_context, chat=chat))
  # The order is important: a row may have the fields of several kinds, and counts as the most
  # particular one.
  order = ("unpaired", "ranked", "pairs", "text")
  kinds = [next((of for of in order if _find_format(row, of) is not None), None) for row in known]
  votes = collections.Counter(of for of in kinds if of)
  if not votes:
    raise _unknown_format(plain[0])
  return votes.most_common(1)[0][0]


def _readable(rows: Iterable[Row], change: Callable[[Row], Row]) -> list[Row]:
  """Returns the changed rows, without those that cannot be; raises `UserError` if none can be."""
  found, error = [], None
  for row in rows:
    try:
      found.append(change(row))
    except (RowError, BadRow) as one:
      error = error or one
  if not found:
    raise error if isinstance(error, BadRow) else UserError(f"no row can be read: {error}")
  return found


def _vote(rows: Sequence[Row], kind: str, shown: Row) -> tuple[str, int, str]:
  """Returns the kind, the number and the name of the format that most rows have.

  `shown` is a row with all its fields, for the error that no row has a known format.
  """
  votes: collections.Counter[tuple[str, int]] = collections.Counter()
  for row in rows:
    found = ((of, _find_format(row, of)) for of in ACCEPTED_ROWS[kind])
    votes.update([(of, index) for of, index in found if index is not None][:1])
  if not votes:
    of = next((of for of in KINDS if _find_format(rows[0], of) is not None), None)
    if of is None:
      raise _unknown_format(shown, kind)
    raise UserError(f"the row has fields {_field_names(shown)}: {_WHICH_LOSS[of]}; {_NEEDED[kind]}")
  of, index = votes.most_common(1)[0][0]
  main = formats.FORMATS[of][index]
  names = [main.name]
  for other, number in votes:
    one = formats.FORMATS[other][number]
    if other == of and one.fields == main.fields and one.name not in names:
      names.append(one.name)
  return of, index, ", ".join(names)


def _whether_scores(rows: Sequence[Row], requested: bool | None) -> tuple[bool, str]:
  """Returns whether the scores of pairs are read, and a note if they cannot be."""
  if requested is not None:
    return requested, ""
  try:
    found = {bool(row_fields.read_pair_scores(row)) for row in rows}
  except BadRow as error:
    return False, f"scores are not read: {error}"
  both = found == {True, False}
  return not both, "scores are not read: some rows have none" if both else ""


def _notes_on_marks(rows: Sequence[Row]) -> list[str]:
  """Returns notes on rows that a chat template has rendered already."""
  texts, contents = canonical.rendered_marks(rows)
  notes = []
  if texts:
    notes.append(
      f"the texts contain {' '.join(texts)}, so a chat template wrote them already; they are used"
      " as they are"
    )
  if contents:
    notes.append(
      f"the messages contain {' '.join(contents)}, which chat templates write; a rendered text"
      " inside a message is rendered twice"
    )
  return notes


def _without_empty(fields: dict[str, str] | None) -> dict[str, str]:
  # A configuration has every name of the map; those that are not set are empty.
  return {ours: theirs for ours, theirs in (fields or {}).items() if theirs}


def _find_format(row: Row, kind: str) -> int | None:
  """Returns the number of the first format in the table of a kind that the row has."""
  return next((i for i, one in enumerate(formats.FORMATS[kind]) if one.matches(row)), None)


def _unknown_format(row: Row, kind: str = "") -> UserError:
  """Returns the error about a row of no known format, with the field map that would fit.

  Args:
    row: the first row that can be read.
    kind: of the training; "" if any would do.
  """
  kinds = ACCEPTED_ROWS[kind] if kind else KINDS
  has = f"the row has fields {_field_names(row)}"
  if hint := suggestions.suggest(row, kinds):
    return UserError(f"{has}; {hint}")
  for other in KINDS:
    if other not in kinds and (hint := suggestions.suggest(row, [other])):
      return UserError(f"{has}: {_WHICH_LOSS[other]}; {hint}")
  kind = kind or "pairs"
  lacking = suggestions.missing(row, _FIELDS[kind])
  if 0 < len(lacking) < len(_FIELDS[kind]):
    verb = "is" if len(lacking) == 1 else "are"
    return UserError(f"{has}; {' and '.join(lacking)} {verb} missing: {_NEEDED[kind]}")
  flags = " ".join(f"--config.data.fields.{name}=NAME" for name in _FIELDS[kind])
  return UserError(f"{has}; {_NEEDED[kind]}. If the row has them by other names: {flags}")


def _field_names(row: Row) -> str:
  return ", ".join(sorted(row)) or "no fields"


def _check_field_map(rows: Sequence[Row], fields: dict[str, str]) -> None:
  """Checks that some row has each of the fields that a map names."""
  names = {name for row in rows for name in row}
  for ours, theirs in fields.items():
    if theirs not in names and not set(theirs.split("+")) <= names:
      raise UserError(
        f"the field map's {ours}={theirs} is not in the row, which has {_field_names(rows[0])}"
      )


def _check_input(rows: Sequence[Row], fields: dict[str, str]) -> None:
  """Checks that a map of the prompt to `instruction` does not leave out the `input` beside it."""
  beside = any(isinstance(row.get("input"), str) and row["input"].strip() for row in rows)
  if fields.get("prompt") == "instruction" and beside:
    raise UserError(
      "the field map's prompt=instruction leaves out the field input beside it; leave"
      " prompt=instruction out of the map: both are then read"
    )


def _check_ranked(rows: Sequence[Row]) -> None:
  """Checks that completions without scores are not best first by an oversight."""
  names = ("ratings", "rewards", "reward_scores", "rating", "score", "labels", "ranks", "rank")
  for row in rows:
    answers = canonical.parse_list(row.get("answers"))
    if not isinstance(answers, list) or row.get("scores") is not None:
      continue
    for name in names:
      values = canonical.parse_list(row.get(name))
      if isinstance(values, list) and len(values) == len(answers) > 1:
        raise UserError(
          f"the row has no scores, and {name} has a value for each of its answers; if higher is"
          f" better: --config.data.fields.scores={name} (in other commands: --fields"
          f" scores={name}). If answers are best first, leave out {name}"
        )


def _apply_field_map(row: Row, fields: dict[str, str]) -> Row:
  """Returns the row under our field names; columns joined by + become a list of their values.

  A field that the row lacks is null, as in a table.
  """
  found, used = {}, set(fields)
  for ours, theirs in fields.items():
    # A column whose own name contains a plus is that column.
    names = [theirs] if theirs in row else theirs.split("+")
    used |= set(names)
    values = [row.get(name) for name in names]
    found[ours] = values if len(names) > 1 else values[0]
  # Fields under either name are left out: an old `prompt` that the map replaces must not be read.
  return {name: value for name, value in row.items() if name not in used} | found


def _has_text(completion: Any) -> bool:
  """Returns True unless a completion is empty or white space; a tool call counts as text."""
  if isinstance(completion, str):
    return bool(completion.strip())
  if completion and isinstance(completion[0], dict):
    written = filter(messages.is_assistant, completion)
    return any(message.get("tool_calls") or _has_text(message["content"]) for message in written)
  return bool(completion)


# --- prompts alone -------------------------------------------------------------------------------


def read_prompt(row: Row, *, chat: bool = False) -> str | Messages | Conversation:
  """Returns the `prompt` of a row to sample from, with its `system`, `history` and `tools`.

  Args:
    row: a row of the file.
    chat: whether some rows of the file have a system message or a history; then the prompts of
      all are messages.

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
    row = canonical.plain(row)
    row = canonical.with_context(row, chat=chat or canonical.has_context(row))
    if isinstance(row["prompt"], str):
      content = row_fields.check_unicode(row["prompt"])
    else:
      content = messages.read_messages(row["prompt"], "prompt", role="user")
    found: Any = messages.with_tools(content, row)
    return found
  except RowError as error:
    # There is no ledger of prompts to count a dropped row in, so a bad one stops the command.
    raise UserError(f"field 'prompt': {error}") from None
