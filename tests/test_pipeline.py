"""From files to batches: nothing lost uncounted, and batch k the same however one gets there."""

import collections
import itertools
import json

import numpy as np
import pytest
import small_tokenizers

from dpo_jax.data import chat, layout, packing, pipeline
from dpo_jax.data.layout import Example
from dpo_jax.structs import TokenBatch, UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return chat.load_tokenizer(small_tokenizers.byte_fallback(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows_file(tmp_path):
  """Writes rows, one a line, and says where."""

  def write(rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path

  return write


def pair(prompt="the answer is", chosen=" good", rejected=" bad"):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def examples(size, seed=0, longest=20, answers=2):
  rng = np.random.default_rng(seed)
  text = lambda: rng.integers(1, 100, rng.integers(1, longest + 1)).astype(np.int32)
  return [Example(text(), tuple(text() for _ in range(answers)), row=i) for i in range(size)]


def data_rows(batch: TokenBatch, answers=2) -> list[int]:
  """Data rows of a batch, each named once."""
  rows = batch.row_NS.reshape(-1, answers)[:, 0]
  return sorted(rows[rows >= 0].tolist())


def shapes(batch: TokenBatch):
  return tuple(x.shape for x in batch)


# --- loading --------------------------------------------------------------------------------------


def test_every_row_is_accounted_for(rows_file, tokenizer):
  path = rows_file(
    [
      pair(),
      pair(rejected=" good"),  # equal
      pair(rejected="  "),  # empty
      pair(chosen=" good" * 40),  # longer than the window
      pair(prompt="a question and " * 10),  # prompt cut
      pair(chosen=" is"),
    ]
  )
  found, ledger, form = pipeline.load_examples(path, tokenizer, max_length=40, prompt_floor=8)
  assert form == "strings"
  assert [example.row for example in found] == [0, 4, 5]
  assert all(example.prompt[0] == tokenizer.bos_id for example in found)
  lengths, answers = layout.lengths(found)
  assert (lengths + answers.max(1)).max() == 40
  taken = packing.costs(lengths, answers, "shared").sum()
  assert ledger.to_json() == {
    "format": "strings",
    "rows": 6,
    "pairs": 3,
    "dropped": {"equal answers": 1, "empty answer": 1, "too long": 1},
    "truncated": {"prompt": 1},
    "tokens": {
      "prompt": lengths.sum(),
      "answer": answers.sum(),
      "padding": ledger.tokens["padding"],
      "shared": lengths.sum() - 3,
    },
  }
  assert ledger.tokens["padding"] == -taken % layout.fit_row_length(found, "shared")
  json.dumps(ledger.to_json())


def test_a_cut_answer_has_no_end(rows_file, tokenizer):
  path = rows_file([pair(chosen=" good" * 40), pair(chosen=" is" * 40, rejected=" is" * 41)])
  found, ledger, _ = pipeline.load_examples(
    path, tokenizer, max_length=24, prompt_floor=4, truncation="cut"
  )
  (example,) = found
  chosen, rejected = (answer.tolist() for answer in example.answers)
  assert tokenizer.eos_id not in chosen and rejected[-1] == tokenizer.eos_id
  assert ledger.truncated == {"prompt": 1, "answer": 1}
  assert ledger.dropped == {"equal answers after cutting": 1}, "what differed was cut off"


def test_texts_to_learn_from_have_one_answer(rows_file, tokenizer):
  found, ledger, form = pipeline.load_examples(rows_file([pair()]), tokenizer, answers=1)
  assert len(found[0].answers) == 1 and ledger.tokens["shared"] == 0
  assert tokenizer.decode(found[0].answers[0]) == "good"
  found, _, form = pipeline.load_examples(rows_file([{"text": "the answer"}]), tokenizer, answers=1)
  assert form == "text" and found[0].prompt.tolist() == [tokenizer.bos_id]


def test_ids_are_scored_as_they_stand(rows_file, tokenizer):
  path = rows_file([{"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7]}])
  ((prompt, answers, *_),), ledger, form = pipeline.load_examples(path, tokenizer, max_length=8)
  assert (prompt.tolist(), [a.tolist() for a in answers]) == ([1, 5], [[6, 2], [7]])
  assert form == ledger.format == "ids"


def test_several_files_are_one_data_set(rows_file, tokenizer):
  paths = [rows_file([pair(), pair(" so")], "a"), rows_file([pair("and")], "b")]
  found, ledger, _ = pipeline.load_examples(paths, tokenizer)
  assert [example.row for example in found] == [0, 1, 2] and ledger.rows == 3
  found, ledger, _ = pipeline.load_examples(paths, tokenizer, limit=2)
  assert ledger.rows == 2


def test_each_file_has_a_form_of_its_own(rows_file, tokenizer):
  dialogue = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
  paths = [rows_file([pair()], "a"), rows_file([dialogue], "b")]
  found, ledger, form = pipeline.load_examples(paths, tokenizer)
  assert [example.row for example in found] == [0, 1] and not ledger.dropped
  assert form == ledger.format == "strings, transcripts"


@pytest.mark.parametrize(
  ("rows", "kwargs", "line"),
  [
    (
      [pair(rejected=" good")] * 2 + [pair(chosen="")],
      {},
      r"no row is of use in .*: 3 rows, dropped equal answers: 2, empty answer: 1$",
    ),
    (
      [pair(chosen=" good" * 30), pair(chosen=" good" * 20)],
      {"max_length": 8},
      r"max_length is 8 and the shortest answers take 21 tokens, raise max_length",
    ),
    ([pair(), pair(chosen=True)], {}, r"rows\.jsonl:2: field chosen is true, not text"),
    ([pair(), {"prompt": "a"}], {}, r"rows\.jsonl:2: field chosen is missing; the row has prompt"),
    ([{"a": 1}], {}, r"rows\.jsonl:1: a row with a is of no known form"),
    (
      [{"prompt_ids": [1], "chosen_ids": [70_000], "rejected_ids": [3]}],
      {},
      r"rows\.jsonl:1: token id 70000 is not in the tokenizer, whose ids go to \d+",
    ),
  ],
)
def test_bad_data_is_one_line(rows_file, tokenizer, rows, kwargs, line):
  with pytest.raises(UserError, match=line):
    pipeline.load_examples(rows_file(rows), tokenizer, **kwargs)


def test_a_tokenizer_must_fit_the_model(tokenizer):
  pipeline.check_vocabulary(tokenizer, tokenizer.vocab_size)
  with pytest.raises(UserError, match=r"ids go to \d+ and the model's vocabulary is 100; name"):
    pipeline.check_vocabulary(tokenizer, 100)


def test_split_keeps_a_prompt_on_one_side():
  some = [e._replace(prompt=np.array([e.row // 3], np.int32)) for e in examples(60)]
  train, held_out = pipeline.split(some, 0.2, seed=3)
  sides = [{int(e.prompt[0]) for e in side} for side in (train, held_out)]
  assert len(train) + len(held_out) == 60 and len(sides[1]) == 4
  assert not sides[0] & sides[1]
  again = pipeline.split(some, 0.2, seed=3)[1]
  assert [e.row for e in again] == [e.row for e in held_out]
  assert {e.row for e in pipeline.split(some, 0.2, seed=4)[1]} != {e.row for e in held_out}
  assert pipeline.split(some, 0.0) == (some, [])
  line = "0.01 of 20 distinct prompts leaves one side.*data.eval_fraction=0 .*data.eval_path"
  with pytest.raises(UserError, match=line):
    pipeline.split(some, 0.01)


def test_texts_of_one_prompt_are_split_one_by_one():
  some = [e._replace(prompt=np.array([1], np.int32)) for e in examples(20)]
  train, held_out = pipeline.split(some, 0.2)
  assert len(held_out) == 4 and sorted(e.row for e in train + held_out) == list(range(20))
  with pytest.raises(UserError, match=r"0.01 of 20 rows leaves one side"):
    pipeline.split(some, 0.01)


# --- batches --------------------------------------------------------------------------------------


def take(count, some, **kwargs):
  stream = pipeline.batches(some, **kwargs)
  return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_batch_k_is_the_same_however_one_gets_there(name):
  some = examples(37)
  kwargs = {"batch_size": 8, "accumulate": 2, "seed": 5, "layout": name, "groups": 2}
  straight = take(12, some, **kwargs)
  for start in (0, 1, 7, 11):
    resumed = take(1, some, start=start, **kwargs)[0]
    np.testing.assert_equal(resumed._asdict(), straight[start]._asdict())
  other = take(1, some, **(kwargs | {"seed": 6}))[0]
  assert data_rows(other) != data_rows(straight[0])


def test_an_epoch_is_every_example_once_and_in_another_order_than_the_last():
  some = examples(24)
  got = [data_rows(batch) for batch in take(12, some, batch_size=4, seed=1)]
  first, second = got[:6], got[6:]
  assert all(sorted(itertools.chain(*epoch)) == list(range(24)) for epoch in (first, second))
  assert first != second
  ordered = take(2, some, batch_size=4, shuffle=False)
  assert [data_rows(batch) for batch in ordered] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_order_does_not_know_layout_micro_batches_or_devices():
  some = examples(50)
  plain = [data_rows(batch) for batch in take(5, some, batch_size=12, seed=2)]
  for kwargs in ({"accumulate": 3}, {"groups": 4}, {"layout": "padded"}, {"layout": "packed"}):
    batches = take(5, some, batch_size=12, seed=2, **kwargs)
    assert [data_rows(batch) for batch in batches] == plain
    assert all(len(x) == kwargs.get("accumulate", 1) for batch in batches for x in batch)


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_few_shapes(name):
  some = examples(400, longest=40)
  seen = collections.Counter(
    shapes(batch) for batch in take(100, some, batch_size=32, layout=name, accumulate=2)
  )
  assert len(seen) <= 3 and seen.most_common(1)[0][1] >= 70


def test_fewer_examples_than_a_batch_are_repeated():
  (batch,) = take(1, examples(3), batch_size=6)
  assert data_rows(batch) == [0, 0, 1, 1, 2, 2]


def test_a_batch_is_whole_micro_batches():
  with pytest.raises(UserError, match="batch size 10 is not divisible by 4 micro-batches; try 8"):
    pipeline.batches(examples(20), batch_size=10, accumulate=4)


def test_a_row_that_is_too_short_is_found_before_the_first_batch():
  some = [*examples(50, longest=5), *examples(1, longest=90)]
  with pytest.raises(UserError, match=r"data row 0 takes .* rows hold 16; raise row_length"):
    pipeline.batches(some, batch_size=4, row_length=16)


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_evaluation_sees_every_example_once_in_one_shape(name, groups):
  some = examples(21)
  batches = list(pipeline.eval_batches(some, batch_size=8, layout=name, groups=groups))
  assert len({shapes(batch) for batch in batches}) == 1
  got = [data_rows(batch) for batch in batches]
  assert got == [list(range(8)), list(range(8, 16)), list(range(16, 21))]
  assert sum(float(batch.weight_NS.sum()) for batch in batches) == 2 * 21
  assert list(pipeline.eval_batches([], batch_size=8)) == []


def test_padding_is_counted_for_each_layout():
  # P - 1 + n + n: 5 tokens shared, 7 packed; two rows of 4 when padded.
  ids = lambda n: np.ones(n, np.int32)
  some = [Example(ids(3), (ids(1), ids(2)), row=i) for i in range(4)]
  count = lambda name, length: pipeline.count_padding(
    some, batch_size=2, layout=name, row_length=length
  )
  assert count("shared", 10) == 0
  assert count("shared", 12) == 2 * 2
  assert count("packed", 7) == 0
  assert count("padded", None) == 4 * (2 * 8 - 7), "rows of 8, the least multiple above 4"


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("file", "dropped"),
  [
    ("rasbt_instruction_pref.open.json", {"equal answers": 5}),
    ("hh_helpful_base_test.open.jsonl", {"prompts differ": 8, "empty answer": 3, "too long": 109}),
  ],
)
def test_real_preferences_make_batches(shared_data, file, dropped):
  real = chat.load_tokenizer(shared_data / "tokenizers" / "stories260k")
  some, ledger, _ = pipeline.load_examples(shared_data / "preferences" / file, real, max_length=512)
  assert ledger.dropped == dropped
  assert ledger.pairs == len(some) == ledger.rows - sum(dropped.values())
  assert ledger.tokens["padding"] < 0.15 * (ledger.tokens["prompt"] + ledger.tokens["answer"])
  batch = take(1, some, batch_size=16)[0]
  assert len(data_rows(batch)) == 16
  assert (batch.position_NL < 511).all() and batch.ids_NL.max() < real.vocab_size
