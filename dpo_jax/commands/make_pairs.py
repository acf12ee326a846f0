"""Samples completions from a model and labels them with a reward, as preference pairs.

  dpo-jax make-pairs --model runs/quickstart/sft/export \\
    --prompts runs/quickstart/task/prompts.jsonl --reward controlled --out pairs.jsonl

Of two completions a and b, a is chosen with probability σ(r(a) - r(b)) (Bradley-Terry). Each row
that is written has `prompt_ids`, `chosen_ids` and `rejected_ids` exactly as sampled (a completion
that the model ended has its end token), the same as texts, and both rewards. Pairs of equal
completions are left out.
"""

from absl import flags

from dpo_jax.utils import cli, messages

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("model", None, "model folder", required=True)
  cli.define_path("prompts", None, "file of rows with a `prompt`", required=True)
  flags.DEFINE_string(
    "reward",
    None,
    "controlled, or module:function of (prompt, completion), from the current folder or PYTHONPATH",
    required=True,
  )
  cli.define_path("out", None, "JSONL file to write", required=True)
  cli.define_force()
  flags.DEFINE_integer("num", 2, "completions per prompt, paired two by two", lower_bound=2)
  flags.DEFINE_float("temperature", 1.0, "of sampling; 1 is the model's own distribution")
  flags.DEFINE_integer("max_tokens", 48, "new tokens at most", lower_bound=1)
  flags.DEFINE_integer("skip", 0, "prompts to leave out at the start", lower_bound=0)
  flags.DEFINE_integer("limit", None, "prompts to use after those (default: all)", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "random seed of samples and labels", lower_bound=0)


def main(argv: list[str]) -> None:
  del argv
  # Imported here, since these load jax, for which `--help` should not wait.
  from dpo_jax.generation import rewards, rollouts
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  # The order is important: flags, the output, the user's reward and the prompts all come before the
  # model, which may take minutes to read.
  if FLAGS.num % 2:
    raise UserError(f"--num={FLAGS.num} completions do not pair up; give an even number")
  files.check_output_file(FLAGS.out, force=FLAGS.force)
  reward = rewards.resolve(FLAGS.reward)
  every = rollouts.read_prompts(FLAGS.prompts)
  prompts = every[FLAGS.skip :][: FLAGS.limit]
  if not prompts:
    raise UserError(f"--skip={FLAGS.skip} leaves none of {FLAGS.prompts}'s {len(every)} prompts")
  rollout = rollouts.sample(
    rollouts.load(FLAGS.model),
    prompts,
    reward,
    num=FLAGS.num,
    max_tokens=FLAGS.max_tokens,
    temperature=FLAGS.temperature,
    seed=FLAGS.seed,
    label="sampling",
  )
  rows = rollouts.label(rollout, seed=FLAGS.seed)
  if not rows:
    raise UserError(
      f"every pair has two equal completions, so {FLAGS.out} is not written; raise --temperature"
      " or --max_tokens, or give other --prompts"
    )
  files.write_json_lines(FLAGS.out, rows)
  total = len(prompts) * FLAGS.num // 2
  better = sum(row["chosen_reward"] > row["rejected_reward"] for row in rows)
  messages.say(
    f"{FLAGS.out}: {len(rows):,} pairs ({total - len(rows):,} of equal completions left out);"
    f" mean reward {rollout.reward_XK.mean():.2f}; the higher reward was chosen in"
    f" {better / len(rows):.1%}"
  )
