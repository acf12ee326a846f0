"""What came out: points gathered over seeds, compared at equal KL, as tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.evaluation import estimates
from dpo_jax.experiments.frontier.settings import BEST_OF_N, COLORS, LABELS, Settings
from dpo_jax.experiments.frontier.yardstick import Json, Yardstick
from dpo_jax.monitoring import plots

KLS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # nats at which methods are compared


def group(points: Iterable[Json]) -> dict[str, dict[float | None, list[Json]]]:
  """Points by method and by what was varied (β, n or nothing), in order of appearance."""
  grouped: dict[str, dict[float | None, list[Json]]] = {}
  for point in points:
    varied = point["n"] if point["beta"] is None else point["beta"]
    grouped.setdefault(point["method"], {}).setdefault(varied, []).append(point)
  return grouped


def at_equal_kl(points: Sequence[Json], kls: Sequence[float] = KLS) -> list[float | None]:
  """Share of the frontier's gain of one method at given KLs, averaged over its seeds.

  Between neighbouring points of a seed the share is interpolated in KL; where not every seed has a
  point on both sides there is None. Points beyond the frontier's reach are left out.
  """
  seeds = {point["seed"] for point in points}
  values = []
  for seed in seeds:
    own = sorted(
      (point["kl"], point["fraction"])
      for point in points
      if point["seed"] == seed and point["fraction"] is not None and point["within_reach"]
    )
    kl, fraction = np.array(own).T if own else (np.array([np.nan]), np.array([np.nan]))
    values.append(np.interp(kls, kl, fraction, left=np.nan, right=np.nan))
  mean = np.mean(values, axis=0)
  return [float(x) if math.isfinite(x) else None for x in mean]


def curve(frontier: estimates.Frontier) -> list[Json]:
  """The exact frontier, and whether enough samples stand behind each of its points."""
  columns = (frontier.kl_XF, frontier.reward_XF, frontier.effective_XF)
  return [
    {
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
  """All that frontier.json holds."""
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
  """A row of text for every method and β: means over seeds, the share also least and greatest."""
  table = []
  for name, values in group(points).items():
    for varied, some in values.items():
      mean = lambda key, some=some: _mean(point[key] for point in some)
      shares = [point["fraction"] for point in some if point["fraction"] is not None]
      share = "–"
      if shares:
        share = f"{np.mean(shares):.3f}"
        if len(shares) > 1:
          share += f" ({min(shares):.3f}–{max(shares):.3f})"
        if not all(point["within_reach"] for point in some):
          share = f"at most {share}"
      table.append(
        [
          LABELS[name],
          "–" if varied is None else f"{'n' if name == BEST_OF_N else 'β'} {varied:g}",
          f"{mean('kl'):.2f}",
          f"{mean('reward'):.2f}",
          share,
          "–" if some[0]["seconds"] is None else f"{mean('seconds'):.0f}",
        ]
      )
  return table


def _mean(values: Iterable[float]) -> float:
  return float(np.mean(list(values)))


def show(summary: Json) -> None:
  """Prints two tables: every point, and every method at equal KL."""
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
  """Reward against KL: the exact frontier in black, each method as a curve through its means."""
  exact = summary["exact"]
  with plots.styled(
    "True reward against distance from the reference",
    "mean true reward",
    "KL(π ‖ π_ref), nats an answer",
    (7.2, 4.6),
  ) as (figure, ax):
    known = [point for point in exact if point["within_reach"]]
    beyond = exact[max(len(known) - 1, 0) :]
    line = lambda some: ([point["kl"] for point in some], [point["reward"] for point in some])
    ax.plot(*line(known), color="black", linewidth=2, label="exact frontier π*", zorder=3)
    ax.plot(*line(beyond), color="black", linewidth=1.2, linestyle=(0, (2, 2)), zorder=3)
    for name, values in group(summary["points"]).items():
      color = COLORS[name]
      means = sorted(
        (_mean(p["kl"] for p in some), _mean(p["reward"] for p in some)) for some in values.values()
      )
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
        every = [point for some in values.values() for point in some]
        ax.plot(
          *line(every),
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
