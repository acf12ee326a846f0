"""Log-probabilities of every pair of a file under a model, one JSON line a pair, in order.

  python scripts/score.py --model DIR --data pairs.jsonl --out scores.jsonl
  python scripts/score.py --model DIR --reference DIR --data pairs.jsonl --out scores.jsonl \\
    --loss sigmoid --beta 0.1

A line holds `row` (of the data file, from 0; rows without a pair have no line), `chosen_logp` and
`rejected_logp` (nats, summed over the answer's tokens, the end token included where the text really
ends), `chosen_tokens` and `rejected_tokens`; with --reference also `ref_chosen_logp`,
`ref_rejected_logp`, `chosen_reward` and `rejected_reward` (β log π/π_ref) and `loss`.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

MODEL = flags.DEFINE_string("model", None, "model folder", required=True)
DATA = flags.DEFINE_string("data", None, "file of preference rows", required=True)
OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
REFERENCE = flags.DEFINE_string("reference", None, "model folder to compare with")
LOSS = flags.DEFINE_string("loss", None, "name of the loss; sigmoid by default")
BETA = flags.DEFINE_float("beta", None, "reward units per nat; by default the loss's own")
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "window in tokens: prompts are cut on the left to fit", lower_bound=2
)


def main(_):
  from dpo_jax.evaluation import evaluate
  from dpo_jax.generation import rollouts
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  files.check_output_file(OUT.value)
  if not REFERENCE.value and (LOSS.value or BETA.value):
    raise UserError("--loss and --beta are for losses and rewards, which need a --reference")
  ask = evaluate.resolve_pair_loss(LOSS.value or "sigmoid", BETA.value)
  policy = rollouts.load(MODEL.value)
  reference = rollouts.load(REFERENCE.value) if REFERENCE.value else None
  examples = evaluate.read_pairs(DATA.value, policy, reference, max_length=MAX_LENGTH.value)
  rows = evaluate.score_pairs(policy, reference, examples, ask)
  files.write_json_lines(OUT.value, rows)
  print(f"{OUT.value}: {len(rows)} pairs scored")


if __name__ == "__main__":
  cli.run(main)
