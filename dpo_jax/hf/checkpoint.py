"""Hugging Face folders in and out, a tensor at a time.

Every tensor on disk is described once, by a `Tensor`: its name, the leaves of the parameter tree
it holds and whether it lies transposed. Reading and writing follow the same list, so what is
written reads back bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from dpo_jax.distributed.gather import Lead, gather_to_host
from dpo_jax.hf.loading import Leaf, distribute
from dpo_jax.hf.safetensors_files import (
  DTYPES,
  Entry,
  Weights,
  open_weights,
  read_json,
  write_weights,
)
from dpo_jax.model import families
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import Tensor
from dpo_jax.model.transformer import param_shapes
from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils.files import replacing_folder

GENERATION = "generation_config.json"
# Copied untouched from the folder the model came from.
COMPANIONS = (
  GENERATION,
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "tekken.json",
  "chat_template.jinja",
  "chat_template.json",
  "additional_chat_templates",
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
  fields = read_json(file)
  try:
    return families.from_hf(fields)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


# -- in --------------------------------------------------------------------------------------------


def check(path: str | pathlib.Path) -> ModelConfig:
  """The configuration of a folder whose weights are all there and fit it, by their headers alone.

  Raises:
    UserError: names what is missing, unexpected, broken or of another shape.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  with open_weights(path) as weights:
    _find(config, _flatten(param_shapes(config)["params"]), weights, path)
  return config


def load(
  path: str | pathlib.Path, *, dtype: str = "float32", shardings: PyTree | Sharding | None = None
) -> tuple[ModelConfig, PyTree]:
  """Reads a model folder, a tensor at a time.

  A tensor is read once, by every process that holds a part of it. Beside the parameters themselves,
  host memory holds the largest tensor, and this process's part of one leaf until it is placed.

  Args:
    path: folder with `config.json` and `model.safetensors` or its shards and index.
    dtype: of the parameters returned.
    shardings: where they go: one for all, or a tree as of `param_shapes`; None keeps them on host.

  Returns:
    The configuration and {"params": ...}: placed arrays in buffers that nothing else holds, or
    NumPy arrays in host memory.

  Raises:
    UserError: names what is missing, unexpected, broken or of another shape, before any tensor is
      read, or the first tensor that holds numbers which are not finite.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  shapes = _flatten(param_shapes(config)["params"])
  if shardings is None or isinstance(shardings, Sharding):
    places = dict.fromkeys(shapes, shardings)
  else:
    places = _flatten(shardings["params"])
  leaves: dict[str, Any] = dict.fromkeys(shapes)
  with open_weights(path) as weights:
    found = _find(config, shapes, weights, path)
    # The largest first: a leaf is held twice while it is placed, on host and on a device that may
    # be host memory too, and so that stays below what is still to come.
    size = lambda tensor: sum(shapes[leaf].size for leaf in tensor.leaves)
    for tensor in sorted(found, key=size, reverse=True):
      filling = [
        Leaf(shapes[leaf].shape, places[leaf], np.dtype(jnp.dtype(dtype))) for leaf in tensor.leaves
      ]
      for lead, name in found[tensor].items():
        if any(leaf.holds(lead) for leaf in filling):
          # Never bound to a name: it would be held beside the next one.
          distribute(weights.read(name), lead, filling, tensor.transposed, f"{path}: tensor {name}")
      leaves |= {name: leaf.place() for name, leaf in zip(tensor.leaves, filling, strict=True)}
  return config, {"params": _unflatten(leaves)}


def _find(
  config: ModelConfig, shapes: dict[str, Any], weights: Weights, path: pathlib.Path
) -> dict[Tensor, dict[Lead, str]]:
  """The name on disk of every tensor's every layer, all of them there and of the right shape."""
  wanted = {
    tensor: _names(tensor, shapes[tensor.leaves[0]].shape) for tensor in families.tensors(config)
  }
  names = {name for by_lead in wanted.values() for name in by_lead.values()}
  # Bare models are saved without the prefix of their language model ("transformer." or "model.").
  prefix = next(iter(wanted)).name.split(".")[0] + "."
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
  found = {}
  for tensor, by_lead in wanted.items():
    found[tensor] = {lead: on_disk[name] for lead, name in by_lead.items()}
    shape = _stored_shape(tensor, [shapes[leaf].shape for leaf in tensor.leaves])
    for name in found[tensor].values():
      _check_header(weights, name, shape, path)
  return found


def _check_header(weights: Weights, name: str, shape: tuple[int, ...], path: pathlib.Path) -> None:
  if weights.dtype(name) not in DTYPES:
    raise UserError(
      f"{path}: tensor {name} is {weights.dtype(name)}; quantised weights are not supported, use"
      f" the model's floating-point weights ({', '.join(DTYPES)})"
    )
  if weights.shape(name) != shape:
    raise UserError(
      f"{path}: tensor {name} has shape {list(weights.shape(name))}, but config.json asks for "
      f"{list(shape)}; check that both are of one model"
    )


# -- out -------------------------------------------------------------------------------------------


def save(
  path: str | pathlib.Path,
  config: ModelConfig,
  params: PyTree,
  *,
  source: str | pathlib.Path | None = None,
  max_shard_size: int = 5 * 10**9,
) -> None:
  """Writes a model folder; an older one at the same place is replaced when the new one is whole.

  An interrupted export never looks like a model. Beside the parameters, memory holds a tensor or
  two.

  Args:
    path: the folder to write.
    config: the model.
    params: {"params": ...}, on host or on devices; written in its own dtype. What other processes
      hold of it, they `lend` meanwhile.
    source: folder the model came from: its tokenizer and generation settings are copied untouched,
      and its `config.json` is kept where it describes this very model.
    max_shard_size: bytes above which the weights are divided into shards with an index.
  """
  source = None if source is None else pathlib.Path(source)
  with replacing_folder(path) as new:
    entries = _entries(config, _flatten(params["params"]))
    fields = _config_fields(config, source, str(entries[0].dtype))
    _write_json(new / "config.json", fields)
    copy_companions(source, new)
    if not (new / GENERATION).exists():
      ids = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
      _write_json(new / GENERATION, {k: v for k, v in ids.items() if v is not None})
    write_weights(new, entries, max_shard_size)


def lend(config: ModelConfig, params: PyTree) -> None:
  """Takes part in `save` by another process, which needs what this one holds of every tensor."""
  for entry in _entries(config, _flatten(params["params"])):
    entry.fetch()


def _entries(config: ModelConfig, leaves: dict[str, Any]) -> list[Entry]:
  """Every tensor of the folder, none of them fetched."""
  entries = []
  for tensor in families.tensors(config):
    held = [leaves[leaf] for leaf in tensor.leaves]
    shape = _stored_shape(tensor, [leaf.shape for leaf in held])
    for lead, name in _names(tensor, held[0].shape).items():
      fetch = functools.partial(_fetch, held, lead, tensor.transposed)
      entries.append(Entry(name, shape, np.dtype(held[0].dtype), fetch))
  return entries


def _fetch(leaves: list[Any], lead: Lead, transposed: bool) -> np.ndarray:
  """One tensor as it lies on disk."""
  parts = [gather_to_host(leaf, lead) for leaf in leaves]
  joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
  return joined.T if transposed else joined


def _config_fields(config: ModelConfig, source: pathlib.Path | None, dtype: str) -> dict[str, Any]:
  """The contents of `config.json`: the source's own where they describe this model, else ours."""
  fields = families.to_hf(config)
  if source is not None and (source / "config.json").is_file():
    with contextlib.suppress(UserError):  # not a model that we understand, so not this one
      given = read_json(source / "config.json")
      if given.get("model_type") == fields["model_type"] and families.from_hf(given) == config:
        fields = given | {"architectures": fields["architectures"]}
  # Transformers reads the first name since 4.56, other programs still the second.
  return fields | {"dtype": dtype, "torch_dtype": dtype}


def copy_companions(source: pathlib.Path | None, folder: pathlib.Path) -> None:
  """Copies tokenizer, chat templates and generation settings, as far as the source has them."""
  if source is None:
    return
  for name in COMPANIONS:
    if (source / name).is_dir():
      shutil.copytree(source / name, folder / name)
    elif (source / name).is_file():
      shutil.copyfile(source / name, folder / name)


def _write_json(file: pathlib.Path, fields: dict[str, Any]) -> None:
  file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


# -- both ways -------------------------------------------------------------------------------------


def _names(tensor: Tensor, shape: tuple[int, ...]) -> dict[Lead, str]:
  """Names on disk by layer and expert: as many leading axes of a leaf as the name has `{}`."""
  stacked = shape[: tensor.name.count("{}")]
  return {lead: tensor.name.format(*lead) for lead in np.ndindex(*stacked)}


def _stored_shape(tensor: Tensor, leaves: list[tuple[int, ...]]) -> tuple[int, ...]:
  """Shape on disk, from the shapes of the leaves that are joined along their last axis."""
  rest = leaves[0][tensor.name.count("{}") : -1]
  shape = (*rest, sum(leaf[-1] for leaf in leaves))
  return shape[::-1] if tensor.transposed else shape


def _without_effect(name: str, config: ModelConfig) -> bool:
  """Buffers that older checkpoints hold, and a copy of the embedding where the head is tied."""
  buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
  return name.endswith(buffers) or (config.tied and name == "lm_head.weight")


def _more(names: list[str]) -> str:
  return f" and {len(names) - 1} more" if len(names) > 1 else ""


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
