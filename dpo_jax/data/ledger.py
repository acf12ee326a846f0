"""The ledger of a data set: what became of every row, and how many tokens they give."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data import collate, left_out, packing
from dpo_jax.data.examples import Example, Measured, lengths


@dataclasses.dataclass
class Ledger:
  """Statistics of a data set: how many rows were kept, truncated and dropped, and why.

  Attributes:
    format: names of the row formats.
    rows: rows read.
    pairs: rows kept, of whatever kind.
    dropped: reason -> number of rows.
    truncated: "prompt" and "answer" -> number of kept rows that were truncated there.
    tokens: of the kept rows: "prompt" (once per example), "answer", "scored" (those of "answer"
      that are scored; the others are context), "shared" (copies of prompt tokens that the shared
      layout saves) and "padding" (in rows of the shared layout). The mismatched completions that
      unpaired examples get later are not counted.
    labels: "desirable" and "undesirable" -> number of completions with this label.
    bad: reason -> the error about the first row that was dropped because it is malformed.
    notes: what a user should know about how the rows were read.
    lengths: tokens of a row, prompt and longest completion, before anything is cut -> rows.
    max_length: the limit that they were cut to; None for no limit.
  """

  format: str = ""
  rows: int = 0
  pairs: int = 0
  dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  truncated: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  tokens: dict[str, int] = dataclasses.field(
    default_factory=lambda: {"prompt": 0, "answer": 0, "scored": 0, "padding": 0, "shared": 0}
  )
  labels: dict[str, int] = dataclasses.field(default_factory=dict)
  bad: dict[str, str] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)
  lengths: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  max_length: int | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns the ledger as one JSON object; `labels`, `bad` and `notes` only if there are any.

    Where rows are longer than the limit, `longer` has their number and the lengths of all rows.
    """
    found = dataclasses.asdict(self) | {
      "dropped": dict(self.dropped),
      "truncated": dict(self.truncated),
      "longer": self.longer(self.max_length),
    }
    del found["lengths"], found["max_length"]
    optional = ("labels", "bad", "notes", "longer")
    return {name: value for name, value in found.items() if name not in optional or value}

  def longer(self, limit: int | None) -> dict[str, Any]:
    """Returns how many rows are longer than a limit, and the lengths of all; {} for none."""
    if limit is None:
      return {}
    rows = sum(count for tokens, count in self.lengths.items() if tokens > limit)
    if not rows:
      return {}
    lengths = left_out.percentiles(self.lengths)
    return {"max_length": limit, "rows": rows, "percentiles": lengths}


def merge(ledgers: Sequence[Ledger]) -> Ledger:
  """Returns the sums of some ledgers; `tokens` are those of rows that are packed by themselves."""
  total = Ledger()
  formats, notes = [], []
  for one in ledgers:
    formats += one.format.split(", ")
    notes += one.notes
    total.rows += one.rows
    total.pairs += one.pairs
    total.dropped.update(one.dropped)
    total.truncated.update(one.truncated)
    total.lengths.update(one.lengths)
    total.max_length = one.max_length
    total.bad = one.bad | total.bad  # the first of each reason
    for part, into in ((one.tokens, total.tokens), (one.labels, total.labels)):
      for name, number in part.items():
        into[name] = into.get(name, 0) + number
  # Each name once, in the order of the sources.
  total.format, total.notes = ", ".join(dict.fromkeys(formats)), [*dict.fromkeys(notes)]
  return total


def remarks(ledger: Mapping[str, Any]) -> list[str]:
  """Returns a line for each note, and for each first row that could not be read."""
  dropped = (f"dropped {one}" for one in ledger.get("bad", {}).values())
  return [*ledger.get("notes", ()), *dropped]


def summarize(name: object, ledger: Mapping[str, Any], **how: Any) -> str:
  """Returns a line on the rows kept, dropped and truncated, from `Ledger.to_json`.

  Each note, each first row that could not be read, and each warning has a line of its own.

  Args:
    name: of the rows.
    ledger: of them.
    how: arguments of `left_out.warnings`.
  """
  parts = [f"{ledger['rows']:,} rows ({ledger['format']}), {ledger['pairs']:,} kept"]
  parts += [f"{count:,} dropped: {reason}" for reason, count in ledger["dropped"].items()]
  parts += [f"{count:,} truncated: {what}" for what, count in ledger["truncated"].items()]
  lines = [f"{name}: " + ", ".join(parts), *(f"  {line}" for line in remarks(ledger))]
  return "\n".join(lines + left_out.warnings(ledger, **how))


def count_tokens(examples: Sequence[Example] | Measured) -> dict[str, int]:
  """Returns `Ledger.tokens` of some examples; only their lengths are read."""
  measured = lengths(examples)
  packed, shared = (int(packing.costs(measured, layout).sum()) for layout in ("packed", "shared"))
  return {
    "prompt": int(measured.prompt_B.sum()),
    "answer": int(measured.tokens_BK.sum()),
    "scored": int(measured.scored_BK.sum()),
    "padding": collate.count_padding(examples, batch_size=32),
    "shared": packed - shared,
  }
