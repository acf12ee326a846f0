"""Shows what a model will be trained on: texts, tokens, and which of them are scored.

`scripts/inspect_data.py` prints what is rendered here.
"""

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
from dpo_jax.data.examples import Example, lengths, weights_of
from dpo_jax.data.tokenizer import Tokenizer

# Two shades each, in turns, so that the boundaries of tokens are visible.
GIVEN = ("grey70", "grey54")
GOOD = ("black on green3", "black on dark_sea_green3")
BAD = ("black on salmon1", "black on tan")
MIDDLING = ("black on khaki1", "black on light_goldenrod2")
CUT = "✂"
# Around the context of a completion. Its shades are those of the prompt, which is not scored
# either; the marks also show where there are no colours.
CONTEXT, MARK = ("⟦", "⟧"), "bold cyan"


def show_row(
  number: int, outcome: Encoded | Dropped, tokenizer: Tokenizer, *, kind: str = "pairs"
) -> RenderableType:
  """Renders a row: its examples, or the reason why it was dropped."""
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
  """Renders one example: prompt and completions with the boundaries of tokens, ids and scores.

  Args:
    example: the example.
    tokenizer: that decodes it.
    kind: the kind of training, as in `detection.detect`.
    prompt_tokens: of a longer prompt, only so many of the last tokens are shown.
    lost: number of tokens cut from the start of the prompt and the end of each completion.
  """
  lost_prompt, *lost_ends = lost or [0] * (1 + len(example.completions))
  shown = example.prompt[-prompt_tokens:]
  hidden = len(example.prompt) - len(shown)
  given = f"prompt · {len(example.prompt)} tokens, given" + (
    f" (the last {len(shown)} shown)" if hidden else ""
  )
  given += f", {CUT} {lost_prompt} cut before" if lost_prompt else ""
  # The mark of the cut stands before the first token; if that is not shown, neither is the mark.
  parts = _part(given, shown, tokenizer, GIVEN, cut_before=bool(lost_prompt and not hidden))
  # Not strict: absent completions have no role, and mismatched ones are added only in training.
  weights = weights_of(example)
  completions = zip(_roles(example, kind), example.completions, weights, lost_ends, strict=False)
  for (name, shades), completion, weight, cut in completions:
    ends = tokenizer.eos_id is not None and tokenizer.eos_id in completion
    title = f"{name} · {len(completion)} tokens, {_scored(weight)}, "
    title += "ended" if ends else "no end token"
    title += f", {CUT} {cut} cut after" if cut else ""
    parts += _part(title, completion, tokenizer, shades, cut_after=cut > 0, context=weight == 0)
  title = f"row {example.row}" + (", cut" if any(lost) else "")
  legend = "{} context: given, not scored {}".format(*CONTEXT)
  if all(weight.all() for weight in weights):
    legend = None
  return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, subtitle=legend)


def _scored(weights: np.ndarray) -> str:
  """Returns in words which tokens of a completion are scored, and with which weights."""
  scored = weights[weights > 0]
  context = len(weights) - len(scored)
  words = f"{len(scored)} scored, {context} context" if context else "scored"
  if (scored != 1).any():
    words += f" with weights {scored.min():g} to {scored.max():g}"
  return words


def _roles(example: Example, kind: str) -> list[tuple[str, tuple[str, str]]]:
  """Returns the name and shades of each completion that is present."""
  if kind == "text":
    return [("completion", GOOD)]
  if kind == "unpaired":
    own = ("desirable", GOOD) if example.scores[0] else ("undesirable", BAD)
    return [own, ("mismatched", MIDDLING)]
  count = sum(len(completion) > 0 for completion in example.completions)
  names = [f"completion {k} of {count}" for k in range(1, count + 1)]
  names = names if kind == "ranked" else ["chosen", "rejected"]
  scores = [f" (score {score:g})" for score in example.scores[:count]] or [""] * count
  shades = [GOOD, *[MIDDLING] * (count - 2), BAD]
  return [(name + score, shade) for name, score, shade in zip(names, scores, shades, strict=True)]


def show_ledger(ledger: Ledger, examples: Sequence[Example]) -> Table:
  """Renders the statistics of a data set: rows, tokens, and lengths."""
  table = Table("", "", box=box.SIMPLE, show_header=False, pad_edge=False)
  table.columns[1].justify = "right"
  table.add_column(justify="left", style="dim")

  def add(name: str, value: int, note: str = "") -> None:
    # A reason may contain brackets, which rich would read as markup.
    table.add_row(name, f"{value:,}", escape(note))

  add("rows read", ledger.rows, f"format: {ledger.format}")
  add("kept", ledger.pairs)
  for label, count in ledger.labels.items():
    add(label, count, "completions")
  for reason, count in ledger.dropped.most_common():
    add("dropped", count, reason)
  for what, count in ledger.truncated.most_common():
    add(f"{what}s truncated", count)
  tokens = ledger.tokens
  add("prompt tokens", tokens["prompt"], "given")
  context = tokens["answer"] - tokens["scored"]
  add("completion tokens", tokens["answer"], "" if context else "scored")
  if context:
    add("scored tokens", tokens["scored"], "of completions")
    add("context tokens", context, "of completions; given, not scored")
  if tokens["shared"]:
    add("shared tokens", tokens["shared"], "copies of prompts that shared rows save")
  real = tokens["prompt"] + tokens["answer"]
  share = tokens["padding"] / (real + tokens["padding"])
  add("padding tokens", tokens["padding"], f"{share:.1%} of shared rows")
  measured = lengths(examples)
  tokens_BK = measured.tokens_BK
  if tokens_BK.shape[1] > 2:
    present_B = (tokens_BK > 0).sum(1)
    note = f"per prompt; at least {present_B.min()}, {present_B.mean():.1f} on average"
    add("most completions", tokens_BK.shape[1], note)
  total_B = measured.longest()
  half, most = np.quantile(total_B, [0.5, 0.95], method="higher").tolist()
  note = f"of prompt and longest completion; 95% have at most {most}, half at most {half}"
  add("longest sequence", int(total_B.max()), note)
  return table


def show_lengths(examples: Sequence[Example]) -> Table:
  """Renders histograms of the lengths of prompts and completions, in powers of two."""
  prompt_B, tokens_BK, _ = lengths(examples)
  table = Table("tokens", "prompts", "", "completions", "", box=box.SIMPLE, pad_edge=False)
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
  """Returns k for lengths of more than 2^(k-1) and at most 2^k tokens."""
  return np.ceil(np.log2(tokens)).astype(int)


def show_layouts(examples: Sequence[Example], batch_size: int = 32) -> Table:
  """Renders the tokens that one epoch computes in each layout; dense layers cost in proportion."""
  table = Table("layout", "tokens per epoch", "of padded", "row", box=box.SIMPLE, pad_edge=False)
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
  ids: Sequence[int] | np.ndarray,
  tokenizer: Tokenizer,
  shades: tuple[str, str],
  *,
  cut_before: bool = False,
  cut_after: bool = False,
  context: np.ndarray | None = None,
) -> list[RenderableType]:
  """Renders a title, the text with marks where it was cut and around context, and its ids."""
  text = Text(CUT if cut_before else "", style="bold red")
  at, inside = 0, False
  for i, (piece, held) in enumerate(pieces(ids, tokenizer)):
    given = context is not None and bool(context[at : at + len(held)].all())
    if given != inside:
      text.append(CONTEXT[inside], style=MARK)
    text.append(piece.replace("\n", "⏎\n"), style=(GIVEN if given else shades)[i % 2])
    at, inside = at + len(held), given
  text.append(CONTEXT[1] if inside else "", style=MARK)
  text.append(CUT if cut_after else "", style="bold red")
  numbers = Text(" ".join(str(id) for id in ids), style="dim")
  return [Text(title, style="bold"), text, numbers, Text()]


def pieces(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
  """Splits token ids into pieces of text: (text, ids), mostly one token each.

  Tokens that together make up one character stay together. The texts joined are the whole text,
  special tokens included.
  """
  found: list[tuple[str, list[int]]] = []
  pending: list[int] = []  # tokens of a character that is not complete
  for id in ids:
    pending.append(int(id))
    # Decoded after the piece before it: decoders strip the space before the first word of a text.
    before = found[-1][1] if found else []
    added = tokenizer.decode([*before, *pending], special=True)
    added = added[len(tokenizer.decode(before, special=True)) :]
    # The replacement character stands for a part of a character. UTF-8 takes up to 4 bytes, so
    # after 4 tokens it is really in the text.
    if "\ufffd" in added and len(pending) < 4:
      continue
    found.append((added, pending))
    pending = []
  if pending:
    found.append(("\ufffd", pending))
  return found
