"""A Qwen2.5 of 0.5B, all of it trained, on any number of devices of 16 GB or more.

  python -m dpo_jax.train --config=qwen_0_5b --model=QWEN_DIR --data=PREFERENCES.jsonl \\
    --workdir=runs/qwen

Memory of every device (each holds all of it), for P = 494,032,768 parameters, V D for the tied
embedding and the rest in 24 layers:

  policy     float32                       4 P   1.976 GB
  reference  float32                       4 P   1.976 GB
  AdamW      two float32 moments           8 P   3.952 GB
  gradients  their sum and a micro-batch's 8 P   3.952 GB
  in all                                  24 P  11.857 GB

With one micro-batch the gradients take 4 P. Activations come on top: they go by data.max_length,
and by train.accumulate (micro-batches) and model.remat, which a run chooses from the memory of its
devices. Worked out from shapes; not a measurement. Where it is too much,
--config.reference.param_dtype=bfloat16 halves the reference, at the price of the step-0 check.
"""

from dpo_jax import defaults


def get_config():
  """The configuration; model.path and data.path are given on the command line."""
  config = defaults.get_config()
  config.model.compute_dtype = "bfloat16"
  config.data.max_length = 1024
  config.optimizer.learning_rate = 1e-6
  config.train.batch_size = 64
  return config.lock()
