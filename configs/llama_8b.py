"""A Llama 3.1 of 8B on one host of 8 chips: by LoRA, or all of it, divided by FSDP.

  python -m dpo_jax.train --config=llama_8b:lora --model=LLAMA_DIR --data=PREFERENCES.jsonl \\
    --workdir=runs/llama8b

Memory of every device by LoRA, on chips of 24 GB or more (each holds all of it), for a base of
P = 8,030,261,248 parameters and adapters of R = 41,943,040, rank 16 on every linear map. The
reference is the base itself:

  reference  the base, bfloat16            2 P  16.061 GB
  policy     adapters, float32             4 R   0.168 GB
  AdamW      two float32 moments           8 R   0.336 GB
  gradients  their sum and a micro-batch's 8 R   0.336 GB
  in all                                        16.899 GB

With `configs/llama_8b.py:fsdp`, on 8 chips of 40 GB or more (each holds an eighth, norms whole):

  policy     float32                       4 P   4.016 GB
  reference  bfloat16                      2 P   2.008 GB
  AdamW      two float32 moments           8 P   8.032 GB
  gradients  their sum and a micro-batch's 8 P   8.032 GB
  in all                                  22 P  22.088 GB

Beside that, a layer is gathered while it is used. With one micro-batch the gradients take 4 P.
Activations come on top: they go by data.max_length, and by train.accumulate (micro-batches) and
model.remat, which a run chooses from the memory of its devices. Worked out from shapes; not a
measurement.
"""

from dpo_jax import defaults
from dpo_jax.structs import UserError


def get_config(arg: str = "lora"):
  """The configuration; model.path and data.path are given on the command line."""
  if arg not in ("lora", "fsdp"):
    raise UserError(f"configs/llama_8b.py:{arg} is not known; known are lora and fsdp")
  config = defaults.get_config()
  config.model.compute_dtype = "bfloat16"
  config.reference.param_dtype = "bfloat16"
  config.data.max_length = 1024
  config.train.batch_size = 64
  if arg == "fsdp":
    config.parallel.fsdp = 8
    config.optimizer.learning_rate = 5e-7
    return config.lock()
  config.model.param_dtype = "bfloat16"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.optimizer.learning_rate = 2e-5
  return config.lock()
