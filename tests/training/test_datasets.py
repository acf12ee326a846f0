"""What a run learns from, as its configuration asks for it."""

import dataclasses
import json

import numpy as np
import pytest

from configs import preferences
from dpo_jax import losses
from dpo_jax.data import digest, encode, examples
from dpo_jax.data.batches import Batching
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import UserError
from dpo_jax.training import data_checks, datasets, setup
from tests.support import prepared_sets, small_rows, small_tokenizers

MODEL = ModelConfig(
  family="llama", vocab=512, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8,
  max_positions=64, norm="rms", norm_eps=1e-5, positions="rotary", activation="silu", gated=True,
  qkv_bias=False, out_bias=False, mlp_bias=False, tied=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(small_tokenizers.byte_fallback(tmp_path_factory.mktemp("tokenizer")))


def load(path, tokenizer, loss="sigmoid", model=MODEL, **data):
  config = preferences.get_config(f"data={path},loss={loss}")
  config.data.update({"max_length": 64, "eval_fraction": 0.2, **data})
  settings = datasets.BatchSettings(batch_size=32, accumulate=1, seed=0, balance=True)
  rows = setup.data_settings(config)
  return datasets.load(rows, settings, Batching(), losses.resolve(loss), tokenizer, model)


def rows_file(folder, kind):
  return prepared_sets.write(folder / f"{kind}.jsonl", prepared_sets.rows_of(kind))


@pytest.mark.parametrize(("kind", "loss"), [("pairs", "sigmoid"), ("unpaired", "kto")])
def test_rows_of_a_prepared_set_stay_on_disk(tmp_path, tokenizer, kind, loss):
  path, out = rows_file(tmp_path, kind), tmp_path / "prepared"
  encoder = encode.Encoder(tokenizer, kind=kind, max_length=64)
  prepared_sets.prepare(out, path, encoder, eval_fraction=0.0)
  training_data, _ = load(out, tokenizer, loss, eval_fraction=0.0)
  plain, _ = load(path, tokenizer, loss, eval_fraction=0.0)
  assert isinstance(training_data.examples, examples.Lazy)
  prepared_sets.same(training_data.examples, plain.examples)
  for known, read in zip(
    examples.lengths(training_data.examples),
    examples.lengths(list(training_data.examples)),
    strict=True,
  ):
    assert np.array_equal(known, read)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_row_with_a_token_beyond_the_model_is_refused(tmp_path, prepared):
  """An added token may lie beyond the embedding as long as no row uses it."""
  folder = small_tokenizers.byte_fallback(tmp_path / "tokenizer")
  vocab = load_tokenizer(folder).vocab_size
  model = dataclasses.replace(MODEL, vocab=vocab)
  fields = json.loads((folder / "tokenizer.json").read_text())
  image = {"id": vocab, "content": "<image>", "special": True}
  image |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  fields["added_tokens"].append(image)
  (folder / "tokenizer.json").write_text(json.dumps(fields))
  tokenizer = load_tokenizer(folder)

  def read(rows):
    path = prepared_sets.write(tmp_path / "rows.jsonl", rows)
    if prepared:
      out = tmp_path / f"set{len(rows)}"
      prepared_sets.prepare(out, path, encode.Encoder(tokenizer, max_length=64), eval_fraction=0.0)
      path = out
    return load(path, tokenizer, model=model, eval_fraction=0.0)

  rows = [*prepared_sets.rows_of("pairs")]
  read(rows)
  more = {"prompt": "a <image>", "chosen": "b", "rejected": "c"}
  with pytest.raises(UserError, match=rf"data row \d+ contains token id {vocab}, and the mod"):
    read([*rows, more])


def test_another_weight_of_a_token_is_other_data():
  def digest_of(*token_weights):
    some = small_rows.examples(3)
    some[1] = some[1]._replace(token_weights=token_weights)
    return digest.of(some)

  plain, weighted = small_rows.examples(3)[1], []
  for value in (0.0, 0.5):
    weights = [w.copy() for w in examples.weights_of(plain)]
    weights[0][0] = value
    weighted.append(digest_of(*weights))
  assert len({digest_of(), *weighted}) == 3


@pytest.mark.parametrize("loss", ["npo", "simnpo"])
def test_unlearning_reads_labeled_completions_and_no_mismatched_ones(tmp_path, tokenizer, loss):
  path = rows_file(tmp_path, "unpaired")
  data, _ = load(path, tokenizer, loss, eval_fraction=0.0)
  assert data.completions == 1
  assert {example.scores for example in data.examples} == {(0.0,), (1.0,)}
  assert load(path, tokenizer, "kto", eval_fraction=0.0)[0].completions == 2


def test_a_loss_of_three_completions_has_three(tmp_path, tokenizer):
  answers = [" best", " good", " bad"]
  rows = [{"prompt": f"ask {i}", "answers": answers} for i in range(32)]
  path = prepared_sets.write(tmp_path / "three.jsonl", rows)
  assert load(path, tokenizer, "tpo", eval_fraction=0.0)[0].completions == 3
  rows[5]["answers"] = answers[:2]
  path = prepared_sets.write(tmp_path / "two.jsonl", rows)
  words = (
    r"loss 'tpo' needs 3 completions .* 1 of 32 prompts of .*two\.jsonl have fewer.* in row 5;"
  )
  with pytest.raises(UserError, match=words):
    load(path, tokenizer, "tpo", eval_fraction=0.0)
  assert load(path, tokenizer, "plackett_luce", eval_fraction=0.0)[0].completions == 3


@pytest.mark.parametrize(
  ("size", "accumulate", "groups", "way"),
  [
    (8, 1, 1, r"set --batch_size=7, or give more rows"),
    (8, 1, 2, r"set --batch_size=6, or"),
    (8, 2, 2, r"set --batch_size=4, or"),
    (8, 1, 8, r"--config\.parallel\.devices=1 --accumulate=1 .*batch_size=7, or"),
  ],
)
def test_a_batch_larger_than_the_data_is_refused(size, accumulate, groups, way):
  with pytest.raises(UserError, match=r"batch_size is 8 and d\.jsonl leaves 7 to train on.*" + way):
    data_checks.check_batch(size, accumulate, groups, 7, "d.jsonl")
  data_checks.check_batch(size, accumulate, groups, 8, "d.jsonl")
