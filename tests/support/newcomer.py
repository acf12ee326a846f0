"""Writes the folder of somebody who tries the project: models, rows, and runs.

No program is compiled for it: weights are random numbers, and runs are as training leaves them.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np

from configs import preferences
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import families, lora, transformer
from dpo_jax.training import setup
from dpo_jax.utils import workdir as workdirs
from tests.support import small_tokenizers

LLAMA = {
  "model_type": "llama",
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "intermediate_size": 24,
  "max_position_embeddings": 512,
}
PAIRS = [
  {"prompt": f"What is {n} + {n}?", "chosen": f" It is {2 * n}.", "rejected": f" It is {n}."}
  for n in range(1, 101)
]


def write() -> None:
  """Writes all of it to the current folder, since runs store paths as they were given."""
  model = write_model(pathlib.Path("model"))
  write_others(model)
  rows = pathlib.Path("pairs.jsonl")
  # One run began with other rows in the file of the same name.
  rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[::-1]))
  write_run(pathlib.Path("runs/before"))
  rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
  write_run(pathlib.Path("runs/stopped"))
  mine = write_run(pathlib.Path("runs/mine"))
  shutil.copytree(model, mine / "export")


def write_model(folder: pathlib.Path) -> pathlib.Path:
  """Writes a model with its tokenizer, and `adapter`, which was trained on it."""
  small_tokenizers.byte_level(folder)
  tokenizer = json.loads((folder / "tokenizer.json").read_text())
  vocab = 1 + max(tokenizer["model"]["vocab"].values())
  config = families.from_hf(LLAMA | {"vocab_size": vocab})
  rng = np.random.default_rng(0)

  def numbers(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

  params = jax.tree.map(numbers, transformer.param_shapes(config))
  hf_checkpoint.save(folder, config, params, source=folder)
  settings = lora.LoRA(rank=4)
  about = peft.Adapter(settings, str(folder), peft.fingerprint_of(params))
  adapters = lora.init(config, settings, 0)
  peft.save("adapter", config, adapters, about, source=folder)
  return folder


def write_others(model: pathlib.Path) -> None:
  """Writes folders and files that people take for a model that can be trained."""
  for name in (
    "bert",
    "quantized",
    "pickled",
    "pointer",
    "incomplete",
    "no-tokenizer",
    "other-tokenizer",
  ):
    shutil.copytree(model, name)
  set_fields(pathlib.Path("bert/config.json"), model_type="bert")
  method = {"quant_method": "gptq", "bits": 4}
  set_fields(pathlib.Path("quantized/config.json"), quantization_config=method)
  weights = pathlib.Path("pickled/model.safetensors")
  weights.rename(weights.with_name("pytorch_model.bin"))
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
  pathlib.Path("pointer/model.safetensors").write_text(pointer)
  weights = pathlib.Path("incomplete/model.safetensors")
  weights.write_bytes(weights.read_bytes()[:-100])
  pathlib.Path("no-tokenizer/tokenizer.json").unlink()
  small_tokenizers.byte_level(pathlib.Path("other-tokenizer"), special=("<|endoftext|>", "<pad>"))
  pathlib.Path("checkpoints").mkdir()
  shutil.copytree(model, "checkpoints/checkpoint-500")
  pathlib.Path("model.gguf").write_bytes(b"GGUF")


def set_fields(file: pathlib.Path, **fields: object) -> None:
  """Changes fields of a JSON file."""
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def write_run(folder: pathlib.Path) -> pathlib.Path:
  """Writes a run of `model` on `pairs.jsonl` that has taken two steps."""
  config = preferences.get_config("model=model,data=pairs.jsonl,beta=0.1")
  examined = setup.examine(config, folder)
  workdirs.claim(
    folder,
    config.to_json_best_effort(indent=2),
    examined.described.ledger,
    dict(examined.inputs),
    began=examined.began,
  )
  (folder / "checkpoints" / "2").mkdir(parents=True)
  (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 0.69}\n')
  return folder
