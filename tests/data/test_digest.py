"""Digests of examples: the same for what is learned alike, another for whatever differs."""

import json

import numpy as np
import pytest

from dpo_jax.data import digest, prepared
from dpo_jax.data.encode import Encoder
from dpo_jax.data.examples import Example
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import prepared_sets, small_tokenizers


def ids(*numbers):
  return np.array(numbers, np.int32)


ONE = Example(ids(1, 2), (ids(3, 4), ids(5)), weight=0.5, row=7, scores=(2.0, 1.0))


@pytest.mark.parametrize(
  "other",
  [
    ONE._replace(prompt=ids(1, 3)),
    ONE._replace(completions=(ids(5), ids(3, 4))),  # the labels swapped
    ONE._replace(completions=(ids(3), ids(4, 5))),  # the same ids, divided elsewhere
    ONE._replace(prompt=ids(1), completions=(ids(2, 3, 4), ids(5))),
    ONE._replace(weight=1.0),
    ONE._replace(scores=(1.0, 2.0)),
    ONE._replace(scores=()),
  ],
)
def test_whatever_is_learned_counts(other):
  assert digest.of([other]) != digest.of([ONE])


def test_number_and_reference_do_not_count():
  same = ONE._replace(row=8, reference=(np.zeros(2, np.float32),) * 2)
  assert digest.of([same]) == digest.of([ONE])


def test_order_and_number_of_examples_count():
  two = ONE._replace(prompt=ids(9))
  found = {digest.of(some) for some in ([], [ONE], [ONE, ONE], [ONE, two], [two, ONE])}
  assert len(found) == 5


def test_a_field_that_came_later_leaves_digests_as_they_were():
  """A field at its default adds nothing: `weight` and `scores` here, others some day."""
  plain = Example(ids(1), (ids(2), ids(3)))
  assert digest.of([plain]) == digest.of([plain._replace(weight=1.0, scores=())])


def test_a_prepared_set_knows_the_digest_of_its_rows(tmp_path):
  tokenizer = load_tokenizer(small_tokenizers.byte_fallback(tmp_path / "tokenizer"))
  rows = prepared_sets.rows_of("pairs")
  path = prepared_sets.write(tmp_path / "rows.jsonl", rows)
  encoder = Encoder(tokenizer)
  prepared_sets.prepare(tmp_path / "set", path, encoder, eval_fraction=0.0)
  examples, _, _ = prepared.read(tmp_path / "set", encoder, eval_fraction=0.0)
  known = prepared.stored_digests(tmp_path / "set")
  assert known == {"train": digest.of(examples)}
  # Rows of the same lengths that the sample would miss still have another digest.
  assert digest.of_some(examples, known["train"]) != digest.of_some(examples, "another")
  about = json.loads((tmp_path / "set" / "metadata.json").read_text())
  del about["digests"]  # a set that was made before
  (tmp_path / "set" / "metadata.json").write_text(json.dumps(about))
  assert prepared.stored_digests(tmp_path / "set") == {}
  assert digest.of_some(examples, None) != digest.of_some(examples[::-1], None)
