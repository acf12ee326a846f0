"""Provides preferences of a few words, examples of random ids, a tokenizer and files of rows."""

import json

import numpy as np
import pytest

from dpo_jax.data.examples import Example
from dpo_jax.data.fields import RowError
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import small_tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(small_tokenizers.byte_fallback(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows_file(tmp_path):
  """Returns a function that writes rows, one per line, and returns the path."""

  def write(rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path

  return write


def pair(prompt="the answer is", chosen=" good", rejected=" bad", **rest):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}


def score_the_last(monkeypatch, tokenizer):
  """Makes a tokenizer give all tokens of a completion the weight 0, except the last one."""
  encode = tokenizer.encode_preferences

  def weigh(tokens):
    weights = [np.zeros(len(ids), np.float32) for ids in tokens.completions]
    for one in weights:
      one[-1] = 1
    return tokens._replace(token_weights=tuple(weights))

  def encode_preferences(rows):
    return [x if isinstance(x, RowError) else weigh(x) for x in encode(rows)]

  monkeypatch.setattr(tokenizer, "encode_preferences", encode_preferences)


def examples(size, seed=0, longest=20, completions=2):
  """Samples examples of 1 to `longest` random ids per prompt and per completion."""
  rng = np.random.default_rng(seed)

  def text():
    return rng.integers(1, 100, rng.integers(1, longest + 1)).astype(np.int32)

  return [Example(text(), tuple(text() for _ in range(completions)), row=i) for i in range(size)]
