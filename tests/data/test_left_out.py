"""Warnings about rows that are left out or cut in large part, with the way out."""

import collections

import pytest

from dpo_jax.commands import inspect_data
from dpo_jax.data import encode, left_out, prepared
from dpo_jax.data.ledger import Ledger, merge, summarize
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import prepared_sets, small_tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(small_tokenizers.byte_fallback(tmp_path_factory.mktemp("tokenizer")))


def ledger(lengths, max_length=512, **dropped):
  """A ledger of rows with these lengths; of those beyond the limit, `dropped` says what became."""
  found = Ledger(rows=sum(lengths.values()), lengths=collections.Counter(lengths))
  found.max_length = max_length
  found.dropped.update({reason.replace("_", " "): count for reason, count in dropped.items()})
  return found.to_json()


LENGTHS = {400: 17, 900: 40, 1500: 30, 1900: 8, 4000: 5}


def test_the_line_of_rows_that_are_left_out_has_their_share_and_a_length():
  # Of 100 rows, 17 have 512 tokens or fewer, and 95 have 1900 or fewer.
  assert left_out.warnings(ledger(LENGTHS, too_long=83)) == [
    "warning: 83% of the rows are longer than data.max_length=512 and are left out;"
    " --max_length=1900 keeps 95%"
  ]


def test_rows_that_are_cut_are_told_likewise():
  assert left_out.warnings(ledger(LENGTHS)) == [
    "warning: 83% of the rows are longer than data.max_length=512 and are cut; --max_length=1900"
    " keeps 95% whole"
  ]
  (both,) = left_out.warnings(ledger(LENGTHS, too_long=60))
  assert "are left out (60%) or cut (23%); --max_length=1900 keeps 95% whole" in both
  (equal,) = left_out.warnings(ledger(LENGTHS, equal_completions_after_cutting=83))
  assert "are left out; --max_length=1900" in equal


def test_a_suggested_length_is_within_the_models_positions():
  found = ledger(LENGTHS, too_long=83)
  (line,) = left_out.warnings(found, positions=1500)
  assert line.endswith("; --max_length=1500, all positions of the model, keeps 85%")
  (line,) = left_out.warnings(found, positions=512)
  assert line.endswith("; the model has 512 positions, so longer rows cannot be kept")
  assert left_out.warnings(found, positions=1900) == left_out.warnings(found)


@pytest.mark.parametrize(("long", "lines"), [(9, 0), (10, 1)])
def test_a_tenth_of_the_rows_is_large(long, lines):
  assert len(left_out.warnings(ledger({100: 100 - long, 900: long}, too_long=long))) == lines
  equal = ledger({100: 100 - long}) | {"rows": 100, "dropped": {"equal completions": long}}
  assert len(left_out.warnings(equal)) == lines


@pytest.mark.parametrize(
  ("reason", "words"),
  [
    (
      "equal completions",
      "check the columns of both completions (data.fields.chosen and .rejected)",
    ),
    ("chat template: no place for tools", "data.template"),
    ("fewer than two completions", "--loss=sft"),
    ("something new", "dpo-jax inspect"),
  ],
)
def test_another_reason_is_named_with_its_way_out(reason, words):
  found = ledger({100: 40}) | {"rows": 100, "dropped": {reason: 60}}
  (line,) = left_out.warnings(found)
  assert line.startswith(f"warning: 60% of the rows are left out ({reason}): ") and words in line


def test_rows_that_cannot_be_read_name_the_first():
  bad = {"chosen": "rows.jsonl:7: field chosen is 3, not text"}
  found = ledger({100: 40}) | {"rows": 100, "dropped": {"chosen": 60}, "bad": bad}
  (line,) = left_out.warnings(found)
  assert line.endswith("(chosen): mend rows such as rows.jsonl:7: field chosen is 3, not text")


def test_rows_left_out_on_purpose_are_no_warning():
  found = ledger({100: 10}) | {"rows": 100, "dropped": {"duplicate": 45, "not drawn": 45}}
  assert left_out.warnings(found) == []


def test_percentiles_by_hand():
  found = left_out.percentiles(collections.Counter({10: 50, 20: 45, 30: 4, 40: 1}))
  assert [found[p] for p in ("5", "50", "55", "95", "99", "100")] == [10, 10, 20, 20, 30, 40]
  # 0.55 x 100 is a little more than 55 in floating point.
  assert left_out.percentiles(collections.Counter({10: 55, 20: 45}))["55"] == 10


def test_a_share_is_none_or_all_only_where_it_is():
  shares = [left_out.percent(part, 1000) for part in (0, 1, 500, 999, 1000)]
  assert shares == ["0%", "1%", "50%", "99%", "100%"]


def test_sources_together_have_the_lengths_of_all():
  one = Ledger(rows=2, lengths=collections.Counter({5: 2}), max_length=8)
  other = Ledger(rows=2, lengths=collections.Counter({5: 1, 9: 1}), max_length=8)
  longer = merge([one, other]).to_json()["longer"]
  assert (longer["rows"], longer["percentiles"]["75"], longer["percentiles"]["100"]) == (1, 5, 9)


# --- from rows ------------------------------------------------------------------------------------


def rows(tmp_path):
  """Ten rows: completions of one token, and of forty tokens in six of them."""
  many = [
    {"prompt": f"ask {i}", "chosen": " good" * (40 if i < 6 else 1), "rejected": " bad"}
    for i in range(10)
  ]
  return prepared_sets.write(tmp_path / "rows.jsonl", many)


@pytest.mark.parametrize("truncation", ["drop", "cut"])
def test_the_suggested_length_keeps_as_many_rows_as_it_says(tmp_path, tokenizer, truncation):
  path = rows(tmp_path)
  how = {"truncation": truncation, "prompt_floor": 4}
  _, found, _ = encode.load_examples(path, tokenizer, max_length=32, **how)
  (line,) = left_out.warnings(found.to_json())
  assert line.startswith("warning: 60% of the rows are longer than data.max_length=32 and are")
  length = int(line.split("--max_length=")[1].split()[0])
  for less, longer in ((0, 0), (1, 6)):
    _, found, _ = encode.load_examples(path, tokenizer, max_length=length - less, **how)
    assert found.to_json().get("longer", {}).get("rows", 0) == longer


def test_a_prepared_set_says_so_when_it_is_trained_on(tmp_path, tokenizer):
  encoder = encode.Encoder(tokenizer, max_length=32)
  prepared_sets.prepare(tmp_path / "set", rows(tmp_path), encoder, eval_fraction=0.0)
  _, _, found = prepared.read(tmp_path / "set", encoder, eval_fraction=0.0)
  line = summarize("set", found, prepared=True).splitlines()[-1]
  assert line.startswith("warning: 60% of the rows are longer than data.max_length=32")
  assert "; prepare them again with --max_length=" in line
  # A set that was made before lengths were counted.
  del found["longer"]
  assert left_out.warnings(found, prepared=True) == [
    "warning: 60% of the rows are too long and left out; raise max_length"
  ]


def test_a_row_shown_whole_that_the_default_of_training_would_lose():
  whole = Ledger(rows=100, lengths=collections.Counter(LENGTHS))
  (line,) = left_out.of_default(whole.longer(512), 100, None)
  assert line == (
    "warning: 83% of the rows are longer than the default of training, data.max_length=512, and"
    " would be left out or cut; --max_length=1900 keeps 95%"
  )
  (line,) = left_out.of_default(whole.longer(512), 100, 1000)
  assert line.endswith("--max_length=1000, all positions of the model, keeps 55%")
  assert left_out.of_default(whole.longer(4000), 100, None) == []
  assert left_out.of_default(whole.longer(1900), 100, None) == []  # 5 of 100


def test_the_default_of_training_is_what_inspecting_takes_it_to_be():
  from dpo_jax import defaults

  assert defaults.get_config().data.max_length == inspect_data.DEFAULT


def test_rows_beyond_rotary_positions_are_told_with_their_share():
  assert left_out.beyond_positions([3, 4, 4], 4, "to train on") is None
  line = left_out.beyond_positions([3, 4, 5, 6], 4, "to train on")
  assert line.startswith("50% of the rows to train on (2 of 4) are longer than the model's")
  assert "(max_position_embeddings)" in line and "--max_length=4 " in line
