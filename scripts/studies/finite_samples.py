"""Measures how far from the optimum n pairs leave DPO: the gap KL(π̂ ‖ π*) against n.

  python scripts/studies/finite_samples.py --out docs/finite_samples.png --force

Samples labelled pairs from the preferences of a small world whose optimum is known, trains on each
set to convergence with the production step, and prints and draws the gap next to the 1/n line that
the information in a labelled pair predicts.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the package, uninstalled

from absl import flags

from dpo_jax.utils import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "picture to write", required=True)
cli.define_force()
flags.DEFINE_list("betas", ["1", "0.5"], "values of β, reward units per nat")
flags.DEFINE_integer("samples", 32, "sets of pairs of each size", lower_bound=1)
flags.DEFINE_integer(
  "largest", 256_000, "pairs of the largest sets; the others are halves of it", lower_bound=2_000
)
flags.DEFINE_integer("sizes", 8, "how many sizes", lower_bound=2)
flags.DEFINE_integer("seed", 0, "random seed of the world and the samples", lower_bound=0)


def main(argv):
  del argv
  from dpo_jax.experiments import finite_samples
  from dpo_jax.monitoring import plots
  from dpo_jax.utils import files

  path = pathlib.Path(FLAGS.out)
  files.check_output_file(path, force=FLAGS.force)
  finite_samples.check_format(path)
  betas = finite_samples.read_betas(FLAGS.betas)
  sizes = finite_samples.halved_sizes(FLAGS.largest, FLAGS.sizes)
  from dpo_jax.experiments import finite_worlds

  found = {}
  for beta in betas:
    found[beta] = finite_worlds.finite_samples(
      sizes, beta=beta, samples=FLAGS.samples, seed=FLAGS.seed
    )
    finite_samples.show(beta, found[beta])
  path.parent.mkdir(parents=True, exist_ok=True)
  plots.save_png(finite_samples.draw(found), path)
  print(path)


if __name__ == "__main__":
  cli.run(main)
