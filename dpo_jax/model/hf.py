"""Hugging Face folders in and out, by safetensors alone: nothing that is read can be executed.

Every tensor on disk is described once, by a `Tensor`: its name, the leaves of the parameter tree
it holds and whether it lies transposed. Reading and writing follow the same list, so what is
written reads back bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo_jax.model import families
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import Tensor
from dpo_jax.model.transformer import param_shapes
from dpo_jax.structs import PyTree, UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Copied untouched from the folder the model came from.
COMPANIONS = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """The configuration of the model in a folder.

  Raises:
    UserError: no such folder, no or broken `config.json`, or one that is not understood.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"model folder {path} does not exist; name a Hugging Face model folder")
  file = path / "config.json"
  if not file.is_file():
    raise UserError(f"{path} has no config.json; name a Hugging Face model folder")
  fields = _read_json(file)
  try:
    return families.from_hf(fields)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


def load(path: str | pathlib.Path, *, dtype: str = "float32") -> tuple[ModelConfig, PyTree]:
  """Reads a model folder.

  Args:
    path: folder with `config.json` and `model.safetensors` or its shards and index.
    dtype: of the parameters returned.

  Returns:
    The configuration and {"params": ...}, NumPy arrays in host memory.

  Raises:
    UserError: names what is missing, unexpected, broken or of another shape.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  with _open_weights(path) as weights:
    return config, _read_params(config, weights, path, np.dtype(jnp.dtype(dtype)))


class Weights(NamedTuple):
  """Tensors of a folder by name, whichever shard they lie in."""

  names: set[str]
  get: Callable[[str], np.ndarray]


@contextlib.contextmanager
def _open_weights(path: pathlib.Path) -> Iterator[Weights]:
  with contextlib.ExitStack() as stack:
    handle_of: dict[str, Any] = {}
    for file in _weight_files(path):
      try:
        handle = stack.enter_context(safe_open(file, framework="np"))
      except SafetensorError as error:
        raise UserError(
          f"{file} is broken or cut short ({error}); copy or download it again"
        ) from error
      handle_of |= dict.fromkeys(handle.keys(), handle)
    yield Weights(set(handle_of), lambda name: handle_of[name].get_tensor(name))


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  if (path / WEIGHTS).is_file():
    return [path / WEIGHTS]
  if (path / INDEX).is_file():
    shard_of = _read_json(path / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
      raise UserError(f"{path / INDEX} maps no tensors to files (weight_map); copy it again")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
      if pathlib.PurePath(shard).name != shard:
        raise UserError(f"{path / INDEX} names {shard!r}, which is not a file of the folder")
      if not (path / shard).is_file():
        raise UserError(f"{path} lacks {shard}, which its index names; copy the missing shard")
    return [path / shard for shard in shards]
  pickled = sorted(file.name for file in path.glob("*.bin")) + sorted(
    file.name for file in path.glob("*.pt*")
  )
  if any(name.startswith(("pytorch_model", "model", "consolidated")) for name in pickled):
    raise UserError(
      f"{path} holds pickled weights only ({pickled[0]}), which can run code when read; save the "
      "model again with transformers: model.save_pretrained(folder, safe_serialization=True)"
    )
  raise UserError(f"{path} has no {WEIGHTS}; name a folder that holds the weights")


def _read_params(
  config: ModelConfig, weights: Weights, path: pathlib.Path, dtype: np.dtype
) -> PyTree:
  """Fills the parameter tree, a tensor at a time."""
  wanted = families.tensors(config)
  names = {name for tensor in wanted for name in _layer_names(tensor, config)}
  # Bare models are saved without the prefix of their language model ("transformer." or "model.").
  prefix = wanted[0].name.split(".")[0] + "."
  bare = not any(name.startswith(prefix) for name in weights.names)
  on_disk = {name: name.removeprefix(prefix) if bare else name for name in names}

  missing = sorted(name for name in names if on_disk[name] not in weights.names)
  if missing:
    raise UserError(f"{path} lacks tensor {missing[0]}{_more(missing)}; the weights are incomplete")
  rest = sorted(weights.names - set(on_disk.values()))
  rest = [name for name in rest if not _without_effect(name, config)]
  if rest:
    raise UserError(
      f"{path} holds tensor {rest[0]}{_more(rest)}, which config.json does not account for; "
      "check that both are of one model"
    )

  shapes = _flatten(param_shapes(config)["params"])
  leaves = {name: np.empty(leaf.shape, dtype) for name, leaf in shapes.items()}
  for tensor in wanted:
    for layer, name in enumerate(_layer_names(tensor, config)):
      views = [leaves[leaf] for leaf in tensor.leaves]
      if "{}" in tensor.name:
        views = [view[layer] for view in views]
      _fill(views, weights.get(on_disk[name]), tensor, name, path)
  return {"params": _unflatten(leaves)}


def _fill(
  views: list[np.ndarray], array: np.ndarray, tensor: Tensor, name: str, path: pathlib.Path
) -> None:
  widths = [view.shape[-1] for view in views]
  shape = (*views[0].shape[:-1], sum(widths))
  stored = shape[::-1] if tensor.transposed else shape
  if array.shape != stored:
    raise UserError(
      f"{path}: tensor {name} has shape {list(array.shape)}, but config.json asks for "
      f"{list(stored)}; check that both are of one model"
    )
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise UserError(
      f"{path}: tensor {name} is {array.dtype}; quantised weights are not supported, use the "
      "model's floating-point weights"
    )
  if not np.isfinite(array).all():
    raise UserError(
      f"{path}: tensor {name} holds numbers that are not finite; a model that diverged cannot be "
      "used, take an earlier one"
    )
  array = array.T if tensor.transposed else array
  for view, part in zip(views, np.split(array, np.cumsum(widths)[:-1], axis=-1), strict=True):
    view[...] = part


def save(
  path: str | pathlib.Path,
  config: ModelConfig,
  params: PyTree,
  *,
  source: str | pathlib.Path | None = None,
) -> None:
  """Writes a model folder; an older one at the same place is replaced when the new one is whole.

  Everything is written into a hidden sibling that is then renamed, so an interrupted export never
  looks like a model.

  Args:
    path: the folder to write.
    config: the model.
    params: {"params": ...}; written in its own dtype.
    source: folder whose tokenizer and generation settings are copied untouched.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  new = scratch / "new"
  try:
    new.mkdir()
    arrays = _write_params(config, params)
    fields = families.to_hf(config) | {"torch_dtype": str(next(iter(arrays.values())).dtype)}
    (new / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    for name in COMPANIONS:
      if source is not None and (pathlib.Path(source) / name).is_file():
        shutil.copyfile(pathlib.Path(source) / name, new / name)
    save_file(arrays, new / WEIGHTS, metadata={"format": "pt"})
    if path.exists():
      path.rename(scratch / "old")
    new.rename(path)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _write_params(config: ModelConfig, params: PyTree) -> dict[str, np.ndarray]:
  """The tensors of a model folder by name."""
  leaves = _flatten(jax.device_get(params["params"]))
  arrays = {}
  for tensor in families.tensors(config):
    joined = np.concatenate([np.asarray(leaves[leaf]) for leaf in tensor.leaves], axis=-1)
    layers = joined if "{}" in tensor.name else joined[None]
    for name, array in zip(_layer_names(tensor, config), layers, strict=True):
      arrays[name] = np.ascontiguousarray(array.T if tensor.transposed else array)
  return arrays


def _layer_names(tensor: Tensor, config: ModelConfig) -> list[str]:
  if "{}" not in tensor.name:
    return [tensor.name]
  return [tensor.name.format(layer) for layer in range(config.layers)]


def _without_effect(name: str, config: ModelConfig) -> bool:
  """Buffers that older checkpoints hold, and a copy of the embedding where the head is tied."""
  buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
  return name.endswith(buffers) or (config.tied and name == "lm_head.weight")


def _more(names: list[str]) -> str:
  return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{file} is not JSON ({error}); copy or download it again") from error
  if not isinstance(fields, dict):
    raise UserError(f"{file} holds a {type(fields).__name__}, not an object; copy it again")
  return fields


def _flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    flat |= (
      _flatten(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    )
  return flat


def _unflatten(flat: dict[str, Any]) -> PyTree:
  tree: PyTree = {}
  for path, value in flat.items():
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree
