"""Measures the training step of a configuration, or its model's generation, through their own code.

  python scripts/benchmark.py                                    a 25M Llama on synthetic pairs
  python scripts/benchmark.py --config=configs/benchmark.py:controlled
  python scripts/benchmark.py --config=configs/preferences.py:model=DIR,data=FILE
  python scripts/benchmark.py --generate --rows=64 --new_tokens=256

Prints one JSON line. Rates are medians over blocks of steps. A token is counted once: the prompt
of a pair is shared by its answers, whatever the layout. FLOPs are those of the matrix products that
the objective needs (6 a parameter and token for the policy, 2 for the reference, the head at scored
tokens only); their share of this machine's own product rate is the model FLOP utilisation. Told too
are the share of time in which a step waits for its batch, and that of padding in the rows.

With --generate, answers to random prompts are sampled from the initial model, none of them ending
early: tokens of prompts read a second, tokens of answers written a second, and answers' tokens a
second of both together.

Beside programs of other libraries, on one machine and in turns, a driver adds one JSON object:

  python scripts/benchmark.py --config=configs/benchmark.py:b \\
    '{"lockstep": true, "blocks": 9, "block_steps": 2, "warmup": 2}'

It says `@{"ready": true}` when everything is compiled and warm; each line `go` on its input then
runs a block, told as `@{"block": {…}}`: wall_s, cpu_s, pairs, tokens, other_cores (that other
programs used), rss_mb, peak_rss_mb, and peak_memory_mb (of the accelerator, or again of the process
on a CPU). `tokens` are counted there as trainers that repeat the prompt
do: twice the prompt, and both answers.
"""

import sys

import _root  # noqa: F401 (puts the package on the path)
from absl import flags
from ml_collections import config_flags

from dpo_jax.utils import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "what is measured")
# Written out rather than a default of the flag, whose overrides would be parsed before `cli` runs.
if not any(x.split("=")[0].lstrip("-") == "config" for x in sys.argv[1:]):
  sys.argv.insert(1, "--config=configs/benchmark.py:b")
BLOCKS = flags.DEFINE_integer("blocks", 4, "blocks that are timed", lower_bound=1)
STEPS = flags.DEFINE_integer("block_steps", 4, "steps of a block", lower_bound=1)
GENERATE = flags.DEFINE_bool("generate", False, "measure generation instead of training")
ROWS = flags.DEFINE_integer("rows", 64, "prompts that are answered at once", lower_bound=1)
PROMPT = flags.DEFINE_integer("prompt_tokens", 64, "tokens of a prompt", lower_bound=1)
NEW = flags.DEFINE_integer("new_tokens", 128, "tokens of an answer", lower_bound=2)


def main(argv):
  import json
  import pathlib
  import tempfile
  import time

  started = time.perf_counter()
  import jax

  from dpo_jax.benchmarking import pacing, timing
  from dpo_jax.distributed import processes
  from dpo_jax.training.setup import build

  jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the results
  pace = pacing.Pace(BLOCKS.value, STEPS.value)
  if len(argv) > 1:
    pace = pacing.read(argv[1], pace)
  config = CONFIG.value
  section = config.parallel
  where = (section.coordinator, section.processes, section.process)
  processes.start(*where, notice=False)
  with tempfile.TemporaryDirectory() as folder:
    if not config.data.path and "synthetic" in config:
      config.data.path, config.model.tokenizer = timing.write_task(
        pathlib.Path(folder),
        config.model.scratch.vocab_size,
        max_length=config.data.max_length,
        seed=config.seed,
        **config.synthetic,
      )
    run, params, reference, _ = build(config, pathlib.Path(folder))
  if GENERATE.value:
    result = timing.measure_generation(
      run.model_config,
      run.executor.unreplicate(run.executor.place(params)),
      rows=ROWS.value,
      prompt_tokens=PROMPT.value,
      new_tokens=NEW.value,
      blocks=BLOCKS.value,
      dtype=config.model.compute_dtype,
      seed=config.seed,
    )
  else:
    result = timing.measure(run, params, reference, pace=pace, started=started)
  if processes.is_main_process():
    print(json.dumps(result))


if __name__ == "__main__":
  cli.run(main, arguments=1)
