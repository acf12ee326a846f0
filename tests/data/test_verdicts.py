"""Verdicts: what a column means follows from all its values, or the user is asked."""

import pytest

from dpo_jax.commands import row_flags
from dpo_jax.data import detection, encode, verdicts
from dpo_jax.data.detection import detect
from dpo_jax.data.fields import BadRow, RowError
from dpo_jax.structs import UserError


def rows_of(*given, **more):
  return [
    {"prompt": f"p{i}", "answer_a": "a", "answer_b": "b", "preference": one, **more}
    for i, one in enumerate(given)
  ]


def outcomes(rows, **kwargs):
  """Returns (encoding, what each row says): the chosen completion and its weight, or a reason."""
  reading = detect(rows, **kwargs)
  found = []
  for row in rows:
    try:
      preference = reading.convert(row)
      assert preference.scores == (preference.weight, 0.0)
      found.append((preference.completions[0], pytest.approx(preference.weight)))
    except RowError as error:
      found.append(str(error))
  assert reading.encoding is not None and reading.encoding.describe() in reading.notes[0]
  return reading.encoding.name, found


A, B = ("a", 1), ("b", 1)


@pytest.mark.parametrize(
  ("given", "name", "meaning"),
  [
    ((1, 2), "index1", [A, B]),
    ((0, 1, 2), "index1", ["tie", A, B]),
    ((2,), "index1", [B]),
    ((1.0, 2.0), "index1", [A, B]),  # Parquet has whole columns of floats where one is null
    (("1", "2"), "index1", [A, B]),  # CSV has texts alone
    ((1, 2, "tie"), "index1", [A, B, "tie"]),
    ((1.5, 2, 1.2), "index1", ["tie", B, ("a", 0.6)]),  # AlpacaEval's share of 2
    (([1, 1, 1], [2, 1, 2], [1, 0, None]), "index1", [A, ("b", 1 / 3), ("a", 0.5)]),
    (([1, 2], [None, None], [2, 2]), "index1", ["tie", "no verdict", B]),
    (("A", " model_b ", "tie"), "words", [A, B, "tie"]),
    (("Response 2", "Response 1", "Neither"), "words", [B, A, "tie"]),
    (("left", "right", "first", "second"), "words", [A, B, A, B]),
    (("model_a", "model_b", "tie (bothbad)", "tie"), "words", [A, B, "tie", "tie"]),  # Arena
    (("[[A]]", "[[B]]", "[[C]]"), "words", [A, B, "tie"]),  # MT-bench's judge
    (("A>>B", "A>B", "A=B", "[[B>A]]"), "words", [A, ("a", 0.5), "tie", ("b", 0.5)]),
    (("a-is-better", "b is slightly better"), "words", [A, ("b", 0.5)]),
    ((["a-is-better", "b-is-slightly-better"], "b"), "words", [("a", 0.25), B]),
    (("response_0", "response_1"), "words0", [A, B]),
    (("response_1", "response_2"), "words", [A, B]),
  ],
)
def test_values_that_have_one_reading(given, name, meaning):
  assert outcomes(rows_of(*given)) == (name, meaning)


@pytest.mark.parametrize(
  ("given", "one", "other"),
  [
    ((0, 1), "index0", "first_is_better"),
    ((0, 0), "index0", "first_is_better"),
    ((1, 1), "index0", "index1"),
    ((True, False), "index0", "first_is_better"),
    (("1", "0"), "index0", "first_is_better"),
    ((0.2, 0.9), "index0", "first_is_better"),
    ((-3, 1), "signed", "positive_is_first"),
    ((-1, 0, 1), "signed", "positive_is_first"),
    (("response_1", "tie"), "words", "words0"),
  ],
)
def test_values_that_have_two_readings_stop_and_name_both(given, one, other):
  with pytest.raises(UserError, match="can be read in two ways") as raised:
    detect(rows_of(*given))
  line = str(raised.value)
  assert "\n" not in line and f"{one} (" in line and f"{other} (" in line
  assert f"--config.data.verdict={one}" in line and f"--verdict={one}" in line
  # Each of the two is then what it says, and they are opposites.
  chosen = [
    [
      found if isinstance(found, str) else found[0]
      for found in outcomes(rows_of(*given), verdict=v)[1]
    ]
    for v in (one, other)
  ]
  assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
  ("given", "verdict", "meaning"),
  [
    ((0, 1, 0.5, 2), "index0", [A, B, "tie", "tie"]),
    ((1, 0, 0.5, True), "first_is_better", [A, B, "tie", A]),
    ((0.9, 0.25), "first_is_better", [("a", 0.8), ("b", 0.5)]),
    ((-3, 3, 0, 1), "signed", [A, B, "tie", ("b", 1 / 3)]),
    ((-2, 2, 1), "positive_is_first", [B, A, ("a", 0.5)]),
    (("response_1", "response_0"), "words0", [B, A]),
    (([1, 0, 0], [0, 1, 0], [0, 0, 1]), "onehot", [A, B, "tie"]),
  ],
)
def test_a_reading_by_name(given, verdict, meaning):
  assert outcomes(rows_of(*given), verdict=verdict) == (verdict, meaning)


def test_columns_of_winners_are_told_from_annotators():
  """Arena's winner_model_a, winner_model_b and winner_tie: one of three columns is 1."""
  rows = [
    {"prompt": "p", "answer_a": "a", "answer_b": "b", "wa": a, "wb": b, "wt": t}
    for a, b, t in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
  ]
  assert outcomes(rows, fields={"preference": "wa+wb+wt"}) == ("onehot", [A, B, "tie"])
  # Three annotators' verdicts, none of whom prefers the first.
  rows = rows_of([2, 0, 0], [2, 2, 0], [0, 0, 2])
  assert outcomes(rows) == ("index1", [("b", 1 / 3), ("b", 2 / 3), ("b", 1 / 3)])


def test_the_column_of_ties_is_the_last():
  rows = [
    {"prompt": "p", "answer_a": "a", "answer_b": "b", "wins_a": x, "tie": y, "wins_b": z}
    for x, y, z in ((1, 0, 0), (0, 0, 1), (0, 1, 0))
  ]
  with pytest.raises(UserError, match=r"joins wins_a \+ tie \+ wins_b; the column for ties must"):
    detect(rows, {"preference": "wins_a+tie+wins_b"})
  name, found = outcomes(rows, fields={"preference": "wins_a+wins_b+tie"})
  assert (name, found) == ("onehot", [A, B, "tie"])


def test_true_and_false_may_be_text():
  with pytest.raises(UserError, match=r"index0 .* or first_is_better"):
    detect(rows_of("True", "False"))
  found = outcomes(rows_of("True", "False"), verdict="first_is_better")
  assert found == ("first_is_better", [A, B])


def test_public_columns_whose_names_decide():
  # HelpSteer2: -3 is "response 1 is much better", 3 "response 2 is much better".
  rows = [
    {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": one}
    for one in (-3, 2, 0)
  ]
  fields = {"answer_a": "response_1", "answer_b": "response_2", "preference": "preference_strength"}
  assert outcomes(rows, fields=fields) == ("signed", [A, ("b", 2 / 3), "tie"])
  # PKU-SafeRLHF: better_response_id is the number of response_0 or response_1.
  rows = [
    {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": one}
    for one in (0, 1)
  ]
  fields = {"answer_a": "response_0", "answer_b": "response_1", "preference": "better_response_id"}
  assert outcomes(rows, fields=fields) == ("index0", [A, B])


def test_all_rows_of_a_file_count_and_not_the_first_ones_alone():
  rows = rows_of(1, 1, 2)
  with pytest.raises(UserError, match="two ways"):
    detect(rows[:2])
  reading = detect(rows[:2], every_row=lambda: rows)
  assert reading.encoding == verdicts.Encoding("index1")


@pytest.mark.parametrize(
  "given", [(3,), (1, 2, 7), ("a", "c"), ("a or b",), ("better",), ("a", 1), (1, {"a": 1})]
)
def test_values_that_are_no_verdicts_are_named(given):
  with pytest.raises(UserError, match=r"field preference ") as raised:
    reading = detect(rows_of(*given))
    [reading.convert(row) for row in rows_of(*given)]
  assert "\n" not in str(raised.value)


def test_a_word_that_is_no_verdict_is_named_with_its_row(rows_file, tokenizer):
  rows = rows_of("a", "??", "b", prompt="the answer is", answer_a=" good", answer_b=" bad")
  with pytest.raises(
    BadRow, match=r"rows\.jsonl:2: field preference is \"\?\?\"; verdicts are read"
  ):
    encode.load_examples(rows_file(rows), tokenizer)
  _, ledger, _ = encode.load_examples(rows_file(rows), tokenizer, on_bad_row="drop")
  assert (ledger.pairs, ledger.dropped) == (2, {"broken field preference": 1})


def test_a_value_outside_the_named_reading_is_named():
  reading = detect(rows_of(0, 3), verdict="index0")
  with pytest.raises(BadRow, match=r"field preference is 3; verdicts are read as index0"):
    reading.convert(rows_of(3)[0])
  with pytest.raises(UserError, match=r"verdict 'index' is not one of index1, index0"):
    detect(rows_of(0, 1), verdict="index")


def test_flags_offer_what_the_data_code_knows():
  assert row_flags.VERDICTS == verdicts.ENCODINGS and row_flags.TRAIN_ON == detection.TRAIN_ON
