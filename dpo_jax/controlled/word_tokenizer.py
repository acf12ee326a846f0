"""Writes a word-level tokenizer as a Hugging Face folder, from a list of words.

A piece is a word with the space before it (` good`) or one punctuation mark (`.`). So decoding is
concatenation, and a text of known pieces is decoded exactly. Every text begins with `<s>`; callers
add `</s>` where a text ends.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Sequence

UNKNOWN, START, END = SPECIALS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
# Every character matches one of the two alternatives, so no text is lost between the pieces.
PIECE = r" ?[A-Za-z']+|[^A-Za-z']"


def pieces(text: str) -> list[str]:
  """Splits a text into pieces as the tokenizer does."""
  return re.findall(PIECE, text)


def files(vocabulary: Sequence[str], *, max_length: int = 512) -> dict[str, dict]:
  """Returns the JSON files of the folder, by name.

  Args:
    vocabulary: pieces; piece k gets the id 3 + k.
    max_length: `model_max_length`, in tokens.
  """
  tokens = (*SPECIALS, *vocabulary)
  special: dict[str, bool] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  special["special"] = True
  text_a, text_b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
  start = {"SpecialToken": {"id": START, "type_id": 0}}
  tokenizer = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": i, "content": token} | special for i, token in enumerate(SPECIALS)],
    "normalizer": None,
    "pre_tokenizer": {
      "type": "Split",
      "pattern": {"Regex": PIECE},
      "behavior": "Isolated",
      "invert": False,
    },
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [start, text_a],
      "pair": [start, text_a, text_b],
      "special_tokens": {START: {"id": START, "ids": [1], "tokens": [START]}},
    },
    "decoder": {"type": "Fuse"},  # joins the pieces without adding spaces
    "model": {
      "type": "WordLevel",
      "vocab": {token: i for i, token in enumerate(tokens)},
      "unk_token": UNKNOWN,
    },
  }
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": START,
    "eos_token": END,
    "unk_token": UNKNOWN,
    "model_max_length": max_length,
    # True would delete the space before a punctuation mark when decoding.
    "clean_up_tokenization_spaces": False,
  }
  return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def write(path: str | os.PathLike, vocabulary: Sequence[str]) -> None:
  """Writes the tokenizer of these pieces into the folder `path`, which is made if it is missing."""
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files(vocabulary).items():
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")
