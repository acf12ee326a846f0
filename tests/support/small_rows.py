"""Preferences of a few words, and examples of random ids, with a tokenizer and a file for them."""

import json

import numpy as np
import pytest

from dpo_jax.data.examples import Example
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import small_tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(small_tokenizers.byte_fallback(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows_file(tmp_path):
  """Writes rows, one a line, and says where."""

  def write(rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path

  return write


def pair(prompt="the answer is", chosen=" good", rejected=" bad", **rest):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}


def examples(size, seed=0, longest=20, completions=2):
  rng = np.random.default_rng(seed)
  text = lambda: rng.integers(1, 100, rng.integers(1, longest + 1)).astype(np.int32)
  return [Example(text(), tuple(text() for _ in range(completions)), row=i) for i in range(size)]
