"""Measures the training step of a configuration, or its model's generation, in the production code.

  dpo-jax benchmark                                    a 25M Llama on synthetic pairs
  dpo-jax benchmark --config=benchmark:controlled
  dpo-jax benchmark --config=preferences:model=DIR,data=FILE
  dpo-jax benchmark --generate --rows=64 --new_tokens=256

Prints one JSON line. Rates are medians over blocks of steps. A token counts once: the two
completions of a pair share its prompt, whatever the layout. FLOPs are those of the matrix products
that the objective needs (6 per parameter and token for the policy, 2 for the reference, the head at
scored tokens only). Model FLOP utilisation is their share of the product rate measured on this
machine. Two more fractions are reported: of time in which a step waits for its batch, and of
padding in the rows.

With --generate, the initial model completes random prompts, and no completion ends early. Reported
are prompt tokens per second, new tokens per second, and new tokens per second of both together.

A driver that runs this in turns with programs of other libraries, on one machine, adds one JSON
object:

  dpo-jax benchmark --config=benchmark:b \\
    '{"lockstep": true, "blocks": 9, "block_steps": 2, "warmup": 2}'

It prints `@{"ready": true}` once everything is compiled and warm. Each line `go` on its input then
runs a block, reported as `@{"block": {…}}`: wall_s, cpu_s, pairs, tokens, other_cores (used by
other programs), rss_mb, peak_rss_mb, and peak_memory_mb (of the accelerator; on a CPU, of the
process). There `tokens` are counted as by trainers that repeat the prompt: twice the prompt, and
both completions.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax.utils import paths

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file(
    "config", None, "NAME, NAME:ARG, or FILE.py, FILE.py:ARG, FILE.yaml"
  )
  flags.DEFINE_integer("blocks", 4, "timed blocks", lower_bound=1)
  flags.DEFINE_integer("block_steps", 4, "steps per block", lower_bound=1)
  flags.DEFINE_bool("generate", False, "measure generation instead of training")
  flags.DEFINE_integer("rows", 64, "prompts completed at once", lower_bound=1)
  flags.DEFINE_integer("prompt_tokens", 64, "tokens per prompt", lower_bound=1)
  flags.DEFINE_integer("new_tokens", 128, "tokens per completion", lower_bound=2)


def main(argv: list[str]) -> None:
  import json
  import pathlib
  import tempfile
  import time

  # Before jax is imported, which the seconds to the first step include.
  started = time.perf_counter()
  import jax

  from dpo_jax.benchmarking import pacing, timing
  from dpo_jax.distributed import processes
  from dpo_jax.training.setup import build

  jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the results
  pace = pacing.Pace(FLAGS.blocks, FLAGS.block_steps)
  if len(argv) > 1:
    pace = pacing.read(argv[1], pace)
  config = FLAGS.config
  paths.expand_fields(config)
  section = config.parallel
  where = (section.coordinator, section.processes, section.process)
  # SIGTERM ends a benchmark: it has nothing to save.
  processes.start(*where, notice=False)
  # The folder may go after set-up: rows and tokenizer are in memory by then.
  with tempfile.TemporaryDirectory() as folder:
    if not (config.data.path or config.data.mix) and "synthetic" in config:
      config.data.path, config.model.tokenizer = timing.write_task(
        pathlib.Path(folder),
        config.model.scratch.vocab_size,
        max_length=config.data.max_length,
        seed=config.seed,
        **config.synthetic,
      )
    run, params, reference, _ = build(config, pathlib.Path(folder))
  if FLAGS.generate:
    result = timing.measure_generation(
      run.model_config,
      run.executor.unreplicate(run.executor.place(params)),
      rows=FLAGS.rows,
      prompt_tokens=FLAGS.prompt_tokens,
      new_tokens=FLAGS.new_tokens,
      blocks=FLAGS.blocks,
      dtype=config.model.compute_dtype,
      seed=config.seed,
    )
  else:
    result = timing.measure(run, params, reference, pace=pace, started=started)
  # Figures are those of all processes, so one line is enough.
  if processes.is_main_process():
    print(json.dumps(result))
