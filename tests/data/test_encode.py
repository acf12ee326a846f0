"""Files become examples: every dropped or truncated row is counted, every error is one line."""

import json
import re

import pytest

from dpo_jax.data import batches, collate, encode, packing
from dpo_jax.data import examples as data_examples
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.structs import UserError
from tests.support import small_tokenizers
from tests.support.small_rows import pair, score_the_last

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
  found, ledger, form = encode.load_examples(path, tokenizer, max_length=40, prompt_floor=8)
  assert form == "strings"
  assert [example.row for example in found] == [0, 4, 5]
  assert all(example.prompt[0] == tokenizer.bos_id for example in found)
  measured = data_examples.lengths(found)
  assert measured.longest().max() == 40
  taken = packing.costs(measured, "shared").sum()
  written = ledger.to_json()
  assert written.pop("longer")["rows"] == 2
  assert written == {
    "format": "strings",
    "rows": 6,
    "pairs": 3,
    "dropped": {"equal completions": 1, "empty completion": 1, "too long": 1},
    "truncated": {"prompt": 1},
    "tokens": {
      "prompt": measured.prompt_B.sum(),
      "answer": measured.tokens_BK.sum(),
      "scored": measured.tokens_BK.sum(),
      "padding": ledger.tokens["padding"],
      "shared": measured.prompt_B.sum() - 3,
    },
  }
  assert ledger.tokens["padding"] == -taken % collate.fit_row_length(found, "shared")
  json.dumps(ledger.to_json())


def test_an_answer_whose_scored_tokens_are_cut_off_is_dropped(rows_file, tokenizer, monkeypatch):
  """Only the last token is scored: of a longer answer that is cut, nothing would be left."""
  score_the_last(monkeypatch, tokenizer)
  path = rows_file([pair(), pair(chosen=" good" * 40, rejected=" bad" * 40)])
  found, ledger, _ = encode.load_examples(path, tokenizer, max_length=40, truncation="cut")
  assert ledger.dropped == {"no scored token after cutting": 1}
  (example,) = found
  for ids, weights in zip(example.completions, example.token_weights, strict=True):
    assert weights.tolist() == [0] * (len(ids) - 1) + [1]
  assert ledger.tokens["scored"] == 2 < ledger.tokens["answer"]
  # One by one as unpaired completions, each has its own weights.
  rows = [{"prompt": "the answer is", "completion": " good", "label": True}]
  (alone,), _, _ = encode.load_examples(rows_file(rows), tokenizer, kind="unpaired")
  assert [len(weights) for weights in alone.token_weights] == [len(alone.completions[0])]


def test_a_cut_answer_has_no_end(rows_file, tokenizer):
  path = rows_file([pair(chosen=" good" * 40), pair(chosen=" is" * 40, rejected=" is" * 41)])
  found, ledger, _ = encode.load_examples(
    path, tokenizer, max_length=24, prompt_floor=4, truncation="cut"
  )
  (example,) = found
  chosen, rejected = (answer.tolist() for answer in example.completions)
  assert tokenizer.eos_id not in chosen and rejected[-1] == tokenizer.eos_id
  assert ledger.truncated == {"prompt": 1, "answer": 1}
  assert ledger.dropped == {"equal completions after cutting": 1}, "what differed was cut off"


def test_texts_to_learn_from_have_one_answer(rows_file, tokenizer):
  found, ledger, form = encode.load_examples(rows_file([pair()]), tokenizer, kind="text")
  assert len(found[0].completions) == 1 and ledger.tokens["shared"] == 0
  assert tokenizer.decode(found[0].completions[0]) == "good"
  path = rows_file([{"text": "the answer"}])
  found, _, form = encode.load_examples(path, tokenizer, kind="text")
  assert form == "text" and found[0].prompt.tolist() == [tokenizer.bos_id]


def test_ids_are_scored_as_they_stand(rows_file, tokenizer):
  path = rows_file([{"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7]}])
  ((prompt, completions, *_),), ledger, form = encode.load_examples(path, tokenizer, max_length=8)
  assert (prompt.tolist(), [a.tolist() for a in completions]) == ([1, 5], [[6, 2], [7]])
  assert form == ledger.format == "ids"


def test_several_files_are_one_data_set(rows_file, tokenizer):
  paths = [rows_file([pair(), pair(" so")], "a"), rows_file([pair("and")], "b")]
  found, ledger, _ = encode.load_examples(paths, tokenizer)
  assert [example.row for example in found] == [0, 1, 2] and ledger.rows == 3
  found, ledger, _ = encode.load_examples(paths, tokenizer, limit=2)
  assert ledger.rows == 2


def test_each_file_has_a_form_of_its_own(rows_file, tokenizer):
  dialogue = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
  paths = [rows_file([pair()], "a"), rows_file([dialogue], "b")]
  found, ledger, form = encode.load_examples(paths, tokenizer)
  assert [example.row for example in found] == [0, 1] and not ledger.dropped
  assert form == ledger.format == "strings, transcripts"


# --- judged and ranked answers, margins -----------------------------------------------------------


def judged(label=True, prompt="the answer is", completion=" good"):
  return {"prompt": prompt, "completion": completion, "label": label}


def ranked(*completions, prompt="the answer is", **rest):
  return {"prompt": prompt, "answers": list(completions), **rest}


def test_judged_answers_and_pairs_taken_apart(rows_file, tokenizer):
  paths = [
    rows_file([judged(), judged(0, completion=" bad"), judged(completion="  ")], "judged"),
    rows_file([pair("so", margin=3), pair(rejected=" good")], "pairs"),
  ]
  found, ledger, form = encode.load_examples(paths, tokenizer, kind="unpaired")
  assert form == "completion with label, strings"
  assert [(e.row, e.scores) for e in found] == [(0, (1,)), (1, (0,)), (3, (1,)), (3, (0,))]
  texts = [tokenizer.decode(e.completions[0]) for e in found]
  assert texts == ["good", "bad", "good", "bad"] and all(len(e.completions) == 1 for e in found)
  assert found[2].prompt.tolist() == found[3].prompt.tolist()
  # A row is kept or dropped, also one that became two answers.
  assert (ledger.rows, ledger.pairs) == (5, 3)
  written = ledger.to_json()
  assert written["dropped"] == {"empty completion": 1, "equal completions": 1}
  assert written["labels"] == {"desirable": 2, "undesirable": 2}
  assert written["tokens"]["shared"] == 0


def test_ranked_answers_are_filled_up_to_the_most(rows_file, tokenizer):
  rows = [
    ranked(" bad", " good", scores=[1, 2]),
    ranked(" is", " good", " bad", " so", scores=[4, 3, 2, 1]),
    ranked(" bad"),
    ranked(" good", " is", " good"),
  ]
  path = rows_file(rows)
  found, ledger, form = encode.load_examples(path, tokenizer, kind="ranked")

  def texts(example):
    return [tokenizer.decode(completion) for completion in example.completions]

  assert form == "ranked" and "labels" not in ledger.to_json()
  assert [texts(e) for e in found] == [["good", "bad", "", ""], ["is", "good", "bad", "so"]]
  assert [e.scores for e in found] == [(2, 1, 0, 0), (4, 3, 2, 1)]
  assert ledger.dropped == {"fewer than two completions": 1, "equal completions": 1}
  # Copies of the prompt that shared rows save: one for the row of two, three for the row of four.
  assert ledger.tokens["shared"] == (1 + 3) * (len(found[0].prompt) - 1)

  both = [path, rows_file([pair(chosen_score=2, rejected_score=1)], "pairs")]
  found, ledger, form = encode.load_examples(both, tokenizer, kind="ranked")
  assert form == "ranked, strings" and texts(found[-1]) == ["good", "bad", "", ""]
  assert found[-1].scores == (2, 1, 0, 0)
  (batch,) = batches.eval_batches(found, batch_size=8)
  assert sorted({*batch.row_NS.ravel().tolist()} - {-1}) == [0, 1, 4]


def test_ranked_answers_may_become_equal_by_cutting(rows_file, tokenizer):
  path = rows_file([ranked(" so", " is" * 40, " is" * 41), ranked(" so", " is" * 40, " good")])
  found, ledger, _ = encode.load_examples(
    path, tokenizer, kind="ranked", max_length=24, prompt_floor=4, truncation="cut"
  )
  assert [e.row for e in found] == [1]
  assert ledger.dropped == {"equal completions after cutting": 1}


def test_margins_and_scores_are_scores(rows_file, tokenizer):

  def scores(*rows):
    return [example.scores for example in encode.load_examples(rows_file(rows), tokenizer)[0]]

  assert scores(pair()) == [()]
  assert scores(pair(margin=2), pair(margin=0)) == [(2, 0), (0, 0)]
  assert scores(pair(chosen_score=1, rejected_score=3)) == [(1, 3)]
  rewarded = rows_file([pair(chosen_reward=1.5, rejected_reward=-1)])
  some, _, _ = encode.load_examples(rewarded, tokenizer)
  (batch,) = batches.eval_batches(some, batch_size=1)
  assert batch.score_NS.tolist() == [[1.5, -1]]


@pytest.mark.parametrize(
  ("rows", "kind", "line"),
  [
    (
      [pair(), pair(rejected="", margin=1), pair(margin=1), pair()],
      "pairs",
      r"rows\.jsonl:3: the rows before have no score or margin and this one has one; give one to",
    ),
    (
      [pair(chosen_score=1, rejected_score=0), pair(margin=1), pair(margin=None)],
      "pairs",
      r"rows\.jsonl:3: the rows before have a score or margin and this one has none; give one to",
    ),
    (
      [ranked(" a", " b"), ranked(" a", " b", scores=[1, 2])],
      "ranked",
      r"rows\.jsonl:2: the rows before have no score or margin and this one has one",
    ),
    ([pair(margin="large")], "pairs", r'rows\.jsonl:1: field margin is "large", not a finite'),
    ([judged(), judged("yes")], "unpaired", r'rows\.jsonl:2: field label is "yes"; it must be'),
    ([judged()], "pairs", r"rows\.jsonl:1: .* with a label are for --loss kto; a pair has "),
    ([ranked(" a", " b")], "pairs", r"rows\.jsonl:1: .* are for --loss plackett_luce; a pair has "),
    ([ranked(" a")] * 2, "ranked", r"no usable row in .* dropped fewer than two completions: 2"),
  ],
)
def test_bad_scores_and_labels_are_one_line(rows_file, tokenizer, rows, kind, line):
  with pytest.raises(UserError, match=line) as raised:
    encode.load_examples(rows_file(rows), tokenizer, kind=kind, scores=True)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  ("row", "kind"),
  [
    (judged(), "unpaired"),
    (ranked(" a", " b"), "ranked"),
    (pair(), "pairs"),
    ({"text": "a"}, "text"),
  ],
)
def test_what_rows_are_is_decided_by_most_of_them(rows_file, row, kind):
  assert encode.detect_kind(rows_file([{"a": 1}, row, row])) == kind
  with pytest.raises(UserError, match=r"rows\.jsonl:1: the row has fields a; a pair has "):
    encode.detect_kind(rows_file([{"a": 1}, {"a": 2}]))


@pytest.mark.parametrize("scores", [None, False, True])
def test_scores_stop_only_a_loss_that_reads_them(rows_file, tokenizer, scores):
  """Of one kind of row each: half a pair of scores, words, scores in some rows alone."""
  for rows in ([pair(chosen_score=9)], [pair(margin="much")], [pair(), pair(margin=1)]):
    if scores:
      with pytest.raises(UserError):
        encode.load_examples(rows_file(rows), tokenizer, scores=True)
    else:
      found, ledger, _ = encode.load_examples(rows_file(rows), tokenizer, scores=scores)
      assert [e.scores for e in found] == [()] * len(rows)
      assert len(ledger.notes) == (scores is None)


# --- what is wrong with a file --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("rows", "kwargs", "line"),
  [
    (
      [pair(rejected=" good")] * 2 + [pair(chosen="")],
      {},
      r"no usable row in .*: 3 rows, dropped equal completions: 2, empty completion: 1; check",
    ),
    (
      [pair(chosen=" good" * 30), pair(chosen=" good" * 20)],
      {"max_length": 8},
      r"max_length is 8 and the shortest completions take 21 tokens: --max_length=38 keeps 95%",
    ),
    ([pair(), pair(chosen=3)], {}, r"rows\.jsonl:2: field chosen is 3, not text"),
    ([{"prompt": "a", "chosen": None, "rejected": "b"}], {}, r"jsonl:1: the row has fields chosen"),
    ([{"a": 1}], {}, r"rows\.jsonl:1: the row has fields a; a pair has "),
    (
      [{"prompt_ids": [1], "chosen_ids": [70_000], "rejected_ids": [3]}],
      {},
      r"rows\.jsonl:1: token id 70000 is not in the tokenizer, whose ids go to \d+",
    ),
  ],
)
def test_bad_data_is_one_line(rows_file, tokenizer, rows, kwargs, line):
  with pytest.raises(UserError, match=line):
    encode.load_examples(rows_file(rows), tokenizer, **kwargs)


def test_a_tokenizer_must_fit_the_model(tokenizer):
  encode.check_vocabulary(tokenizer, tokenizer.vocab_size)
  with pytest.raises(UserError, match=r"ids go to \d+ and the model's vocabulary is 100; name"):
    encode.check_vocabulary(tokenizer, 100)


def test_added_tokens_may_lie_beyond_the_model(tmp_path):
  """Gemma 3's tokenizer has a token for images, which the 1B model has no row for."""
  folder = small_tokenizers.byte_level(tmp_path)
  file = folder / "tokenizer.json"
  fields = json.loads(file.read_text())
  plain = load_tokenizer(folder)
  image = fields["added_tokens"][0] | {"id": plain.vocab_size, "content": "<image>"}
  file.write_text(json.dumps(fields | {"added_tokens": [*fields["added_tokens"], image]}))
  tokenizer = load_tokenizer(folder)
  assert tokenizer.vocab_size == plain.vocab_size + 1
  encode.check_vocabulary(tokenizer, plain.vocab_size)
  # The ordinary tokens must fit all the same.
  with pytest.raises(UserError, match="name the tokenizer that belongs to the model"):
    encode.check_vocabulary(tokenizer, plain.vocab_size - 1)


@pytest.mark.parametrize(
  ("template", "words"),
  [
    (None, "names no eos_token: completions have no end, and a model does not learn to stop;"),
    (small_tokenizers.CHATML, r"turns of its chat template end with <\|im_end\|>, and plain texts"),
  ],
)
def test_a_tokenizer_without_an_end_is_reported(tmp_path, capsys, template, words):
  settings = {"eos_token": None} | ({"chat_template": template} if template else {})
  encode.report_end(load_tokenizer(small_tokenizers.byte_level(tmp_path / "none", **settings)))
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(words, line)
  encode.report_end(load_tokenizer(small_tokenizers.byte_level(tmp_path / "some")))
  assert capsys.readouterr().err == ""
