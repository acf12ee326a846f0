"""The preview shows exactly the tokens that a model is trained on."""

import io
import json
import shlex

import numpy as np
import pytest
from rich.console import Console

from dpo_jax.data import encode, packing, preview
from dpo_jax.data.examples import Example, with_mismatched
from dpo_jax.data.ledger import count_tokens
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import in_process, small_tokenizers

ROW = {"prompt": "the answer is", "chosen": " good 🙂é!", "rejected": " bad"}


@pytest.mark.parametrize("family", [small_tokenizers.byte_level, small_tokenizers.byte_fallback])
def test_pieces_are_the_text_and_hold_every_id(tmp_path, family):
  tokenizer = load_tokenizer(family(tmp_path))
  ids = [*tokenizer.encode_prompt("the answer is good 🙂é, 한 \n\n bad"), tokenizer.eos_id]
  pieces = preview.pieces(ids, tokenizer)
  assert "".join(text for text, _ in pieces) == tokenizer.decode(ids, special=True)
  assert [id for _, held in pieces for id in held] == ids
  assert all("\ufffd" not in text for text, _ in pieces)
  # Cut inside a character, what is left of it is shown as such.
  assert preview.pieces(tokenizer.encode_prompt("🙂")[:-1], tokenizer)[-1][0] == "\ufffd"


def test_a_row_shows_texts_ids_and_ends(tmp_path):
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path / "model"))
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(ROW))
  (example,), ledger, _ = encode.load_examples(path, tokenizer)
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(preview.show_example(example, tokenizer))
  console.print(preview.show_ledger(ledger, [example]))
  shown = console.export_text()
  for part in ("the answer is", "good 🙂é!<|endoftext|>", "bad<|endoftext|>"):
    assert part in shown
  assert f"{len(example.completions[1])} tokens, scored, ended" in shown
  assert " ".join(map(str, example.completions[1])) in shown


def test_a_turn_that_the_template_ends_is_ended(tmp_path):
  """Its end token is not the EOS; a completion that was cut, or given as ids, may have none."""
  settings = {"chat_template": small_tokenizers.CHATML}
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path / "model", **settings))
  end = tokenizer.token_text(tokenizer.end_ids[1])
  assert end == "<|im_end|>" != tokenizer.token_text(tokenizer.eos_id)
  chosen, rejected = tokenizer.encode_prompt("good" + end), tokenizer.encode_prompt(end + "bad")
  example = Example(np.array([5]), (np.array(chosen), np.array(rejected)))
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(preview.show_example(example, tokenizer))
  good, bad = console.export_text().split("rejected ·")
  assert "scored, ended" in good and "scored, no end token" in bad


def show(folder, kind, *rows):
  tokenizer = load_tokenizer(small_tokenizers.byte_level(folder / "model"))
  path = folder / "rows.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  examples, ledger, _ = encode.load_examples(path, tokenizer, kind=kind)
  if kind == "unpaired":
    examples = with_mismatched(examples)
  console = Console(width=100, record=True, file=io.StringIO())
  for example in examples:
    console.print(preview.show_example(example, tokenizer, kind=kind))
  console.print(preview.show_ledger(ledger, examples))
  return console.export_text()


def test_context_is_marked_and_explained(tmp_path):
  """Of " good is bad" the token " is" is context, in the shades of the prompt and between marks."""
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path / "model"))
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(ROW | {"chosen": " good is bad"}))
  (example,), ledger, _ = encode.load_examples(path, tokenizer)
  chosen, rejected = example.completions
  size = len(preview.pieces(chosen, tokenizer))
  weights = np.ones(len(chosen), np.float32)
  assert size == len(chosen) == 4, "one token a word, and the end"
  weights[1] = 0
  example = example._replace(token_weights=(weights, np.ones(len(rejected), np.float32)))
  ledger.tokens = count_tokens([example])
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(preview.show_example(example, tokenizer))
  console.print(preview.show_ledger(ledger, [example]))
  shown = console.export_text()
  assert " good⟦ is⟧ bad<|endoftext|>" in shown
  assert "chosen · 4 tokens, 3 scored, 1 context, ended" in shown
  assert f"rejected · {len(rejected)} tokens, scored, ended" in shown
  assert "⟦ context: given, not scored ⟧" in shown
  assert ledger.to_json()["tokens"]["scored"] == 3 + len(rejected)
  assert "of completions; given, not scored" in shown
  segments = console.render(preview.show_example(example, tokenizer))
  styles = {text: str(style) for text, style, _ in segments}
  assert "on green3" in styles[" good"] and preview.GIVEN[1] in styles[" is"]
  assert " on " not in styles[" is"]
  weights[1] = 0.5
  console.print(preview.show_example(example, tokenizer))
  shown = console.export_text()
  assert "chosen · 4 tokens, scored with weights 0.5 to 1, ended" in shown and "⟧" not in shown


def test_labels_scores_and_ranks_are_shown(tmp_path):
  judged = {"prompt": "the answer is", "completion": " good", "label": True}
  other = {"prompt": "a", "completion": " bad", "label": 0}
  shown = show(tmp_path, "unpaired", judged, other, other | {"prompt": "and"})
  _, first, *others = shown.split("─ row ")
  assert "│ desirable · 2 tokens, scored, ended" in first and "mismatched · 2 tokens" in first
  assert len(others) == 2 and all("│ undesirable · 2 tokens" in other for other in others)
  shown = show(tmp_path, "pairs", ROW | {"margin": 1.5})
  assert "chosen (score 1.5) · " in shown and "rejected (score 0) · " in shown
  ranked = {"prompt": "the answer is", "answers": [" bad", " good", " is"], "scores": [0, 2.5, 1]}
  shown = show(tmp_path, "ranked", ranked, ranked | {"answers": [" a", " b"], "scores": [0, 1]})
  assert "completion 1 of 3 (score 2.5)" in shown and "completion 3 of 3 (score 0)" in shown
  assert "completion 2 of 2 (score 0)" in shown and "completion 3 of 2" not in shown
  assert "at least 2, 2.5 on average" in shown
  assert " completion · " in show(tmp_path, "text", ROW)


def test_inspect_data_prints_one_object_or_one_line(tmp_path):
  model = small_tokenizers.byte_level(tmp_path / "model")
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in (ROW, ROW | {"chosen": " bad"})))

  def run(*arguments):
    words = ["dpo-jax", "inspect", "--model", model, *arguments]
    return in_process.run(shlex.join(map(str, words)), tmp_path)

  found = json.loads(run("--data", path, "--json").stdout)
  assert list(found) == ["format", "rows", "pairs", "dropped", "truncated", "tokens"]
  assert (found["rows"], found["pairs"], found["dropped"]) == (2, 1, {"equal completions": 1})
  assert set(found["tokens"]) == {"prompt", "answer", "scored", "padding", "shared"}
  assert json.loads(run("--data", f"{path},", "--json").stdout)["rows"] == 2
  found = json.loads(run("--data", path, "--json", "--kind", "unpaired").stdout)
  assert found["labels"] == {"desirable": 1, "undesirable": 1}
  ranked = tmp_path / "ranked.jsonl"
  row = {"prompt": ROW["prompt"], "answers": [ROW["prompt"] + x for x in (" good", " bad", " is")]}
  ranked.write_text("\n".join(map(json.dumps, [row, row, row | {"answers": 3}])))
  found = run("--data", ranked, "--on_bad_row=drop").stdout
  assert "completion 1 of 3" in found and "format: ranked" in found
  # What a user should know is a line of its own.
  note, bad = found.splitlines()[-2:]
  assert note == "the completions begin with their prompt, which is taken away"
  assert bad.startswith(f"dropped {ranked}:3: field answers is 3, not a list")
  wrong = run("--data", ranked, "--kind", "pairs")
  assert wrong.status == 1 and "lists of ranked completions are for --loss" in wrong.stderr
  missing = run("--data", tmp_path / "gone")
  assert missing.status == 1 and missing.stdout == ""
  assert missing.stderr == f"error: no data file {tmp_path / 'gone'}\n"


def test_cuts_are_marked_and_dropped_rows_say_why(tmp_path):
  tokenizer = load_tokenizer(small_tokenizers.byte_level(tmp_path / "model"))
  long = {"prompt": "the answer is " * 20, "chosen": " good" * 40, "rejected": " bad"}
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in (long, ROW | {"chosen": " bad"}, ROW)))
  whole = encode.load_examples(path, tokenizer)[0][0]
  how = {"max_length": 40, "prompt_floor": 4, "truncation": "cut"}
  encoder = encode.Encoder(tokenizer, **how)
  console = Console(width=100, record=True, file=io.StringIO())
  for row, outcome in enumerate(encode.first_rows(path, encoder, 3)):
    console.print(preview.show_row(row, outcome, tokenizer))
  cut, rest = console.export_text().split("row 1: dropped, equal completions")
  assert "row 0, cut" in cut and "─ row 2 ─" in rest and preview.CUT not in rest
  assert f"4 tokens, given, ✂ {len(whole.prompt) - 4} cut before" in cut and "│ ✂" in cut
  lost = len(whole.completions[0]) - 36
  assert f"chosen · 36 tokens, scored, no end token, ✂ {lost} cut after" in cut
  assert cut.count("cut after") == 1 and "rejected · 2 tokens, scored, ended" in cut


def test_histograms_count_every_text(tmp_path):

  def ids(*lengths):
    return [np.zeros(length, np.int32) for length in lengths]

  examples = [
    Example(*ids(1), tuple(ids(2, 3))),
    Example(*ids(4), tuple(ids(5, 8))),
    Example(*ids(9), tuple(ids(9, 0))),
  ]
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(preview.show_lengths(examples), preview.show_layouts(examples))
  rows = [line.replace("█", " ").split() for line in console.export_text().splitlines()]
  counts = {row[0]: row[1:] for row in rows if row and row[0][0].isdigit()}
  assert counts == {
    "1": ["1", "0"],
    "2": ["0", "1"],
    "3-4": ["1", "1"],
    "5-8": ["0", "2"],
    "9-16": ["1", "1"],
  }
  # Six texts in rows of 24; at 64 tokens a row, everything fits one.
  taken = {row[0]: row[1:] for row in rows if row and row[0] in packing.LAYOUTS}
  assert taken["padded"] == ["144", "100.0%", "24"]
  assert taken["shared"] == ["64", "44.4%", "64"] == taken["packed"]
