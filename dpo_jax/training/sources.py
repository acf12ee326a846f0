"""Sources of examples: reads each by itself, and compares what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_jax import losses
from dpo_jax.data import digest, encode, mixture
from dpo_jax.data import prepared as prepared_data
from dpo_jax.data.examples import Example, Lazy, fill_up, lengths
from dpo_jax.data.ledger import Ledger, count_tokens, merge, summarize
from dpo_jax.data.mixture import Source
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.structs import UserError
from dpo_jax.utils import messages


class Part(NamedTuple):
  """The examples of one source.

  Attributes:
    source: where they come from.
    examples: in the order of the data.
    ledger: counts of what became of its rows.
    rows: the numbers of its rows; those of other parts that were read with it are others.
  """

  source: Source
  examples: list[Example]
  ledger: Ledger
  rows: range


def read(
  sources: Sequence[Source],
  field: str,
  tokenizer: Tokenizer,
  loss: losses.Loss,
  *,
  seed: int = 0,
  unique: bool = False,
  first_row: int = 0,
  positions: int | None = None,
  **how: Any,
) -> list[Part]:
  """Reads sources, one after another, and reports a line on each.

  Args:
    sources: such as those of a mix.
    field: name of the field of the configuration that names them.
    tokenizer: of the model.
    loss: decides what a row must have.
    seed: of the rows that are drawn where a source has a count or a fraction.
    unique: whether rows that occurred before, in any of the sources, are dropped.
    first_row: number of the first row.
    positions: of the model, for warnings.
    how: options of `encode.Encoder`; those of a source come before them.

  Raises:
    UserError: a source that cannot be read, or whose rows do not serve.
  """
  parts, seen = [], set()
  for source in sources:
    name = f"{field}.{source.name} ({source.path})" if source.name else source.path
    options = how | {k: v for k in ("fields", "verdict") if (v := getattr(source, k)) is not None}
    try:
      examples, ledger, _ = encode.load_examples(source.path, tokenizer, **options)
    except UserError as error:
      if not source.name:
        raise
      raise UserError(f"{field}.{source.name}: {error}") from None
    # The order is important: duplicates first, so that as many rows are drawn as were asked for.
    if unique:
      examples = _without(examples, mixture.drop_duplicates(examples, seen), ledger, "duplicate")
    if examples:
      examples = _without(examples, mixture.draw(examples, source, seed), ledger, "not drawn")
    check_scores(loss, source.path, examples)
    check_completions(loss, source.path, examples)
    rows = range(first_row, first_row + ledger.rows)
    # Numbers of rows go on from source to source: a row's number says which one it is of.
    examples = [e._replace(row=first_row + e.row) for e in examples] if first_row else examples
    first_row = rows.stop
    messages.show(summarize(name, ledger.to_json(), positions=positions))
    parts.append(Part(source, examples, ledger, rows))
  return parts


def _without(
  before: list[Example], after: list[Example], ledger: Ledger, reason: str
) -> list[Example]:
  """Returns the examples that are left, and counts the rows that are not."""
  if len(before) == len(after):
    return before
  lost = len({example.row for example in before}) - len({example.row for example in after})
  ledger.dropped[reason] += lost
  ledger.pairs -= lost
  ledger.tokens = count_tokens(after) if after else dict.fromkeys(ledger.tokens, 0)
  if ledger.labels:
    desirable = sum(example.scores[0] == 1 for example in after)
    ledger.labels = {"desirable": desirable, "undesirable": len(after) - desirable}
  return after


def check_scores(loss: losses.Loss, path: str, examples: Sequence[Example]) -> None:
  """Checks that rows say by how much a completion is better, where the loss reads that."""
  # Without scores every margin would be 0, and a loss that reads margins would be another loss.
  if loss.reads("margin_B") and len(examples) and not examples[0].scores:
    raise UserError(
      f"loss {loss.name!r} reads by how much the chosen completion is better, and the rows of"
      f" {path} do not say; give them a field margin, or chosen_score and rejected_score"
    )


def check_completions(loss: losses.Loss, path: str, examples: Sequence[Example]) -> None:
  """Checks that every prompt has as many completions as the loss compares, if they are ranked."""
  if loss.kind != "ranked" or not len(examples):
    return
  found_B = (lengths(examples).tokens_BK > 0).sum(axis=1)
  fewer_B = found_B < loss.completions
  if fewer_B.any():
    raise UserError(
      f"loss {loss.name!r} needs {loss.completions} completions of every prompt, and"
      f" {fewer_B.sum()} of {len(examples)} prompts of {path} have fewer, the first of them in row"
      f" {examples[int(fewer_B.argmax())].row}; give a list of completions, best first, in the"
      " field answers, or leave these rows out"
    )


def join(parts: Sequence[Part]) -> tuple[list[Example], dict[str, Any]]:
  """Returns the examples of all parts as one list, and the ledger of all with that of each."""
  examples = [example for part in parts for example in part.examples]
  # Ranked rows: one number of completions for all.
  if len({len(example.completions) for example in examples}) > 1:
    examples = fill_up(examples)
  if not parts[0].source.name:
    return examples, parts[0].ledger.to_json()
  total = merge([part.ledger for part in parts])
  total.tokens = count_tokens(examples)
  return examples, total.to_json() | {
    "sources": {
      part.source.name: {"path": part.source.path} | part.ledger.to_json() for part in parts
    }
  }


def read_evaluation_sets(
  main: str,
  named: Sequence[Source],
  tokenizer: Tokenizer,
  loss: losses.Loss,
  ledger: dict[str, Any],
  **how: Any,
) -> list[Part]:
  """Reads evaluation sets, and adds their ledgers to that of the data.

  Args:
    main: files of the set without a name, `data.eval_path`; "" for none.
    named: the others, `data.eval_sets`.
    tokenizer, loss, how: as in `read`.
    ledger: of the training data, as JSON.
  """
  parts: list[Part] = []
  for source in (*((Source("", main),) if main else ()), *named):
    # One at a time: a row that is in two sets is no duplicate.
    first_row = parts[-1].rows.stop if parts else 0
    parts += read([source], "data.eval_sets", tokenizer, loss, first_row=first_row, **how)
    found = parts[-1].ledger.to_json()
    if source.name:
      ledger.setdefault("eval_sets", {})[source.name] = {"path": source.path} | found
    else:
      ledger["eval"] = found
  return parts


def groups_of(
  parts: Sequence[Part], evaluated: Sequence[Part], held_out: Sequence[Example]
) -> dict[str, range]:
  """Returns the rows whose metrics are computed by themselves, by the name of these metrics.

  Args:
    parts: sources of the training data.
    evaluated: evaluation sets; the first may have no name. If there are none, `held_out` is a part
      of the training data.
    held_out: all examples to evaluate on.

  Returns:
    name -> rows, "" for metrics without a name. Without a set of its own, "" is all examples. Empty
    where "" would be the only group.
  """
  if evaluated:
    groups = {part.source.name: part.rows for part in evaluated}
    groups = {"": range(evaluated[-1].rows.stop)} | groups
  else:
    groups = {f"by_source/{part.source.name}": part.rows for part in parts if part.source.name}
    groups = {"": range(parts[-1].rows.stop)} | groups if groups else {}
  rows = {example.row for example in held_out}
  groups = {name: some for name, some in groups.items() if not rows.isdisjoint(some)}
  return groups if len(groups) > 1 else {}


def check_files(sources: Sequence[Source], field: str, check: Any) -> None:
  """Checks that every source names files that are there, and is none that only training reads.

  Args:
    sources: such as those of a mix.
    field: name of the field of the configuration that names them.
    check: function of a field and a path that raises an error, for the files.
  """
  for source in sources:
    where = f"{field}.{source.name}.path"
    if prepared_data.is_prepared_set(source.path):
      raise UserError(
        f"{where}={source.path} is a prepared set, which is trained on by itself (data.path); name"
        " the rows that it was made of"
      )
    check(where, source.path)


def digests_of(
  path: str,
  examples: Sequence[Example],
  held_out: Sequence[Example],
  parts: Sequence[Part],
  evaluated: Sequence[Part],
) -> dict[str, str]:
  """Computes digests of all rows, by names for messages.

  Args:
    path: files of the training data; "" for a mix.
    examples, held_out: to train on, and the part of the data that is held out.
    parts: sources of the training data, whole; none where it is a prepared set.
    evaluated: evaluation sets.
  """
  found = {}
  for field, some in (("mix", parts), ("eval_sets", evaluated)):
    for part in some:
      if part.source.name:
        name = f"the rows of data.{field}.{part.source.name} ({part.source.path})"
        found[name] = digest.of(part.examples)
  # The rows of a mix are all above; what is held out of them is a function of the seed.
  sides = {f"the rows to train on ({path})": ("train", examples)} if path else {}
  main = [part for part in evaluated if not part.source.name]
  if main:
    sides[f"the held-out rows ({main[0].source.path})"] = ("", main[0].examples)
  elif path:
    sides[f"the held-out rows ({path})"] = ("validation", held_out)
  for name, (split_name, rows) in sides.items():
    if isinstance(rows, Lazy):  # on disk: to read all of them would take as long as to train
      known = prepared_data.stored_digests(path).get(split_name)
      found[name] = digest.of_some(rows, known)
    elif len(rows):
      found[name] = digest.of(rows)
  return found


# --- what sources have in common ------------------------------------------------------------------


def report_repeated(parts: Sequence[Part]) -> dict[str, int]:
  """Reports rows that two sources of a mix have in common: a line for every two that have any.

  Returns:
    "A, B" -> number of distinct rows that are in both.
  """
  digests = [set(mixture.row_digests(part.examples).values()) for part in parts]
  found = {}
  for second, part in enumerate(parts):
    for first, other in enumerate(parts[:second]):
      if common := len(digests[first] & digests[second]):
        names = other.source.name, part.source.name
        found[", ".join(names)] = common
        messages.warn(
          f"data.mix: {common:,} rows of {names[1]} are in {names[0]} too;"
          " --config.data.drop_duplicates=True keeps one of each"
        )
  return found


def report_leakage(
  training: Sequence[Example], field: str, held_out: Sequence[Example]
) -> dict[str, int]:
  """Reports prompts that are both trained on and evaluated on.

  Args:
    training: examples in memory.
    field: the field of the configuration that names the evaluation set.
    held_out: the examples of that set.

  Returns:
    Numbers of distinct prompts: those in common, `prompts`, and all of the set, `of`; nothing if
    none is in common.
  """
  theirs = mixture.prompt_digests(held_out)
  common = len(theirs & mixture.prompt_digests(training))
  if not common:
    return {}
  messages.warn(
    f"{field}: {common:,} of its {len(theirs):,} prompts are trained on too; its metrics say little"
    " about new prompts"
  )
  return {"prompts": common, "of": len(theirs)}


def report_overlap(
  parts: Sequence[Part],
  examples: Sequence[Example],
  evaluated: Sequence[Part],
  ledger: dict[str, Any],
) -> None:
  """Reports what sources have in common with each other, and with evaluation sets.

  Args:
    parts: sources of the training data.
    examples: those that are left to train on.
    evaluated: evaluation sets.
    ledger: of the data, as JSON; what was found is added to it.
  """
  if repeated := report_repeated(parts):
    ledger["repeated"] = repeated
  for part in evaluated:
    name = part.source.name
    field = f"data.eval_sets.{name}" if name else "data.eval_path"
    if leaked := report_leakage(examples, field, part.examples):
      ledger.setdefault("leakage", {})[name or "eval_path"] = leaked
