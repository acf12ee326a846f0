"""What a study is asked for: methods, sizes and runs, read from flags and checked."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.monitoring import plots
from dpo_jax.structs import UserError
from dpo_jax.utils import files, workdir

MAX_TOKENS = 48  # of an answer

# --- The methods ----------------------------------------------------------------------------------


class Method(NamedTuple):
  """How the points of one method are trained.

  Attributes:
    label: its name in the plot and the table.
    color: of its curve.
    config: the name of a configuration and its argument.
    flags: of the run; names in braces are filled in by `runs.command`.
    betas: the values of β it is trained at unless others are asked for; none has no β.
    follows: a method whose policy, of the same β and seed, it goes on from: to the pairs that one
      was trained on come as many of its policy's own samples. The reference stays what it was.
  """

  label: str
  color: str
  config: str
  flags: tuple[str, ...]
  betas: tuple[float, ...]
  follows: str = ""


_PAIRS = (
  "--config.data.path={pairs}",
  "--config.data.eval_path={eval_pairs}",
  "--config.train.epochs={epochs}",
)
_PROMPTS = (
  "--config.data.path={prompts}",
  "--config.data.eval_path={eval_prompts}",
  "--config.train.steps={on_policy_steps}",
)
_BETA = "--config.loss.beta={beta}"
# A larger β asks for smaller log-ratios, past which steps of one size would carry them.
_RATE = "--config.optimizer.learning_rate={rate}"
_BETAS = (6.0, 3.0, 1.5, 0.8)

METHODS: dict[str, Method] = {
  "dpo": Method("DPO", plots.TRAIN, "controlled:dpo", (*_PAIRS, _BETA, _RATE), _BETAS),
  "dpo_again": Method(
    "DPO, second round",
    "#8c6bd1",
    "controlled:dpo",
    (
      *_PAIRS,
      _BETA,
      _RATE,
      "--config.reference.path={reference}",
    ),
    _BETAS,
    follows="dpo",
  ),
  # Its optimum is π_ref exp(p/τ), p in [0, 1] the chance to win, so τ is far smaller than β.
  "ipo": Method(
    "IPO",
    plots.EVAL,
    "controlled:dpo",
    (*_PAIRS, _BETA, "--config.loss.name=ipo"),
    (0.3, 0.12, 0.05),
  ),
  "on_policy": Method(
    "on-policy", plots.CHOSEN, "controlled:on_policy", (*_PROMPTS, _BETA), _BETAS
  ),
  "sft": Method(
    "SFT on chosen",
    plots.REJECTED,
    "preferences:loss=sft",
    (
      *_PAIRS,
      "--config.data.max_length=64",
      "--config.data.row_length=128",
      "--config.train.batch_size=64",
      "--config.optimizer.learning_rate=1e-3",
      "--config.optimizer.b2=0.98",
      "--config.eval.every=500",
    ),
    (),
  ),
}
BEST_OF_N = "best_of_n"
LABELS = {name: method.label for name, method in METHODS.items()} | {BEST_OF_N: "best of n"}
COLORS = {name: method.color for name, method in METHODS.items()} | {BEST_OF_N: plots.MUTED}


# --- Sizes and runs -------------------------------------------------------------------------------


class Settings(NamedTuple):
  """What fixes the task of a study: two studies that differ here do not share a folder.

  Attributes:
    pairs: training pairs of a seed, one a prompt.
    epochs: passes over them; a second round, which has twice the pairs, makes half as many.
    on_policy_steps: updates of methods that sample as they go.
    sft_rows, sft_steps: texts that the reference learns from, and its updates.
    eval_prompts: unseen prompts that policies are measured on.
    frontier_prompts, frontier_samples: of those, and answers of the reference to each, that the
      exact frontier and best-of-n rest on.
  """

  pairs: int = 36_000
  epochs: float = 2.0
  on_policy_steps: int = 400
  sft_rows: int = 32_000
  sft_steps: int = 500
  eval_prompts: int = 1_024
  frontier_prompts: int = 32
  frontier_samples: int = 4_096


QUICK = Settings(1_280, 1.0, 10, 1_280, 20, 64, 8, 256)
SEEDS = (0, 1, 2)


class Task(NamedTuple):
  """One run to train; `beta` is None where the method has none."""

  method: str
  beta: float | None
  seed: int

  def folder(self, study: pathlib.Path) -> pathlib.Path:
    """Its workdir."""
    return study / f"seed{self.seed}" / self.name

  @property
  def name(self) -> str:
    """Of its workdir, and of the files beside it."""
    return self.method if self.beta is None else f"{self.method}-{self.beta:g}"

  @property
  def first(self) -> Task | None:
    """The point it goes on from."""
    follows = METHODS[self.method].follows
    return self._replace(method=follows) if follows else None


# --- Reading and checking -------------------------------------------------------------------------


def numbers(text: str, written: str, kind: type = float) -> list[Any]:
  """The numbers of a flag, separated by commas, each once and in order of appearance.

  Args:
    text: the numbers.
    written: the whole flag as the user wrote it, for the error.
    kind: int or float.
  """
  found = []
  for part in text.split(","):
    try:
      found.append(kind(part))
    except ValueError:
      what = "an integer" if kind is int else "a number"
      raise UserError(f"{written}: {part!r} is not {what}; separate several by commas") from None
  return list(dict.fromkeys(found))


def read_methods(text: str) -> list[str]:
  """The names of a --methods flag; everything there is for an empty one."""
  names = list(dict.fromkeys(text.split(","))) if text else [*METHODS, BEST_OF_N]
  for name in names:
    if not name:
      raise UserError(
        f"--methods={text}: a name is missing beside a comma; give some of {', '.join(LABELS)}"
      )
    if name not in LABELS:
      raise UserError(f"--methods={text}: there is no {name!r}, only {', '.join(LABELS)}")
  return names


def read_betas(
  texts: Sequence[str], methods: Sequence[str], *, quick: bool = False
) -> dict[str, list[float]]:
  """β of every trained method from --betas flags, `METHOD:1,2,4`, and the defaults of the rest.

  A quick study has the first of the defaults alone.
  """
  some = slice(1 if quick else None)
  betas = {name: list(METHODS[name].betas[some]) for name in methods if name in METHODS}
  for text in texts:
    name, colon, values = text.partition(":")
    if not colon or not betas.get(name):
      able = [known for known, defaults in betas.items() if defaults]
      raise UserError(
        f"--betas={text} names no method with a β among those asked for;"
        f" write METHOD:1,2,4 with METHOD one of {', '.join(able) or 'none: there is none'}"
      )
    betas[name] = numbers(values, f"--betas={text}")
    for beta in betas[name]:
      if not 0 < beta < math.inf:
        raise UserError(f"--betas={text}: β is {beta:g}; it must be above 0 and finite")
  return betas


def read_seeds(text: str | None, *, quick: bool = False) -> list[int]:
  """The seeds of a --seeds flag, or of None the defaults, of which a quick study has the first."""
  if text is None:
    return list(SEEDS[:1] if quick else SEEDS)
  seeds = numbers(text, f"--seeds={text}", int)
  for seed in seeds:
    if not 0 <= seed < 2**31:
      raise UserError(f"--seeds={text}: {seed} does not lie between 0 and 2^31 - 1")
  return seeds


def tasks(betas: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Task]:
  """Every run asked for, seed by seed, so that a study stopped early has whole seeds.

  Raises:
    UserError: a method that has a β is given none.
  """
  for name, values in betas.items():
    if METHODS[name].betas and not values:
      raise UserError(f"{name} is asked for at no β; give it one or more, or leave it out")
  return [
    Task(name, beta, seed)
    for seed in seeds
    for name, values in betas.items()
    for beta in (values or [None])
  ]


def check(settings: Settings) -> None:
  """Values that would fail only after the reference was trained."""
  for name, value in settings._asdict().items():
    if not 0 < value < math.inf:
      raise UserError(f"--{name}={value:g}; it must be above 0")
  if settings.frontier_prompts > settings.eval_prompts:
    raise UserError(
      f"--frontier_prompts={settings.frontier_prompts} are taken from --eval_prompts="
      f"{settings.eval_prompts}; give no more than those"
    )
  if settings.eval_prompts < 2 or settings.frontier_samples < 2:
    raise UserError("--eval_prompts and --frontier_samples must be 2 or more: a mean needs both")


def claim(study: pathlib.Path, settings: Settings) -> None:
  """Makes a folder this study's own, or finds that it already is.

  Raises:
    UserError: it is no folder, or holds a study of other settings.
  """
  files.check_folder(study, f"--out={study}")
  held, now = study / "settings.json", settings._asdict()
  if held.is_file():
    try:
      before = json.loads(held.read_text(encoding="utf-8"))
    except ValueError:
      raise UserError(f"{held} is not JSON; choose another --out") from None
    changed = [
      f"{key} was {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
      raise UserError(
        f"{study} holds a study with other settings: {'; '.join(changed)}. Choose another --out,"
        " or the same values to go on"
      )
    return
  study.mkdir(parents=True, exist_ok=True)
  workdir.write(held, json.dumps(now, indent=1) + "\n")
