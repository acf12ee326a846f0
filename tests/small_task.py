"""A random Llama with a tokenizer, a few preferences, and a run on them that takes seconds."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np

from configs import preferences
from dpo_jax.data import controlled, word_level
from dpo_jax.loggers import read_metrics
from dpo_jax.model import adapters, families, hf, transformer

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A learning rate at which rounding does not grow beyond what is looked for in a few steps.
GENTLE = {"optimizer.learning_rate": 1e-3, "optimizer.eps": 1e-4}
TWENTY = GENTLE | {
  "optimizer.eps": 1e-3,
  "train.steps": 20,
  "checkpoint.every": 0,
  "eval.every": 10,
}
CLOCK = {"pairs_per_second", "tokens_per_second"}
MEASURED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "eval/loss", "reward")

LLAMA = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": len(controlled.vocabulary()) + 8,  # room for the special ids
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "initializer_range": 0.3,
  }
)


def write(folder, seed=0):
  """`base`, a model with its tokenizer, and `pairs.jsonl`, in a folder."""
  word_level.write(folder / "tokenizer", controlled.vocabulary())
  params = transformer.init_params(LLAMA, seed)
  hf.save(folder / "base", LLAMA, params, source=folder / "tokenizer")
  texts = controlled.distinct(64, seed=0)
  rows = [
    {"prompt": p, "chosen": a, "rejected": other}
    for (p, a), (_, other) in zip(texts[::2], texts[1::2], strict=True)
  ]
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return folder


def configured(task, **changes):
  """Four steps on two devices, with changes by their dotted names."""
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


def command(task, name, program=("-m", "dpo_jax.train"), **changes):
  """The run of `configured`, for a process of its own, on all devices it has."""
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
  """The environment of a process that is to be killed: compiled programs in a folder of its own.

  Killed while it writes one, a process leaves half a program, which no other test should find.
  """
  own = folder / "programs"
  if not own.is_dir():
    shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], own)
  return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(own)}


def start(task, name, processes, devices=4, each=None, env=os.environ, **changes):
  """A run of several processes that share some devices; `each` changes what one of them is told."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  together = {"parallel.coordinator": f"127.0.0.1:{port}", "parallel.processes": processes}
  return [
    subprocess.Popen(
      command(
        task, name, **together, **changes, **{"parallel.process": i}, **(each or {}).get(i, {})
      ),
      cwd=ROOT,
      env=env | {"JAX_NUM_CPU_DEVICES": str(devices // processes), "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]


def end(started, timeout=240):
  """Exit status and stderr of every process, all of them over."""
  said = [process.communicate(timeout=timeout)[1] for process in started]
  return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def outcome(folder):
  return read_metrics(folder / "metrics.jsonl"), adapters.load_model(folder / "export")[1]


def alike(found, expected):
  """As far as float32 sums in another order allow."""
  (lines, params), (wanted, model) = found, expected
  for line, other in zip(lines, wanted, strict=True):
    for key in set(MEASURED) & line.keys() & other.keys():
      np.testing.assert_allclose(line[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
  leaves = zip(*(sorted(flat(tree).items()) for tree in (params, model)), strict=True)
  for (name, x), (_, y) in leaves:
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max(), err_msg=name)


def flat(tree, prefix=""):
  found = {}
  for name, node in tree.items():
    inside = flat(node, f"{prefix}{name}.") if isinstance(node, dict) else {prefix + name: node}
    found |= {key: np.asarray(value) for key, value in inside.items()}
  return found
