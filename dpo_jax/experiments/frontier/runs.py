"""Creates data and trains models with the commands a user would run; existing files are reused."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from dpo_jax.experiments.frontier.settings import MAX_TOKENS, METHODS, Settings, Task
from dpo_jax.experiments.frontier.yardstick import Json, Yardstick
from dpo_jax.structs import UserError
from dpo_jax.utils import files

# The folder that contains the package. The runs start there, so that they find it uninstalled too.
# The index counts folders upward from this file, so it must change when the file moves.
ROOT = pathlib.Path(__file__).resolve().parents[3]
DPO_JAX = ("-m", "dpo_jax")


def run(command: Sequence[str], log: pathlib.Path) -> float:
  """Runs a Python command from the project's root and returns its time in seconds.

  Output and errors are appended to `log`.

  Raises:
    UserError: the command failed; the message contains the last line of its output.
  """
  # A process of its own, so that host and device memory are free again before the next run.
  log.parent.mkdir(parents=True, exist_ok=True)
  started = time.monotonic()
  # Appended, and unbuffered (-u): a run that is killed and repeated leaves both outputs.
  with log.open("a", encoding="utf-8") as out:
    done = subprocess.run(
      [sys.executable, "-u", *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False
    )
  if done.returncode:
    lines = log.read_text(encoding="utf-8").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    raise UserError(f"{' '.join(command[:3])} … failed: {last.strip()} ({log} has all of it)")
  return time.monotonic() - started


def make_reference(study: pathlib.Path, settings: Settings, say=print) -> None:
  """Writes the task's data, trains the reference on it and samples held-out pairs, unless done."""
  task, held_out = study / "task", study / "eval_pairs.jsonl"
  # Written last, and complete as soon as it exists: one file stands for all three steps.
  if held_out.is_file():
    return
  say(f"training the reference: {study / 'sft'}")
  sizes = {
    "sft_rows": settings.sft_rows,
    "prompts": settings.pairs,
    "eval_prompts": settings.eval_prompts,
  }
  flags = [f"--{name}={value}" for name, value in sizes.items()]
  run([*DPO_JAX, "make-controlled", f"--out={task}", "--force", *flags], study / "task.log")
  run(sft_command(study, settings), study / "sft.log")
  make_pairs(study / "sft" / "export", task / "eval_prompts.jsonl", held_out, seed=0)


def sft_command(study: pathlib.Path, settings: Settings) -> list[str]:
  """Returns the arguments of the Python command that trains the reference."""
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
  """Writes one preference per prompt between two samples of a model; an existing file is kept."""
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
  arguments = [f"--{name}={value}" for name, value in flags.items()]
  run([*DPO_JAX, "make-pairs", *arguments], out.with_suffix(".log"))


def training_pairs(task: Task, study: pathlib.Path) -> pathlib.Path:
  """Returns the path of a run's training pairs; `make_training_pairs` writes them."""
  folder = study / f"seed{task.seed}"
  return folder / ("pairs.jsonl" if task.predecessor is None else f"{task.name}.pairs.jsonl")


def make_training_pairs(task: Task, study: pathlib.Path) -> None:
  """Writes the training pairs of a run, unless they exist or its method needs none."""
  out, prompts = training_pairs(task, study), study / "task" / "prompts.jsonl"
  if out.is_file() or not any("{pairs}" in flag for flag in METHODS[task.method].flags):
    return
  if task.predecessor is None:
    # Held-out pairs have seed 0, first rounds odd seeds and second rounds even ones: the random
    # numbers depend on the seed and a prompt's index, and the three must not share any.
    make_pairs(study / "sft" / "export", prompts, out, seed=1 + 2 * task.seed)
    return
  # A file of its own, complete or absent: a round that was interrupted samples it once.
  own = out.with_name(f"{task.name}.own.jsonl")
  make_pairs(task.predecessor.folder(study) / "export", prompts, own, seed=2 + 2 * task.seed)
  lines = (
    path.read_text(encoding="utf-8") for path in (training_pairs(task.predecessor, study), own)
  )
  files.write_text(out, lines)


def learning_rate(task: Task) -> float | None:
  """Returns the learning rate of DPO: min(0.004, 0.01/β), times 3/4 in a second round.

  It falls with β: a larger β has its optimum at smaller log-ratios, which steps of one size would
  pass. None for a method without β.
  """
  if task.beta is None:
    return None
  return min(4e-3, 1e-2 / task.beta) * (1.0 if task.predecessor is None else 0.75)


def command(task: Task, study: pathlib.Path, settings: Settings) -> list[str]:
  """Returns the arguments of the Python command that trains one run."""
  method, reference = METHODS[task.method], study / "sft" / "export"
  filled = {
    "pairs": training_pairs(task, study),
    "eval_pairs": study / "eval_pairs.jsonl",
    "prompts": study / "task" / "prompts.jsonl",
    "eval_prompts": study / "task" / "eval_prompts.jsonl",
    "reference": reference,
    "on_policy_steps": settings.on_policy_steps,
    # A second round has twice the pairs: half the epochs make as many updates.
    "epochs": settings.epochs if task.predecessor is None else settings.epochs / 2,
    "beta": task.beta,
    "rate": learning_rate(task),
  }
  start = reference if task.predecessor is None else task.predecessor.folder(study) / "export"
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
  """Trains and measures one run, and before it the run whose policy it continues from.

  A run that is already measured is read from its point.json.
  """
  folder = task.folder(study)
  kept = folder / "point.json"
  if kept.is_file():
    return json.loads(kept.read_text(encoding="utf-8"))
  if task.predecessor is not None:
    train_point(task.predecessor, study, settings, yardstick)
  make_training_pairs(task, study)
  seconds = run(command(task, study, settings), folder.with_name(f"{task.name}.log"))
  point = {"method": task.method, "beta": task.beta, "seed": task.seed, "n": None}
  point |= yardstick.measure(folder / "export", seed=task.seed) | {"seconds": seconds}
  # Written last: an interrupted run has no point.json, and the same command resumes it.
  files.write_text(kept, json.dumps(point, indent=1) + "\n")
  return point
