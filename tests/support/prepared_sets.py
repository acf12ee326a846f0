"""Writes small files of preferences, and prepares data sets from them."""

import json

import numpy as np

from dpo_jax.data import prepared

WORDS = ["the", "answer", "is", "good", "bad", "question"]


def text(rng, longest=6):
  return " ".join(rng.choice(WORDS, rng.integers(1, longest)))


def rows_of(kind, count=90):
  """Yields random rows of a kind, and at last a row whose completions are all empty."""
  rng = np.random.default_rng(0)
  for i in range(count):
    prompt = f"question {i // 3}"  # three rows per prompt
    if kind == "ranked":
      completions = [f" {text(rng)} {k}" for k in range(rng.integers(2, 5))]
      yield {
        "prompt": prompt,
        "answers": completions,
        "scores": list(range(len(completions), 0, -1)),
      }
    elif kind == "unpaired":
      yield {"prompt": prompt, "completion": f" {text(rng)}", "label": bool(rng.integers(2))}
    else:
      pair = {"prompt": prompt, "chosen": f" {text(rng)} 1", "rejected": f" {text(rng)} 2"}
      yield pair | {"weight": 1 + i % 3}
  yield {"prompt": "a", "completion": "", "label": True, "answers": ["", ""]} | dict.fromkeys(
    ("chosen", "rejected"), ""
  )


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def prepare(out, paths, encoder, **how):
  """Prepares a data set and returns its ledger."""
  (*_, ledger) = prepared.prepare(out, paths, encoder, **how)
  return ledger


def same(found, expected):
  """Asserts that two sequences of examples are identical."""
  assert len(found) == len(expected)
  for left, right in zip(found, expected, strict=True):
    assert (left.row, left.weight, left.scores) == (right.row, right.weight, right.scores)
    parts = [(e.prompt, *e.completions, *e.token_weights) for e in (left, right)]
    for one, other in zip(*parts, strict=True):
      np.testing.assert_array_equal(one, other)
