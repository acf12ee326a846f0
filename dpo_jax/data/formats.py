"""Forms of rows, and what a row of each form means."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.data import fields as row_fields
from dpo_jax.data.fields import Messages, Preference, Row, RowError
from dpo_jax.structs import UserError


class Form(NamedTuple):
  """One kind of row.

  Attributes:
    name: as the ledger has it.
    fields: what such a row has.
    fits: whether this is one, given that the fields are there.
    convert: the row's prompt and answers.
  """

  name: str
  fields: tuple[str, ...]
  fits: Callable[[Row], bool]
  convert: Callable[[Row], Preference]

  def serves(self, row: Row) -> bool:
    """Whether a row is of this form."""
    return all(field in row for field in self.fields) and self.fits(row)


# --- forms ----------------------------------------------------------------------------------------

TURN = "\n\nAssistant:"  # what an answer follows in a transcript


def _from_ids(row: Row) -> Preference:
  prompt = row_fields.ids_of(row, "prompt_ids")
  if not prompt:
    raise RowError("empty prompt")
  return Preference(
    prompt, (row_fields.ids_of(row, "chosen_ids"), row_fields.ids_of(row, "rejected_ids"))
  )


def _from_strings(row: Row) -> Preference:
  return Preference(
    row_fields.text(row, "prompt"),
    (row_fields.text(row, "chosen"), row_fields.text(row, "rejected")),
  )


def _from_messages(row: Row) -> Preference:
  """A prompt and answers of which at least one is messages; answers may repeat the prompt."""
  prompt = row_fields.messages(row_fields.field_of(row, "prompt"), "prompt", role="user")
  return _after(
    prompt,
    *(
      row_fields.messages(row_fields.field_of(row, field), field, role="assistant")
      for field in ("chosen", "rejected")
    ),
  )


def _after(prompt: Messages, *completions: Messages) -> Preference:
  """Answers of one message each to a prompt, or whole conversations, which bring their own."""
  if all(len(answer) > 1 for answer in completions):
    return _after_shared(*completions)
  if any(len(answer) != 1 for answer in completions):
    raise RowError("answer of several messages")
  return Preference(prompt, tuple(map(_reply, completions)))


def _from_shared_messages(row: Row) -> Preference:
  return _after_shared(
    *(
      row_fields.messages(row_fields.field_of(row, field), field, role="assistant")
      for field in ("chosen", "rejected")
    )
  )


def _after_shared(*conversations: Messages) -> Preference:
  """Conversations that are the same up to their last message."""
  prompt = conversations[0][:-1]
  if any(conversation[:-1] != prompt for conversation in conversations):
    raise RowError("prompts differ")
  if not prompt:
    raise RowError("empty prompt")
  return Preference(prompt, tuple(map(_reply, conversations)))


def _reply(conversation: Messages) -> Messages:
  """The last message, which must be the assistant's."""
  if not conversation or conversation[-1]["role"] != "assistant":
    raise RowError("last message is not the assistant's")
  return conversation[-1:]


def _from_transcripts(row: Row) -> Preference:
  """Helpful and harmless dialogues: an answer is what follows the last `\\n\\nAssistant:`."""
  (prompt, chosen), (other, rejected) = (
    _split_transcript(row_fields.text(row, field)) for field in ("chosen", "rejected")
  )
  if prompt != other:
    raise RowError("prompts differ")
  return Preference(prompt, (chosen, rejected))


def _split_transcript(text: str) -> tuple[str, str]:
  before, turn, answer = text.rpartition(TURN)
  if not turn:
    raise RowError("no assistant turn")
  return before + turn, answer


def _from_conversations(row: Row) -> Preference:
  prompt = row_fields.messages(
    row_fields.field_of(row, "conversations"), "conversations", role="user"
  )
  completions = (
    _reply(row_fields.messages(row_fields.field_of(row, field), field, role="assistant"))
    for field in ("chosen", "rejected")
  )
  return Preference(prompt, tuple(completions))


def _from_compared(row: Row) -> Preference:
  """Two answers and what one or several judges say of them: the better is chosen.

  Verdicts are 1 or -1, half of it where they say slightly, or 0; their mean decides, and where that
  is 0 the row is a tie. |mean| is the weight of the pair, to first order what every verdict would
  teach as a pair of its own, and its margin.
  """
  said = row_fields.field_of(row, "preference")
  judges = said if isinstance(said, list) else [said]
  verdicts = [row_fields.verdict_of(one) for one in judges if one is not None]
  if not verdicts:
    raise RowError("no verdict")
  mean = sum(verdicts) / len(verdicts)
  if not mean:
    raise RowError("tie")
  better, worse = ("answer_a", "answer_b") if mean > 0 else ("answer_b", "answer_a")
  pair = row | {"chosen": row.get(better), "rejected": row.get(worse)}
  form = next(form for form in PAIRS if form.serves(pair))
  return form.convert(pair)._replace(scores=(abs(mean), 0.0), weight=abs(mean))


def instruction_prompt(instruction: str, context: str = "") -> str:
  """An instruction and what it is about, under Alpaca's headings.

  Alpaca's opening sentence is left out: it says the same for every row, and costs tokens.
  """
  about = f"### Input:\n{context}\n\n" if context.strip() else ""
  return f"### Instruction:\n{instruction}\n\n{about}### Response:\n"


def _instruction(row: Row) -> str:
  context = row_fields.text(row, "input") if row.get("input") is not None else ""
  return instruction_prompt(row_fields.text(row, "instruction"), context)


def _from_instruction(row: Row) -> Preference:
  return Preference(
    _instruction(row), (row_fields.text(row, "chosen"), row_fields.text(row, "rejected"))
  )


def _from_conversation(row: Row, field: str) -> Preference:
  conversation = row_fields.messages(row_fields.field_of(row, field), field, role="user")
  return Preference(conversation[:-1], (_reply(conversation),))


def _from_completion(row: Row) -> Preference:
  prompt, completion = row_fields.field_of(row, "prompt"), row_fields.field_of(row, "completion")
  if isinstance(prompt, str) and isinstance(completion, str):
    return Preference(row_fields.valid(prompt), (row_fields.valid(completion),))
  answer = _reply(row_fields.messages(completion, "completion", role="assistant"))
  return Preference(row_fields.messages(prompt, "prompt", role="user"), (answer,))


def _judged(form: Form) -> Form:
  """The same form with a label that says whether the answer is desirable."""

  def convert(row: Row) -> Preference:
    return form.convert(row)._replace(scores=(row_fields.label_of(row),))

  return Form(f"{form.name} with label", (*form.fields, "label"), _always, convert)


def _from_ranked_ids(row: Row) -> Preference:
  prompt = row_fields.ids_of(row, "prompt_ids")
  if not prompt:
    raise RowError("empty prompt")
  completions = [
    row_fields.check_ids(value, "answers_ids")
    for value in row_fields.answers_of(row, "answers_ids")
  ]
  return _by_scores(Preference(prompt, tuple(completions)), row)


def _from_ranked(row: Row) -> Preference:
  """A prompt and a list of answers: all texts, or messages as those of a pair."""
  prompt, completions = row_fields.field_of(row, "prompt"), row_fields.answers_of(row, "answers")
  if all(isinstance(value, str) for value in (prompt, *completions)):
    return _by_scores(
      Preference(row_fields.valid(prompt), tuple(map(row_fields.valid, completions))), row
    )
  completions = [row_fields.messages(value, "answers", role="assistant") for value in completions]
  return _by_scores(_after(row_fields.messages(prompt, "prompt", role="user"), *completions), row)


def _by_scores(preference: Preference, row: Row) -> Preference:
  """Answers in the order of their `scores`, the highest first, where the row has them.

  Answers of equal score stay in the order of the row; where all are equal nothing is preferred.
  """
  scores = row.get("scores")
  if scores is None:
    return preference
  count = len(preference.completions)
  if not isinstance(scores, list) or len(scores) != count:
    raise UserError(
      f"field scores is {row_fields.show(scores)}, not a list of {count} numbers, one an answer"
    )
  scores = [row_fields.number(score, "scores") for score in scores]
  if len(set(scores)) == 1:
    raise RowError("equal scores")
  order = sorted(range(count), key=lambda k: -scores[k])
  return preference._replace(
    completions=tuple(preference.completions[k] for k in order),
    scores=tuple(scores[k] for k in order),
  )


def _all_text(row: Row) -> bool:
  return all(not isinstance(row[field], (list, dict)) for field in ("prompt", "chosen", "rejected"))


def _both(kind: type | tuple[type, ...]) -> Callable[[Row], bool]:
  return lambda row: all(isinstance(row[field], kind) for field in ("chosen", "rejected"))


def _always(row: Row) -> bool:
  return True


def _unlabelled(row: Row) -> bool:
  # A label marks good and bad answers; learning from both alike would be a silent mistake.
  return not row_fields.is_label(row.get("label"))


# Forms of two answers, one of which is better.
PAIRS = (
  Form("ids", ("prompt_ids", "chosen_ids", "rejected_ids"), _always, _from_ids),
  Form("strings", ("prompt", "chosen", "rejected"), _all_text, _from_strings),
  Form("messages", ("prompt", "chosen", "rejected"), _always, _from_messages),
  Form("conversations", ("conversations", "chosen", "rejected"), _always, _from_conversations),
  Form("instruction", ("instruction", "chosen", "rejected"), _always, _from_instruction),
  Form("transcripts", ("chosen", "rejected"), _both(str), _from_transcripts),
  Form("shared messages", ("chosen", "rejected"), _both(list), _from_shared_messages),
  Form("compared", ("prompt", "answer_a", "answer_b", "preference"), _always, _from_compared),
  Form("compared", ("instruction", "answer_a", "answer_b", "preference"), _always, _from_compared),
)

# Forms of texts to learn from. Of a conversation the last message is the answer.
TEXTS = (
  Form("completion", ("prompt", "completion"), _unlabelled, _from_completion),
  Form("chat", ("messages",), _unlabelled, lambda row: _from_conversation(row, "messages")),
  Form(
    "chat", ("conversations",), _unlabelled, lambda row: _from_conversation(row, "conversations")
  ),
  Form(
    "instruction",
    ("instruction", "output"),
    _unlabelled,
    lambda row: Preference(_instruction(row), (row_fields.text(row, "output"),)),
  ),
  Form("text", ("text",), _always, lambda row: Preference("", (row_fields.text(row, "text"),))),
)

# Forms of one answer and its label.
UNPAIRED = tuple(_judged(form) for form in TEXTS if form.name != "text")

# Forms of K answers.
RANKED = (
  Form("ranked ids", ("prompt_ids", "answers_ids"), _always, _from_ranked_ids),
  Form("ranked", ("prompt", "answers"), _always, _from_ranked),
)

# By kind of rows; within a kind the first that fits, so more particular ones stand first.
FORMS = {"pairs": PAIRS, "text": TEXTS, "unpaired": UNPAIRED, "ranked": RANKED}

# Fields that rows of some form may have besides.
_OPTIONAL = (
  *("input", "tools", "weight", "scores", "margin"),
  *("chosen_score", "rejected_score", "chosen_reward", "rejected_reward"),
)
# All names that rows may be given by a field map.
KNOWN = tuple(
  dict.fromkeys(
    name for forms in FORMS.values() for form in forms for name in (*form.fields, *_OPTIONAL)
  )
)
