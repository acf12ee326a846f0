"""Warnings about rows that are left out or cut in large part, each with the way out.

They are computed from a ledger as JSON, so those of a prepared set are the same as when it was
made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LARGE = 0.1  # share of the rows from which on a warning is due
KEPT = 95  # percent of the rows that a suggested max_length keeps
PERCENTS = (*range(5, 96, 5), 99, 100)
# Reasons that a larger max_length helps against.
BY_LENGTH = ("too long", "equal completions after cutting", "no scored token after cutting")
# Rows that a configuration leaves out on purpose.
WANTED = ("duplicate", "not drawn")
# What to do, by the beginning of a reason.
WAYS = {
  "equal completions": "check the columns of both completions (data.fields.chosen and .rejected)",
  "empty completion": "check the column of the completions (data.fields)",
  "empty prompt": "check the column of the prompt (data.fields.prompt)",
  "no prompt token": "check the column of the prompt (data.fields.prompt)",
  "equal scores": "pairs without a better completion teach no preference; give rows with one",
  "tie": "ties teach no preference; give rows with a better completion",
  "no verdict": "rows without a verdict teach no preference; give rows with one",
  "prompts differ": "both conversations must begin with the same prompt",
  "the prompt and the conversation": "check the column of the prompt (data.fields.prompt)",
  "last message is not": "conversations must end with a message of the assistant",
  "no scored": "nothing in them is learned from; check their masks, weights, or data.train_on",
  "fewer than two completions": "a ranking needs two completions; single ones serve --loss=sft",
  "chat template": "change the values of the template (data.template) or the tokenizer's template",
}


def percentiles(tokens: Counter[int]) -> dict[str, int]:
  """Returns the least lengths that so many percent of the rows have at most.

  Args:
    tokens: length -> number of rows.
  """
  lengths = np.array(sorted(tokens))
  below = np.cumsum([tokens[int(length)] for length in lengths])
  at = np.searchsorted(below, np.array(PERCENTS) / 100 * below[-1] - 1e-9)
  return {str(percent): int(lengths[i]) for percent, i in zip(PERCENTS, at, strict=True)}


def way_out(reason: str) -> str | None:
  """Returns what to do about rows that are left out for a reason; None if nothing is known."""
  return next((way for start, way in WAYS.items() if reason.startswith(start)), None)


def warnings(
  ledger: Mapping[str, Any], *, positions: int | None = None, prepared: bool = False
) -> list[str]:
  """Returns `warning: …` for each reason for which many rows are left out or cut.

  Args:
    ledger: as `Ledger.to_json` returns it.
    positions: of the model; a suggested length is not above. None if they are not known.
    prepared: whether the rows are those of a prepared set, which would have to be made again.
  """
  rows = ledger["rows"]
  found = _by_length(ledger, positions, prepared=prepared)
  for reason, count in ledger["dropped"].items():
    if count < LARGE * rows or reason in (*BY_LENGTH, *WANTED):
      continue
    bad = ledger.get("bad", {}).get(reason)
    way = f"mend rows such as {bad}" if bad else way_out(reason)
    way = way or "dpo-jax inspect --data=FILE --model=DIR --rows=20 shows some"
    found.append(f"{percent(count, rows)} of the rows are left out ({reason}): {way}")
  return [f"warning: {line}" for line in found]


def _by_length(ledger: Mapping[str, Any], positions: int | None, *, prepared: bool) -> list[str]:
  """Returns the line about rows that are longer than max_length, if they are many."""
  rows, longer = ledger["rows"], ledger.get("longer")
  dropped = sum(ledger["dropped"].get(reason, 0) for reason in BY_LENGTH)
  if longer is None:  # of a set that was prepared before lengths were counted
    if dropped < LARGE * rows:
      return []
    return [f"{percent(dropped, rows)} of the rows are too long and left out; raise max_length"]
  if longer["rows"] < LARGE * rows:
    return []
  cut = longer["rows"] - dropped
  what = "left out" if not cut else "cut"
  if cut and dropped:
    what = f"left out ({percent(dropped, rows)}) or cut ({percent(cut, rows)})"
  line = (
    f"{percent(longer['rows'], rows)} of the rows are longer than"
    f" data.max_length={longer['max_length']} and are {what}"
  )
  again = "prepare them again with " if prepared else ""
  cure = _cure(longer, positions, again)
  return [f"{line}; {cure}{' whole' * (cut > 0 and cure.endswith('%'))}"]


def of_default(longer: Mapping[str, Any], rows: int, positions: int | None) -> list[str]:
  """Returns `warning: …` for rows that are all kept now, and that training's default would lose.

  Args:
    longer: `Ledger.longer` of that default; {} where no row is longer.
    rows: number of all rows.
    positions: as in `warnings`.
  """
  if not longer or longer["rows"] < LARGE * rows:
    return []
  return [
    f"warning: {percent(longer['rows'], rows)} of the rows are longer than the default of training,"
    f" data.max_length={longer['max_length']}, and would be left out or cut;"
    f" {_cure(longer, positions)}"
  ]


def _cure(longer: Mapping[str, Any], positions: int | None, again: str = "") -> str:
  """Returns the length that keeps most rows, as a phrase, within the positions of the model."""
  need = longer["percentiles"][str(KEPT)]
  if positions is None or need <= positions:
    return f"{again}--max_length={need} keeps {KEPT}%"
  fitting = [int(p) for p, most in longer["percentiles"].items() if most <= positions]
  if positions <= longer["max_length"] or not fitting:
    return f"the model has {positions:,} positions, so longer rows cannot be kept"
  return f"{again}--max_length={positions}, all positions of the model, keeps {max(fitting)}%"


def beyond_positions(
  tokens_B: Sequence[int] | np.ndarray, positions: int, purpose: str
) -> str | None:
  """Returns the line about rows with more tokens than a model has positions; None without any.

  Args:
    tokens_B: lengths of the rows.
    positions: of the model.
    purpose: what is done with the rows, "to train on".
  """
  count = int(np.sum(np.asarray(tokens_B) > positions))
  if not count:
    return None
  return (
    f"{percent(count, len(tokens_B))} of the rows {purpose} ({count:,} of {len(tokens_B):,}) are"
    f" longer than the model's {positions:,} positions"
    f" (max_position_embeddings), beyond which it was not trained; --max_length={positions} cuts"
    " or leaves them out"
  )


def percent(part: int, whole: int) -> str:
  """Formats a share; 0% and 100% stand only for none and all."""
  if 0 < part < whole:
    share = min(99, max(1, round(100 * part / whole)))
    return f"{share}%"
  return f"{part / whole:.0%}"
