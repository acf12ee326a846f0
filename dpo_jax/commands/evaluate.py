"""Measures a trained model: on held-out pairs, and by samples where the true reward is known.

  dpo-jax evaluate --workdir RUN
  dpo-jax evaluate --model DIR --reference DIR --data FILE
  dpo-jax evaluate --workdir RUN --out summary.json --reward controlled --prompts eval_prompts.jsonl

With --workdir everything is found in the folder of a run: its model, reference, loss, β, and the
rows that it held out. All of these rows are evaluated, also those beyond data.eval_limit, and shown
before and after training. --model, --reference and --data then name what has moved since.
Elsewhere --model, --reference and --data are required. Rows that the model was trained on are
counted, where it is the export of a run.

Accuracy, margins and loss come with 95% intervals. With --reward, both models complete
every prompt. Reported are the mean true reward, the win rate (a tie counts one half),
KL(π ‖ π_ref) over whole completions, and how much of the best possible gain in reward at that KL
was reached. The best possible is the exact frontier, π* ∝ π_ref exp(r/β) for all β, estimated by
importance weights over many samples of the reference.

--out writes all of it as one JSON object. With --reward, a file named summary.json also gets a
report.html with the frontier's plot, in its folder.
"""

import time
from typing import Any

from absl import flags

from dpo_jax.commands import row_flags
from dpo_jax.utils import cli

FLAGS = flags.FLAGS
SHOWN = 4  # samples side by side in the terminal; the summary contains three times as many


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("workdir", None, "folder of a run; all else is found there")
  cli.define_path("model", None, "folder of the policy (required without --workdir)")
  cli.define_path("reference", None, "folder of the reference (required without --workdir)")
  cli.define_path("data", None, "file of preference rows (required without --workdir)")
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
  _check_flags()
  if bool(FLAGS.reward) != bool(FLAGS.prompts):
    raise UserError("--reward and --prompts go together: give both, or neither")
  if FLAGS.out:
    files.check_output_file(FLAGS.out, force=FLAGS.force)
  # A reward of the user's own is imported, and prompts are read, before any model: mistakes in them
  # show at once.
  reward = rewards.resolve(FLAGS.reward) if FLAGS.reward else None
  prompts = rollouts.read_prompts(FLAGS.prompts) if FLAGS.prompts else None
  summary, title, notes = _of_run() if FLAGS.workdir else _of_file()
  if reward is not None and prompts is not None:
    summary |= evaluate.evaluate_samples(
      rollouts.load(summary["model"]),
      rollouts.load(summary["reference"]),
      prompts,
      reward,
      num=FLAGS.samples_per_prompt,
      frontier_prompts=FLAGS.frontier_prompts,
      frontier_samples=FLAGS.frontier_samples,
      max_tokens=FLAGS.max_tokens,
      seed=FLAGS.seed,
    )
  summary["seconds"] = time.time() - started
  evaluate.print_summary(summary, SHOWN, title, notes)
  if FLAGS.out:
    out = pathlib.Path(FLAGS.out)
    files.write_text(out, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: the numbers")
    # The report reads its folder's summary.json, and no other name.
    if out.name == "summary.json" and reward is not None:
      print(f"{report.write(out.parent)}: the report")


def _check_flags() -> None:
  """Checks that a run or all files are named, and nothing that the run decides."""
  from dpo_jax.structs import UserError

  if not FLAGS.workdir:
    for name in ("model", "reference", "data"):
      if not FLAGS[name].value:
        raise UserError(f"--{name} is required, or --workdir=RUN to find it there (see --help)")
    return
  for name in ("loss", "beta", "max_length", "fields", "verdict", "train_on", "on_bad_row"):
    if FLAGS[name].present:
      raise UserError(
        f"--{name}: with --workdir it is that of the run; leave it out, or name --model,"
        " --reference and --data in place of --workdir"
      )


def _of_run() -> tuple[dict[str, Any], str, list[str]]:
  """Evaluates a run: returns its summary, the title of the table, and notes below it."""
  import pathlib

  from dpo_jax import configure
  from dpo_jax.evaluation import evaluate
  from dpo_jax.structs import UserError
  from dpo_jax.training import reevaluation, setup

  workdir = pathlib.Path(FLAGS.workdir)
  setup.check_run(workdir)
  config = configure.get_config(str(workdir / "config.json"))
  opened = setup.reopen(
    config, workdir, model=FLAGS.model, reference=FLAGS.reference, data=FLAGS.data
  )
  if FLAGS.reward and not opened.reference:
    raise UserError(
      f"--reward: what the run in {workdir} started from is not there (random weights, or moved),"
      " so there is no reference to sample from; name --model, --reference and --data in place of"
      " --workdir"
    )
  summary = reevaluation.measure(opened)
  unit = "pairs" if "pairs" in summary else "examples"
  title = f"Held-out rows of {workdir}: {summary[unit]:,} {unit} of {summary['data']}"
  notes = []
  if summary.get("trained_on"):
    notes.append(f"{summary['trained_on']:,} of these rows were trained on too")
  if some := summary.get("in_training"):
    what = evaluate.accuracy_of(some) if "pairs" in some else f"{some['examples']:,} examples"
    notes.append(
      f"training evaluated the first of them alone (data.eval_limit): {what},"
      f" loss {some['eval_loss']:.4f}"
    )
  if line := summary.get("verdict"):
    notes.append(line)
  return summary, title, notes


def _of_file() -> tuple[dict[str, Any], str, list[str]]:
  """Evaluates a model on a file: returns its summary, the title of the table, and notes below."""
  import pathlib

  from dpo_jax.evaluation import evaluate
  from dpo_jax.generation import rollouts
  from dpo_jax.training import splits

  rows = row_flags.read_options()
  loss = evaluate.resolve_pair_loss(FLAGS.loss, FLAGS.beta)
  policy, reference = rollouts.load(FLAGS.model), rollouts.load(FLAGS.reference)
  examples = evaluate.read_pairs(
    FLAGS.data,
    policy,
    reference,
    max_length=FLAGS.max_length,
    scores=loss.reads("margin_B"),
    **rows,
  )
  tokenizer = policy.tokenizer
  bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
  known = splits.trained_on(pathlib.Path(FLAGS.model), examples, bos_id)
  run, trained_on = known or (None, set())
  summary = {"model": FLAGS.model, "reference": FLAGS.reference, "data": FLAGS.data}
  summary |= evaluate.evaluate_pairs(policy, reference, examples, loss, trained_on)
  notes = []
  if run is not None:
    summary["trained_on"] = len(trained_on)
    many = f"{len(trained_on):,} of {len(examples):,}" if trained_on else "none of the"
    notes.append(f"{many} rows were trained on by this model (run {run})")
    if others := summary.get("not_trained_on"):
      notes[-1] += f"; the others: {evaluate.accuracy_of(others)}"
  return summary, f"On {FLAGS.data}: {summary['pairs']:,} pairs", notes
