"""What is made and trained, by the commands a user would run; what is there is not made again."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from dpo_jax.experiments.frontier.settings import MAX_TOKENS, METHODS, Settings, Task
from dpo_jax.experiments.frontier.yardstick import Json, Yardstick
from dpo_jax.generation import rollouts
from dpo_jax.structs import UserError
from dpo_jax.utils import workdir

# The folder that contains the package. The runs start there, so that they find it uninstalled too.
ROOT = pathlib.Path(__file__).resolve().parents[3]
DPO_JAX = ("-m", "dpo_jax")


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
      [sys.executable, "-u", *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False
    )
  if done.returncode:
    words = log.read_text(encoding="utf-8").split("\n")
    last = next((line for line in reversed(words) if line.strip()), "it said nothing")
    raise UserError(f"{' '.join(command[:3])} … failed: {last.strip()} ({log} has all of it)")
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
  run([*DPO_JAX, "make-controlled", f"--out={task}", *flags], study / "task.log")
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
    *DPO_JAX,
    "train",
    "--config=controlled:sft",
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
  run([*DPO_JAX, "make-pairs", *words], out.with_suffix(".log"))


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
  rollouts.write_whole(out, lines)


def learning_rate(task: Task) -> float | None:
  """Of DPO at a β: 0.01/β, 4e-3 at most, and three quarters of it in a second round."""
  if task.beta is None:
    return None
  return min(4e-3, 1e-2 / task.beta) * (1.0 if task.first is None else 0.75)


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
    "rate": learning_rate(task),
  }
  start = reference if task.first is None else task.first.folder(study) / "export"
  return [
    *DPO_JAX,
    "train",
    f"--config={method.config}",
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
  workdir.write(kept, json.dumps(point, indent=1) + "\n")
  return point
