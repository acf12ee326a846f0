"""Reward against KL on the embedded task: what each method reaches, and the best there can be.

A study is a folder. One reference is trained there, and its samples give the exact frontier and
best-of-n; every other point is an ordinary run of `dpo_jax.train` in a folder of its own:

  settings.json            what fixes the task; a study of other settings is refused
  task/, sft/              the texts, and the reference
  eval_pairs.jsonl         held-out pairs, for the runs' own evaluation
  reference.json           rewards of samples of the reference
  seed0/pairs.jsonl        the pairs of a seed: new samples and new labels
  seed0/dpo-2.5/           the run of a method at a β; point.json, once measured, is not made again
  frontier.json, frontier.png

The files, each knowing those before it: `settings` (methods, sizes, flags), `yardstick` (a policy
against the reference; best-of-n), `runs` (pairs and runs), `results` (tables and the picture).
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
  """Trains and measures every point that is not there yet; writes frontier.json and frontier.png.

  Args:
    out: the study's folder.
    settings: of the task.
    betas: of every trained method, as `read_betas` gives them.
    seeds: of pairs, training and samples.
    with_best_of_n: whether best-of-n is among the methods.
    say: takes a line about what is being done.

  Returns:
    What frontier.json holds.

  Raises:
    UserError: bad settings or a β missing, before anything is made; or a run that failed.
  """
  check(settings)
  wanted = tasks(betas, seeds)
  out = out.absolute()  # the runs start in the project's root
  claim(out, settings)
  make_reference(out, settings, say)
  yardstick = make_yardstick(out, settings, say)
  points = best_of_n_points(yardstick) if with_best_of_n else []
  for number, task in enumerate(wanted, 1):
    say(f"{number} of {len(wanted)}: {task.folder(out)}")
    point = train_point(task, out, settings, yardstick)
    say(f"  KL {point['kl']:.2f}, reward {point['reward']:.2f}, share {point['fraction'] or 0:.3f}")
    points.append(point)
  points.sort(key=lambda point: point["method"] == BEST_OF_N)  # the trained ones first
  summary = summarise(settings, yardstick, points)
  files.write_text(out / "frontier.json", json.dumps(summary, indent=1) + "\n")
  plots.save_png(draw(summary), out / "frontier.png")
  return summary
