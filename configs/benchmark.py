"""What scripts/benchmark.py measures: models of known shapes, random weights, synthetic pairs.

  python scripts/benchmark.py --config=configs/benchmark.py:b

Shapes: `controlled` is the embedded task's; a, b and c are Llamas of 1.5M, 25M and 110M parameters.
Texts have log-normal lengths, the prompt a share of each that both answers have in common.
"""

from ml_collections import ConfigDict

from dpo_jax import defaults
from dpo_jax.structs import UserError

# Vocabulary, width, layers, heads, key and value heads, inner width, tied head.
SHAPES = {
  "controlled": (296, 96, 3, 3, 3, 288, True),
  "a": (512, 128, 7, 4, 2, 384, False),
  "b": (32000, 384, 6, 6, 2, 1536, True),
  "c": (50304, 768, 12, 12, 4, 2304, True),
}


def get_config(arg: str = "b"):
  """The configuration of one shape; `arg` names it."""
  if arg not in SHAPES:
    raise UserError(f"configs/benchmark.py:{arg} is no shape; known: {', '.join(SHAPES)}")
  vocab, width, layers, heads, kv_heads, inner, tied = SHAPES[arg]
  config = defaults.get_config()
  config.model.scratch = ConfigDict(
    {
      "model_type": "llama",
      "vocab_size": vocab,
      "hidden_size": width,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "num_key_value_heads": kv_heads,
      "intermediate_size": inner,
      "max_position_embeddings": 2048,
      "tie_word_embeddings": tied,
    }
  )
  short = arg == "controlled"
  config.synthetic = defaults.section(
    pairs=512,
    mean_length=34 if short else 250,  # tokens of a prompt and one answer
    prompt_fraction=0.38 if short else 0.6,
    sigma=0.3 if short else 0.6,  # of the logarithm of lengths
  )
  config.data.eval_fraction = 0.0  # every row is trained on
  config.data.max_length = 64 if short else 512
  config.train.batch_size = 64 if short else 8
  return config.lock()
