"""Measures the training step of a configuration, through the same code as training.

  python scripts/benchmark.py                                    a 25M Llama on synthetic pairs
  python scripts/benchmark.py --config=configs/benchmark.py:controlled
  python scripts/benchmark.py --config=configs/preferences.py:model=DIR,data=FILE

Prints one JSON line. Rates are medians over blocks of steps. A token is counted once: the prompt
of a pair is shared by its answers, whatever the layout. FLOPs are those of the matrix products that
the objective needs (6 a parameter and token for the policy, 2 for the reference, the head at scored
tokens only); their share of this machine's own product rate is the model FLOP utilisation.
"""

import sys

import _root  # noqa: F401 (puts the package on the path)
from absl import flags
from ml_collections import config_flags

from dpo_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "what is measured")
# Written out rather than a default of the flag, whose overrides would be parsed before `cli` runs.
if not any(x.split("=")[0].lstrip("-") == "config" for x in sys.argv[1:]):
  sys.argv.insert(1, "--config=configs/benchmark.py:b")
BLOCKS = flags.DEFINE_integer("blocks", 4, "blocks that are timed", lower_bound=1)
STEPS = flags.DEFINE_integer("block_steps", 4, "steps of a block", lower_bound=1)


def main(_):
  import json
  import pathlib
  import tempfile
  import time

  started = time.perf_counter()
  config = CONFIG.value

  import jax

  from dpo_jax import benchmark
  from dpo_jax.build import build

  jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the results
  config = CONFIG.value
  with tempfile.TemporaryDirectory() as folder:
    if not config.data.path and "synthetic" in config:
      config.data.path, config.model.tokenizer = benchmark.write_task(
        pathlib.Path(folder),
        config.model.scratch.vocab_size,
        max_length=config.data.max_length,
        seed=config.seed,
        **config.synthetic,
      )
    run, params, reference, _ = build(config, pathlib.Path(folder))
  result = benchmark.measure(
    run, params, reference, blocks=BLOCKS.value, block_steps=STEPS.value, started=started
  )
  print(json.dumps(result))


if __name__ == "__main__":
  cli.run(main)
