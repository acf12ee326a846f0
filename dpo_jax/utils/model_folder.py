"""What a path is that was named as a model folder and is none, and what to name instead."""

from __future__ import annotations

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


def hub_name(path: str | pathlib.Path) -> str | None:
  """Returns a path as a name on the Hugging Face hub, `Qwen/Qwen2.5-0.5B`; None if it is none."""
  name = str(path)
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
  name = hub_name(path)
  if name and not folder.exists():
    short = name.partition("/")[2]
    return (
      f"{name} is no folder here; if it is a model of the Hugging Face hub, download it first,"
      f" `hf download {name} --local-dir {short}`, and name the folder {short}"
    )
  if folder.is_file():
    kind = "; GGUF is not read: name the Hugging Face folder" if folder.suffix == ".gguf" else ""
    return f"{path} is a file; name its folder{kind}"
  if is_run(folder):
    export = folder / "export"
    if export.is_dir():
      return f"{path} is the folder of a run; its model is {export}"
    return (
      f"{path} is the folder of a run that has not ended; write a checkpoint of it as a model:"
      f" dpo-jax convert --workdir {path} --out DIR"
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
  if not folder.exists():
    return f"{path} does not exist; name a Hugging Face model folder"
  return f"{path} has no config.json; name a Hugging Face model folder"
