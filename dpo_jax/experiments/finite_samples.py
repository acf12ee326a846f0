"""The gap to the optimum against the number of pairs: settings, the table and the picture."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.monitoring import plots
from dpo_jax.structs import UserError

if TYPE_CHECKING:
  from dpo_jax.experiments.finite_worlds import Gaps


def check_format(path: pathlib.Path) -> None:
  """Checks that the name ends as that of a picture that can be written.

  Raises:
    UserError: it does not.
  """
  known = Figure().canvas.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
  if path.suffix[1:].lower() not in known:
    raise UserError(
      f"--out={path}: {path.suffix or 'a name without ending'!r} is no kind of picture; end it in"
      f" one of {', '.join(sorted(known))}"
    )


def read_betas(texts: Sequence[str]) -> list[float]:
  """Returns the values of β in a flag, each once.

  Raises:
    UserError: one is no number, or out of range.
  """
  try:
    betas = list(dict.fromkeys(map(float, texts)))
  except ValueError:
    betas = []
  # Below 0.01 the exp(r/β) of the world's rewards, of size 5 at most, is near the limit of float64.
  if not betas or not all(0.01 <= beta <= 1e6 for beta in betas):
    raise UserError(
      f"--betas={','.join(texts)}: give numbers from 0.01 to 1e6, such as --betas=1,0.5"
    )
  return betas


def halved_sizes(largest: int, count: int) -> tuple[int, ...]:
  """Returns `count` sizes in rising order, each half of the next.

  Raises:
    UserError: the smallest is too small.
  """
  sizes = tuple(sorted(largest // 2**i for i in range(count)))
  if sizes[0] < 500:
    raise UserError(
      f"--sizes {count} goes down to {sizes[0]} pairs, of which some have no minimum; give"
      " fewer, or a larger --largest"
    )
  return sizes


def show(beta: float, gaps: Gaps) -> None:
  """Prints the gaps of one β: their slope against n, and mean and spread at each size."""
  mean = gaps.gap_SzRs.mean(axis=1)
  # In logarithms a power law is a line; the prediction, n KL constant, has slope -1.
  slope = np.polyfit(np.log(gaps.sizes), np.log(mean), 1)[0]
  print(
    f"β = {beta:g}: slope {slope:.3f}; n KL as n grows {gaps.expected:.1f};"
    f" gradient at the end at most {gaps.slope_SzRs.max():.1e}"
  )
  for size, gap, spread in zip(gaps.sizes, mean, gaps.gap_SzRs.std(axis=1), strict=True):
    print(f"  n {size:7d}   KL {gap:.3e} ± {spread:.1e}   n KL {size * gap:6.1f}")


def draw(found: Mapping[float, Gaps]) -> Figure:
  """Draws a point for every set of pairs, and a line for the prediction, for each β."""
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
    each = np.repeat(sizes, gaps.gap_SzRs.shape[1])
    ax.plot(each, gaps.gap_SzRs.reshape(-1), ".", color=color, alpha=0.35, markersize=5)
    ax.plot(sizes, gaps.gap_SzRs.mean(axis=1), "o", color=color, label=f"β = {beta:g}, mean")
    line = gaps.expected / sizes
    ax.plot(sizes, line, color=color, linewidth=1.2, label=f"{gaps.expected:.0f} / n, predicted")
  ax.legend(frameon=False)
  return figure
