"""Summarises points over seeds, compares methods at equal KL, and shows tables and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.evaluation import estimates
from dpo_jax.experiments.frontier.settings import BEST_OF_N, COLORS, LABELS, Settings
from dpo_jax.experiments.frontier.yardstick import Json, Yardstick
from dpo_jax.monitoring import plots

KLS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # KLs in nats at which methods are compared


def group(points: Iterable[Json]) -> dict[str, dict[float | None, list[Json]]]:
  """Groups points by method and by β, n or None, in order of appearance."""
  grouped: dict[str, dict[float | None, list[Json]]] = {}
  for point in points:
    varied = point["n"] if point["beta"] is None else point["beta"]
    grouped.setdefault(point["method"], {}).setdefault(varied, []).append(point)
  return grouped


def at_equal_kl(points: Sequence[Json], kls: Sequence[float] = KLS) -> list[float | None]:
  """Computes one method's share of the frontier's gain at given KLs, a mean over its seeds.

  The share is interpolated in KL between neighboring points of a seed. It is None where some seed
  has no point on one side of the KL. Points beyond the frontier's reach are left out.
  """
  seeds = {point["seed"] for point in points}
  values = []
  for seed in seeds:
    # By KL, which `np.interp` needs to rise.
    own = sorted(
      (point["kl"], point["fraction"])
      for point in points
      if point["seed"] == seed and point["fraction"] is not None and point["within_reach"]
    )
    # NaN outside the measured range: np.interp would repeat the last value, and the mean over seeds
    # must be unknown where one seed is.
    kl, fraction = np.array(own).T if own else (np.array([np.nan]), np.array([np.nan]))
    values.append(np.interp(kls, kl, fraction, left=np.nan, right=np.nan))
  mean = np.mean(values, axis=0)
  return [float(x) if math.isfinite(x) else None for x in mean]


def curve(frontier: estimates.Frontier) -> list[Json]:
  """Lists the points of the exact frontier, means over prompts.

  A point is within reach where its estimate rests on enough effective samples.
  """
  columns = (frontier.kl_XF, frontier.reward_XF, frontier.effective_XF)
  return [
    {
      # β starts at infinity, the reference itself, for which JSON has no number.
      "beta": float(beta) if math.isfinite(beta) else None,
      "kl": float(kl),
      "reward": float(reward),
      "effective_samples": float(effective),
      "within_reach": bool(kl <= frontier.reach),
    }
    for beta, kl, reward, effective in zip(
      frontier.beta_F, *(x_XF.mean(0) for x_XF in columns), strict=True
    )
  ]


def summarise(settings: Settings, yardstick: Yardstick, points: Sequence[Json]) -> Json:
  """Returns the content of frontier.json."""
  grouped = group(points)
  return {
    "settings": settings._asdict(),
    "reference_reward": float(yardstick.reference_X.mean()),
    "reach": yardstick.frontier.reach,
    "exact": curve(yardstick.frontier),
    "points": list(points),
    "fraction_at_kl": {
      "kl": list(KLS),
      **{
        name: at_equal_kl([point for some in values.values() for point in some])
        for name, values in grouped.items()
      },
    },
  }


def rows(points: Sequence[Json]) -> list[list[str]]:
  """Formats one table row per method and β (or n): means over seeds, and the range of the share."""
  table = []
  for name, values in group(points).items():
    for varied, some in values.items():
      shares = [point["fraction"] for point in some if point["fraction"] is not None]
      share = "–"
      if shares:
        share = f"{np.mean(shares):.3f}"
        if len(shares) > 1:
          share += f" ({min(shares):.3f}–{max(shares):.3f})"
        # Beyond its reach the frontier is a lower bound, so a share of it is an upper bound.
        if not all(point["within_reach"] for point in some):
          share = f"at most {share}"
      table.append(
        [
          LABELS[name],
          "–" if varied is None else f"{'n' if name == BEST_OF_N else 'β'} {varied:g}",
          f"{_mean(some, 'kl'):.2f}",
          f"{_mean(some, 'reward'):.2f}",
          share,
          "–" if some[0]["seconds"] is None else f"{_mean(some, 'seconds'):.0f}",
        ]
      )
  return table


def _mean(points: Iterable[Json], key: str) -> float:
  return float(np.mean([point[key] for point in points]))


def _coordinates(points: Iterable[Json]) -> tuple[list[float], list[float]]:
  """Returns the KLs and the rewards of points, for a plot."""
  points = list(points)
  return [point["kl"] for point in points], [point["reward"] for point in points]


def show(summary: Json) -> None:
  """Prints two tables: all points, and all methods at equal KL."""
  from rich.console import Console
  from rich.table import Table

  console = Console()
  columns = ("method", "", "KL, nats", "reward", "share of the frontier's gain", "seconds")
  table = Table(*columns, title="Every point, mean over seeds", title_justify="left")
  for row in rows(summary["points"]):
    table.add_row(*row)
  console.print(table)
  shares = dict(summary["fraction_at_kl"])
  heads = [f"{kl:g} nats" for kl in shares.pop("kl")]
  table = Table(
    "method", *heads, title="Share of the frontier's gain at equal KL", title_justify="left"
  )
  for name, values in shares.items():
    table.add_row(LABELS[name], *("–" if x is None else f"{x:.3f}" for x in values))
  console.print(table)
  console.print(f"The exact frontier is known to {summary['reach']:.2f} nats.")


def draw(summary: Json) -> Figure:
  """Plots reward against KL: the exact frontier in black, one curve of means per method."""
  exact = summary["exact"]
  with plots.styled(
    "True reward against distance from the reference",
    "mean true reward",
    "KL(π ‖ π_ref), nats per completion",
    (7.2, 4.6),
  ) as (figure, ax):
    known = [point for point in exact if point["within_reach"]]
    # The dashed part starts at the last known point, so that no gap is left between the two.
    beyond = exact[max(len(known) - 1, 0) :]
    ax.plot(*_coordinates(known), color="black", linewidth=2, label="exact frontier π*", zorder=3)
    ax.plot(*_coordinates(beyond), color="black", linewidth=1.2, linestyle=(0, (2, 2)), zorder=3)
    for name, values in group(summary["points"]).items():
      color = COLORS[name]
      means = sorted((_mean(some, "kl"), _mean(some, "reward")) for some in values.values())
      ax.plot(
        *zip(*means, strict=True),
        color=color,
        linewidth=1.4,
        label=LABELS[name],
        marker="o",
        markersize=3 if name == BEST_OF_N else 0,
        zorder=4,
      )
      if name != BEST_OF_N:
        # Single runs as points, so that the scatter over seeds is seen beside the curve of means.
        every = [point for some in values.values() for point in some]
        ax.plot(
          *_coordinates(every),
          color=color,
          linestyle="none",
          marker="o",
          markersize=5.5,
          markeredgecolor="white",
          markeredgewidth=0.7,
          zorder=5,
        )
    far = max([point["kl"] for point in summary["points"]] + [summary["reach"]])
    ax.set_xlim(0, 1.05 * far)
    ax.legend(loc="lower right")
  return figure
