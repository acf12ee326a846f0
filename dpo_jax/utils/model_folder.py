"""Folders of models and of runs, and hints for a path that is no model folder."""

from __future__ import annotations

import difflib
import json
import pathlib
import re

# Files of a run's folder, of which a model folder has none.
_RUN = ("checkpoints", "metrics.jsonl", "inputs.json")


def is_run(path: pathlib.Path) -> bool:
  """Returns True for the folder of a run, whose config.json is not that of a model."""
  return (path / "config.json").is_file() and any((path / name).exists() for name in _RUN)


def is_model(path: pathlib.Path) -> bool:
  """Returns True for a folder that contains a model or an adapter."""
  return not is_run(path) and (
    any(path.glob("*.safetensors")) or (path / "adapter_config.json").is_file()
  )


def run_around(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of the run that a model folder lies in, such as its export; or None."""
  return path.parent if is_run(path.parent) else None


def positions(path: str | pathlib.Path) -> int | None:
  """Returns the positions of the model in a folder; None for a folder of a tokenizer alone."""
  try:
    fields = json.loads((pathlib.Path(path) / "config.json").read_text(encoding="utf-8"))
    found = fields.get("max_position_embeddings", fields.get("n_positions"))
  except (OSError, ValueError, AttributeError):
    return None
  return found if isinstance(found, int) else None


def hub_name(path: str | pathlib.Path) -> str | None:
  """Returns a path as a name on the Hugging Face hub, `Qwen/Qwen2.5-0.5B`; None if it is none."""
  name = re.sub(r"^(hf:(//)?|https?:/+(www\.)?huggingface\.co/)", "", str(path)).rstrip("/")
  owner, _, rest = name.partition("/")
  # An owner that is a folder here is meant as one: `runs/mine`.
  part = r"[A-Za-z0-9][\w.-]*"
  fits = re.fullmatch(f"{part}/{part}", name) and not pathlib.Path(owner).exists()
  return name if fits and rest else None


def instead(path: str | pathlib.Path) -> str:
  """Returns what a path is that contains no model, and what to name instead of it.

  Qwen/Qwen2.5-0.5B is no folder; if it is a model of the Hugging Face hub, download it first: …
  """
  folder = pathlib.Path(path)
  if not str(path):
    return "no model folder is named"
  name = hub_name(path)
  if name and not folder.exists():
    short = name.partition("/")[2]
    return (
      f"{path} is no folder here; if it is a model of the Hugging Face hub, download it first,"
      f" `hf download {name} --local-dir {short}`, and name the folder {short}"
    )
  if folder.is_file():
    if folder.suffix == ".gguf":
      return f"{path} is GGUF, which is not read; name the Hugging Face folder of the model"
    in_model = (folder.parent / "config.json").is_file()
    return f"{path} is a file; name {'its folder' if in_model else 'the folder of a model'}"
  if is_run(folder):
    export = folder / "export"
    if export.is_dir():
      return f"{path} is the folder of a run; its model is {export}"
    return (
      f"{path} is the folder of a run that has not ended; write a checkpoint of it as a model:"
      f" dpo-jax convert --workdir {path} --out DIR"
    )
  if (folder / "adapter_config.json").is_file():
    return f"{path} is an adapter, and a whole model is needed here"
  for run in folder.parents[:2]:
    if folder.is_dir() and is_run(run):
      step = f" --step {folder.name}" if folder.name.isdecimal() else ""
      return (
        f"{path} is a part of the run {run}; write a checkpoint of it as a model: dpo-jax convert"
        f" --workdir {run} --out DIR{step}"
      )
  # The hub's cache has the files below snapshots/; other folders may have one model in them.
  below = sorted(
    found.parent
    for pattern in ("config.json", "*/config.json", "snapshots/*/config.json")
    for found in folder.glob(pattern)
    if is_model(found.parent) and found.parent != folder
  )
  if below:
    return f"{path} has no config.json; did you mean {' or '.join(map(str, below[:3]))}?"
  if folder.exists():
    return f"{path} has no config.json; name a Hugging Face model folder"
  near = difflib.get_close_matches(folder.name, _models_in(folder.parent), n=1)
  if near:
    return f"there is no folder {path}; did you mean {folder.with_name(near[0])}?"
  return (
    f"there is no folder {path}; name a Hugging Face model folder (a model of the hub is"
    " downloaded first, by `hf download`)"
  )


def _models_in(folder: pathlib.Path) -> list[str]:
  """Returns the names of the model folders in a folder."""
  return [path.parent.name for path in folder.glob("*/config.json") if is_model(path.parent)]
