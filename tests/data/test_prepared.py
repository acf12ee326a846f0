"""Prepared sets give the examples they were made of, and only to runs with the same settings."""

import json
import multiprocessing

import numpy as np
import pytest

from dpo_jax.data import batches, encode, examples, prepared
from dpo_jax.data.encode import Encoder
from dpo_jax.data.ledger import Ledger
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import UserError
from tests.support import small_tokenizers
from tests.support.prepared_sets import prepare, rows_of, same, write
from tests.support.small_rows import score_the_last

BAD = {"prompt": 3, "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(small_tokenizers.byte_fallback(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("kind", ["pairs", "ranked", "unpaired"])
def test_what_is_read_is_what_is_in_the_files(tmp_path, tokenizer, kind):
  path = write(tmp_path / "rows.jsonl", rows_of(kind))
  encoder = Encoder(tokenizer, kind=kind, max_length=64)
  ledger = prepare(tmp_path / "set", path, encoder, eval_fraction=0.3)
  expected, account, _ = encode.load_examples(path, tokenizer, kind=kind, max_length=64)
  assert ledger.rows == 91 and ledger.dropped == {"empty completion": 1} == account.dropped
  train, held_out, told = prepared.read(tmp_path / "set", encoder, eval_fraction=0.3)
  assert told == ledger.to_json()
  same(sorted([*train, *held_out], key=lambda e: e.row), expected)
  prompts = [{e.prompt.tobytes() for e in side} for side in (train, held_out)]
  assert not prompts[0] & prompts[1] and 4 <= len(prompts[1]) <= 14  # 9 of 30, in expectation
  for some in (train, held_out):
    for known, counted in zip(some.lengths, examples.lengths(list(some)), strict=True):
      np.testing.assert_array_equal(known, counted)
  same(train[3:9:2], [train[3], train[5], train[7]])
  same(train.widened(6)[:4], examples.fill_up(train[:4], 6))


@pytest.mark.parametrize("kind", ["pairs", "ranked"])
def test_weights_of_tokens_are_stored(tmp_path, tokenizer, monkeypatch, kind):
  path = write(tmp_path / "rows.jsonl", rows_of(kind, 20))
  encoder = Encoder(tokenizer, kind=kind)
  prepare(tmp_path / "plain", path, encoder, eval_fraction=0.0)
  score_the_last(monkeypatch, tokenizer)
  ledger = prepare(tmp_path / "set", path, encoder, eval_fraction=0.0)
  expected, account, _ = encode.load_examples(path, tokenizer, kind=kind)
  train, _, _ = prepared.read(tmp_path / "set", encoder, eval_fraction=0.0)
  same(train, expected)
  measured = examples.lengths(list(train))
  for known, counted in zip(train.lengths, measured, strict=True):
    np.testing.assert_array_equal(known, counted)
  assert ledger.tokens == account.tokens
  assert ledger.tokens["scored"] == (measured.tokens_BK > 0).sum() < ledger.tokens["answer"]
  # A set of before has no weights and no count of scored tokens: all of them are.
  with np.load(tmp_path / "plain" / prepared.LENGTHS) as arrays:
    before = {name: array for name, array in arrays.items() if "scored" not in name}
  np.savez(tmp_path / "plain" / prepared.LENGTHS, **before)
  plain, _, _ = prepared.read(tmp_path / "plain", encoder, eval_fraction=0.0)
  np.testing.assert_array_equal(plain.lengths.scored_BK, plain.lengths.tokens_BK)
  assert plain[0].token_weights == ()
  record = {name: x for name, x in plain.source[0].items() if name != "token_weights"}
  assert prepared.PairSet([record], plain.lengths.select([0]))[0].token_weights == ()


def test_tokens_are_those_of_the_same_rows_in_memory(tmp_path, tokenizer):
  path = write(tmp_path / "rows.jsonl", rows_of("pairs"))
  ledger = prepare(tmp_path / "set", path, Encoder(tokenizer), eval_fraction=0.0)
  assert ledger == encode.load_examples(path, tokenizer)[1]
  _, held_out, _ = prepared.read(tmp_path / "set", Encoder(tokenizer), eval_fraction=0.0)
  assert held_out is None


def test_batches_do_not_know_where_examples_lie(tmp_path, tokenizer):
  path = write(tmp_path / "rows.jsonl", rows_of("pairs"))
  prepare(tmp_path / "set", path, Encoder(tokenizer))
  train, _, _ = prepared.read(tmp_path / "set", Encoder(tokenizer), eval_fraction=0.1)
  for start in (0, 7):
    both = [
      batches.batches(some, batch_size=8, accumulate=2, seed=3, start=start)
      for some in (train, list(train))
    ]
    for _, stored, held in zip(range(3), *both, strict=False):
      for left, right in zip(stored, held, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_processes_change_nothing(tmp_path, tokenizer, monkeypatch):
  monkeypatch.setattr(encode, "CHUNK", 8)
  paths = [write(tmp_path / f"{i}.jsonl", rows_of("pairs", 40)) for i in range(2)]
  alone, several = Ledger(), Ledger()
  expected = list(encode.stream_examples(paths, Encoder(tokenizer), alone))
  found = list(encode.stream_examples(paths, Encoder(tokenizer), several, workers=2))
  same(found, expected)
  assert several == alone and alone.rows == 82
  write(
    tmp_path / "bad.jsonl", [*rows_of("pairs", 20), {"prompt": 3, "chosen": "a", "rejected": "b"}]
  )
  with pytest.raises(UserError, match=r"bad\.jsonl:22: field prompt is 3"):
    list(encode.stream_examples(tmp_path / "bad.jsonl", Encoder(tokenizer), Ledger(), workers=2))
  assert not multiprocessing.active_children()


def test_little_is_read_ahead(tmp_path, tokenizer, monkeypatch):
  monkeypatch.setattr(encode, "CHUNK", 8)
  path = write(tmp_path / "rows.jsonl", rows_of("pairs", 800))
  ledger = Ledger()
  next(encode.stream_examples(path, Encoder(tokenizer), ledger))
  assert ledger.rows <= 8


def test_a_set_made_otherwise_is_refused(tmp_path, tokenizer):
  path = write(tmp_path / "rows.jsonl", rows_of("pairs"))
  made = Encoder(tokenizer, max_length=64)
  folder = tmp_path / "set"
  prepare(folder, path, made)

  def refused(line, encoder=made, eval_fraction=0.1):
    with pytest.raises(UserError, match=line) as raised:
      prepared.read(folder, encoder, eval_fraction=eval_fraction)
    assert "\n" not in str(raised.value)

  other = load_tokenizer(small_tokenizers.byte_level(tmp_path / "other"))
  refused("with another tokenizer or chat template", Encoder(other, max_length=64))
  refused(
    "with max_length 64, and this run has 32; .*, or change data.max_length",
    Encoder(tokenizer, max_length=32),
  )
  refused("with kind 'pairs', .* or change loss", Encoder(tokenizer, kind="text", max_length=64))
  refused("with eval_fraction 0.1, and this run has 0.2", eval_fraction=0.2)
  prepared.read(folder, made, eval_fraction=None)  # other rows are held out
  about = json.loads((folder / "metadata.json").read_text())
  (folder / "metadata.json").write_text(json.dumps(about | {"rules": 0}))
  refused("by rules of version 0, and the present version is 3")
  (folder / "metadata.json").write_text("{")
  refused(r"is a broken prepared set \(.*\); prepare it again")


@pytest.mark.parametrize("name", ["lengths.npz", "features.json", "tfds_pairs-train*"])
def test_a_broken_set_is_one_line(tmp_path, tokenizer, name):
  path = write(tmp_path / "rows.jsonl", rows_of("pairs"))
  prepare(tmp_path / "set", path, Encoder(tokenizer))
  (file,) = (tmp_path / "set").glob(name)
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(UserError, match=r"is a broken prepared set \(.+\); prepare it again"):
    prepared.read(tmp_path / "set", Encoder(tokenizer), eval_fraction=0.1)


def test_nothing_is_replaced_and_nothing_half_made_stays(tmp_path, tokenizer):
  path = write(tmp_path / "rows.jsonl", rows_of("pairs"))
  (tmp_path / "kept").mkdir()
  with pytest.raises(UserError, match="kept exists; remove it, or name another folder"):
    prepare(tmp_path / "kept", path, Encoder(tokenizer))
  bad = write(
    tmp_path / "bad.jsonl", [*rows_of("pairs"), {"prompt": 3, "chosen": "", "rejected": ""}]
  )
  with pytest.raises(UserError, match=r"bad\.jsonl:92"):
    prepare(tmp_path / "set", bad, Encoder(tokenizer))
  one = write(tmp_path / "one.jsonl", [*rows_of("pairs", 3)])
  with pytest.raises(UserError, match="of 3 examples leaves one side empty"):
    prepare(tmp_path / "set", one, Encoder(tokenizer))
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "bad.jsonl",
    "kept",
    "one.jsonl",
    "rows.jsonl",
  ]
