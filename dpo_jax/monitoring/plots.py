"""Plots of a run, of the frontier and of scaling, as matplotlib figures in one style.

Figures are made without pyplot, so there is no global state and no display is needed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dpo_jax.monitoring import loggers

Records = Sequence[Mapping[str, Any]]

INK, MUTED, GRID = "#1d2733", "#66717f", "#e8ebf0"
TRAIN, EVAL = "#4059c9", "#e08a00"
CHOSEN, REJECTED = "#1f9280", "#d9593d"

_STYLE: dict[Any, Any] = {
  "font.family": "sans-serif",
  "font.size": 9.5,
  "text.color": INK,
  "axes.edgecolor": GRID,
  "axes.labelcolor": MUTED,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "axes.titleweight": "bold",
  "axes.titlepad": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": GRID,
  "grid.linewidth": 0.9,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "legend.frameon": False,
  "legend.fontsize": 9,
  "lines.linewidth": 1.8,
  "lines.solid_capstyle": "round",
  "svg.fonttype": "none",  # text stays text: small files, sharp and selectable
  "svg.hashsalt": "dpo_jax",  # the same report from the same metrics
  "savefig.facecolor": "white",
}

# Name, title, unit, and lines: (metric, label, color). Held-out values have the name eval/METRIC.
_CURVES = (
  ("loss", "Loss", "nats", (("loss", "training", TRAIN),)),
  ("accuracy", "Accuracy", "share of pairs", (("rewards/accuracies", "training", TRAIN),)),
  ("reward", "Reward of samples", "reward units", (("reward", "training", TRAIN),)),
  (
    "objective",
    "Assumed objective  −r + β log π/π_ref",
    "reward units",
    (("objective", "training", TRAIN),),
  ),
  (
    "rewards",
    "Implicit rewards  β log π/π_ref",
    "reward units",
    (
      ("rewards/chosen", "chosen", CHOSEN),
      ("rewards/rejected", "rejected", REJECTED),
      ("rewards/desirable", "desirable", CHOSEN),
      ("rewards/undesirable", "undesirable", REJECTED),
      ("rewards/best", "best", CHOSEN),
      ("rewards/rest", "rest", REJECTED),
    ),
  ),
  ("margin", "Margin of rewards", "reward units", (("rewards/margins", "training", TRAIN),)),
  (
    "margin_by_length",
    "Margin of rewards, by length",
    "reward units",
    (
      ("margins/chosen_longer", "chosen longer", TRAIN),
      ("margins/chosen_shorter", "chosen shorter", EVAL),
    ),
  ),
  (
    "drift",
    "Drift of the completions  log π/π_ref",
    "nats per token",
    (("drift/chosen", "chosen", CHOSEN), ("drift/rejected", "rejected", REJECTED)),
  ),
  (
    "both_fell",
    "Pairs whose completions both lost probability",
    "share of pairs",
    (("drift/both_fell", "training", TRAIN),),
  ),
  (
    "pair_mass",
    "Probability of the pair, against π_ref",
    "log ratio, nats",
    (("drift/pair_mass", "training", TRAIN),),
  ),
  (
    "logps",
    "Log-probability of the completions",
    "nats per completion",
    (
      ("logps/chosen", "chosen", CHOSEN),
      ("logps/rejected", "rejected", REJECTED),
      ("logps/desirable", "desirable", CHOSEN),
      ("logps/undesirable", "undesirable", REJECTED),
      ("logps/best", "best", CHOSEN),
      ("logps/rest", "rest", REJECTED),
    ),
  ),
  (
    "kl",
    "Distance of completions from the reference",
    "log π/π_ref, nats per completion",
    (("kl", "training", TRAIN), ("sampled/kl", "sampled", CHOSEN)),
  ),
  ("entropy", "Entropy of samples", "nats per token", (("sampled/entropy", "", TRAIN),)),
  (
    "diversity",
    "Samples",
    "share",
    (
      ("sampled/distinct_2", "distinct bigrams", CHOSEN),
      ("sampled/repetition", "repeated 4-grams", REJECTED),
      ("sampled/ended", "ended", MUTED),
    ),
  ),
  ("length", "Length of samples", "tokens", (("sampled/tokens", "", TRAIN),)),
  ("grad_norm", "Norm of the gradient, before clipping", "", (("grad_norm", "training", TRAIN),)),
  ("learning_rate", "Learning rate", "", (("learning_rate", "training", MUTED),)),
  ("speed", "Speed", "", (("pairs_per_second", "training", MUTED),)),
)


def curves(records: Records) -> dict[str, Figure]:
  """Draws a figure for each quantity that the metrics of a run contain.

  Returns:
    Figures by name; the names are used for files.
  """
  figures = {}
  for name, title, unit, lines in _CURVES:
    present = [line for line in lines if _is_recorded(records, line[0])]
    if not present:
      continue
    if name == "speed":
      unit = f"{loggers.unit_of({key for record in records for key in record})} per second"
    with styled(title, unit, "step") as (figure, ax):
      _draw_lines(ax, records, present)
      _draw_marks(ax, records, name)
    figures[name] = figure
  return figures


def _is_recorded(records: Records, metric: str) -> bool:
  """Returns True if any record has the metric, of training or held out."""
  return any(_series(records, name)[0].size for name in (metric, f"eval/{metric}"))


def _draw_lines(ax: Axes, records: Records, lines: Sequence[tuple[str, str, str]]) -> None:
  """Draws training metrics as lines and held-out ones as points, joined by dashes if several."""
  several = len(lines) > 1
  points: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
    "linewidth": 1.2,
    "clip_on": False,
    "zorder": 3,
  }
  dashed: dict[str, Any] = points | {"linestyle": (0, (4, 2))}
  # Several metrics keep their colors, so held-out values differ by their dashes alone.
  has_dashed = False
  for metric, label, color in lines:
    steps, trained = _series(records, metric)
    # A learning rate has no noise, and a short run too few values for an average.
    if metric != "learning_rate" and len(trained) > 20:
      # Single steps stay visible behind their average: how they scatter is the noise.
      ax.plot(steps, trained, color=color, alpha=0.18, linewidth=0.8)
      ax.plot(steps, smoothed(trained), color=color, label=label)
    elif trained.size:
      ax.plot(steps, trained, color=color, label=label)
    steps, values = _series(records, f"eval/{metric}")
    if not values.size:
      continue
    if not trained.size:
      ax.plot(steps, values, color=color, label=label, **points)
    elif several:
      ax.plot(steps, values, color=color, **dashed)
      has_dashed = True
    else:
      ax.plot(steps, values, color=EVAL, label="held out", **points)
  if has_dashed:
    ax.plot([], [], color=MUTED, label="held out", **dashed)
  if len(ax.get_legend_handles_labels()[0]) > 1:
    if several:  # the legend gets a row of its own above the curves
      bottom, top = ax.get_ylim()
      ax.set_ylim(bottom, top + 0.18 * (top - bottom))
    ax.legend(
      loc="upper left" if several else "best",
      ncols=3 if several else 1,
      columnspacing=1.2,
      handlelength=1.6,
    )


def _draw_marks(ax: Axes, records: Records, name: str) -> None:
  """Draws levels to compare a curve with: chance, zero, the loss at the start."""
  if name == "accuracy":
    ax.axhline(0.5, color=MUTED, linewidth=1, linestyle=":")
    # Chance stays in sight, and there is no space above 1, beyond which no share lies.
    ax.set_ylim(min(0.4, ax.get_ylim()[0]), max(1.0, min(1.02, ax.get_ylim()[1])))
  if name in ("margin", "rewards", "margin_by_length", "drift", "pair_mass"):
    ax.axhline(0, color=MUTED, linewidth=1, linestyle=":")
  if name in ("speed", "entropy", "diversity", "length"):
    ax.set_ylim(bottom=0)
  if name == "loss" and _series(records, "rewards/margins")[0].size:
    steps, values = _series(records, "eval/loss")
    if steps.size and steps[0] == 0:  # evaluated while the policy still equaled the reference
      ax.axhline(values[0], color=MUTED, linewidth=1, linestyle=":")


def frontier(
  exact: Sequence[Mapping[str, float]], points: Mapping[str, Mapping[str, Any]]
) -> Figure:
  """Draws reward against KL: the exact frontier as a line, trained policies as points.

  Args:
    exact: `kl` (nats) and `reward` of π* for some values of β, in any order.
    points: `kl` and `reward` of trained policies, by name; also `kl_interval` and
      `reward_interval` (low, high) if known.
  """
  # `np.interp` needs rising KLs.
  curve = sorted(exact, key=lambda point: point["kl"])
  kl, reward = ([point[key] for point in curve] for key in ("kl", "reward"))
  title = "True reward against distance from the reference"
  with styled(title, "mean true reward", "KL(π ‖ π_ref), nats", (7.2, 4.4)) as (figure, ax):
    ax.fill_between(kl, reward, min(reward), color=TRAIN, alpha=0.06, linewidth=0)
    ax.plot(kl, reward, color=TRAIN, label="exact frontier π*")
    colors = itertools.cycle((MUTED, REJECTED, CHOSEN, EVAL))
    for (name, point), color in zip(points.items(), colors, strict=False):
      x, y = point["kl"], point["reward"]
      # The dotted line is the gain that is left. Outside its range the frontier is not known.
      if kl[0] <= x <= kl[-1]:
        best = np.interp(x, kl, reward)
        ax.plot([x, x], [y, best], color=color, linewidth=1, linestyle=":")
      ax.errorbar(
        x,
        y,
        xerr=_bar(x, point.get("kl_interval")),
        yerr=_bar(y, point.get("reward_interval")),
        color=color,
        fmt="o",
        markersize=8,
        markeredgecolor="white",
        elinewidth=1.5,
        label=name,
        clip_on=False,
        zorder=4,
      )
    ax.set_xlim(left=0)
    ax.margins(y=0.06)
    ax.legend(loc="lower right")
  return figure


def growth(points: Records, labels: Mapping[str, str]) -> Figure:
  """Draws time and memory of a step against each varied quantity, on logarithmic axes.

  A dotted line shows proportional growth through the last measured point.

  Args:
    points: records with `axis`, `value`, `seconds`, `measured_mb` and `planned_mb`, the last three
      None if not known.
    labels: labels of the quantities, in the order in which they are drawn.
  """
  names = [name for name in labels if any(point["axis"] == name for point in points)]
  rows = -(-len(names) // 2)
  kinds = (
    ("Time", "seconds per step", {"seconds": ("measured", TRAIN)}),
    (
      "Memory",
      "MB",
      {"measured_mb": ("measured peak", TRAIN), "planned_mb": ("by the compiler", EVAL)},
    ),
  )
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(14, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False)
    # An odd number of quantities leaves two panels without curves.
    for unused in panels.flat[2 * len(names) :]:
      unused.set_visible(False)
    for number, name in enumerate(names):
      some = sorted((p for p in points if p["axis"] == name), key=lambda point: point["value"])
      for (title, unit, curves), ax in zip(kinds, panels.flat[2 * number :][:2], strict=True):
        ax.set(title=title, xlabel=labels[name], ylabel=unit)
        _draw_growth(ax, some, curves)
  return figure


class _Plain(LogFormatter):
  """Labels the ticks that matplotlib chooses on a logarithmic axis as 0.05, not as 5·10⁻²."""

  def __call__(self, x: float, pos: int | None = None) -> str:
    return f"{x:g}" if super().__call__(x, pos) else ""


def _draw_growth(ax: Axes, points: Records, curves: Mapping[str, tuple[str, str]]) -> None:
  last = None
  for (field, (label, color)), mark in zip(curves.items(), "os", strict=False):
    known = [(point["value"], point[field]) for point in points if point[field]]
    if known:
      x, y = zip(*known, strict=True)
      ax.plot(x, y, color=color, marker=mark, markersize=4, label=label)
      # Of the first curve, which is what was measured.
      last = last or known[-1]
  values = [point["value"] for point in points]
  if last:
    line = [last[1] * value / last[0] for value in values]
    ax.plot(values, line, color=MUTED, linestyle=":", linewidth=1.2, label="in proportion")
  # Both logarithmic: growth by a power is a straight line, whose slope is the power.
  ax.set_xscale("log", base=2)
  ax.set_yscale("log")
  ax.yaxis.set_major_formatter(_Plain())
  ax.yaxis.set_minor_formatter(_Plain())
  ax.set_xticks(values, [f"{x // 1024}k" if x >= 1024 else str(x) for x in values])
  ax.tick_params(which="minor", length=0)
  ax.legend(fontsize=8)


def _bar(at: float, interval: Sequence[float] | None) -> list[list[float]] | None:
  """Converts an interval to the lengths below and above a point that matplotlib wants."""
  return None if interval is None else [[max(0, at - interval[0])], [max(0, interval[1] - at)]]


# ---------------------------------------------------------------------------- parts


@contextlib.contextmanager
def styled(
  title: str, ylabel: str, xlabel: str, size: tuple[float, float] = (4.5, 2.8)
) -> Iterator[tuple[Figure, Axes]]:
  """Yields a figure with one titled pair of axes, in the common style."""
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    yield figure, ax


def _series(records: Records, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and values of one metric, from the records that have it."""
  pairs = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
  return np.array([s for s, _ in pairs]), np.array([v for _, v in pairs], float)


def smoothed(values: np.ndarray) -> np.ndarray:
  """Averages values under a centered bell whose width is a hundredth of the run, so without lag."""
  width = max(1.0, len(values) / 100)
  reach = min(int(3 * width), len(values) - 1)
  bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)

  def weighted(x: np.ndarray) -> np.ndarray:
    # "full" and a slice: mode "same" returns the length of the longer input, which may be the bell.
    return np.convolve(x, bell)[reach : reach + len(values)]

  # Near the ends part of the bell has no values, so its weight is divided out.
  return weighted(values) / weighted(np.ones_like(values))


def _lay_out(figure: Figure) -> None:
  """Places axes and labels, if that has not been done; otherwise each saving would do it again.

  Most of the time of a picture goes into that: matplotlib draws the whole of it twice for it.
  """
  engine = figure.get_layout_engine()
  if engine is not None:
    engine.execute(figure)
    figure.set_layout_engine(None)


def save_png(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG, for documents and slides."""
  with matplotlib.rc_context(_STYLE):
    _lay_out(figure)
    # In the style again: matplotlib reads some settings when it saves, not when it draws.
    figure.savefig(path, dpi=160)


def to_svg(figure: Figure) -> str:
  """Returns a figure as an `<svg>` element, for a page without other files."""
  buffer = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    _lay_out(figure)
    # Without the date, so that the same metrics give the same page.
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
  text = buffer.getvalue()
  return text[text.index("<svg") :]  # without the XML header, which has no place inside a page
