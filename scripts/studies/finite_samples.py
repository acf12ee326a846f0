"""How far from the optimum n pairs leave DPO: the gap KL(π̂ ‖ π*) against n, drawn.

  python scripts/finite_samples.py --out docs/finite_samples.png

draws labelled pairs from the preferences of a small world whose optimum is known, trains on each
set to the end with the production step, and prints and draws the gap beside the 1/n line that the
information in a labelled pair predicts.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

OUT = flags.DEFINE_string("out", None, "picture to write", required=True)
BETAS = flags.DEFINE_list("betas", ["1", "0.5"], "values of β, reward units a nat")
SAMPLES = flags.DEFINE_integer("samples", 32, "sets of pairs of each size", lower_bound=1)
LARGEST = flags.DEFINE_integer(
  "largest", 256_000, "pairs of the largest sets; the others are halves of it", lower_bound=2_000
)
SIZES = flags.DEFINE_integer("sizes", 8, "how many sizes", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "of the world and the draws", lower_bound=0)


def main(_):
  import pathlib

  import numpy as np

  from dpo_jax.experiments import finite_worlds
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  path = pathlib.Path(OUT.value)
  files.check_output_file(path)
  _check_format(path)
  try:
    betas = list(dict.fromkeys(float(beta) for beta in BETAS.value))
  except ValueError:
    betas = []
  # Below 0.01 the exp(r/β) of the world's rewards, of size 5 at most, is near what float64 holds.
  if not betas or not all(0.01 <= beta <= 1e6 for beta in betas):
    raise UserError(
      f"--betas={','.join(BETAS.value)}: give numbers from 0.01 to 1e6, such as --betas=1,0.5"
    )
  sizes = tuple(sorted(LARGEST.value // 2**i for i in range(SIZES.value)))
  if sizes[0] < 500:
    raise UserError(
      f"--sizes {SIZES.value} goes down to {sizes[0]} pairs, of which some have no minimum; give"
      " fewer, or a larger --largest"
    )
  found = {}
  for beta in betas:
    gaps = finite_worlds.finite_samples(sizes, beta=beta, samples=SAMPLES.value, seed=SEED.value)
    found[beta] = gaps
    mean = gaps.gap_NS.mean(axis=1)
    slope = np.polyfit(np.log(sizes), np.log(mean), 1)[0]
    print(
      f"β = {beta:g}: slope {slope:.3f}; n KL as n grows {gaps.expected:.1f};"
      f" gradient at the end at most {gaps.slope_NS.max():.1e}"
    )
    for size, gap, spread in zip(sizes, mean, gaps.gap_NS.std(axis=1), strict=True):
      print(f"  n {size:7d}   KL {gap:.3e} ± {spread:.1e}   n KL {size * gap:6.1f}")
  _draw(found, path)
  print(path)


def _check_format(path):
  """The name's ending is one of a picture that can be written."""
  from matplotlib.figure import Figure

  from dpo_jax.structs import UserError

  known = Figure().canvas.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
  if path.suffix[1:].lower() not in known:
    raise UserError(
      f"--out={path}: {path.suffix or 'a name without ending'!r} is no kind of picture; end it in"
      f" one of {', '.join(sorted(known))}"
    )


def _draw(found, path):
  """A point for every set of pairs, a line for the prediction."""
  import itertools

  import numpy as np
  from matplotlib.figure import Figure

  from dpo_jax.monitoring import plots

  figure = Figure(figsize=(7.2, 4.4), layout="constrained")
  ax = figure.add_subplot()
  ax.set_title("Distance from the optimum against data", loc="left", fontweight="bold")
  ax.set_xlabel("labelled pairs n", color=plots.MUTED)
  ax.set_ylabel("KL(π̂ ‖ π*), nats", color=plots.MUTED)
  ax.set(xscale="log", yscale="log")
  ax.grid(color=plots.GRID)
  ax.set_axisbelow(True)
  ax.spines[:].set_visible(False)
  colors = itertools.cycle((plots.TRAIN, plots.EVAL, plots.CHOSEN, plots.REJECTED))
  for color, (beta, gaps) in zip(colors, found.items(), strict=False):
    sizes = np.array(gaps.sizes)
    each = np.repeat(sizes, gaps.gap_NS.shape[1])
    ax.plot(each, gaps.gap_NS.reshape(-1), ".", color=color, alpha=0.35, markersize=5)
    ax.plot(sizes, gaps.gap_NS.mean(axis=1), "o", color=color, label=f"β = {beta:g}, mean")
    line = gaps.expected / sizes
    ax.plot(sizes, line, color=color, linewidth=1.2, label=f"{gaps.expected:.0f} / n, predicted")
  ax.legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  plots.save_png(figure, path)


if __name__ == "__main__":
  cli.run(main)
