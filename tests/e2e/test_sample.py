"""scripts/sample.py: what it writes, and what it refuses before any weights are read."""

import json
import subprocess
import sys

import pytest

from dpo_jax.data import formats
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.generation import rollouts, sampler, stopping
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError
from tests.support import small_tokenizers
from tests.support.paths import ROOT

SHAPE = {
  "model_type": "llama",
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 16,
  "initializer_range": 0.4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model folder, with a chat template."""
  path = tmp_path_factory.mktemp("model")
  settings = {"chat_template": small_tokenizers.CHATML, "eos_token": "<|im_end|>"}
  tokenizer = load_tokenizer(small_tokenizers.byte_level(path, **settings))
  config = families.from_hf(SHAPE | {"vocab_size": tokenizer.vocab_size, "eos_token_id": 2})
  hf_checkpoint.save(path, config, transformer.init_params(config, 0))
  small_tokenizers.byte_level(path, **settings)
  return path


def start(folder, *flags):
  command = [sys.executable, str(ROOT / "scripts" / "sample.py"), f"--model={folder}", *flags]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_samples_in_a_file_are_those_of_the_package(folder, tmp_path):
  asked = [
    {"prompt": "the answer"},
    {"prompt": [{"role": "user", "content": "good?"}]},
  ]
  (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
  out = tmp_path / "out.jsonl"
  flags = ("--num=2", "--max_tokens=12", "--min_p=0.01", "--seed=5", "--stop=e", "--stop_ids=7,9")
  process = start(folder, f"--prompts={tmp_path / 'asked.jsonl'}", f"--out={out}", *flags)
  (tmp_path / "none.txt").write_text("\n \n")
  (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
  # No weights stand in these folders: what is said is said before they are looked for.
  bare = small_tokenizers.byte_level(tmp_path / "bare")
  config = json.dumps(SHAPE | {"vocab_size": 400, "eos_token_id": 2})
  (bare / "config.json").write_text(config)
  refused = {
    "has no chat template": start(bare, "--prompt=a", "--chat"),
    "none.txt holds no prompts": start(bare, f"--prompts={tmp_path / 'none.txt'}"),
    "bad.jsonl:2: field 'prompt' is 3": start(bare, f"--prompts={tmp_path / 'bad.jsonl'}"),
    "--top_k cannot change": start(bare, "--prompt=a", "--temperature=0", "--top_k=2"),
  }
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  for message, refusing in refused.items():
    _, errors = refusing.communicate()
    assert refusing.returncode == 1 and message in errors and errors.count("\n") == 1

  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(row["index"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  assert [row["prompt"] for row in rows] == [one["prompt"] for one in asked for _ in range(2)]
  model = rollouts.load(folder)
  stops = stopping.Stops(model.tokenizer, (2,), (7, 9), ("e",))
  ids = rollouts.encode_prompts(model.tokenizer, [one["prompt"] for one in asked])
  completions = sampler.generate(
    model.config, model.params, ids, max_tokens=12, min_p=0.01, seed=5, num=2,
    eos_ids=(2, 7, 9), stop_fn=stops.stop_length,
  )  # fmt: skip
  assert [row["tokens"] for row in rows] == [len(ids) for each in completions for ids in each]
  assert [row["finish"] for row in rows] == [
    stops.finish_reason(ids) for each in completions for ids in each
  ]
  assert not any("e" in row["text"] for row in rows)


def test_prompts_are_written_as_rows_of_the_data_are():
  user = [{"role": "user", "content": "a"}]
  assert rollouts.frame(["a", user]) == ["a", user]
  assert rollouts.frame(["a", user], chat=True) == [user, user]
  row = {"instruction": "a", "chosen": "b", "rejected": "c"}
  read = next(one for one in formats.PAIRS if one.name == "instruction").convert(row)
  assert rollouts.frame(["a"], instruction=True) == [read.prompt]
  with pytest.raises(UserError, match="--instruction is for texts"):
    rollouts.frame([user], instruction=True)
  with pytest.raises(UserError, match="two ways to write a prompt"):
    rollouts.frame(["a"], chat=True, instruction=True)


def test_a_text_ends_an_answer_within_a_token(folder):
  tokenizer = load_tokenizer(folder)
  ids = tokenizer.encode_prompt("the answer is good")
  stops = stopping.Stops(tokenizer, (2,), (5,), ("swer i", "zz"))
  kept = stops.stop_length(ids)
  assert "swer i" in tokenizer.decode(ids[:kept]) and "swer i" not in tokenizer.decode(
    ids[: kept - 1]
  )
  assert stops.stop_length(ids[: kept - 1]) is None
  assert stops.truncate("the answer is good") == "the an"
  # The end token is known by its text, too.
  assert stopping.Stops(tokenizer, (), (), ("<|im_end|>",)).stop_length([4, 2, 4]) == 2
  assert [stops.finish_reason(ids) for ids in ([4, 2], [4, 5], [4, 4])] == ["end", "stop", "length"]
  with pytest.raises(UserError, match="a text to stop at is empty"):
    stopping.Stops(tokenizer, (), (), ("",))


def test_prompts_of_every_kind_of_file(tmp_path):
  (tmp_path / "lines.txt").write_text("\ufeffone\n\n two\n", "utf-8")
  assert rollouts.read_prompts(tmp_path / "lines.txt") == ["one", " two"]
  (tmp_path / "broken.txt").write_bytes(b"one\n\xff\n")
  with pytest.raises(UserError, match=r"broken\.txt:2: not UTF-8"):
    rollouts.read_prompts(tmp_path / "broken.txt")
  tools = [{"type": "function", "function": {"name": "weigh"}}]
  rows = [
    {"prompt": [{"role": "user", "content": "a"}], "tools": tools},
    {"prompt": [{"role": "user", "content": "a"}], "tools": json.dumps(tools)},
    {"prompt": [{"role": "user", "content": "a"}], "tools": None},
  ]
  (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  one, two, three = rollouts.read_prompts(tmp_path / "rows.jsonl")
  assert one == two and one.tools == tuple(tools) and isinstance(three, list)
  (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "tools": tools}))
  with pytest.raises(UserError, match="the prompt is text; a chat template writes tools"):
    rollouts.read_prompts(tmp_path / "rows.jsonl")
