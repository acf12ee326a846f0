"""The rows that a run holds out and trains on, written to its workdir before training.

`held_out/rows.jsonl` has a line per held-out row: the file, the row's number in it (from 0) and a
digest of the row's tokens (of the prompt itself, on policy). `held_out/trained_on.npy` has the
digests of the rows to train on.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import digest
from dpo_jax.data.examples import Example, Lazy, truncate
from dpo_jax.structs import UserError
from dpo_jax.training.sources import Part
from dpo_jax.training.verdict import FOLDER
from dpo_jax.utils import files, messages, model_folder
from dpo_jax.utils import workdir as workdirs

ROWS, TRAINED = "rows.jsonl", "trained_on.npy"


class Row(NamedTuple):
  """A held-out row.

  Attributes:
    source: name of its source in a mix, or of its evaluation set; "" for the only one.
    file: path of that source, as the configuration names it.
    row: its number among the rows read from there, from 0.
    digest: `digest.of_rows` of it.
  """

  source: str
  file: str
  row: int
  digest: int


class Rows(NamedTuple):
  """The rows of a run.

  Attributes:
    held_out: rows that are not trained on.
    trained: uint64, digests of the rows to train on, in rising order; None where they are not read
      (a prepared set).
  """

  held_out: tuple[Row, ...]
  trained: np.ndarray | None


def describe(
  path: str,
  parts: Sequence[Part],
  examples: Sequence[Example],
  held_out: Sequence[Example],
  evaluated: Sequence[Part],
) -> Rows:
  """Describes the rows of a run, as its files have them.

  Args:
    path: the training data; "" for a mix.
    parts: sources of the training data; none where it is a prepared set.
    examples, held_out: to train on, and the part of the training data that is held out.
    evaluated: evaluation sets.
  """
  trained = None
  if not isinstance(examples, Lazy):
    trained = np.unique(np.fromiter(digest.of_rows(examples).values(), np.uint64))
  found = digest.of_rows(held_out)
  rows = [] if parts else [Row("", path, *item) for item in found.items()]
  for part in parts:
    rows += _rows_of(part, {row: found[row] for row in found if row in part.rows})
  for part in evaluated:
    rows += _rows_of(part, digest.of_rows(part.examples))
  return Rows(tuple(rows), trained)


def of_prompts(
  path: str, prompts: Sequence[Any], held_out: Sequence[Any], numbers: Sequence[int]
) -> Rows:
  """Describes prompts that completions are sampled for, by their texts or messages.

  Args:
    path: the file of the held-out ones.
    prompts, held_out: to train on, and those that are not.
    numbers: of the held-out ones in their file.
  """

  def of(prompt: Any) -> int:
    return int(digest.of_values([prompt])[:16], 16)

  rows = (Row("", path, *item) for item in zip(numbers, map(of, held_out), strict=True))
  return Rows(tuple(rows), np.unique(np.array([*map(of, prompts)], np.uint64)))


def _rows_of(part: Part, digests: dict[int, int]) -> list[Row]:
  source, start = part.source, part.rows.start
  return [Row(source.name, source.path, row - start, one) for row, one in digests.items()]


def find(rows: Sequence[Row], part: Part) -> set[int]:
  """Finds the held-out rows of a source, also in a file that has other rows beside them.

  Args:
    rows: held-out rows of a run.
    part: the source, as it is read now.

  Returns:
    Their numbers, as `Example.row` has them.

  Raises:
    UserError: some of them are not there.
  """
  wanted = [row for row in rows if row.source == part.source.name]
  found, start = digest.of_rows(part.examples), part.rows.start
  unmoved = {start + one.row for one in wanted if found.get(start + one.row) == one.digest}
  if len(unmoved) == len(wanted):
    return unmoved
  # Rows were added, removed or sorted: by digest alone, equal rows as often as they were held out.
  left, chosen = collections.Counter(one.digest for one in wanted), set()
  for row, one in found.items():
    if left[one] > 0:
      left[one] -= 1
      chosen.add(row)
  missing = left.total()
  if missing:
    raise UserError(
      f"{part.source.path} has changed: {missing:,} of the {len(wanted):,} held-out rows of the run"
      " are not in it; put back what was there, or name a file that has them by --data=FILE"
    )
  return chosen


def select(rows: Sequence[Row], part: Part) -> Part:
  """Returns a source with its held-out rows alone: see `find`."""
  chosen = find(rows, part)
  return part._replace(examples=[e for e in part.examples if e.row in chosen])


# --- how many are evaluated -----------------------------------------------------------------------


def limit(
  sets: Sequence[Sequence[Any]], eval_limit: int, *, eval_samples: int
) -> list[Sequence[Any]]:
  """Returns at most `eval_limit` rows of every set; refuses none where prompts are sampled from."""
  limited = [some[:eval_limit] for some in sets]
  if eval_samples and not any(map(len, limited)):
    raise UserError(
      f"eval.samples is {eval_samples}, and no row is held out to take prompts from; set"
      " data.eval_fraction above 0, name rows by data.eval_path, or leave eval.samples 0"
    )
  return limited


def count(
  evaluated: Sequence[Part],
  sets: Sequence[Sequence[Any]],
  limited: Sequence[Sequence[Any]],
  ledger: Mapping[str, Any],
) -> dict[str, Any]:
  """Counts the held-out examples behind the metrics without a name, and reports what is left out.

  Args:
    evaluated: evaluation sets; none where some of the training data are held out.
    sets, limited: the examples of each, and those that training evaluates.
    ledger: of the data; of a prepared set, it has the count of those on disk.

  Returns:
    `held_out` of the ledger, if there are any: `examples`, and how many are `evaluated`.
  """
  # A first set without a name has these metrics for itself.
  last = 1 if evaluated and not evaluated[0].source.name else None
  total, used = (sum(map(len, some[:last])) for some in (sets, limited))
  total = max(total, ledger.get("held_out", {}).get("examples", 0))
  if used < total:
    messages.show(
      f"data.eval_limit: training evaluates the first {used:,} of {total:,} held-out examples; all"
      f" are used by `dpo-jax evaluate --workdir`, or with --config.data.eval_limit={total}"
    )
  return {"held_out": {"examples": total, "evaluated": used}} if total else {}


# --- rows that a model was trained on -------------------------------------------------------------


def trained_on(
  model: pathlib.Path, examples: Sequence[Example], bos_id: int | None
) -> tuple[pathlib.Path, set[int]] | None:
  """Finds the examples that a model was trained on, where it lies in the folder of a run.

  The runs that its run started from are looked through too.

  Args:
    model: its folder.
    examples: whole, or cut less than the runs cut them.
    bos_id: the token that a cut prompt keeps at its start; None keeps none.

  Returns:
    The folder of its run, and the rows of the examples; None where no run is known.
  """
  first, rows, seen = None, set(), set()
  while (run := model_folder.run_around(model.resolve())) is not None and run not in seen:
    seen.add(run)
    config, trained = workdirs.stored_config(run) or {}, read_trained(run)
    if trained is not None:
      first = first or run
      found = digest.of_rows(_cut(examples, config.get("data", {}), bos_id))
      known = np.isin(np.fromiter(found.values(), np.uint64, len(found)), trained)
      rows |= {row for row, is_known in zip(found, known, strict=True) if is_known}
    start = config.get("lora", {}).get("path") or config.get("model", {}).get("path")
    if not start:  # random weights
      break
    model = pathlib.Path(start)
  return None if first is None else (first, rows)


def _cut(
  examples: Sequence[Example], window: Mapping[str, Any], bos_id: int | None
) -> Iterator[Example]:
  """Yields the examples as a run cut them, without those that it dropped."""
  for example in examples:
    kept = truncate(
      example.prompt,
      example.completions,
      max_length=window.get("max_length"),
      prompt_floor=window.get("prompt_floor", 64),
      mode=window.get("truncation", "drop"),
      bos_id=bos_id,
    )
    if kept is not None:
      yield example._replace(prompt=kept[0], completions=kept[1])


# --- files ----------------------------------------------------------------------------------------


def write(workdir: pathlib.Path, rows: Rows, *, step: int = 0) -> None:
  """Writes the rows of a run to its workdir.

  A run that goes on with other rows keeps what was there: `rows.jsonl` gets another name, and the
  digests of all rows that were trained on stay.

  Args:
    workdir: folder of the run.
    rows: of the run.
    step: steps that it has taken.
  """
  folder = workdir / FOLDER
  before = read(workdir)
  if before != list(rows.held_out):
    if before is not None:
      (folder / ROWS).rename(folder / f"rows-until-step-{step}.jsonl")
    files.write_json_lines(
      folder / ROWS, (row._asdict() | {"digest": f"{row.digest:016x}"} for row in rows.held_out)
    )
  if rows.trained is None:
    return
  known = read_trained(workdir)
  trained = rows.trained if known is None else np.union1d(known, rows.trained)
  if known is None or len(known) < len(trained):
    with files.replacing_file(folder / TRAINED) as partial, partial.open("wb") as file:
      np.save(file, trained)


def read(workdir: pathlib.Path) -> list[Row] | None:
  """Reads the held-out rows of a run; None for a run that began before they were written."""
  path = workdir / FOLDER / ROWS
  if not path.is_file():
    return None
  try:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Row(one["source"], one["file"], one["row"], int(one["digest"], 16)) for one in lines]
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{path} cannot be read; delete it to find the rows by the seed") from None


def read_trained(workdir: pathlib.Path) -> np.ndarray | None:
  """Reads the digests of the rows that a run trains on; None where there are none."""
  try:
    with (workdir / FOLDER / TRAINED).open("rb") as file:
      return np.load(file)
  except (OSError, ValueError, EOFError):
    return None
