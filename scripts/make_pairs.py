"""Samples answers from a model and labels them by a reward, as preference pairs.

  python scripts/make_pairs.py --model runs/quickstart/sft/export \\
    --prompts runs/quickstart/task/prompts.jsonl --reward controlled --out pairs.jsonl

Of two answers a and b, a is chosen with probability σ(r(a) - r(b)), as Bradley and Terry have it.
A row of the output holds `prompt_ids`, `chosen_ids`, `rejected_ids` exactly as sampled (an answer
that the model ended holds the end token), the same as texts, and both rewards. Pairs of equal
answers are left out.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

MODEL = flags.DEFINE_string("model", None, "model folder", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "rows with a `prompt`", required=True)
REWARD = flags.DEFINE_string(
  "reward",
  None,
  "controlled, or module:function of (prompt, answer), in the current folder or on PYTHONPATH",
  required=True,
)
OUT = flags.DEFINE_string("out", None, "JSONL file to write", required=True)
NUM = flags.DEFINE_integer("num", 2, "answers a prompt, paired two by two", lower_bound=2)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of sampling; 1 is the model itself")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 48, "of an answer", lower_bound=1)
SKIP = flags.DEFINE_integer("skip", 0, "prompts at the start that are left out", lower_bound=0)
LIMIT = flags.DEFINE_integer("limit", None, "prompts after those; all by default", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of samples and labels", lower_bound=0)


def main(_):
  from dpo_jax.generation import rewards, rollouts
  from dpo_jax.structs import UserError

  if NUM.value % 2:
    raise UserError(f"--num={NUM.value} answers do not pair up; give an even number")
  rollouts.check_out(OUT.value)
  reward = rewards.resolve(REWARD.value)
  every = rollouts.read_prompts(PROMPTS.value)
  prompts = every[SKIP.value :][: LIMIT.value]
  if not prompts:
    raise UserError(f"--skip={SKIP.value} leaves none of {PROMPTS.value}'s {len(every)} prompts")
  rollout = rollouts.sample(
    rollouts.load(MODEL.value),
    prompts,
    reward,
    num=NUM.value,
    max_tokens=MAX_TOKENS.value,
    temperature=TEMPERATURE.value,
    seed=SEED.value,
  )
  rows = rollouts.label(rollout, seed=SEED.value)
  if not rows:
    raise UserError(
      f"every pair of answers is equal, so {OUT.value} is not written; raise --temperature"
      " or --max_tokens, or give other --prompts"
    )
  rollouts.write_rows(OUT.value, rows)
  total = len(prompts) * NUM.value // 2
  better = sum(row["chosen_reward"] > row["rejected_reward"] for row in rows)
  print(
    f"{OUT.value}: {len(rows)} pairs ({total - len(rows)} of equal answers left out);"
    f" mean reward {rollout.reward_XS.mean():.2f}, chosen is the better in {better / len(rows):.1%}"
  )


if __name__ == "__main__":
  cli.run(main)
