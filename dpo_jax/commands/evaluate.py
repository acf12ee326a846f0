"""Measures a trained model: on held-out pairs, and by samples where the true reward is known.

  dpo-jax evaluate --model DIR --reference DIR --data held_out.jsonl
  dpo-jax evaluate --model DIR --reference DIR --data held_out.jsonl --out summary.json \\
    --reward controlled --prompts eval_prompts.jsonl

Accuracy, margins and loss of the pairs come with 95% intervals. With --reward, both models complete
every prompt. Reported are the mean true reward, the win rate (a tie counts one half),
KL(π ‖ π_ref) over whole completions, and how much of the best possible gain in reward at that KL
was reached. The best possible is the exact frontier, π* ∝ π_ref exp(r/β) for all β, estimated by
importance weights over many samples of the reference.

--out writes all of it as one JSON object. With --reward, a file named summary.json also gets a
report.html with the frontier's plot, in its folder.
"""

import time

from absl import flags

from dpo_jax.commands import row_flags
from dpo_jax.utils import cli

FLAGS = flags.FLAGS
SHOWN = 4  # samples side by side in the terminal; the summary contains three times as many


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("model", None, "folder of the policy", required=True)
  cli.define_path("reference", None, "folder of the reference", required=True)
  cli.define_path("data", None, "file of held-out preference rows", required=True)
  cli.define_path("out", None, "JSON file to write")
  cli.define_force()
  flags.DEFINE_string("loss", "sigmoid", "name of the loss")
  flags.DEFINE_float(
    "beta", None, "reward units per nat, for margins and loss (default: that of the loss)"
  )
  flags.DEFINE_integer(
    "max_length",
    None,
    "tokens of a sequence at most; longer prompts are cut on the left",
    lower_bound=2,
  )
  row_flags.define_flags()
  flags.DEFINE_string("reward", None, "name, or module:function of (prompt, completion)")
  cli.define_path("prompts", None, "file of rows with a `prompt`, to sample on")
  flags.DEFINE_integer(
    "samples_per_prompt", 2, "completions of each model per prompt", lower_bound=1
  )
  flags.DEFINE_integer(
    "frontier_prompts",
    32,
    "prompts, from the first, that the exact frontier is estimated on",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "frontier_samples", 512, "completions of the reference for each of those", lower_bound=2
  )
  flags.DEFINE_integer("max_tokens", 48, "new tokens at most", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "random seed of the samples", lower_bound=0)
  flags.DEFINE_float(
    "started", None, "Unix time that `seconds` counts from (default: the start of this command)"
  )


def main(argv: list[str]) -> None:
  del argv
  # Before the imports: they are part of the time that a user waits.
  started = FLAGS.started or time.time()
  import json
  import pathlib

  # Imported here, since these load jax, for which `--help` should not wait.
  from dpo_jax.evaluation import evaluate
  from dpo_jax.generation import rewards, rollouts
  from dpo_jax.monitoring import report
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  # The order is important: flags, the output, the reward and the prompts, which take moments, come
  # before the models.
  if bool(FLAGS.reward) != bool(FLAGS.prompts):
    raise UserError("--reward and --prompts go together: give both, or neither")
  if FLAGS.out:
    files.check_output_file(FLAGS.out, force=FLAGS.force)
  rows = row_flags.read_options()
  ask = evaluate.resolve_pair_loss(FLAGS.loss, FLAGS.beta)
  # A reward of the user's own is imported, and prompts are read, before any model: mistakes in them
  # show at once.
  reward = rewards.resolve(FLAGS.reward) if FLAGS.reward else None
  prompts = rollouts.read_prompts(FLAGS.prompts) if FLAGS.prompts else None
  policy, reference = rollouts.load(FLAGS.model), rollouts.load(FLAGS.reference)
  examples = evaluate.read_pairs(
    FLAGS.data,
    policy,
    reference,
    max_length=FLAGS.max_length,
    scores=ask.reads("margin_B"),
    **rows,
  )
  summary = evaluate.evaluate_pairs(policy, reference, examples, ask)
  if reward is not None and prompts is not None:
    summary |= evaluate.evaluate_samples(
      policy,
      reference,
      prompts,
      reward,
      num=FLAGS.samples_per_prompt,
      frontier_prompts=FLAGS.frontier_prompts,
      frontier_samples=FLAGS.frontier_samples,
      max_tokens=FLAGS.max_tokens,
      seed=FLAGS.seed,
    )
  summary["seconds"] = time.time() - started
  evaluate.print_summary(summary, SHOWN)
  if FLAGS.out:
    out = pathlib.Path(FLAGS.out)
    files.write_text(out, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: the numbers")
    # The report reads its folder's summary.json, and no other name.
    if out.name == "summary.json" and reward is not None:
      print(f"{report.write(out.parent)}: the report")
