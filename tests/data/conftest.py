"""Tokenizers that several files of tests use."""

import pytest

from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import small_tokenizers

SHARED = ("gpt2", "qwen3", "mistral-7b-instruct-v0.3", "minimind", "stories260k")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """One tokenizer of each family."""
  folder = tmp_path_factory.mktemp("tokenizers")
  return {
    "byte_level": load_tokenizer(small_tokenizers.byte_level(folder / "bytes")),
    "byte_fallback": load_tokenizer(small_tokenizers.byte_fallback(folder / "fallback")),
    "word_level": load_tokenizer(small_tokenizers.word_level(folder / "words")),
    "chatml": load_tokenizer(
      small_tokenizers.byte_level(
        folder / "chatml", chat_template=small_tokenizers.CHATML, eos_token="<|im_end|>"
      )
    ),
    "system_last": load_tokenizer(
      small_tokenizers.byte_fallback(
        folder / "system_last", chat_template=small_tokenizers.SYSTEM_LAST
      )
    ),
  }


@pytest.fixture(scope="module", params=SHARED)
def real(request, shared_data):
  return load_tokenizer(shared_data / "tokenizers" / request.param)
