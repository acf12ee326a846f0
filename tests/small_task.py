"""A random Llama with a tokenizer, a few preferences, and a run on them that takes seconds."""

import json

from configs import preferences
from dpo_jax.data import controlled, word_level
from dpo_jax.model import families, hf, transformer

LLAMA = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": len(controlled.vocabulary()) + 8,  # room for the special ids
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "initializer_range": 0.3,
  }
)


def write(folder, seed=0):
  """`base`, a model with its tokenizer, and `pairs.jsonl`, in a folder."""
  word_level.write(folder / "tokenizer", controlled.vocabulary())
  params = transformer.init_params(LLAMA, seed)
  hf.save(folder / "base", LLAMA, params, source=folder / "tokenizer")
  texts = controlled.distinct(64, seed=0)
  rows = [
    {"prompt": p, "chosen": a, "rejected": other}
    for (p, a), (_, other) in zip(texts[::2], texts[1::2], strict=True)
  ]
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return folder


def configured(task, **changes):
  """Four steps on two devices, with changes by their dotted names."""
  config = preferences.get_config()
  config.model.path, config.data.path = str(task / "base"), str(task / "pairs.jsonl")
  config.data.row_length = 128
  config.train.update(steps=4, batch_size=8)
  config.checkpoint.every = 2
  config.eval.every = 2
  config.parallel.devices = 2
  config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
  config.update_from_flattened_dict(changes)
  return config
