"""Defines the methods, sizes and runs of a study; reads them from flags and checks them."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.monitoring import plots
from dpo_jax.structs import UserError
from dpo_jax.utils import files

MAX_TOKENS = 48  # largest length of a completion

# --- The methods ----------------------------------------------------------------------------------


class Method(NamedTuple):
  """Contains the configuration that trains the points of one method.

  Attributes:
    label: name in plot and table.
    color: color of the curve.
    config: name of a configuration and its argument.
    flags: flags of the run; `runs.command` fills in the names in braces.
    betas: default values of β; empty for a method without β.
    follows: method whose policy, of the same β and seed, this method continues from. It trains on
      that method's pairs and on as many new pairs sampled from the policy. The reference does not
      change.
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
# The optimum at a larger β has smaller log-ratios, which steps of a fixed size would pass; so the
# learning rate depends on β.
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
  # The optimum of IPO is π_ref exp(p/τ)/Z with p in [0, 1] the probability to win. In DPO's stands
  # a reward of several units, so for the same KL τ must be far smaller than β.
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
  """Contains the sizes of a study; studies with different sizes cannot share a folder.

  Attributes:
    pairs: number of training pairs per seed, one per prompt.
    epochs: passes over the pairs; a second round, with twice the pairs, makes half as many.
    on_policy_steps: updates of a method that samples while it trains.
    sft_rows, sft_steps: examples and updates that the reference is trained with.
    eval_prompts: number of unseen prompts that policies are measured on.
    frontier_prompts: number of these prompts that the exact frontier and best-of-n are computed on.
    frontier_samples: samples of the reference for each of them.
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
  """Identifies one run; `beta` is None where the method has none."""

  method: str
  beta: float | None
  seed: int

  def folder(self, study: pathlib.Path) -> pathlib.Path:
    """Returns the workdir of the run."""
    return study / f"seed{self.seed}" / self.name

  @property
  def name(self) -> str:
    """The name of the workdir, and the beginning of names of files next to it."""
    return self.method if self.beta is None else f"{self.method}-{self.beta:g}"

  @property
  def predecessor(self) -> Task | None:
    """The run whose policy this run continues from; None where it starts from the reference."""
    follows = METHODS[self.method].follows
    return self._replace(method=follows) if follows else None


# --- Reading and checking -------------------------------------------------------------------------


def parse_numbers(text: str, written: str, kind: type = float) -> list[Any]:
  """Reads numbers separated by commas; repeated ones are dropped, the order stays.

  Args:
    text: the numbers.
    written: the whole flag as the user wrote it, for the error message.
    kind: int or float.

  Raises:
    UserError: a part is not a number.
  """
  found = []
  for part in text.split(","):
    try:
      found.append(kind(part))
    except ValueError:
      what = "an integer" if kind is int else "a number"
      raise UserError(f"{written}: {part!r} is not {what}; separate several by commas") from None
  # A repeated value would train two runs into one folder.
  return list(dict.fromkeys(found))


def read_methods(text: str) -> list[str]:
  """Reads the names of methods from a --methods flag; an empty one means all methods.

  Raises:
    UserError: a name is unknown or missing.
  """
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
  """Reads β per trained method from --betas flags such as `METHOD:1,2,4`; others have defaults.

  A quick study uses only the first of the defaults.

  Raises:
    UserError: a flag names no requested method with a β, or a β is no positive number.
  """
  some = slice(1 if quick else None)
  betas = {name: list(METHODS[name].betas[some]) for name in methods if name in METHODS}
  for text in texts:
    name, colon, values = text.partition(":")
    if not colon or not betas.get(name):
      able = [known for known, defaults in betas.items() if defaults]
      raise UserError(
        f"--betas={text} names no method with a β among the requested ones;"
        f" write METHOD:1,2,4 with METHOD one of {', '.join(able) or 'none: there is none'}"
      )
    betas[name] = parse_numbers(values, f"--betas={text}")
    for beta in betas[name]:  # written so that NaN, which float() accepts, is refused too
      if not 0 < beta < math.inf:
        raise UserError(f"--betas={text}: β is {beta:g}; it must be above 0 and finite")
  return betas


def read_seeds(text: str | None, *, quick: bool = False) -> list[int]:
  """Reads a --seeds flag; None means the defaults, of which a quick study uses only the first.

  Raises:
    UserError: a seed is no integer or out of range.
  """
  if text is None:
    return list(SEEDS[:1] if quick else SEEDS)
  seeds = parse_numbers(text, f"--seeds={text}", int)
  for seed in seeds:
    if not 0 <= seed < 2**31:
      raise UserError(f"--seeds={text}: {seed} does not lie between 0 and 2^31 - 1")
  return seeds


def tasks(betas: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Task]:
  """Lists every requested run, seed by seed, so that a study stopped early has complete seeds.

  Raises:
    UserError: a method that needs a β has none.
  """
  for name, values in betas.items():
    if METHODS[name].betas and not values:
      raise UserError(f"{name} is requested without a β; give it one or more, or leave it out")
  return [
    Task(name, beta, seed)
    for seed in seeds
    for name, values in betas.items()
    for beta in (values or [None])
  ]


def check(settings: Settings) -> None:
  """Raises `UserError` for sizes that would fail only after the reference was trained."""
  for name, value in settings._asdict().items():
    if not 0 < value < math.inf:  # written so that NaN is refused too
      raise UserError(f"--{name}={value:g}; it must be above 0")
  if settings.frontier_prompts > settings.eval_prompts:
    raise UserError(
      f"--frontier_prompts={settings.frontier_prompts} are taken from --eval_prompts="
      f"{settings.eval_prompts}; give no more than those"
    )
  if settings.eval_prompts < 2 or settings.frontier_samples < 2:
    raise UserError("--eval_prompts and --frontier_samples must be 2 or more: a mean needs both")


def claim(study: pathlib.Path, settings: Settings) -> None:
  """Writes the settings to a folder, or checks that they are those already written there.

  Raises:
    UserError: the path is no folder, or it contains a study with other settings.
  """
  files.check_folder(study, f"--out={study}")
  stored, now = study / "settings.json", settings._asdict()
  if stored.is_file():
    try:
      before = json.loads(stored.read_text(encoding="utf-8"))
    except ValueError:
      raise UserError(f"{stored} is not JSON; choose another --out") from None
    changed = [
      f"{key} was {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
      raise UserError(
        f"{study} contains a study with other settings: {'; '.join(changed)}. Choose another --out,"
        " or give the same values to continue it"
      )
    return
  study.mkdir(parents=True, exist_ok=True)
  files.write_text(stored, json.dumps(now, indent=1) + "\n")
