"""A Llama 3.2 of 1B, all of it trained, on any number of devices of 40 GB or more.

  python -m dpo_jax.train --config=llama_1b --model=LLAMA_DIR --data=PREFERENCES.jsonl \\
    --workdir=runs/llama

Memory of every device (each holds all of it), for P = 1,235,814,400 parameters, V D for the tied
embedding and the rest in 16 layers:

  policy     float32                       4 P   4.943 GB
  reference  float32                       4 P   4.943 GB
  AdamW      two float32 moments           8 P   9.887 GB
  gradients  their sum and a micro-batch's 8 P   9.887 GB
  in all                                  24 P  29.660 GB

With one micro-batch the gradients take 4 P. Activations come on top: they go by data.max_length,
and by train.accumulate (micro-batches) and model.remat, which a run chooses from the memory of its
devices. Worked out from shapes; not a measurement.
"""

from dpo_jax import defaults


def get_config():
  """The configuration; model.path and data.path are given on the command line."""
  config = defaults.get_config()
  config.model.compute_dtype = "bfloat16"
  config.data.max_length = 1024
  config.optimizer.learning_rate = 5e-7
  config.train.batch_size = 64
  return config.lock()
