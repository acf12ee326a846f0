"""Tables of what the compilers of accelerators say of many runs, remade by one command.

Each row is a call of `dpo-jax plan --topology`, in a process of its own. Results are kept as they
come, so that a table can be finished later, and by two environments: that of TPUs' compiler and
that of CUDA's.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dpo_jax.benchmarking import targets
from dpo_jax.structs import UserError
from dpo_jax.utils import files

GB, GIB = 1e9, 2**30


class Row(NamedTuple):
  """A run that is planned.

  Attributes:
    label: what the table calls it.
    config: as `--config` takes it.
    topology: what it is compiled for.
    fields: dotted fields of the configuration and their values.
    model: name of a shape, for configurations that need a model's folder.
    memory: GiB of a device, where documentation names less than the target has.
    lengths: `--mean_length`, `--prompt_fraction` and `--sigma`; None for the configuration's own.
  """

  label: str
  config: str
  topology: str
  fields: Mapping[str, Any] = {}
  model: str = ""
  memory: float | None = None
  lengths: tuple[int, float, float] | None = None

  @property
  def name(self) -> str:
    """A name that no other row has: results are found by it."""
    parts = [self.config, self.topology]
    parts += [f"{field}={value}" for field, value in self.fields.items()]
    parts += [self.model] if self.model else []
    parts += [f"memory={self.memory:g}"] if self.memory else []
    return " ".join(parts)


# Fields of the config.json of a model that is larger than those of configs/benchmark.py.
LARGER = {
  "llama_70b": {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
  }
}
_ULTRAFEEDBACK = (500, 0.35, 0.8)


def _trained(label: str, config: str, topology: str, model: str, **more: Any) -> Row:
  """Returns a row of a configuration that trains a model from a folder."""
  return Row(label, config, topology, model=model, lengths=_ULTRAFEEDBACK, **more)


_1B, _8B, _LONG = "benchmark:llama_1b", "benchmark:llama_8b", "benchmark:long"
_FSDP = "llama_8b:fsdp"
_STEPS = (
  _trained("configs/qwen_0_5b.py", "qwen_0_5b", "v5e:1x1", "qwen_0_5b"),
  Row("llama_1b", _1B, "v5p:1x1x1"),
  Row("llama_1b, fsdp 4", _1B, "v5e:2x2", {"parallel.fsdp": 4}),
  Row("llama_1b, fsdp 4, 32 pairs", _1B, "v5e:2x2", {"parallel.fsdp": 4, "train.batch_size": 32}),
  Row("llama_1b, tensor 4", _1B, "v5e:2x2", {"parallel.tensor": 4}),
  Row("llama_1b, pmap 4", _1B, "v5p:2x2x1", {"parallel.mode": "pmap"}),
  _trained("configs/llama_8b.py:fsdp", _FSDP, "v5p:2x2x2", "llama_8b"),
  _trained("configs/llama_8b.py:fsdp", _FSDP, "h100:8", "llama_8b"),
  _trained("the same, fsdp 16", _FSDP, "v5e:4x4", "llama_8b", fields={"parallel.fsdp": 16}),
  _trained(
    "the same, fsdp 16, accumulate 4",
    _FSDP,
    "v5e:4x4",
    "llama_8b",
    fields={"parallel.fsdp": 16, "train.accumulate": 4},
  ),
  Row("8B by LoRA", _8B, "v6e:1x1"),
  Row("8B by LoRA", _8B, "h100:1"),
  Row("8B by LoRA, remat dots", _8B, "h100:1", {"model.remat": "dots"}),
  Row("llama_1b", _1B, "h100:1"),
  Row("32k rows", _LONG, "v5p:1x1x1"),
  Row("32k rows", _LONG, "h100:1"),
  Row("32k rows, sequence 4", _LONG, "v5e:2x2", {"parallel.sequence": 4}),
  Row("32k rows, sequence 4", _LONG, "v5p:2x2x1", {"parallel.sequence": 4}),
  Row("32k rows, sequence 4", _LONG, "h100:4", {"parallel.sequence": 4}),
)
# What the configurations' docstrings and docs/scale.md say: model, devices and their memory.
_CONFIGS = (
  _trained("0.5B, 16 GB", "qwen_0_5b", "v5e:1x1", "qwen_0_5b"),
  _trained("0.5B, H100", "qwen_0_5b", "h100:1", "qwen_0_5b"),
  _trained("1B, 40 GB", "llama_1b", "v5p:1x1x1", "llama_1b", memory=40 * GB / GIB),
  _trained("1B, 40 GB", "llama_1b", "h100:1", "llama_1b", memory=40 * GB / GIB),
  _trained("8B by LoRA, 24 GB", "llama_8b:lora", "v6e:1x1", "llama_8b", memory=24 * GB / GIB),
  _trained("8B by LoRA, 24 GB", "llama_8b:lora", "h100:1", "llama_8b", memory=24 * GB / GIB),
  _trained("8B, 8 of 40 GB", _FSDP, "v5p:2x2x2", "llama_8b", memory=40 * GB / GIB),
  _trained("8B, 8 of 40 GB", _FSDP, "h100:8", "llama_8b", memory=40 * GB / GIB),
  _trained("8B, 16 of 16 GB", _FSDP, "v5e:4x4", "llama_8b", fields={"parallel.fsdp": 16}),
  _trained(
    "70B by LoRA, 8 of 80 GB", "llama_8b:lora", "h100:8", "llama_70b", fields={"parallel.fsdp": 8}
  ),
  _trained("70B, 64 of 95 GB", _FSDP, "v5p:4x4x4", "llama_70b", fields={"parallel.fsdp": 64}),
)


def _pod(label: str, topology: str, model: str, chips: int, pairs: int, accumulate: int) -> Row:
  fields = {
    "parallel.fsdp": chips,
    "train.batch_size": pairs,
    "train.accumulate": accumulate,
  }
  return _trained(label, _FSDP, topology, model, fields=fields)


# Google counts TensorCores in the names of v5p: v5p-64 are 32 chips, v5p-256 are 128.
_PODS = (
  _pod("8B, v5p-64", "v5p:2x4x4", "llama_8b", 32, 256, 1),
  _pod("8B, v5p-256", "v5p:4x4x8", "llama_8b", 128, 256, 1),
  _pod("8B, v6e-64", "v6e:8x8", "llama_8b", 64, 256, 1),
  _pod("70B, v5p-64", "v5p:2x4x4", "llama_70b", 32, 256, 2),
  _pod("70B, v5p-256", "v5p:4x4x8", "llama_70b", 128, 256, 1),
  _pod("70B, v6e-64", "v6e:8x8", "llama_70b", 64, 256, 2),
)
SUITES = {"steps": _STEPS, "configs": _CONFIGS, "pods": _PODS}


# --- running --------------------------------------------------------------------------------------


def read_results(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns the results that a file has, by the names of rows; none where there is no file."""
  return json.loads(path.read_text("utf-8")) if path.exists() else {}


def command(row: Row, out: pathlib.Path, models: Mapping[str, Any]) -> list[str]:
  """Returns the words of the command that plans a row; writes the folder of its model.

  Args:
    row: the run.
    out: folder of the table.
    models: name to the fields of a config.json.
  """
  words = [f"--config={row.config}", f"--topology={row.topology}"]
  if row.model:
    folder = out / "models" / row.model
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "config.json", json.dumps(models[row.model], indent=1) + "\n")
    words.append(f"--config.model.path={folder}")
  words += [f"--config.{field}={value}" for field, value in row.fields.items()]
  if row.lengths:
    names = ("mean_length", "prompt_fraction", "sigma")
    words += [f"--{name}={value:g}" for name, value in zip(names, row.lengths, strict=True)]
  if row.memory:
    words.append(f"--device_memory={row.memory:.4f}")
  return words


def run(row: Row, words: Sequence[str], minutes: float) -> dict[str, Any]:
  """Plans one row in a process of its own.

  Args:
    row: the run.
    words: of its command.
    minutes: after which it is given up.

  Returns:
    `plan`: what the command printed, or `error`: its last line; `command`, `jax` (its version),
    `date`, and `seconds` that it took.
  """
  began = time.monotonic()
  result = _call([*words, "--json"], minutes)
  # A folder of this machine tells readers nothing; the name of its shape does.
  shown = [f"--config.model.path={row.model}" if "model.path=" in word else word for word in words]
  about = {"command": " ".join(shown), "jax": jax.__version__}
  about["date"] = datetime.date.today().isoformat()
  return about | result | {"seconds": round(time.monotonic() - began, 1)}


def _call(words: Sequence[str], minutes: float) -> dict[str, Any]:
  """Returns what `plan` prints, or an error."""
  program = [sys.executable, "-m", "dpo_jax", "plan", *words]
  try:
    done = subprocess.run(
      program, capture_output=True, text=True, timeout=minutes * 60, check=False
    )
  except subprocess.TimeoutExpired:
    return {"error": f"not compiled in {minutes:g} minutes"}
  if done.returncode == 0:
    return {"plan": json.loads(done.stdout)}
  lines = done.stderr.strip().splitlines() or ["no output"]
  return {"error": lines[-1].removeprefix("error: "), "status": done.returncode}


def missing(topology: str) -> str:
  """Returns why a target cannot be compiled for by this Python, "" if it can."""
  try:
    targets.find(topology)
  except UserError as error:
    return str(error)
  return ""


# --- tables ---------------------------------------------------------------------------------------

_COLUMNS = (
  "run",
  "target",
  "fits",
  "GiB of limit",
  "needed ÷ done",
  "of peak, at most",
  "GB sent",
  "s at the links' rate",
  "s a step, about",
  "attention",
  "compiled in s",
)


def table(
  rows: Sequence[Row],
  results: Mapping[str, Mapping[str, Any]],
  before: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
  """Returns a table in Markdown, one line for each row that has a result.

  Args:
    rows: of a suite.
    results: by the names of rows.
    before: earlier results, shown in front of those of today.
  """
  lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
  for row in rows:
    if row.name not in results:
      continue
    now = _cells(results[row.name])
    old = _cells(before[row.name]) if before and row.name in before else now
    cells = [b if a == b else f"{a} → {b}" for a, b in zip(old, now, strict=True)]
    lines.append((row.label, row.topology, *cells))
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(result: Mapping[str, Any]) -> list[str]:
  """Returns the cells of a result, but the first two."""
  plan = result.get("plan")
  if plan is None:
    return [f"no: {result.get('error', 'no result')}", *["–"] * (len(_COLUMNS) - 3)]

  def cell(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else format(value * factor, form)

  by_cycles = plan["utilization_by_cycles"]
  used = plan["utilization_by_roofline"] if by_cycles is None else by_cycles
  kinds = plan["collectives"]
  sent = None if kinds is None else sum(kind["sent_bytes"] for kind in kinds.values())
  return [
    "yes" if plan["fits"] else "**no**",
    f"{plan['peak_bytes'] / GIB:.1f} of {plan['limit_bytes'] / GIB:.2f}",
    cell(plan["utilization_by_products"], ".0%"),
    cell(used, ".0%"),
    cell(sent, ".1f", 1 / GB),
    cell(plan["sent_seconds"], ".3f"),
    cell(plan["estimated_seconds"], ".3f"),
    plan["attention"],
    f"{plan['compile_seconds']:.0f}",
  ]


def page(
  suite: str,
  rows: Sequence[Row],
  results: Mapping[str, Mapping[str, Any]],
  before: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
  """Returns the page of a suite: a table, what it refers to, and its commands."""
  rates = "; ".join(
    f"{kind} {chip.flops / 1e12:.0f} TFLOP/s, {chip.links / GB:.0f} GB/s"
    for kind, chip in targets.CHIPS.items()
  )
  versions = {f"{r['date']}, JAX {r['jax']}" for r in results.values() if "jax" in r}
  commands = [
    f"- `dpo-jax plan {results[row.name]['command']}`" for row in rows if row.name in results
  ]
  return (
    f"## {suite}\n\nCompiled and not run ({'; '.join(sorted(versions))}). Rates that shares and"
    f" seconds refer to: {rates}.\n\n{table(rows, results, before)}\n" + "\n".join(commands) + "\n"
  )
