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

X lists prompts, S samples of a prompt, R distinct rewards among them.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dpo_jax import draws, evaluate, measures, plots, rewards, workdirs
from dpo_jax.structs import UserError

Json = dict[str, Any]

ROOT = pathlib.Path(__file__).resolve().parent.parent
KLS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # nats at which methods are compared
MAX_TOKENS = 48  # of an answer
EVERYDAY = 2  # answers a prompt that a policy is measured by

# --- The methods ----------------------------------------------------------------------------------


class Method(NamedTuple):
  """How the points of one method are trained.

  Attributes:
    label: its name in the plot and the table.
    color: of its curve.
    config: a file of configs/ and its argument.
    flags: of the run; names in braces are filled in by `command`.
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
_BETAS = (6.0, 4.0, 2.5, 1.5, 0.8)

METHODS: dict[str, Method] = {
  "dpo": Method("DPO", plots.TRAIN, "controlled.py:dpo", (*_PAIRS, _BETA), _BETAS),
  "dpo_again": Method(
    "DPO, second round",
    "#8c6bd1",
    "controlled.py:dpo",
    (
      *_PAIRS,
      _BETA,
      "--config.reference.path={reference}",
      "--config.optimizer.learning_rate=3e-3",
    ),
    _BETAS,
    follows="dpo",
  ),
  # Its optimum is π_ref exp(p/τ), p in [0, 1] the chance to win, so τ is far smaller than β.
  "ipo": Method(
    "IPO",
    plots.EVAL,
    "controlled.py:dpo",
    (*_PAIRS, _BETA, "--config.loss.name=ipo"),
    (0.3, 0.2, 0.12, 0.07, 0.04),
  ),
  "on_policy": Method(
    "on-policy", plots.CHOSEN, "controlled.py:on_policy", (*_PROMPTS, _BETA), _BETAS
  ),
  "sft": Method(
    "SFT on chosen",
    plots.REJECTED,
    "preferences.py:loss=sft",
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


# --- What is asked for ----------------------------------------------------------------------------


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


def numbers(text: str, flag: str, kind: type = float) -> list[Any]:
  """The numbers of a flag, separated by commas, each once and in order of appearance."""
  found = []
  for part in text.split(","):
    try:
      found.append(kind(part))
    except ValueError:
      what = "an integer" if kind is int else "a number"
      raise UserError(
        f"{flag}={text}: {part!r} is not {what}; separate several by commas"
      ) from None
  return list(dict.fromkeys(found))


def read_methods(text: str) -> list[str]:
  """The names of a --methods flag; everything there is for an empty one."""
  names = list(dict.fromkeys(text.split(","))) if text else [*METHODS, BEST_OF_N]
  for name in names:
    if name not in LABELS:
      raise UserError(f"--methods={text}: there is no {name!r}, only {', '.join(LABELS)}")
  return names


def read_betas(texts: Sequence[str], methods: Sequence[str]) -> dict[str, list[float]]:
  """β of every trained method from --betas flags, `METHOD:1,2,4`, and the defaults of the rest."""
  betas = {name: list(METHODS[name].betas) for name in methods if name in METHODS}
  for text in texts:
    name, colon, values = text.partition(":")
    if not colon or not betas.get(name):
      able = [known for known, defaults in betas.items() if defaults]
      raise UserError(
        f"--betas={text} names no method with a β among those asked for;"
        f" write METHOD:1,2,4 with METHOD one of {', '.join(able) or 'none: there is none'}"
      )
    betas[name] = numbers(values, f"--betas={name}")
    for beta in betas[name]:
      if not 0 < beta < math.inf:
        raise UserError(f"--betas={text}: β is {beta:g}; it must be above 0 and finite")
  return betas


def read_seeds(text: str) -> list[int]:
  """The seeds of a --seeds flag."""
  seeds = numbers(text, "--seeds", int)
  for seed in seeds:
    if not 0 <= seed < 2**31:
      raise UserError(f"--seeds={text}: {seed} does not lie between 0 and 2^31 - 1")
  return seeds


def tasks(betas: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Task]:
  """Every run asked for, seed by seed, so that a study stopped early has whole seeds."""
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
  if study.exists() and not study.is_dir():
    raise UserError(f"--out={study} is a file; name a folder")
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
  workdirs.write(held, json.dumps(now, indent=1) + "\n")


# --- Making and training --------------------------------------------------------------------------


def run(command: Sequence[str], log: pathlib.Path) -> float:
  """Runs a Python command from the project's root, its words into a file; returns its seconds.

  A process of its own, so that its memory is given back.

  Raises:
    UserError: it failed; the last line it said.
  """
  log.parent.mkdir(parents=True, exist_ok=True)
  started = time.monotonic()
  with log.open("a", encoding="utf-8") as out:
    done = subprocess.run(
      [sys.executable, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False
    )
  if done.returncode:
    words = log.read_text(encoding="utf-8").split("\n")
    last = next((line for line in reversed(words) if line.strip()), "it said nothing")
    raise UserError(f"{' '.join(command[:2])} … failed: {last.strip()} ({log} has all of it)")
  return time.monotonic() - started


def make_reference(study: pathlib.Path, settings: Settings, say=print) -> None:
  """The task's texts, the reference trained on them, and held-out pairs, unless all are there."""
  task, held_out = study / "task", study / "eval_pairs.jsonl"
  if held_out.is_file():  # the last to be made, and whole once it is there
    return
  say(f"training the reference: {study / 'sft'}")
  sizes = {
    "sft_rows": settings.sft_rows,
    "prompts": settings.pairs,
    "eval_prompts": settings.eval_prompts,
  }
  flags = [f"--{name}={value}" for name, value in sizes.items()]
  run(["scripts/make_controlled.py", f"--out={task}", *flags], study / "task.log")
  run(sft_command(study, settings), study / "sft.log")
  make_pairs(study / "sft" / "export", task / "eval_prompts.jsonl", held_out, seed=0)


def sft_command(study: pathlib.Path, settings: Settings) -> list[str]:
  """The command that trains the reference."""
  flags = {
    "model.tokenizer": study / "task" / "tokenizer",
    "data.path": study / "task" / "sft.jsonl",
    "train.steps": settings.sft_steps,
    "optimizer.warmup_steps": min(50, settings.sft_steps // 2),
  }
  return [
    "-m",
    "dpo_jax.train",
    "--config=configs/controlled.py:sft",
    f"--workdir={study / 'sft'}",
    *(f"--config.{key}={value}" for key, value in flags.items()),
  ]


def make_pairs(model: pathlib.Path, prompts: pathlib.Path, out: pathlib.Path, *, seed: int) -> None:
  """Preferences between two answers of a model to each prompt; a file there is kept."""
  if out.is_file():
    return
  flags = {
    "model": model,
    "prompts": prompts,
    "reward": "controlled",
    "out": out,
    "max_tokens": MAX_TOKENS,
    "seed": seed,
  }
  words = [f"--{name}={value}" for name, value in flags.items()]
  run(["scripts/make_pairs.py", *words], out.with_suffix(".log"))


def training_pairs(task: Task, study: pathlib.Path) -> pathlib.Path:
  """The file of pairs a point is trained on; `make_training_pairs` makes it."""
  folder = study / f"seed{task.seed}"
  return folder / ("pairs.jsonl" if task.first is None else f"{task.name}.pairs.jsonl")


def make_training_pairs(task: Task, study: pathlib.Path) -> None:
  """The pairs of a point, unless they are there or it takes none."""
  out, prompts = training_pairs(task, study), study / "task" / "prompts.jsonl"
  if out.is_file() or not any("{pairs}" in flag for flag in METHODS[task.method].flags):
    return
  if task.first is None:
    # Held-out pairs have seed 0; theirs are other prompts of the same numbers.
    make_pairs(study / "sft" / "export", prompts, out, seed=1 + 2 * task.seed)
    return
  own = out.with_name(f"{task.name}.own.jsonl")
  make_pairs(task.first.folder(study) / "export", prompts, own, seed=2 + 2 * task.seed)
  lines = (path.read_text(encoding="utf-8") for path in (training_pairs(task.first, study), own))
  draws.write_whole(out, lines)


def command(task: Task, study: pathlib.Path, settings: Settings) -> list[str]:
  """The command that trains one point."""
  method, reference = METHODS[task.method], study / "sft" / "export"
  filled = {
    "pairs": training_pairs(task, study),
    "eval_pairs": study / "eval_pairs.jsonl",
    "prompts": study / "task" / "prompts.jsonl",
    "eval_prompts": study / "task" / "eval_prompts.jsonl",
    "reference": reference,
    "on_policy_steps": settings.on_policy_steps,
    "epochs": settings.epochs if task.first is None else settings.epochs / 2,
    "beta": task.beta,
  }
  start = reference if task.first is None else task.first.folder(study) / "export"
  return [
    "-m",
    "dpo_jax.train",
    f"--config=configs/{method.config}",
    f"--workdir={task.folder(study)}",
    f"--config.model.path={start}",
    f"--config.seed={task.seed}",
    *(flag.format_map(filled) for flag in method.flags),
  ]


def train_point(task: Task, study: pathlib.Path, settings: Settings, yardstick: Yardstick) -> Json:
  """One point, trained and measured unless it already is; what it goes on from before it."""
  folder = task.folder(study)
  kept = folder / "point.json"
  if kept.is_file():
    return json.loads(kept.read_text(encoding="utf-8"))
  if task.first is not None:
    train_point(task.first, study, settings, yardstick)
  make_training_pairs(task, study)
  seconds = run(command(task, study, settings), folder.with_name(f"{task.name}.log"))
  point = {"method": task.method, "beta": task.beta, "seed": task.seed, "n": None}
  point |= yardstick.measure(folder / "export", seed=task.seed) | {"seconds": seconds}
  workdirs.write(kept, json.dumps(point, indent=1) + "\n")
  return point


# --- Measuring ------------------------------------------------------------------------------------


class Yardstick(NamedTuple):
  """What policies are measured against, drawn once from the reference.

  Attributes:
    reference: the model.
    prompts: that policies answer.
    reference_X: mean reward of the reference on each of them.
    many_XS: rewards of many samples of the reference to the first of them.
    frontier: the exact frontier by those samples.
  """

  reference: draws.LanguageModel
  prompts: list[Any]
  reference_X: np.ndarray
  many_XS: np.ndarray
  frontier: measures.Frontier

  def measure(self, export: pathlib.Path, *, seed: int) -> Json:
    """Reward, KL and share of the frontier's gain of the model in a folder."""
    policy = draws.load(export)
    # The reference's own samples take seeds 0 and 1.
    drawn = draws.draw(
      policy,
      self.prompts,
      rewards.resolve("controlled"),
      num=EVERYDAY,
      max_tokens=MAX_TOKENS,
      seed=2 + seed,
    )
    examples = drawn.examples()
    policy_XS, reference_XS = (
      evaluate.scorer(model.config)(model.params, examples).logp_BK
      for model in (policy, self.reference)
    )
    return describe(
      drawn.reward_XS.mean(1),
      self.reference_X,
      (policy_XS - reference_XS).mean(1),
      self.frontier,
    )


def describe(
  reward_X: np.ndarray, reference_X: np.ndarray, kl_X: np.ndarray, frontier: measures.Frontier
) -> Json:
  """Means over prompts with 95% intervals; the KL is in nats an answer."""
  estimates = {
    "reward": measures.mean_estimate(reward_X),
    "kl": measures.mean_estimate(kl_X),
    "fraction": measures.fraction_of_gain(reward_X, reference_X, kl_X, frontier),
  }
  known = bool(estimates["kl"].mean <= frontier.reach)
  out: Json = {"within_reach": known}
  for name, (mean, *interval) in estimates.items():
    out[name] = mean if math.isfinite(mean) else None
    out[f"{name}_interval"] = interval if np.isfinite(interval).all() else None
  return out


def make_yardstick(study: pathlib.Path, settings: Settings, say=print) -> Yardstick:
  """Samples of the reference, drawn once and kept in reference.json."""
  reference = draws.load(study / "sft" / "export")
  prompts = draws.read_prompts(study / "task" / "eval_prompts.jsonl")
  kept = study / "reference.json"
  if not kept.is_file():
    say(
      f"the exact frontier: {settings.frontier_samples} samples of the reference to each of"
      f" {settings.frontier_prompts} prompts"
    )
    take = functools.partial(
      draws.draw, reference, reward=rewards.resolve("controlled"), max_tokens=MAX_TOKENS
    )
    everyday = take(prompts, num=EVERYDAY, seed=0)
    many = take(prompts[: settings.frontier_prompts], num=settings.frontier_samples, seed=1)
    found = {"everyday": everyday.reward_XS.tolist(), "many": many.reward_XS.tolist()}
    workdirs.write(kept, json.dumps(found) + "\n")
  found = json.loads(kept.read_text(encoding="utf-8"))
  many_XS = np.array(found["many"])
  return Yardstick(
    reference,
    prompts,
    np.array(found["everyday"]).mean(1),
    many_XS,
    measures.exact_frontier(many_XS),
  )


# --- Best of n ------------------------------------------------------------------------------------


def best_of_n(reward_S: np.ndarray, n: int) -> tuple[float, float]:
  """Expected reward and KL of taking the best of n samples, for one prompt.

    P(r) = [C(#{r_s <= r}, n) - C(#{r_s < r}, n)] / C(S, n)
    E[r] = Σ_r P(r) r,    KL(π_n ‖ π_ref) = Σ_r P(r) log(P(r) / p(r)),    p(r) = #{r_s = r} / S

  P is the distribution of the largest of n of the S samples, over all ways to take them. Samples of
  one reward are told apart by nothing, so within a reward π_n is π_ref, and the KL of the answers
  is that of the rewards. Where no two answers have one reward it is log n - (n - 1)/n, which is
  otherwise a bound from above (Beirami et al. 2024).

  Args:
    reward_S: rewards of samples of the reference.
    n: answers to choose from, at most S.

  Returns:
    The mean reward and the KL, nats.
  """
  level_R, count_R = np.unique(np.asarray(reward_S, np.float64), return_counts=True)
  log_R = _log_choose(np.cumsum(count_R), n) - _log_choose(np.array([len(reward_S)]), n)
  chance_R = np.diff(np.exp(log_R), prepend=0.0)
  some_R = chance_R > 0
  ratio_R = chance_R[some_R] / (count_R[some_R] / len(reward_S))
  kl = float(chance_R[some_R] @ np.log(ratio_R))
  # The reference itself is at no distance, whatever rounding says.
  return float(chance_R @ level_R), kl if n > 1 else 0.0


def _log_choose(total_R: np.ndarray, n: int) -> np.ndarray:
  """log C(total, n), minus infinity where total < n."""
  steps = np.arange(n)
  with np.errstate(divide="ignore"):
    terms_Rn = np.log(np.maximum(total_R[:, None] - steps, 0)) - np.log(n - steps)
  return terms_Rn.sum(1)


def best_of_n_points(yardstick: Yardstick) -> list[Json]:
  """Points for n = 1, 2, 4, … while sixteen samples or more stand behind each of the n."""
  many_XS = yardstick.many_XS
  points = []
  for n in (2**k for k in range(int(math.log2(many_XS.shape[1])) - 3)):
    both = np.array([best_of_n(reward_S, n) for reward_S in many_XS])
    found = describe(both[:, 0], many_XS.mean(1), both[:, 1], yardstick.frontier)
    point = {"method": BEST_OF_N, "beta": None, "seed": None, "n": n}
    points.append(point | found | {"kl_bound": math.log(n) - (n - 1) / n, "seconds": None})
  return points


# --- What came out --------------------------------------------------------------------------------


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


def curve(frontier: measures.Frontier) -> list[Json]:
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
  with plots._styled(
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


# --- The whole ------------------------------------------------------------------------------------


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
    UserError: bad settings, before anything is made; or a run that failed.
  """
  check(settings)
  out = out.absolute()  # the runs start in the project's root
  claim(out, settings)
  make_reference(out, settings, say)
  yardstick = make_yardstick(out, settings, say)
  points = best_of_n_points(yardstick) if with_best_of_n else []
  wanted = tasks(betas, seeds)
  for number, task in enumerate(wanted, 1):
    say(f"{number} of {len(wanted)}: {task.folder(out)}")
    point = train_point(task, out, settings, yardstick)
    say(f"  KL {point['kl']:.2f}, reward {point['reward']:.2f}, share {point['fraction'] or 0:.3f}")
    points.append(point)
  points.sort(key=lambda point: point["method"] == BEST_OF_N)  # the trained ones first
  summary = summarise(settings, yardstick, points)
  workdirs.write(out / "frontier.json", json.dumps(summary, indent=1) + "\n")
  plots.save_png(draw(summary), out / "frontier.png")
  return summary
