"""Row formats: the sets of fields that a data row may have, and how each becomes a `Preference`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dpo_jax.data import fields as row_fields
from dpo_jax.data import messages
from dpo_jax.data.canonical import ASSISTANT_TURN, HUMAN_TURN
from dpo_jax.data.fields import BadRow, Messages, Preference, Row, RowError
from dpo_jax.structs import UserError


class Format(NamedTuple):
  """One way of writing a row.

  Attributes:
    name: the name that the ledger reports.
    fields: the fields that such a row must have.
    condition: what else must hold; called only on rows that have all the fields.
    convert: row -> its prompt and completions.
  """

  name: str
  fields: tuple[str, ...]
  condition: Callable[[Row], bool]
  convert: Callable[[Row], Preference]

  def matches(self, row: Row) -> bool:
    """Returns True if a row is written in this format."""
    return all(row.get(field) is not None for field in self.fields) and self.condition(row)


# --- conversion -----------------------------------------------------------------------------------


def _from_ids(row: Row) -> Preference:
  prompt = row_fields.read_ids(row, "prompt_ids")
  if not prompt:
    raise RowError("empty prompt")
  completions = [row_fields.read_ids(row, f"{side}_ids") for side in ("chosen", "rejected")]
  masks = [row.get(f"{side}_mask") for side in ("chosen", "rejected")]
  weights = _read_masks(masks, completions, ("chosen_mask", "rejected_mask"))
  return Preference(prompt, tuple(completions), token_weights=weights)


def _read_masks(
  masks: list[Any], completions: list[list[int]], fields: Sequence[str]
) -> tuple[list[float] | None, ...]:
  """Returns the weights of the tokens of completions; () if no completion has any."""
  found = tuple(map(row_fields.check_mask, masks, completions, fields))
  return found if any(weights is not None for weights in found) else ()


def _from_strings(row: Row) -> Preference:
  return Preference(
    row_fields.read_text(row, "prompt"),
    (row_fields.read_text(row, "chosen"), row_fields.read_text(row, "rejected")),
  )


def _replies(row: Row, *fields: str) -> list[Messages]:
  return [
    messages.read_messages(row_fields.read_field(row, field), field, role="assistant")
    for field in fields
  ]


def _from_messages(row: Row) -> Preference:
  """Converts a prompt and two completions, some of them messages, perhaps repeating the prompt."""
  prompt = messages.read_messages(row_fields.read_field(row, "prompt"), "prompt", role="user")
  return messages.join(prompt, *_replies(row, "chosen", "rejected"))


def _from_shared_messages(row: Row) -> Preference:
  return messages.divide(*_replies(row, "chosen", "rejected"))


def _from_transcripts(row: Row) -> Preference:
  """Converts HH dialogues, where a completion is what follows the last `\\n\\nAssistant:`.

  Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF".
  """
  (prompt, chosen), (other, rejected) = (
    _split_transcript(row_fields.read_text(row, field)) for field in ("chosen", "rejected")
  )
  if prompt != other:
    raise RowError("prompts differ")
  return Preference(prompt, (chosen, rejected))


def _split_transcript(text: str) -> tuple[str, str]:
  before, turn, completion = text.rpartition(ASSISTANT_TURN)
  if not turn:
    raise RowError("no assistant turn")
  if HUMAN_TURN in completion:
    raise RowError("last message is not the assistant's")
  return before + turn, completion


def _from_conversations(row: Row, field: str = "conversations") -> Preference:
  prompt = messages.read_messages(row_fields.read_field(row, field), field, role="user")
  return messages.join(prompt, *_replies(row, "chosen", "rejected"))


def _from_compared(row: Row) -> Preference:
  """Converts an A/B comparison: two completions, and a verdict in [-1, 1].

  The verdict is the mean of those of all annotators (`verdicts.Encoding.read`). Its sign decides
  which completion is chosen; 0 is a tie. Its size becomes the weight of the pair, which is to first
  order as if every annotator's verdict were a pair of its own. It also becomes the margin.
  """
  verdict = row_fields.read_field(row, "preference")
  if not verdict:
    raise RowError("tie")
  better, worse = ("answer_a", "answer_b") if verdict > 0 else ("answer_b", "answer_a")
  pair = {name: value for name, value in row.items() if name not in ("answer_a", "answer_b")}
  pair |= {"chosen": row_fields.read_field(row, better)}
  pair |= {"rejected": row_fields.read_field(row, worse)}
  # With chosen and rejected filled in, the row has one of the other formats of a pair.
  pair_format = next((one for one in PAIRS if one.matches(pair)), None)
  if pair_format is None:
    raise RowError("no prompt")
  return pair_format.convert(pair)._replace(scores=(abs(verdict), 0.0), weight=abs(verdict))


def instruction_prompt(instruction: str, context: str = "") -> str:
  """Returns an instruction and its input as one prompt, under Alpaca's headings.

  Alpaca's opening sentence is left out: it is the same in every row, and costs tokens.
  """
  section = f"### Input:\n{context}\n\n" if context.strip() else ""
  return f"### Instruction:\n{instruction}\n\n{section}### Response:\n"


def _instruction(row: Row) -> str:
  context = row_fields.read_text(row, "input") if row.get("input") is not None else ""
  return instruction_prompt(row_fields.read_text(row, "instruction"), context)


def _question(row: Row) -> Messages:
  """Returns the instruction and its input as a message, without Alpaca's headings."""
  parts = [row_fields.read_text(row, name) for name in ("instruction", "input") if row.get(name)]
  return [{"role": "user", "content": "\n".join(parts)}]


def _from_instruction(row: Row) -> Preference:
  if any(isinstance(row.get(field), (list, dict)) for field in ("chosen", "rejected")):
    return messages.join(_question(row), *_replies(row, "chosen", "rejected"))
  return Preference(
    _instruction(row), (row_fields.read_text(row, "chosen"), row_fields.read_text(row, "rejected"))
  )


def _from_conversation(row: Row, field: str) -> Preference:
  """Converts a conversation: what the assistant writes in it is the completion."""
  conversation = messages.read_messages(row_fields.read_field(row, field), field, role="user")
  return messages.divide_one(conversation)


def _from_completion(row: Row) -> Preference:
  prompt = row_fields.read_field(row, "prompt")
  completion = row_fields.read_field(row, "completion")
  # If one of the two is messages, the other becomes messages too.
  if isinstance(prompt, str) and isinstance(completion, str):
    return Preference(row_fields.check_unicode(prompt), (row_fields.check_unicode(completion),))
  prompt = messages.read_messages(prompt, "prompt", role="user")
  return messages.join(prompt, *_replies(row, "completion"))


def _with_label(base: Format) -> Format:
  """Returns the format that has a `label` besides: is the completion desirable?"""

  def convert(row: Row) -> Preference:
    return base.convert(row)._replace(scores=(row_fields.read_label(row),))

  return Format(f"{base.name} with label", (*base.fields, "label"), _always, convert)


def _from_ranked_ids(row: Row) -> Preference:
  prompt = row_fields.read_ids(row, "prompt_ids")
  if not prompt:
    raise RowError("empty prompt")
  completions = [
    row_fields.check_ids(value, "answers_ids")
    for value in row_fields.read_ranked(row, "answers_ids")
  ]
  masks = row.get("answers_mask")
  if not isinstance(masks, list) or len(masks) != len(completions):
    if masks is not None:
      raise BadRow(
        "answers_mask",
        f"field answers_mask is {row_fields.shorten(masks)}, not a list of {len(completions)}"
        " masks, one per completion",
      )
    masks = [None] * len(completions)
  weights = _read_masks(masks, completions, ["answers_mask"] * len(completions))
  return _order_by_scores(Preference(prompt, tuple(completions), token_weights=weights), row)


def _from_ranked(row: Row) -> Preference:
  """Converts a prompt and a list of completions: all texts, or messages as in a pair."""
  completions = row_fields.read_ranked(row, "answers")
  texts = all(isinstance(value, str) for value in completions)
  if row.get("prompt") is None and row.get("instruction") is not None:
    prompt = _instruction(row) if texts else _question(row)
  else:
    prompt = row_fields.read_field(row, "prompt")
  if texts and isinstance(prompt, str):
    checked = tuple(map(row_fields.check_unicode, completions))
    return _order_by_scores(Preference(row_fields.check_unicode(prompt), checked), row)
  replies = [messages.read_messages(one, "answers", role="assistant") for one in completions]
  prompt = messages.read_messages(prompt, "prompt", role="user")
  return _order_by_scores(messages.join(prompt, *replies), row)


def _order_by_scores(preference: Preference, row: Row) -> Preference:
  """Sorts completions by the row's `scores`, the highest first; without scores nothing changes.

  Raises:
    RowError: all scores are equal, so no completion is preferred.
    BadRow: not one finite number per completion.
  """
  scores = row.get("scores")
  if scores is None:
    return preference
  count = len(preference.completions)
  if not isinstance(scores, list) or len(scores) != count:
    raise BadRow(
      "scores",
      f"field scores is {row_fields.shorten(scores)}, not a list of {count} numbers, one per"
      " completion",
    )
  scores = [row_fields.check_number(score, "scores") for score in scores]
  if len(set(scores)) == 1:
    raise RowError("equal scores")
  # sorted is stable: completions of equal score keep the order of the row.
  order = sorted(range(count), key=lambda k: -scores[k])
  return preference._replace(
    completions=tuple(preference.completions[k] for k in order),
    scores=tuple(scores[k] for k in order),
    token_weights=tuple(preference.token_weights[k] for k in order if preference.token_weights),
  )


# --- conditions -----------------------------------------------------------------------------------


def _no_messages(row: Row) -> bool:
  return all(not isinstance(row[field], (list, dict)) for field in ("prompt", "chosen", "rejected"))


def _transcripts(row: Row) -> bool:
  # Both are text, and at least one of them is a dialogue. Other texts without a prompt are rows
  # whose prompt has another name.
  texts = [row["chosen"], row["rejected"]]
  return all(isinstance(text, str) for text in texts) and any(ASSISTANT_TURN in x for x in texts)


def _conversations(row: Row) -> bool:
  # Lists of the assistant's messages alone are rows whose prompt has another name.
  lists = [row["chosen"], row["rejected"]]
  return all(isinstance(one, list) and not _is_reply(one) for one in lists)


def _is_reply(said: list[Any]) -> bool:
  """Returns True if messages are what an assistant says, with the results of tools."""
  return bool(said) and all(messages.role_of(one) in ("assistant", "tool") for one in said)


def _open_conversation(row: Row) -> bool:
  # One that ends with the assistant is the chosen conversation once more.
  said = row["messages"]
  return not isinstance(said, list) or not _is_reply(said[-1:])


def _always(row: Row) -> bool:
  return True


def _unlabelled(row: Row) -> bool:
  # A label marks good and bad completions. Training on both as if all were good would be a mistake
  # that no number shows.
  return not row_fields.is_label(row.get("label"))


# --- tables ---------------------------------------------------------------------------------------

# Within a table the first format that matches is used, so the order is important:
#   1. Formats with more particular fields stand before those whose fields they contain (ids before
#      strings: a row with both has been tokenized already, and its ids are what counts).
#   2. Formats with a condition stand before those that take any row with the same fields.

# Two completions, one of them better.
PAIRS = (
  Format("ids", ("prompt_ids", "chosen_ids", "rejected_ids"), _always, _from_ids),
  Format("strings", ("prompt", "chosen", "rejected"), _no_messages, _from_strings),
  Format("messages", ("prompt", "chosen", "rejected"), _always, _from_messages),
  Format("conversations", ("conversations", "chosen", "rejected"), _always, _from_conversations),
  Format(
    "conversations",
    ("messages", "chosen", "rejected"),
    _open_conversation,
    lambda row: _from_conversations(row, "messages"),
  ),
  Format("instruction", ("instruction", "chosen", "rejected"), _always, _from_instruction),
  Format("transcripts", ("chosen", "rejected"), _transcripts, _from_transcripts),
  Format("shared messages", ("chosen", "rejected"), _conversations, _from_shared_messages),
  Format("compared", ("prompt", "answer_a", "answer_b", "preference"), _always, _from_compared),
  Format(
    "compared", ("instruction", "answer_a", "answer_b", "preference"), _always, _from_compared
  ),
  Format("compared", ("answer_a", "answer_b", "preference"), _always, _from_compared),
)

# One completion without a label (SFT data).
TEXTS = (
  Format("completion", ("prompt", "completion"), _unlabelled, _from_completion),
  Format("chat", ("messages",), _unlabelled, lambda row: _from_conversation(row, "messages")),
  Format(
    "chat", ("conversations",), _unlabelled, lambda row: _from_conversation(row, "conversations")
  ),
  Format(
    "instruction",
    ("instruction", "output"),
    _unlabelled,
    lambda row: Preference(_instruction(row), (row_fields.read_text(row, "output"),)),
  ),
  Format(
    "text", ("text",), _always, lambda row: Preference("", (row_fields.read_text(row, "text"),))
  ),
)

# One completion and its label. A plain text has no prompt, so nothing says what it completes.
UNPAIRED = tuple(_with_label(one) for one in TEXTS if one.name != "text")

# K completions.
RANKED = (
  Format("ranked ids", ("prompt_ids", "answers_ids"), _always, _from_ranked_ids),
  Format("ranked", ("prompt", "answers"), _always, _from_ranked),
  Format("ranked", ("instruction", "answers"), _always, _from_ranked),
)

# Formats by the kind of rows.
FORMATS = {"pairs": PAIRS, "text": TEXTS, "unpaired": UNPAIRED, "ranked": RANKED}

# Fields that rows of some formats may have besides.
_OPTIONAL = (
  *("input", "system", "history", "tools", "weight", "scores", "margin"),
  *("chosen_mask", "rejected_mask", "answers_mask"),
  *("chosen_score", "rejected_score", "chosen_reward", "rejected_reward"),
)
# Every field name that a field map may assign.
FIELD_NAMES = tuple(
  dict.fromkeys(
    name for table in FORMATS.values() for one in table for name in (*one.fields, *_OPTIONAL)
  )
)


def check_field_names(names: Iterable[str], where: str) -> None:
  """Checks that a field map assigns fields that some row format has.

  Args:
    names: the fields that it assigns.
    where: what an error puts before the name, such as "--fields ".
  """
  for name in names:
    if name not in FIELD_NAMES:
      near = difflib.get_close_matches(name, FIELD_NAMES, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIELD_NAMES)}"
      raise UserError(f"{where}{name}=…: no row format has a field {name!r}; {hint}")
