"""Writes the embedded task: texts to learn from, prompts to sample from, and their tokenizer.

  dpo-jax make-controlled --out runs/quickstart/task

The folder then contains
  sft.jsonl           {"prompt": …, "completion": …}: whole reviews from the grammar
  prompts.jsonl       {"prompt": …}: openings to sample preference pairs from
  eval_prompts.jsonl  {"prompt": …}: openings for the evaluation
  tokenizer/          a word-level tokenizer in Hugging Face's format
No opening is in two of the three files, nor twice in one.
"""

from absl import flags

from dpo_jax.utils import cli, messages

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("out", None, "folder to write, made where missing", required=True)
  flags.DEFINE_bool("force", False, "replace the files of a task that is there already")
  flags.DEFINE_integer("seed", 0, "random seed of the texts", lower_bound=0)
  flags.DEFINE_integer("sft_rows", 32_000, "reviews to learn from", lower_bound=1)
  flags.DEFINE_integer("prompts", 32_000, "openings to sample pairs from", lower_bound=1)
  flags.DEFINE_integer("eval_prompts", 1_024, "openings for the evaluation", lower_bound=1)


def main(argv: list[str]) -> None:
  del argv
  import json
  import pathlib

  import numpy as np

  from dpo_jax.controlled import reviews as controlled_reviews
  from dpo_jax.controlled import word_tokenizer
  from dpo_jax.utils import files, progress

  folder = pathlib.Path(FLAGS.out)
  files.check_folder(folder, f"--out={folder}")
  for name in ("sft.jsonl", "prompts.jsonl", "eval_prompts.jsonl"):
    files.check_output_file(folder / name, force=FLAGS.force)
  with progress.Progress("writing reviews"):
    reviews = controlled_reviews.distinct(
      FLAGS.eval_prompts + FLAGS.prompts + FLAGS.sft_rows, FLAGS.seed
    )
  # Slices of one list of distinct openings: no opening is in two of the files.
  evaluation = reviews[: FLAGS.eval_prompts]
  prompts = reviews[FLAGS.eval_prompts : -FLAGS.sft_rows]
  sft = reviews[-FLAGS.sft_rows :]

  word_tokenizer.write(folder / "tokenizer", controlled_reviews.vocabulary())
  rows = {
    "sft.jsonl": [{"prompt": prompt, "completion": completion} for prompt, completion in sft],
    "prompts.jsonl": [{"prompt": prompt} for prompt, _ in prompts],
    "eval_prompts.jsonl": [{"prompt": prompt} for prompt, _ in evaluation],
  }
  for name, content in rows.items():
    text = "".join(json.dumps(row) + "\n" for row in content)
    files.write_text(folder / name, text)

  rewards = np.array([controlled_reviews.reward(prompt, completion) for prompt, completion in sft])
  messages.say(
    f"{folder}: {len(sft):,} reviews, {len(prompts):,} + {len(evaluation):,} prompts,"
    f" {len(controlled_reviews.vocabulary())} words; mean reward {rewards.mean():.2f}"
    f" (standard deviation {rewards.std():.2f})"
  )
