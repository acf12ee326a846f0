"""What a person is shown is what a model is trained on."""

import io
import json
import pathlib
import subprocess
import sys

import pytest
import small_tokenizers
from rich.console import Console

from dpo_jax.data import chat, pipeline, view

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROW = {"prompt": "the answer is", "chosen": " good 🙂é!", "rejected": " bad"}


@pytest.mark.parametrize("family", [small_tokenizers.byte_level, small_tokenizers.byte_fallback])
def test_pieces_are_the_text_and_hold_every_id(tmp_path, family):
  tokenizer = chat.load_tokenizer(family(tmp_path))
  ids = [*tokenizer.encode_prompt("the answer is good 🙂é, 한 \n\n bad"), tokenizer.eos_id]
  pieces = view.pieces(ids, tokenizer)
  assert "".join(text for text, _ in pieces) == tokenizer.decode(ids, special=True)
  assert [id for _, held in pieces for id in held] == ids
  assert all("\ufffd" not in text for text, _ in pieces)
  # Cut inside a character, what is left of it is shown as such.
  assert view.pieces(tokenizer.encode_prompt("🙂")[:-1], tokenizer)[-1][0] == "\ufffd"


def test_a_row_shows_texts_ids_and_ends(tmp_path):
  tokenizer = chat.load_tokenizer(small_tokenizers.byte_level(tmp_path / "model"))
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(ROW))
  (example,), ledger, _ = pipeline.load_examples(path, tokenizer)
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(view.show_example(example, tokenizer))
  console.print(view.show_ledger(ledger, [example]))
  shown = console.export_text()
  for part in ("the answer is", "good 🙂é!<|endoftext|>", "bad<|endoftext|>"):
    assert part in shown
  assert f"{len(example.answers[1])} tokens, scored, ended" in shown
  assert " ".join(map(str, example.answers[1])) in shown


def test_inspect_data_prints_one_object_or_one_line(tmp_path):
  model = small_tokenizers.byte_level(tmp_path / "model")
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in (ROW, ROW | {"chosen": " bad"})))
  script = ROOT / "scripts" / "inspect_data.py"

  def run(*arguments):
    return subprocess.run(
      [sys.executable, script, "--model", model, *arguments], capture_output=True, text=True
    )

  found = json.loads(run("--data", path, "--json").stdout)
  assert list(found) == ["format", "rows", "pairs", "dropped", "truncated", "tokens"]
  assert (found["rows"], found["pairs"], found["dropped"]) == (2, 1, {"equal answers": 1})
  assert set(found["tokens"]) == {"prompt", "answer", "padding", "shared"}
  assert json.loads(run("--data", f"{path},", "--json").stdout)["rows"] == 2
  missing = run("--data", tmp_path / "gone")
  assert missing.returncode == 1 and missing.stdout == ""
  assert missing.stderr == f"error: no data file {tmp_path / 'gone'}\n"
