"""Tokenizes rows once, into a TFDS data set (ArrayRecord) that training reads by random access.

  dpo-jax prepare --data 'parts/*.parquet' --model MODEL_DIR --out prepared
  dpo-jax train … --data=prepared

A prepared set is tied to its tokenizer, template, kind and max_length: runs with others refuse it.
Rows are held out by prompt, so that no prompt is on both sides.
"""

from absl import flags

from dpo_jax.commands import row_flags
from dpo_jax.utils import cli, messages, model_folder

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path(
    "data", None, "file of rows; several separated by commas, or a pattern", required=True
  )
  cli.define_path("model", None, "folder of the model or its tokenizer", required=True)
  cli.define_path("out", None, "folder to make", required=True)
  flags.DEFINE_enum(
    "kind",
    None,
    ["pairs", "text", "unpaired", "ranked"],
    "how to use the rows (default: told by the first rows)",
  )
  flags.DEFINE_integer(
    "max_length",
    512,
    "tokens of a sequence at most: prompt and one completion together",
    lower_bound=2,
  )
  flags.DEFINE_integer("prompt_floor", 64, "prompt tokens that are never cut", lower_bound=1)
  flags.DEFINE_enum(
    "truncation", "drop", ["drop", "cut"], "what to do with completions that do not fit"
  )
  row_flags.define_flags()
  flags.DEFINE_string("template", "", "arguments of the chat template as JSON")
  flags.DEFINE_float(
    "eval_fraction", 0.1, "fraction of the prompts to hold out", lower_bound=0, upper_bound=0.99
  )
  flags.DEFINE_integer("seed", 0, "random seed of the held-out prompts", lower_bound=0)
  flags.DEFINE_integer(
    "workers",
    None,
    "processes that tokenize, 0 for this one alone (default: one per core)",
    lower_bound=0,
  )


def main(argv: list[str]) -> None:
  del argv
  import os
  import time

  # Imported here: `--help` should not wait for tokenizers and readers of data files.
  from dpo_jax.data import chat_template, encode, left_out, prepared, tokenizer
  from dpo_jax.data.ledger import remarks
  from dpo_jax.utils import progress

  arguments = chat_template.read_arguments(FLAGS.template, "--template")
  rows = row_flags.read_options()
  encoder = encode.Encoder(
    tokenizer.load_tokenizer(FLAGS.model, template_arguments=arguments),
    kind=FLAGS.kind or encode.detect_kind(FLAGS.data, rows["fields"]),
    max_length=FLAGS.max_length,
    prompt_floor=FLAGS.prompt_floor,
    truncation=FLAGS.truncation,
    **rows,
  )
  encode.report_end(encoder.tokenizer)
  # 0 is a choice of its own, this process alone, so it must not pass for an absent flag.
  workers = (os.cpu_count() or 1) if FLAGS.workers is None else FLAGS.workers
  started = time.perf_counter()
  ledgers = prepared.prepare(
    FLAGS.out,
    FLAGS.data,
    encoder,
    eval_fraction=FLAGS.eval_fraction,
    seed=FLAGS.seed,
    workers=workers,
  )
  with progress.Progress("tokenizing", 0, "rows") as shown:
    for ledger in ledgers:
      shown.reach(ledger.rows)
  seconds = time.perf_counter() - started
  dropped = "".join(f", {count:,} {reason}" for reason, count in ledger.dropped.items())
  print(f"{FLAGS.out}: {ledger.pairs:,} of {ledger.rows:,} rows kept{dropped}")
  for line in remarks(ledger.to_json()):
    print(f"  {line}")
  for line in left_out.warnings(ledger.to_json(), positions=model_folder.positions(FLAGS.model)):
    messages.show(line)
  print(f"{seconds:.0f} s, {ledger.rows / seconds:,.0f} rows/s; --data={FLAGS.out}")
