"""Reward against KL on the embedded task: every method over β and seeds, and the best there can be.

  python scripts/frontier.py --out runs/frontier
  python scripts/frontier.py --out runs/few --methods dpo,ipo --betas dpo:2.5,5 --seeds 0

trains one reference, samples its exact frontier, and trains every method at every β and seed by
the commands a user would run, each in its own folder. The same command goes on where it was
stopped; more methods, values of β or seeds in the same --out add to what is there. It leaves
  frontier.json   every point: method, β, seed, reward, KL, share of the frontier's gain, intervals
  frontier.png    reward against KL
and prints the shares. Best-of-n is read off the samples of the reference; its KL is exact for the
distribution of rewards among them, and `kl_bound` is log n - (n - 1)/n. Sizes that are not given
are those of `dpo_jax.experiments.frontier.Settings`.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

OUT = flags.DEFINE_string("out", None, "folder of the study, made where missing", required=True)
METHODS = flags.DEFINE_string(
  "methods", "", "of dpo, dpo_again, ipo, on_policy, sft, best_of_n; all by default"
)
BETAS = flags.DEFINE_multi_string("betas", [], "METHOD:1,2,4; may be given for several methods")
SEEDS = flags.DEFINE_string(
  "seeds", None, "of pairs, training and samples; 0,1,2 by default, 0 with --quick"
)
PAIRS = flags.DEFINE_integer("pairs", None, "training pairs of a seed, one a prompt")
EPOCHS = flags.DEFINE_float("epochs", None, "passes over them; half as many in dpo_again")
ON_POLICY_STEPS = flags.DEFINE_integer("on_policy_steps", None, "updates of on_policy")
SFT_ROWS = flags.DEFINE_integer("sft_rows", None, "texts that the reference learns from")
SFT_STEPS = flags.DEFINE_integer("sft_steps", None, "updates of the reference")
EVAL_PROMPTS = flags.DEFINE_integer("eval_prompts", None, "that policies are measured on")
FRONTIER_PROMPTS = flags.DEFINE_integer(
  "frontier_prompts", None, "of those, that the exact frontier rests on"
)
FRONTIER_SAMPLES = flags.DEFINE_integer(
  "frontier_samples", None, "answers of the reference to each of those"
)
QUICK = flags.DEFINE_boolean(
  "quick",
  False,
  "about two minutes that show nothing else: small sizes, one seed and β unless given",
)


def main(_):
  import pathlib

  from dpo_jax.experiments import frontier

  given = {
    flag.name: flag.value
    for flag in (
      PAIRS,
      EPOCHS,
      ON_POLICY_STEPS,
      SFT_ROWS,
      SFT_STEPS,
      EVAL_PROMPTS,
      FRONTIER_PROMPTS,
      FRONTIER_SAMPLES,
    )
    if flag.value is not None
  }
  settings = (frontier.QUICK if QUICK.value else frontier.Settings())._replace(**given)
  methods = frontier.read_methods(METHODS.value)
  out = pathlib.Path(OUT.value)
  summary = frontier.study(
    out,
    settings,
    frontier.read_betas(BETAS.value, methods, quick=QUICK.value),
    frontier.read_seeds(SEEDS.value, quick=QUICK.value),
    with_best_of_n=frontier.BEST_OF_N in methods,
  )
  frontier.show(summary)
  print(f"{out / 'frontier.json'}: every number; {out / 'frontier.png'}: the picture")


if __name__ == "__main__":
  cli.run(main)
