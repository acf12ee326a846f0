"""Measures reward against KL on the embedded task, for each method and for the exact frontier.

A study is a folder. One reference model is trained there, and its samples give the exact frontier
and best-of-n. Every other point is an ordinary run of `dpo_jax.train` in a folder of its own:

  settings.json            settings of the task; a study with other settings is refused
  task/, sft/              data of the task, and the reference model
  eval_pairs.jsonl         held-out pairs, which every run is evaluated on while it trains
  reference.json           rewards of samples of the reference
  seed0/pairs.jsonl        training pairs of a seed: new samples and new labels
  seed0/dpo-2.5/           run of a method at a β; a run with a point.json is not repeated
  frontier.json, frontier.png

Each file imports only those before it: `settings` (methods, sizes, flags), `yardstick` (measures a
policy against the reference; best-of-n), `runs` (pairs and runs), `results` (tables and plot).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

from dpo_jax.experiments.frontier.results import draw, show, summarise
from dpo_jax.experiments.frontier.runs import make_reference, train_point
from dpo_jax.experiments.frontier.settings import (
  BEST_OF_N,
  QUICK,
  Settings,
  check,
  claim,
  read_betas,
  read_methods,
  read_seeds,
  tasks,
)
from dpo_jax.experiments.frontier.yardstick import Json, best_of_n_points, make_yardstick
from dpo_jax.monitoring import plots
from dpo_jax.utils import files

__all__ = [
  "BEST_OF_N",
  "QUICK",
  "Settings",
  "read_betas",
  "read_methods",
  "read_seeds",
  "show",
  "study",
]


def study(
  out: pathlib.Path,
  settings: Settings,
  betas: Mapping[str, Sequence[float]],
  seeds: Sequence[int],
  *,
  with_best_of_n: bool,
  say=print,
) -> Json:
  """Trains and measures every missing point; writes frontier.json and frontier.png.

  Args:
    out: folder of the study.
    settings: settings of the task.
    betas: values of β per trained method, as `read_betas` returns them.
    seeds: random seeds of pairs, training and samples.
    with_best_of_n: whether best-of-n is among the methods.
    say: prints a line about the progress.

  Returns:
    The content of frontier.json.

  Raises:
    UserError: settings are invalid or a method has no β, before anything is written; or a run
      failed.
  """
  # The order is important:
  # 1. All that the user may have mistyped is checked before the folder is created.
  # 2. The folder is claimed before anything is written to it, so that two tasks never mix.
  # 3. The yardstick samples the reference, which must be trained first.
  check(settings)
  wanted = tasks(betas, seeds)
  out = out.absolute()  # runs start in the project's root, where a relative path means another
  claim(out, settings)
  make_reference(out, settings, say)
  yardstick = make_yardstick(out, settings, say)
  points = best_of_n_points(yardstick) if with_best_of_n else []
  for number, task in enumerate(wanted, 1):
    say(f"{number} of {len(wanted)}: {task.folder(out)}")
    point = train_point(task, out, settings, yardstick)
    say(f"  KL {point['kl']:.2f}, reward {point['reward']:.2f}, share {point['fraction'] or 0:.3f}")
    points.append(point)
  # Trained methods come first in tables and in the legend; the sort is stable.
  points.sort(key=lambda point: point["method"] == BEST_OF_N)
  summary = summarise(settings, yardstick, points)
  files.write_text(out / "frontier.json", json.dumps(summary, indent=1) + "\n")
  plots.save_png(draw(summary), out / "frontier.png")
  return summary
