"""Writes the log-probabilities of a file's pairs under a model, one JSON line per pair, in order.

  dpo-jax score --model DIR --data pairs.jsonl --out scores.jsonl
  dpo-jax score --model DIR --reference DIR --data pairs.jsonl --out scores.jsonl \\
    --loss sigmoid --beta 0.1

Each line has `row` (its row in the data file, from 0; a row that gives no pair has no line),
`chosen_logp` and `rejected_logp` (nats, summed over the scored tokens of the completion, with the
end token where the text really ends), `chosen_tokens` and `rejected_tokens` (how many are scored;
where tokens have weights, the sum of these). With --reference it also has `ref_chosen_logp`,
`ref_rejected_logp`, `chosen_reward` and `rejected_reward` (β log π/π_ref), and `loss`.
"""

from absl import flags

from dpo_jax.commands import row_flags
from dpo_jax.utils import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("model", None, "model folder", required=True)
  cli.define_path("data", None, "file of preference rows", required=True)
  cli.define_path("out", None, "JSONL file to write", required=True)
  cli.define_force()
  cli.define_path("reference", None, "model folder to compare with")
  flags.DEFINE_string("loss", None, "name of the loss (default: sigmoid)")
  flags.DEFINE_float("beta", None, "reward units per nat (default: that of the loss)")
  flags.DEFINE_integer(
    "max_length",
    None,
    "tokens of a sequence at most; longer prompts are cut on the left",
    lower_bound=2,
  )
  row_flags.define_flags()


def main(argv: list[str]) -> None:
  del argv
  # Imported here, since these load jax, for which `--help` should not wait.
  from dpo_jax.evaluation import evaluate
  from dpo_jax.generation import rollouts
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  # First what can be checked at once: models take minutes to read, and scores would be lost if the
  # file could not be written.
  files.check_output_file(FLAGS.out, force=FLAGS.force)
  rows = row_flags.read_options()
  if not FLAGS.reference and (FLAGS.loss or FLAGS.beta):
    raise UserError("--loss and --beta are for losses and rewards, which need a --reference")
  ask = evaluate.resolve_pair_loss(FLAGS.loss or "sigmoid", FLAGS.beta)
  policy = rollouts.load(FLAGS.model)
  reference = rollouts.load(FLAGS.reference) if FLAGS.reference else None
  examples = evaluate.read_pairs(
    FLAGS.data,
    policy,
    reference,
    max_length=FLAGS.max_length,
    scores=ask.reads("margin_B"),
    **rows,
  )
  rows = evaluate.score_pairs(policy, reference, examples, ask)
  files.write_json_lines(FLAGS.out, rows)
  print(f"{FLAGS.out}: {len(rows)} pairs scored")
