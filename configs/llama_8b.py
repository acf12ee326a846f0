"""A Llama 3.1 of 8B by LoRA, on one host of 8 chips of 24 GB or more.

  python -m dpo_jax.train --config=configs/llama_8b.py:lora --workdir=runs/llama8b \\
    --config.model.path=LLAMA_DIR --config.data.path=PREFERENCES.jsonl

Memory of every device (each holds all of it), for a base of P = 8,030,261,248 parameters and
adapters of R = 41,943,040, rank 16 on every linear map. The reference is the base itself:

  reference  the base, bfloat16            2 P  16.061 GB
  policy     adapters, float32             4 R   0.168 GB
  AdamW      two float32 moments           8 R   0.336 GB
  gradients  their sum and a micro-batch's 8 R   0.336 GB
  in all                                        16.899 GB

Activations come on top: they go by train.accumulate (micro-batches), data.max_length and
model.remat. Worked out from shapes; not a measurement. Training all of the model takes 24 bytes a
parameter, 192.726 GB, divided over devices, which this version does not do.
"""

from dpo_jax import defaults
from dpo_jax.structs import UserError


def get_config(arg: str = "lora"):
  """The configuration; model.path and data.path are given on the command line."""
  if arg != "lora":
    raise UserError(f"configs/llama_8b.py:{arg} is not known; the model is trained by lora")
  config = defaults.get_config()
  config.model.compute_dtype = "bfloat16"
  config.model.param_dtype = "bfloat16"
  config.model.remat = "full"
  config.reference.param_dtype = "bfloat16"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.data.max_length = 1024
  config.optimizer.learning_rate = 2e-5
  config.train.batch_size = 64
  config.train.accumulate = 8
  return config.lock()
