"""Tokenises rows once, into a TFDS data set (ArrayRecord) that training reads by random access.

  python scripts/prepare_data.py --data 'parts/*.parquet' --model MODEL_DIR --out prepared
  python -m dpo_jax.train … --config.data.path=prepared

The set fits runs of the same tokenizer, template, kind and window, and is refused by others. Which
rows are held out goes by their prompts, so that no prompt is on both sides.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

DATA = flags.DEFINE_string(
  "data", None, "file of rows, several separated by commas, or a pattern", required=True
)
MODEL = flags.DEFINE_string("model", None, "folder of the model or its tokenizer", required=True)
OUT = flags.DEFINE_string("out", None, "folder to make", required=True)
KIND = flags.DEFINE_enum(
  "kind",
  None,
  ["pairs", "text", "unpaired", "ranked"],
  "what to learn from the rows; by default what they are",
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", 512, "window in tokens, prompt and one answer together", lower_bound=2
)
PROMPT_FLOOR = flags.DEFINE_integer(
  "prompt_floor", 64, "tokens of a prompt that are never cut", lower_bound=1
)
TRUNCATION = flags.DEFINE_enum(
  "truncation", "drop", ["drop", "cut"], "what to do with answers that do not fit"
)
FIELDS = flags.DEFINE_list("fields", [], "names of fields, as prompt=question,chosen=better")
TEMPLATE = flags.DEFINE_string("template", "", "values that the chat template reads, as JSON")
EVAL_FRACTION = flags.DEFINE_float(
  "eval_fraction", 0.1, "share of the prompts to hold out", lower_bound=0, upper_bound=0.99
)
SEED = flags.DEFINE_integer("seed", 0, "of what is held out", lower_bound=0)
WORKERS = flags.DEFINE_integer(
  "workers", None, "processes that tokenise, 0 for this one; by default one a core", lower_bound=0
)


def main(_):
  import os
  import time

  from dpo_jax.data import chat_template, encode, prepared, tokenizer

  arguments = chat_template.read_arguments(TEMPLATE.value, "--template")
  fields = encode.read_fields(FIELDS.value)
  encoder = encode.Encoder(
    tokenizer.load_tokenizer(MODEL.value, template_arguments=arguments),
    kind=KIND.value or encode.detect_kind(DATA.value, fields),
    max_length=MAX_LENGTH.value,
    prompt_floor=PROMPT_FLOOR.value,
    truncation=TRUNCATION.value,
    fields=fields,
  )
  workers = os.cpu_count() if WORKERS.value is None else WORKERS.value
  started = said = time.perf_counter()
  for ledger in prepared.prepare(
    OUT.value,
    DATA.value,
    encoder,
    eval_fraction=EVAL_FRACTION.value,
    seed=SEED.value,
    workers=workers,
  ):
    now = time.perf_counter()
    if now - said > 5:
      said = now
      print(f"{ledger.rows:,} rows, {ledger.rows / (now - started):,.0f} a second", flush=True)
  seconds = time.perf_counter() - started
  dropped = "".join(f", {count:,} {reason}" for reason, count in ledger.dropped.items())
  print(f"{OUT.value}: {ledger.pairs:,} of {ledger.rows:,} rows kept{dropped}")
  print(
    f"{seconds:.0f} s, {ledger.rows / seconds:,.0f} rows a second; --config.data.path={OUT.value}"
  )


if __name__ == "__main__":
  cli.run(main)
