"""Provides a random Llama, a tokenizer, a few preferences, and runs on them that take seconds."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np

from configs import preferences
from dpo_jax.controlled import reviews, word_tokenizer
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import families, transformer
from dpo_jax.monitoring.loggers import read_metrics
from tests.support import forks
from tests.support.paths import ROOT

# Adam divides by sqrt(v) + eps, so gradients near 0 turn rounding into whole steps. With this
# learning rate and eps, runs that sum in different orders agree within the tolerances below.
GENTLE = {"optimizer.learning_rate": 1e-3, "optimizer.eps": 1e-4}
TWENTY = GENTLE | {
  "optimizer.eps": 1e-3,
  "train.steps": 20,
  "checkpoint.every": 0,
  "eval.every": 10,
}
# Metrics that depend on the clock: no two runs agree on them.
CLOCK = {"pairs_per_second", "tokens_per_second"}
MEASURED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "eval/loss", "reward")

LLAMA = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": len(reviews.vocabulary()) + 8,  # room for the special ids
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "initializer_range": 0.3,
  }
)


def write(folder, seed=0):
  """Writes `base`, a model with its tokenizer, and `pairs.jsonl` to a folder."""
  word_tokenizer.write(folder / "tokenizer", reviews.vocabulary())
  params = transformer.init_params(LLAMA, seed)
  hf_checkpoint.save(folder / "base", LLAMA, params, source=folder / "tokenizer")
  texts = reviews.distinct(64, seed=0)
  rows = [
    {"prompt": p, "chosen": a, "rejected": other}
    for (p, a), (_, other) in zip(texts[::2], texts[1::2], strict=True)
  ]
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return folder


def configured(task, **changes):
  """Returns the configuration of four steps on two devices, changed by dotted field names."""
  config = preferences.get_config()
  config.model.path, config.data.path = str(task / "base"), str(task / "pairs.jsonl")
  config.data.row_length = 128
  config.train.update(steps=4, batch_size=8)
  config.checkpoint.every = 2
  config.eval.every = 2
  config.parallel.devices = 2
  config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
  config.update_from_flattened_dict(changes)
  return config


def command(task, name, program=("-m", "tests.support.one_picture"), **changes):
  """Returns the command of the run of `configured`, as a process that uses all its devices."""
  given = {
    "model.path": task / "base",
    "data.path": task / "pairs.jsonl",
    "data.row_length": 128,
    "train.steps": 4,
    "train.batch_size": 8,
    "checkpoint.every": 2,
    "eval.every": 2,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
  }
  flags = [f"--config.{key}={value}" for key, value in (given | changes).items()]
  given = ["--config=configs/preferences.py", f"--workdir={task / name}"]
  return [sys.executable, *program, *given, *flags]


def own_programs(folder):
  """Returns an environment with a folder of compiled programs that no other test reads.

  For a process that is to be killed: killed while it writes a program, it leaves half of one.
  """
  own = folder / "programs"
  if not own.is_dir():
    shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], own)
  return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(own)}


def start(
  task, name, processes, devices=4, each=None, env=os.environ, begin=forks.start, **changes
):
  """Starts a run of several processes that divide `devices`.

  Args:
    task, name: folder of the task, and name of the run.
    processes, devices: their numbers.
    each: for the index of a process, changes of its configuration alone.
    env: the environment of all.
    begin: starts one process.
    **changes: as of `configured`.
  """
  # Port 0 lets the system choose a free one, so that parallel tests do not collide.
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  together = {"parallel.coordinator": f"127.0.0.1:{port}", "parallel.processes": processes}
  return [
    begin(
      command(
        task, name, **together, **changes, **{"parallel.process": i}, **(each or {}).get(i, {})
      ),
      env | {"JAX_NUM_CPU_DEVICES": str(devices // processes), "JAX_PLATFORMS": "cpu"},
    )
    for i in range(processes)
  ]


def from_nothing(command, env):
  """Starts a new interpreter, as users do."""
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def end(started, timeout=240):
  """Waits for all processes; returns the exit status and stderr of each."""
  errors = [process.communicate(timeout=timeout)[1] for process in started]
  return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]


def outcome(folder):
  """Reads the metrics and the exported weights of a run."""
  return read_metrics(folder / "metrics.jsonl"), peft.load_model(folder / "export")[1]


def assert_close(found, expected):
  """Asserts equal outcomes up to the rounding of float32 sums in another order."""
  (lines, params), (wanted, model) = found, expected
  for line, other in zip(lines, wanted, strict=True):
    for key in set(MEASURED) & line.keys() & other.keys():
      np.testing.assert_allclose(line[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
  leaves = zip(*(sorted(flat(tree).items()) for tree in (params, model)), strict=True)
  for (name, x), (_, y) in leaves:
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max(), err_msg=name)


def flat(tree, prefix=""):
  """Flattens nested dictionaries into {dotted name: array}."""
  found = {}
  for name, node in tree.items():
    inside = flat(node, f"{prefix}{name}.") if isinstance(node, dict) else {prefix + name: node}
    found |= {key: np.asarray(value) for key, value in inside.items()}
  return found
