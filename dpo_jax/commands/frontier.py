"""Measures reward against KL on the embedded task: every method over β and seeds, and the optimum.

  dpo-jax frontier --out runs/frontier
  dpo-jax frontier --out runs/few --methods dpo,ipo --betas dpo:2.5,5 --seeds 0

Trains one reference, estimates its exact frontier from samples, and trains every method at every β
and seed with the commands a user would run, each in its own folder. The same command continues
where it was stopped; more methods, values of β or seeds in the same --out add to what is there. It
writes
  frontier.json   every point: method, β, seed, reward, KL, share of the frontier's gain, intervals
  frontier.png    reward against KL
and prints the shares. Best-of-n is computed from the samples of the reference; its KL is exact for
the distribution of rewards among them, and `kl_bound` is log n - (n - 1)/n. Sizes that are not
given are those of `dpo_jax.experiments.frontier.Settings`.
"""

from absl import flags

from dpo_jax.utils import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("out", None, "folder of the study; made where missing", required=True)
  flags.DEFINE_string(
    "methods", "", "some of dpo, dpo_again, ipo, on_policy, sft, best_of_n (default: all)"
  )
  flags.DEFINE_multi_string("betas", [], "METHOD:1,2,4; repeatable, once per method")
  flags.DEFINE_string(
    "seeds", None, "of pairs, training and samples (default: 0,1,2; with --quick 0)"
  )
  flags.DEFINE_integer("pairs", None, "training pairs per seed, one per prompt")
  flags.DEFINE_float("epochs", None, "passes over them; half as many in dpo_again")
  flags.DEFINE_integer("on_policy_steps", None, "updates of on_policy")
  flags.DEFINE_integer("sft_rows", None, "texts that the reference learns from")
  flags.DEFINE_integer("sft_steps", None, "updates of the reference")
  flags.DEFINE_integer("eval_prompts", None, "prompts that policies are measured on")
  flags.DEFINE_integer(
    "frontier_prompts", None, "of those, that the exact frontier is estimated on"
  )
  flags.DEFINE_integer("frontier_samples", None, "completions of the reference for each of those")
  flags.DEFINE_boolean(
    "quick",
    False,
    "a trial run of about two minutes: small sizes, one seed and β unless given",
  )


def main(argv: list[str]) -> None:
  del argv
  import pathlib

  # Imported here, since it loads jax, for which `--help` should not wait.
  from dpo_jax.experiments import frontier

  sizes = {name: FLAGS[name].value for name in frontier.Settings._fields}
  # Sizes have no default as flags: --quick has defaults of its own, and a size that is given
  # replaces either.
  given = {name: value for name, value in sizes.items() if value is not None}
  settings = (frontier.QUICK if FLAGS.quick else frontier.Settings())._replace(**given)
  # All flags are read and checked before the first run, which is one of many.
  methods = frontier.read_methods(FLAGS.methods)
  out = pathlib.Path(FLAGS.out)
  summary = frontier.study(
    out,
    settings,
    frontier.read_betas(FLAGS.betas, methods, quick=FLAGS.quick),
    frontier.read_seeds(FLAGS.seeds, quick=FLAGS.quick),
    with_best_of_n=frontier.BEST_OF_N in methods,
  )
  frontier.show(summary)
  print(f"{out / 'frontier.json'}: every number; {out / 'frontier.png'}: the picture")
