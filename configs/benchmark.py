"""What scripts/benchmark.py measures: models of known shapes, random weights, synthetic pairs.

  python scripts/benchmark.py --config=benchmark:b
  python scripts/benchmark.py --config=benchmark:llama_1b,lengths=ultrafeedback

Shapes, in float32: `controlled` is the embedded task's; a, b and c are Llamas of 1.5M, 25M and
110M parameters. In bfloat16, with float32 where it counts: `qwen_0_5b` (vocabulary 151,936),
`llama_1b` (128,256) and `llama_8b` (the same, by LoRA of rank 16) have the shapes of Qwen2.5 0.5B,
Llama 3.2 1B and Llama 3.1 8B; `long` is qwen_0_5b on pairs whose texts have 32,768 tokens.

Texts have log-normal lengths, the prompt a share of each that both completions have in common.
`lengths` replaces a shape's own: `ultrafeedback` has a window of 2,048 tokens, short prompts and
long completions; `hh` one of 512, dialogues as prompts and short completions.
"""

from ml_collections import ConfigDict

from dpo_jax import defaults
from dpo_jax.structs import UserError


def llama(vocab, width, layers, heads, kv_heads, inner, tied, **more):
  """Fields of a config.json."""
  return {
    "model_type": "llama",
    "vocab_size": vocab,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "intermediate_size": inner,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": tied,
  } | more


QWEN = llama(151936, 896, 24, 14, 2, 4864, True, model_type="qwen2", rope_theta=1e6)
LONG = {"max_position_embeddings": 32768}
LLAMA = {"rope_theta": 5e5, "max_position_embeddings": 131072}
SHAPES = {
  "controlled": llama(296, 96, 3, 3, 3, 288, True),
  "a": llama(512, 128, 7, 4, 2, 384, False),
  "b": llama(32000, 384, 6, 6, 2, 1536, True),
  "c": llama(50304, 768, 12, 12, 4, 2304, True),
  "qwen_0_5b": QWEN | LONG,
  "llama_1b": llama(128256, 2048, 16, 32, 8, 8192, True, head_dim=64, **LLAMA),
  "llama_8b": llama(128256, 4096, 32, 32, 8, 14336, False, **LLAMA),
  "long": QWEN | LONG,
}
SMALL = ("controlled", "a", "b", "c")

# Window, mean tokens of a prompt and one answer, the prompt's share, sigma of their logarithms.
LENGTHS = {
  "controlled": (64, 34, 0.38, 0.3),
  "short": (512, 250, 0.6, 0.6),
  "ultrafeedback": (2048, 500, 0.35, 0.8),
  "hh": (512, 220, 0.7, 0.6),
  "long": (32768, 32768, 0.75, 0.0),
}
USUAL = dict.fromkeys(("a", "b", "c"), "short") | {"controlled": "controlled", "long": "long"}


def get_config(arg: str = "b"):
  """The configuration of one shape; `arg` names it, and perhaps lengths=NAME behind a comma."""
  name, _, rest = arg.partition(",")
  if name not in SHAPES:
    raise UserError(f"configs/benchmark.py:{name} is no shape; known: {', '.join(SHAPES)}")
  lengths = defaults.parse(rest, ("lengths",)).get("lengths", USUAL.get(name, "ultrafeedback"))
  if lengths not in LENGTHS:
    raise UserError(f"lengths={lengths} is not known; known: {', '.join(LENGTHS)}")
  config = defaults.get_config()
  config.model.scratch = ConfigDict(SHAPES[name])
  window, mean, fraction, sigma = LENGTHS[lengths]
  config.synthetic = defaults.section(
    pairs=2 if lengths == "long" else 512,
    mean_length=mean,  # tokens of a prompt and one answer
    prompt_fraction=fraction,
    sigma=sigma,  # of the logarithm of lengths
  )
  config.data.eval_fraction = 0.0  # every row is trained on
  config.data.max_length = window
  config.train.batch_size = {"controlled": 64, "long": 1}.get(name, 8)
  if name not in SMALL:
    config.model.compute_dtype = "bfloat16"
  if name == "long":
    config.model.remat = "narrow"
  if name == "llama_8b":
    config.model.param_dtype = config.reference.param_dtype = "bfloat16"
    config.lora.rank = 16
    config.lora.alpha = 32.0
  return config.lock()
