"""Prepared sets: data that was tokenized once, as a TFDS data set (ArrayRecord) with random access.

A set records how it was made (tokenizer, chat template, max_length, rules), and a run with other
settings refuses it. It is never in memory as a whole, neither when it is made nor when it is read:
only the lengths of its examples are, which is all that packing needs.
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

from dpo_jax.data import digest, encode, external
from dpo_jax.data.encode import Encoder
from dpo_jax.data.examples import Example, Lazy, Measured, fill_up, weights_of
from dpo_jax.data.ledger import Ledger, count_tokens
from dpo_jax.structs import UserError
from dpo_jax.utils.files import check_writable, replacing_folder

NAME = "tfds_pairs"
LENGTHS = external.PREPARED
# Names of the arrays of `Measured` in the file of lengths, behind the name of the split.
_LENGTHS = ("prompt", "answers", "scored")
SPLITS = ("train", "validation")
SHARD = 100_000  # examples per file
# Settings that a run must share with a set, besides rules and tokenizer; flags of `prepare_data`.
SETTINGS = ("kind", "max_length", "prompt_floor", "truncation", "train_on", "eval_fraction")


# --- writing --------------------------------------------------------------------------------------


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
  """Makes a prepared set of some files.

  Args:
    out: the folder to make.
    paths: as `readers.files` takes them.
    encoder: turns rows into ids.
    eval_fraction: share of the prompts to hold out, in expectation. A prompt's ids and the seed
      decide whether it is held out, so other rows of the files do not matter.
    seed: of the choice of held-out prompts.
    workers: number of processes that tokenize; 0 for this process.
    limit: most rows to read.

  Yields:
    The ledger, after every chunk of rows and at the end, for a progress display.

  Raises:
    UserError: bad rows, or `out` exists; nothing is left behind.
  """
  if pathlib.Path(out).exists():
    raise UserError(f"{out} exists; remove it, or name another folder")
  # Before hours of tokenizing, not after them.
  check_writable(out, str(out))
  ledger = Ledger()
  with contextlib.ExitStack() as stack:
    # The order is important: 1. the set is built in a folder that is renamed to `out` only when it
    # is complete; 2. ids go to temporary files first, since TFDS writes a split at a time, and the
    # largest K is known only when all examples are.
    new = stack.enter_context(replacing_folder(out))
    scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=new.parent)))
    spools = {name: _Spool(stack.enter_context((scratch / name).open("w+b"))) for name in SPLITS}
    digests = {name: digest.Digest() for name in SPLITS}
    for example in encode.stream_examples(paths, encoder, ledger, limit=limit, workers=workers):
      held_out = _uniform(example.prompt, seed) < eval_fraction
      spools[SPLITS[held_out]].add(example)
      digests[SPLITS[held_out]].add(example)
      if ledger.pairs % encode.CHUNK == 0:
        yield ledger
    if not spools["train"].rows or (eval_fraction and not spools["validation"].rows):
      raise UserError(
        f"eval fraction {eval_fraction} of {ledger.pairs} examples leaves one side empty; set 0 to"
        " hold nothing out"
      )
    completions = max(spool.completions for spool in spools.values())
    measured = {name: spool.measure(completions) for name, spool in spools.items() if spool.rows}
    ledger.tokens = count_tokens(Measured.concatenate(*measured.values()))
    # Names in the files of a set; sets made before must still be read.
    about = {"rules": encode.RULES, "tokenizer": encoder.tokenizer.digest(), "seed": seed}
    about |= {name: getattr(encoder, name) for name in SETTINGS if name != "eval_fraction"}
    about |= {"eval_fraction": eval_fraction, "ledger": ledger.to_json()}
    about |= {"digests": {name: digests[name].text() for name in measured}}
    _build(new, {name: spools[name] for name in measured}, about)
    arrays = {}
    for name, lengths in measured.items():
      arrays |= {f"{name}_{key}": x for key, x in zip(_LENGTHS, lengths, strict=True)}
    np.savez(new / LENGTHS, **arrays)
  yield ledger


def _uniform(prompt: np.ndarray, seed: int) -> float:
  """Returns a number in [0, 1) for a prompt: uniform over prompts, always the same for one."""
  digest = hashlib.blake2b(prompt.tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
  return int.from_bytes(digest.digest(), "little") / 2**64


class _Spool:
  """The examples of one split before they are written: tokens in a file, all else in memory.

  The file has the ids of an example, and behind them the weights of its completions' tokens, unless
  all are 1.

  `array` stores a number in 4 or 8 bytes, where a list would take 8 more and an object each.
  """

  def __init__(self, file: IO[bytes]):
    self.file = file
    self.rows = array.array("q")
    self.counts = array.array("q")  # tokens of the prompt, and of every answer
    self.widths = array.array("q")  # number of counts of an example
    self.scored = array.array("q")  # scored tokens of every answer
    self.weighted = array.array("b")  # 1 if the file has weights of the example's tokens
    self.scores = array.array("d")
    self.weights = array.array("f")
    self.completions = 0

  def add(self, example: Example) -> None:
    """Appends an example."""
    parts = (example.prompt, *example.completions)
    for ids in parts:
      self.file.write(np.asarray(ids, np.int32).tobytes())
    for weights in example.token_weights:
      self.file.write(np.asarray(weights, np.float32).tobytes())
    self.scored.extend(map(np.count_nonzero, weights_of(example)))
    self.weighted.append(bool(example.token_weights))
    self.rows.append(example.row)
    self.counts.extend(map(len, parts))
    self.widths.append(len(parts))
    self.scores.extend(example.scores)
    self.weights.append(example.weight)
    self.completions = max(self.completions, len(example.completions))

  def measure(self, completions: int) -> Measured:
    """Returns the lengths of all examples with K = `completions`; absent ones have 0 tokens."""
    counts_BP = np.zeros((len(self.rows), 1 + completions), np.int32)
    present_BP = np.arange(1 + completions) < np.asarray(self.widths)[:, None]
    # A mask selects row by row, in the order in which the counts were appended.
    counts_BP[present_BP] = self.counts
    scored_BK = np.zeros((len(self.rows), completions), np.int32)
    scored_BK[present_BP[:, 1:]] = self.scored
    return Measured(counts_BP[:, 0], counts_BP[:, 1:], scored_BK)

  def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (key, features) of every example, as TFDS takes them, while reading the file once."""
    has_scores = len(self.scores) > 0
    at = score_at = 0
    self.file.seek(0)
    each = zip(self.rows, self.widths, self.weights, self.weighted, strict=True)
    for key, (row, width, weight, weighted) in enumerate(each):
      lengths = np.array(self.counts[at : at + width], np.int32)
      ids = np.frombuffer(self.file.read(4 * int(lengths.sum())), np.int32)
      # Of completions only: a prompt has no weights.
      size = int(lengths[1:].sum()) if weighted else 0
      token_weights = np.frombuffer(self.file.read(4 * size), np.float32)
      scores = self.scores[score_at : score_at + (width - 1) * has_scores]
      at, score_at = at + width, score_at + len(scores)
      features = {"ids": ids, "lengths": lengths, "grades": np.array(scores, np.float32)}
      yield key, features | {"row": row, "weight": weight, "token_weights": token_weights}


@functools.cache
def _builder_class() -> type:
  """Returns the TFDS builder class; a function, since TFDS is slow to import."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import sequential_writer

  class TfdsPairs(tfds.core.GeneratorBasedBuilder):
    """Prompts and their completions as token ids.

    Features of an example: `ids`, those of the prompt and then of every completion; `lengths`,
    which divides them; `grades`, the scores of an `Example`, perhaps none (the name that sets on
    disk have); `token_weights` of every completion, one after another, or none; `weight` and `row`.
    """

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; a search for checksums would need another package

    def __init__(self, *, spools: dict[str, _Spool], about: dict[str, Any], **kwargs):
      self._spools, self._about = spools, about
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      integers = tfds.features.Tensor(shape=(None,), dtype=np.int32)
      return tfds.core.DatasetInfo(
        builder=self,
        description="Preferences as token ids.",
        features=tfds.features.FeaturesDict(
          {
            "ids": integers,
            "lengths": integers,
            "grades": tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "token_weights": tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "row": np.int64,
            "weight": np.float32,
          }
        ),
        metadata=tfds.core.MetadataDict(self._about),
        disable_shuffling=True,  # example i must have lengths i
      )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
      del dl_manager
      return {name: self._generate_examples(spool) for name, spool in self._spools.items()}

    def _generate_examples(self, spool: _Spool) -> Iterator:
      return spool.records()

    def _download_and_prepare(self, dl_manager, download_config) -> None:
      # Replaces TFDS's own method, which keeps a split in memory to sort it, and above a gigabyte
      # needs TensorFlow. Here examples are written one after another.
      del download_config
      splits = self._split_generators(dl_manager)
      info = self._info()  # of the folder being filled; `self.info` is of the one it is renamed to
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
  """Writes the files of a TFDS data set into a folder."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  # TFDS adds folders for name and version below data_dir; only the files are wanted, in `folder`.
  with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
    builder = _builder_class()(
      spools=spools, about=about, data_dir=scratch, file_format="array_record"
    )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints the temporary path
      builder.download_and_prepare()
    for file in pathlib.Path(builder.data_dir).iterdir():
      file.rename(folder / file.name)


# --- reading --------------------------------------------------------------------------------------


class PairSet(Lazy):
  """One split of a prepared set; its examples are read when indexed, and all have K completions."""

  def __init__(self, source: Any, lengths: Measured):
    self.source = source
    super().__init__(self._read, lengths)

  def _read(self, number: int) -> Example:
    record = self.source[number]
    prompt, *completions = np.split(record["ids"], np.cumsum(record["lengths"])[:-1])
    example = Example(prompt, tuple(completions), float(record["weight"]), int(record["row"]))
    example = example._replace(scores=tuple(record["grades"].tolist()))
    # Sets that were made before there were token weights have no such feature.
    if len(weights := record.get("token_weights", ())):
      parts = np.split(weights, np.cumsum(record["lengths"][1:])[:-1])
      example = example._replace(token_weights=tuple(parts))
    (filled,) = fill_up([example], self.lengths.tokens_BK.shape[1])
    return filled

  def widened(self, completions: int) -> PairSet:
    """Returns the same split with K = `completions`, filled up with absent ones."""
    return PairSet(self.source, self.lengths.widened(completions))


def is_prepared_set(path: str | pathlib.Path) -> bool:
  """Returns True if a folder is a prepared set."""
  return (pathlib.Path(path) / LENGTHS).is_file()


def read(
  path: str | pathlib.Path, encoder: Encoder, *, eval_fraction: float | None
) -> tuple[PairSet, PairSet | None, dict[str, Any]]:
  """Opens a prepared set.

  Args:
    path: the folder.
    encoder: how the run would turn rows into ids.
    eval_fraction: share that the run would hold out; None if it evaluates on another file.

  Returns:
    The training split, the held-out split or None, and the ledger as JSON.

  Raises:
    UserError: the set was made with other settings, or is broken.
  """
  path = pathlib.Path(path)
  try:
    about = json.loads((path / "metadata.json").read_text())
    builder = external.builder_of(path)
    _check(path, about, encoder, eval_fraction)
    with (path / LENGTHS).open("rb") as file, np.load(file) as arrays:
      lengths = dict(arrays.items())
    sets = [
      PairSet(builder.as_data_source(split=name), _measured(lengths, name))
      for name in SPLITS
      if name in builder.info.splits
    ]
    for one in sets:
      _ = one[0], one[-1]  # TFDS opens files at the first read: a broken one must fail here
  except UserError:
    raise
  except Exception as error:  # TFDS, NumPy and ArrayRecord raise exceptions of many types
    line = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path} is a broken prepared set ({line}); prepare it again") from None
  for one in sets:
    if len(one) != len(one.source):
      raise UserError(f"{path} is a broken prepared set: a file is missing; prepare it again")
  return sets[0], sets[1] if len(sets) > 1 else None, about["ledger"]


def _measured(arrays: dict[str, np.ndarray], split: str) -> Measured:
  """Returns the lengths of a split from the arrays of its set."""
  prompt, answers, scored = (f"{split}_{key}" for key in _LENGTHS)
  # Sets that were made before there were token weights score all tokens of a completion.
  return Measured(arrays[prompt], arrays[answers], arrays.get(scored, arrays[answers]))


def stored_digests(path: str | pathlib.Path) -> dict[str, str]:
  """Returns the digest of every split from when the set was made; older sets have none."""
  return json.loads((pathlib.Path(path) / "metadata.json").read_text()).get("digests", {})


def _check(
  path: pathlib.Path, about: dict[str, Any], encoder: Encoder, fraction: float | None
) -> None:
  again = "prepare it again (scripts/prepare_data.py)"
  if about["rules"] != encode.RULES:
    raise UserError(
      f"{path} was prepared by rules of version {about['rules']}, and the present version is"
      f" {encode.RULES}; {again}"
    )
  if about["tokenizer"] not in (encoder.tokenizer.digest(), encoder.tokenizer.older_digest()):
    raise UserError(
      f"{path} was prepared with another tokenizer or chat template than this model's; {again}"
    )
  for name in SETTINGS:
    value = getattr(encoder, name, fraction)  # eval_fraction is the one that is not the encoder's
    if about[name] != value and not (name == "eval_fraction" and value is None):
      flag = "loss" if name == "kind" else f"data.{name}"
      raise UserError(
        f"{path} was prepared with {name} {about[name]!r}, and this run has {value!r};"
        f" {again}, or change {flag}"
      )
