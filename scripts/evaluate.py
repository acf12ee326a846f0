"""How good a trained model is: on held-out pairs, and by samples where the true reward is known.

  python scripts/evaluate.py --model DIR --reference DIR --data held_out.jsonl
  python scripts/evaluate.py --model DIR --reference DIR --data held_out.jsonl --out summary.json \\
    --reward controlled --prompts eval_prompts.jsonl

Accuracy, margins and loss of the pairs come with 95% intervals. With --reward, both models answer
every prompt: mean true reward, win rate (ties one half), KL(π ‖ π_ref) over whole answers, and how
much of the best possible gain in reward at that KL was reached. The best possible is the exact
frontier, π* ∝ π_ref exp(r/β) for all β, by importance weights over many samples of the reference.

--out writes all that as one JSON object. One named summary.json, beside the folders of the runs or
alone, also gets a report.html with the frontier's plot.
"""

import time

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

MODEL = flags.DEFINE_string("model", None, "folder of the policy", required=True)
REFERENCE = flags.DEFINE_string("reference", None, "folder of the reference", required=True)
DATA = flags.DEFINE_string("data", None, "file of held-out preference rows", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file to write")
LOSS = flags.DEFINE_string("loss", "sigmoid", "name of the loss")
BETA = flags.DEFINE_float(
  "beta", None, "reward units per nat, of margins and loss; by default the loss's own"
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "window in tokens: prompts are cut on the left to fit", lower_bound=2
)
REWARD = flags.DEFINE_string("reward", None, "name, or module:function of (prompt, answer)")
PROMPTS = flags.DEFINE_string("prompts", None, "rows with a `prompt`, to sample on")
NUM = flags.DEFINE_integer("samples_per_prompt", 2, "answers of either model", lower_bound=1)
FRONTIER_PROMPTS = flags.DEFINE_integer(
  "frontier_prompts", 32, "prompts, of the first, that the frontier rests on", lower_bound=1
)
FRONTIER_SAMPLES = flags.DEFINE_integer(
  "frontier_samples", 512, "answers of the reference to each of those", lower_bound=2
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 48, "of an answer", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the samples", lower_bound=0)
STARTED = flags.DEFINE_float(
  "started", None, "Unix time that `seconds` counts from; by default the start of this command"
)
SHOWN = 4  # samples side by side in the terminal; the summary holds three times as many


def main(_):
  started = STARTED.value or time.time()
  import json
  import pathlib

  from dpo_jax.evaluation import evaluate
  from dpo_jax.generation import rewards, rollouts
  from dpo_jax.monitoring import report
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  if bool(REWARD.value) != bool(PROMPTS.value):
    raise UserError("--reward and --prompts go together: give both, or neither")
  if OUT.value:
    files.check_output_file(OUT.value)
  ask = evaluate.resolve_pair_loss(LOSS.value, BETA.value)
  reward = rewards.resolve(REWARD.value) if REWARD.value else None
  prompts = rollouts.read_prompts(PROMPTS.value) if PROMPTS.value else None
  policy, reference = rollouts.load(MODEL.value), rollouts.load(REFERENCE.value)
  examples = evaluate.read_pairs(DATA.value, policy, reference, max_length=MAX_LENGTH.value)
  summary = evaluate.evaluate_pairs(policy, reference, examples, ask)
  if reward is not None and prompts is not None:
    summary |= evaluate.evaluate_samples(
      policy,
      reference,
      prompts,
      reward,
      num=NUM.value,
      frontier_prompts=FRONTIER_PROMPTS.value,
      frontier_samples=FRONTIER_SAMPLES.value,
      max_tokens=MAX_TOKENS.value,
      seed=SEED.value,
    )
  summary["seconds"] = time.time() - started
  evaluate.print_summary(summary, SHOWN)
  if OUT.value:
    out = pathlib.Path(OUT.value)
    files.write_text(out, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: the numbers")
    if out.name == "summary.json" and reward is not None:
      print(f"{report.write(out.parent)}: the report")


if __name__ == "__main__":
  cli.run(main)
