"""What a model will be trained on, for a person to read: texts, tokens, and which are scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dpo_jax.data import packing
from dpo_jax.data.collate import count_taken, fit_row_length
from dpo_jax.data.encode import Dropped, Encoded, Ledger
from dpo_jax.data.examples import Example, lengths
from dpo_jax.data.tokenizer import Tokenizer

# Two shades of each, so that neighbouring tokens are told apart.
GIVEN = ("grey70", "grey54")
GOOD = ("black on green3", "black on dark_sea_green3")
BAD = ("black on salmon1", "black on tan")
MIDDLING = ("black on khaki1", "black on light_goldenrod2")
CUT = "✂"


def show_row(
  number: int, outcome: Encoded | Dropped, tokenizer: Tokenizer, *, kind: str = "pairs"
) -> RenderableType:
  """What becomes of a row: its examples, or why there is none."""
  if isinstance(outcome, Dropped):
    title = Text.assemble((f"row {number}: dropped", "bold red"), f", {outcome.reason}")
    return Group(title, Text())
  examples = outcome.examples(number, kind)
  return Group(*(show_example(one, tokenizer, kind=kind, lost=outcome.lost) for one in examples))


def show_example(
  example: Example,
  tokenizer: Tokenizer,
  *,
  kind: str = "pairs",
  prompt_tokens: int = 96,
  lost: Sequence[int] = (),
) -> Panel:
  """One row: prompt and answers, every token in its own shade, with their ids and scores.

  Args:
    example: the row.
    tokenizer: to read it with.
    kind: of what is learned from it, as in `readers.detect`.
    prompt_tokens: how many of a long prompt's last tokens are shown.
    lost: tokens that were cut from the prompt's start and from every answer's end.
  """
  gone, *ends_gone = lost or [0] * (1 + len(example.completions))
  shown = example.prompt[-prompt_tokens:]
  hidden = len(example.prompt) - len(shown)
  given = f"prompt · {len(example.prompt)} tokens, given" + (
    f" (the last {len(shown)} shown)" if hidden else ""
  )
  given += f", {CUT} {gone} cut before" if gone else ""
  parts = _part(given, shown, tokenizer, GIVEN, before=bool(gone and not hidden))
  completions = zip(_roles(example, kind), example.completions, ends_gone, strict=False)
  for (name, shades), answer, gone in completions:
    ends = tokenizer.eos_id is not None and tokenizer.eos_id in answer
    title = f"{name} · {len(answer)} tokens, scored, {'ended' if ends else 'no end token'}"
    title += f", {CUT} {gone} cut behind" if gone else ""
    parts += _part(title, answer, tokenizer, shades, behind=gone > 0)
  title = f"row {example.row}" + (", cut" if any(lost) else "")
  return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED)


def _roles(example: Example, kind: str) -> list[tuple[str, tuple[str, str]]]:
  """Name and shades of each answer there is."""
  if kind == "text":
    return [("answer", GOOD)]
  if kind == "unpaired":
    judged = ("desirable", GOOD) if example.scores[0] else ("undesirable", BAD)
    return [judged, ("mismatched", MIDDLING)]
  count = sum(len(answer) > 0 for answer in example.completions)
  names = [f"answer {k} of {count}" for k in range(1, count + 1)]
  names = names if kind == "ranked" else ["chosen", "rejected"]
  scores = [f" (score {score:g})" for score in example.scores[:count]] or [""] * count
  shades = [GOOD, *[MIDDLING] * (count - 2), BAD]
  return [(name + score, shade) for name, score, shade in zip(names, scores, shades, strict=True)]


def show_ledger(ledger: Ledger, examples: Sequence[Example]) -> Table:
  """What became of the rows, where the tokens are, and how long the texts are."""
  table = Table("", "", box=box.SIMPLE, show_header=False, pad_edge=False)
  table.columns[1].justify = "right"
  add = lambda name, value, note="": table.add_row(name, f"{value:,}", escape(note))
  table.add_column(justify="left", style="dim")
  add("rows read", ledger.rows, f"form: {ledger.format}")
  add("kept", ledger.pairs)
  for label, count in ledger.labels.items():
    add(label, count, "answers")
  for reason, count in ledger.dropped.most_common():
    add("dropped", count, reason)
  for what, count in ledger.truncated.most_common():
    add(f"{what}s cut", count)
  tokens = ledger.tokens
  add("prompt tokens", tokens["prompt"], "given")
  add("answer tokens", tokens["answer"], "scored")
  if tokens["shared"]:
    add("shared tokens", tokens["shared"], "copies of prompts that shared rows save")
  real = tokens["prompt"] + tokens["answer"]
  share = tokens["padding"] / (real + tokens["padding"])
  add("padding tokens", tokens["padding"], f"{share:.1%} of shared rows")
  prompt_B, tokens_BK = lengths(examples)
  if tokens_BK.shape[1] > 2:
    present_B = (tokens_BK > 0).sum(1)
    note = f"of a prompt; at least {present_B.min()}, {present_B.mean():.1f} on average"
    add("most answers", tokens_BK.shape[1], note)
  total_B = prompt_B + tokens_BK.max(1)
  half, most = np.quantile(total_B, [0.5, 0.95], method="higher").tolist()
  note = f"of prompt and longest answer; 95% have at most {most}, half at most {half}"
  add("longest text", int(total_B.max()), note)
  return table


def show_lengths(examples: Sequence[Example]) -> Table:
  """Histograms: how many prompts and answers have so many tokens."""
  prompt_B, tokens_BK = lengths(examples)
  table = Table("tokens", "prompts", "", "answers", "", box=box.SIMPLE, pad_edge=False)
  for column in (0, 1, 3):
    table.columns[column].justify = "right"
  counts = [np.bincount(_octave(some)) for some in (prompt_B, tokens_BK[tokens_BK > 0])]
  first = min(int(np.flatnonzero(count)[0]) for count in counts)
  for octave in range(first, max(map(len, counts))):
    cells = []
    for count in counts:
      number = int(count[octave]) if octave < len(count) else 0
      cells += [f"{number:,}", "█" * round(18 * number / count.max())]
    low, high = 2**octave // 2 + 1, 2**octave
    table.add_row(str(high) if high <= 2 else f"{low}-{high}", *cells)
  return table


def _octave(tokens: np.ndarray) -> np.ndarray:
  """k for more than 2^(k-1) tokens and 2^k at most."""
  return np.ceil(np.log2(tokens)).astype(int)


def show_layouts(examples: Sequence[Example], batch_size: int = 32) -> Table:
  """Tokens computed in one pass, by layout: what dense layers cost goes by them."""
  table = Table("layout", "tokens a pass", "of padded", "row", box=box.SIMPLE, pad_edge=False)
  for column in table.columns[1:]:
    column.justify = "right"
  taken = {}
  for name in reversed(packing.LAYOUTS):
    taken[name] = count_taken(examples, batch_size=batch_size, layout=name)
    share = f"{taken[name] / taken['padded']:.1%}"
    table.add_row(name, f"{taken[name]:,}", share, f"{fit_row_length(examples, name):,}")
  return table


def _part(
  title: str,
  ids: Sequence[int],
  tokenizer: Tokenizer,
  shades: tuple[str, str],
  *,
  before: bool = False,
  behind: bool = False,
) -> list[RenderableType]:
  """A text under its title, with marks where it was cut."""
  text = Text(CUT if before else "", style="bold red")
  for i, (piece, _) in enumerate(pieces(ids, tokenizer)):
    text.append(piece.replace("\n", "⏎\n"), style=shades[i % 2])
  text.append(CUT if behind else "", style="bold red")
  numbers = Text(" ".join(str(id) for id in ids), style="dim")
  return [Text(title, style="bold"), text, numbers, Text()]


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
  """The text that each token adds; tokens that make up one character stay together.

  Joined, the texts are the whole text, special tokens included.
  """
  found: list[tuple[str, list[int]]] = []
  held: list[int] = []
  for id in ids:
    held.append(int(id))
    # Behind its predecessor: decoders strip the space before a text's first word.
    before = found[-1][1] if found else []
    added = tokenizer.decode([*before, *held], special=True)
    added = added[len(tokenizer.decode(before, special=True)) :]
    if "\ufffd" in added and len(held) < 4:  # an unfinished character: UTF-8 takes up to 4 bytes
      continue
    found.append((added, held))
    held = []
  if held:
    found.append(("\ufffd", held))
  return found
