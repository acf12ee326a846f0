"""Writes the embedded task: texts to learn from, prompts to sample from, and their tokenizer.

  python scripts/make_controlled.py --out runs/quickstart/task

leaves in the folder
  sft.jsonl           {"prompt": …, "completion": …}: whole reviews from the grammar
  prompts.jsonl       {"prompt": …}: openings to sample preference pairs from
  eval_prompts.jsonl  {"prompt": …}: openings kept for the evaluation
  tokenizer/          a word-level tokenizer in Hugging Face's format
No opening is in two of the three files, nor twice in one.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

OUT = flags.DEFINE_string("out", None, "folder to write, made where missing", required=True)
SEED = flags.DEFINE_integer("seed", 0, "of the texts", lower_bound=0)
SFT_ROWS = flags.DEFINE_integer("sft_rows", 32_000, "reviews to learn from", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 32_000, "openings for pairs", lower_bound=1)
EVAL_PROMPTS = flags.DEFINE_integer("eval_prompts", 1_024, "openings kept aside", lower_bound=1)


def main(_):
  import json
  import pathlib

  import numpy as np

  from dpo_jax.controlled import reviews as controlled_reviews
  from dpo_jax.controlled import word_tokenizer

  folder = pathlib.Path(OUT.value)
  reviews = controlled_reviews.distinct(
    EVAL_PROMPTS.value + PROMPTS.value + SFT_ROWS.value, SEED.value
  )
  evaluation = reviews[: EVAL_PROMPTS.value]
  prompts = reviews[EVAL_PROMPTS.value : -SFT_ROWS.value]
  sft = reviews[-SFT_ROWS.value :]

  word_tokenizer.write(folder / "tokenizer", controlled_reviews.vocabulary())
  rows = {
    "sft.jsonl": [{"prompt": prompt, "completion": answer} for prompt, answer in sft],
    "prompts.jsonl": [{"prompt": prompt} for prompt, _ in prompts],
    "eval_prompts.jsonl": [{"prompt": prompt} for prompt, _ in evaluation],
  }
  for name, content in rows.items():
    text = "".join(json.dumps(row) + "\n" for row in content)
    (folder / name).write_text(text, encoding="utf-8")

  rewards = np.array([controlled_reviews.reward(prompt, answer) for prompt, answer in sft])
  print(
    f"{folder}: {len(sft)} reviews, {len(prompts)} + {len(evaluation)} prompts,"
    f" {len(controlled_reviews.vocabulary())} words;"
    f" true reward {rewards.mean():.2f} ± {rewards.std():.2f}"
  )


if __name__ == "__main__":
  cli.run(main)
