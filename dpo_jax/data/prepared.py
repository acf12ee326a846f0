"""Prepared sets: token ids in a TFDS data set (ArrayRecord), read by random access.

A set says what it was made by (tokenizer and template, window, rules), and is refused where a run
asks for anything else. Neither making nor reading one holds it in memory: only the lengths of its
examples are, which is what rows are packed by.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import io
import itertools
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from dpo_jax.data import encode, external
from dpo_jax.data.encode import Encoder, Ledger
from dpo_jax.data.examples import Example, Lazy, Measured, fill_up
from dpo_jax.structs import UserError
from dpo_jax.utils.files import check_writable, replacing

NAME = "tfds_pairs"
LENGTHS = external.PREPARED
SPLITS = ("train", "validation")
SHARD = 100_000  # examples of one file
# What a set is asked for beside its rules and its tokenizer: flags of `prepare_data` by name.
ASKED = ("kind", "max_length", "prompt_floor", "truncation", "eval_fraction")


# --- out ------------------------------------------------------------------------------------------


def prepare(
  out: str | pathlib.Path,
  paths: str | Sequence[str],
  encoder: Encoder,
  *,
  eval_fraction: float = 0.1,
  seed: int = 0,
  workers: int = 0,
  limit: int | None = None,
) -> Iterator[Ledger]:
  """Makes a prepared set of some files; gives the ledger now and then, and at the end.

  Args:
    out: the folder to make.
    paths: as `readers.files` has them.
    encoder: how rows become ids.
    eval_fraction: share of the prompts whose rows are held out, in expectation: which side a prompt
      is on goes by its ids and the seed, whatever else is in the files.
    seed: of that.
    workers: processes that tokenise; 0 for this one.
    limit: rows to read at most.

  Raises:
    UserError: bad rows, or `out` is there already; nothing is left behind.
  """
  if pathlib.Path(out).exists():
    raise UserError(f"{out} exists; remove it, or name another folder")
  check_writable(out, str(out))
  ledger = Ledger()
  with contextlib.ExitStack() as stack:
    new = stack.enter_context(replacing(out))
    aside = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=new.parent)))
    spools = {name: _Spool(stack.enter_context((aside / name).open("w+b"))) for name in SPLITS}
    for example in encode.stream_examples(paths, encoder, ledger, limit=limit, workers=workers):
      held_out = _share(example.prompt, seed) < eval_fraction
      spools[SPLITS[held_out]].add(example)
      if ledger.pairs % encode.CHUNK == 0:
        yield ledger
    if not spools["train"].rows or (eval_fraction and not spools["validation"].rows):
      raise UserError(
        f"eval fraction {eval_fraction} of {ledger.pairs} examples leaves one side empty; give 0 to"
        " hold nothing out"
      )
    completions = max(spool.completions for spool in spools.values())
    measured = {name: spool.measure(completions) for name, spool in spools.items() if spool.rows}
    ledger.tokens = encode.count_tokens(Measured.of(*measured.values()))
    about = {"rules": encode.RULES, "tokenizer": encoder.tokenizer.digest(), "seed": seed}
    about |= {name: getattr(encoder, name) for name in ASKED if name != "eval_fraction"}
    about |= {"eval_fraction": eval_fraction, "ledger": ledger.to_json()}
    _build(new, {name: spools[name] for name in measured}, about)
    arrays = {}
    for name, lengths in measured.items():
      arrays[f"{name}_prompt"], arrays[f"{name}_answers"] = lengths.lengths
    np.savez(new / LENGTHS, **arrays)
  yield ledger


def _share(prompt: np.ndarray, seed: int) -> float:
  """Where a prompt stands between 0 and 1, evenly spread."""
  digest = hashlib.blake2b(prompt.tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
  return int.from_bytes(digest.digest(), "little") / 2**64


class _Spool:
  """Examples of one split on their way: ids on disk, all else in memory, 8 bytes a number."""

  def __init__(self, file: IO[bytes]):
    self.file = file
    self.rows = array.array("q")
    self.counts = array.array("q")  # tokens of the prompt, and of every answer
    self.widths = array.array("q")  # how many counts an example has
    self.scores = array.array("d")
    self.weights = array.array("f")
    self.completions = 0

  def add(self, example: Example) -> None:
    texts = (example.prompt, *example.completions)
    for ids in texts:
      self.file.write(np.asarray(ids, np.int32).tobytes())
    self.rows.append(example.row)
    self.counts.extend(map(len, texts))
    self.widths.append(len(texts))
    self.scores.extend(example.scores)
    self.weights.append(example.weight)
    self.completions = max(self.completions, len(example.completions))

  def measure(self, completions: int) -> Measured:
    """Lengths of the examples, absent answers being of none."""
    counts_BK = np.zeros((len(self.rows), 1 + completions), np.int32)
    widths_B = np.asarray(self.widths)
    counts_BK[np.arange(1 + completions) < widths_B[:, None]] = self.counts
    return Measured((counts_BK[:, 0], counts_BK[:, 1:]))

  def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Keys and features, as TFDS wants them."""
    has_scores = len(self.scores) > 0
    at = score_at = 0
    self.file.seek(0)
    each = zip(self.rows, self.widths, self.weights, strict=True)
    for key, (row, width, weight) in enumerate(each):
      lengths = np.array(self.counts[at : at + width], np.int32)
      ids = np.frombuffer(self.file.read(4 * int(lengths.sum())), np.int32)
      scores = self.scores[score_at : score_at + (width - 1) * has_scores]
      at, score_at = at + width, score_at + len(scores)
      features = {"ids": ids, "lengths": lengths, "grades": np.array(scores, np.float32)}
      yield key, features | {"row": row, "weight": weight}


@functools.cache
def _builder_class() -> type:
  """The builder; its library takes a moment to load."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import sequential_writer

  class TfdsPairs(tfds.core.GeneratorBasedBuilder):
    """Prompts and their answers as token ids: `ids` are the prompt's and every answer's in turn.

    `lengths` divides them; `grades` are the scores of an `Example`, perhaps none, under the name
    that sets on disk have; `weight` is its weight, `row` the row it was in.
    """

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for checksums asks for a package more

    def __init__(self, *, spools: dict[str, _Spool], about: dict[str, Any], **kwargs):
      self._spools, self._about = spools, about
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      many = lambda dtype: tfds.features.Tensor(shape=(None,), dtype=dtype)
      return tfds.core.DatasetInfo(
        builder=self,
        description="Preferences as token ids.",
        features=tfds.features.FeaturesDict(
          {
            "ids": many(np.int32),
            "lengths": many(np.int32),
            "grades": many(np.float32),
            "row": np.int64,
            "weight": np.float32,
          }
        ),
        metadata=tfds.core.MetadataDict(self._about),
        disable_shuffling=True,  # example i has lengths i
      )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
      del dl_manager
      return {name: self._generate_examples(spool) for name, spool in self._spools.items()}

    def _generate_examples(self, spool: _Spool) -> Iterator:
      return spool.records()

    def _download_and_prepare(self, dl_manager, download_config) -> None:
      # In order and as they come: what TFDS would do holds a split in memory to put it in order,
      # and beyond a gigabyte asks for TensorFlow.
      del download_config
      splits = self._split_generators(dl_manager)
      info = self._info()  # of the folder that is being filled; `self.info` is of the one to come
      writer = sequential_writer.SequentialWriter(
        info, max_examples_per_shard=SHARD, file_format="array_record"
      )
      writer.initialize_splits(list(splits))
      for name, records in splits.items():
        examples = (features for _, features in records)
        while some := list(itertools.islice(examples, encode.CHUNK)):
          writer.add_examples({name: some})
      writer.close_all()
      self.info.set_splits(info.splits)

  return TfdsPairs


def _build(folder: pathlib.Path, spools: dict[str, _Spool], about: dict[str, Any]) -> None:
  """Fills a folder with the files of a TFDS data set."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
    builder = _builder_class()(
      spools=spools, about=about, data_dir=scratch, file_format="array_record"
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes
      builder.download_and_prepare()
    for file in pathlib.Path(builder.data_dir).iterdir():
      file.rename(folder / file.name)


# --- in -------------------------------------------------------------------------------------------


class PairSet(Lazy):
  """One split of a prepared set: examples read as they are asked for, all with K answers."""

  def __init__(self, source: Any, lengths: tuple[np.ndarray, np.ndarray]):
    self.source = source
    super().__init__(self._read, lengths)

  def _read(self, number: int) -> Example:
    record = self.source[number]
    prompt, *completions = np.split(record["ids"], np.cumsum(record["lengths"])[:-1])
    example = Example(prompt, tuple(completions), float(record["weight"]), int(record["row"]))
    example = example._replace(scores=tuple(record["grades"].tolist()))
    (filled,) = fill_up([example], self.lengths[1].shape[1])
    return filled

  def widened(self, completions: int) -> PairSet:
    """The same with K answers, those that are not there absent."""
    prompt_B, tokens_BK = self.lengths
    wide = np.pad(tokens_BK, ((0, 0), (0, completions - tokens_BK.shape[1])))
    return PairSet(self.source, (prompt_B, wide))


def holds_one(path: str | pathlib.Path) -> bool:
  """Whether a folder is a prepared set."""
  return (pathlib.Path(path) / LENGTHS).is_file()


def read(
  path: str | pathlib.Path, encoder: Encoder, *, eval_fraction: float | None
) -> tuple[PairSet, PairSet | None, dict[str, Any]]:
  """The training split, the held-out one if there is one, and the ledger.

  Args:
    path: the folder.
    encoder: how the run would make ids of rows.
    eval_fraction: what the run would hold out; None for rows of another file.

  Raises:
    UserError: the set was made otherwise, or is broken.
  """
  path = pathlib.Path(path)
  try:
    about = json.loads((path / "metadata.json").read_text())
    builder = external.builder_of(path)
    _check(path, about, encoder, eval_fraction)
    with (path / LENGTHS).open("rb") as file, np.load(file) as arrays:
      lengths = dict(arrays.items())
    sets = [
      PairSet(
        builder.as_data_source(split=name), (lengths[f"{name}_prompt"], lengths[f"{name}_answers"])
      )
      for name in SPLITS
      if name in builder.info.splits
    ]
    for one in sets:
      _ = one[0], one[-1]  # files are opened only now
  except UserError:
    raise
  except Exception as error:  # TFDS, NumPy and ArrayRecord raise what they like
    line = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path} is a broken prepared set ({line}); prepare it again") from None
  for one in sets:
    if len(one) != len(one.source):
      raise UserError(f"{path} is a broken prepared set: a file is missing; prepare it again")
  return sets[0], sets[1] if len(sets) > 1 else None, about["ledger"]


def _check(
  path: pathlib.Path, about: dict[str, Any], encoder: Encoder, fraction: float | None
) -> None:
  again = "prepare it again (scripts/prepare_data.py)"
  if about["rules"] != encode.RULES:
    raise UserError(
      f"{path} was prepared by rules of version {about['rules']}, and those of now are"
      f" {encode.RULES}; {again}"
    )
  if about["tokenizer"] != encoder.tokenizer.digest():
    raise UserError(
      f"{path} was prepared with another tokenizer or chat template than this model's; {again}"
    )
  for name in ASKED:
    value = getattr(encoder, name, fraction)
    if about[name] != value and not (name == "eval_fraction" and value is None):
      flag = "loss" if name == "kind" else f"data.{name}"
      raise UserError(
        f"{path} was prepared with {name} {about[name]!r}, and this run asks for {value!r};"
        f" {again}, or change {flag}"
      )
