"""Reading and writing Hugging Face model folders, one tensor at a time.

Every tensor on disk is described once, by a `Tensor`: its name, the leaves of the parameter tree
that it contains and whether it is stored transposed. Reading and writing use the same list, so a
model that was written reads back bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil
from collections.abc import Sequence
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
from dpo_jax.utils import messages, model_folder, progress
from dpo_jax.utils.files import replacing_folder

GENERATION = "generation_config.json"
HEAD = "lm_head.weight"
# Files that an export copies unchanged from the folder the model came from.
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
  """Reads the configuration of the model in a folder.

  Raises:
    UserError: the folder does not exist, or its `config.json` is missing, broken or not supported.
  """
  path = pathlib.Path(path)
  file = path / "config.json"
  if not file.is_file() or model_folder.is_run(path):
    raise UserError(model_folder.instead(path))
  fields = read_json(file)
  try:
    config = families.from_hf(fields)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  _report_unknown(file, ", ".join(families.unknown_fields(fields)), fields["model_type"])
  return config


@functools.cache  # once per folder: a command reads a configuration several times
def _report_unknown(file: pathlib.Path, names: str, family: str) -> None:
  """Reports fields that are passed over, in one line on stderr."""
  # Other processes of a run have no stderr.
  if names:
    messages.warn(f"{file}: passed over, as transformers does for {family}: {names}")


# -- reading ---------------------------------------------------------------------------------------


def check(path: str | pathlib.Path) -> ModelConfig:
  """Checks that a folder's weights are complete and fit its configuration, which it returns.

  Only headers are read.

  Raises:
    UserError: names the tensor or file that is missing, unexpected, broken or of another shape.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  with open_weights(path) as weights:
    _match_tensors(config, _flatten(param_shapes(config)["params"]), weights, path)
  return config


def load(
  path: str | pathlib.Path, *, dtype: str = "float32", shardings: PyTree | Sharding | None = None
) -> tuple[ModelConfig, PyTree]:
  """Reads a model folder, one tensor at a time.

  Every process reads a tensor once if it stores a part of it. In addition to the parameters, host
  memory contains at most the largest tensor, and this process's part of one leaf until it is on its
  devices.

  Args:
    path: folder with `config.json` and `model.safetensors` or its shards and index.
    dtype: type of the parameters returned.
    shardings: placement of the parameters: one sharding for all, or a tree like `param_shapes`;
      None leaves them on host.

  Returns:
    The configuration and {"params": ...}: arrays on devices, in buffers of their own, or NumPy
    arrays.

  Raises:
    UserError: names the tensor or file that is missing, unexpected, broken or of another shape,
      before any tensor is read; or the first tensor with numbers that are not finite.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  shapes = _flatten(param_shapes(config)["params"])
  # None and a single sharding count for every leaf.
  if shardings is None or isinstance(shardings, Sharding):
    places = dict.fromkeys(shapes, shardings)
  else:
    places = _flatten(shardings["params"])
  leaves: dict[str, Any] = dict.fromkeys(shapes)
  with open_weights(path) as weights:
    found = _match_tensors(config, shapes, weights, path)

    def size(tensor: Tensor) -> int:
      return sum(shapes[leaf].size for leaf in tensor.leaves)

    # The largest first. While a leaf is put on its devices it exists twice, and on a CPU both
    # copies are host memory. At that moment the smaller leaves are not yet there, so the peak stays
    # below the size of the finished parameters.
    with progress.Progress(f"loading {path}", sum(map(size, found))) as shown:
      for tensor in sorted(found, key=size, reverse=True):
        filling = [
          Leaf(shapes[leaf].shape, places[leaf], np.dtype(jnp.dtype(dtype)))
          for leaf in tensor.leaves
        ]
        for lead, name in found[tensor].items():
          if any(leaf.needs(lead) for leaf in filling):
            # The tensor is never bound to a name, which would keep it while the next one is read.
            what = f"{path}: tensor {name}"
            distribute(weights.read(name), lead, filling, tensor.transposed, what)
          shown.advance(size(tensor) / len(found[tensor]))
        # Placed before the next tensor is read, so that its host buffers are free by then.
        leaves |= {name: leaf.place() for name, leaf in zip(tensor.leaves, filling, strict=True)}
  return config, {"params": _unflatten(leaves)}


def _match_tensors(
  config: ModelConfig, shapes: dict[str, Any], weights: Weights, path: pathlib.Path
) -> dict[Tensor, dict[Lead, str]]:
  """Returns the names on disk of every tensor, by layer, after a check of names and shapes."""
  wanted = {
    tensor: _disk_names(tensor, shapes[tensor.leaves[0]].shape)
    for tensor in families.tensors(config)
  }
  names = {name for by_lead in wanted.values() for name in by_lead.values()}
  # A model that was saved without its head lacks the first part of all names ("transformer." or
  # "model.").
  prefix = next(iter(wanted)).name.split(".")[0] + "."
  bare = not any(name.startswith(prefix) for name in weights.names)
  on_disk = {name: name.removeprefix(prefix) if bare else name for name in names}

  missing = sorted(name for name in names if on_disk[name] not in weights.names)
  if missing:
    raise UserError(
      f"{path} lacks tensor {missing[0]}{_and_more(missing)}; the weights are incomplete"
    )
  rest = sorted(weights.names - set(on_disk.values()))
  rest = [name for name in rest if not _has_no_effect(name, config)]
  # Packed weights come with scales and zero points, which would not say why.
  packed = [name for name in rest if weights.dtype(name) not in DTYPES]
  packed += [name for name in on_disk.values() if weights.dtype(name) not in DTYPES]
  if rest and packed:
    _check_header(weights, min(packed), (), path)
  if rest:
    raise UserError(
      f"{path} contains tensor {rest[0]}{_and_more(rest)}, which config.json does not account for;"
      " check that both are of one model"
    )
  # Every layer's tensor is checked, since each is a tensor of its own on disk.
  found = {}
  for tensor, by_lead in wanted.items():
    found[tensor] = {lead: on_disk[name] for lead, name in by_lead.items()}
    shape = _stored_shape(tensor, [shapes[leaf].shape for leaf in tensor.leaves])
    for name in found[tensor].values():
      _check_header(weights, name, shape, path)
  if config.tied and HEAD in weights.names:
    _check_tied_head(weights, next(iter(found[next(iter(wanted))].values())), path)
  return found


def _check_tied_head(weights: Weights, embedding: str, path: pathlib.Path) -> None:
  """Checks that a head on disk is the embedding, as a tied model's configuration says.

  Releases of transformers differ: since 5 it takes the head, before it passed it over.
  """
  equal = weights.shape(HEAD) == weights.shape(embedding)
  # Compared by digests, so that memory contains one of the two at a time.
  if not equal or weights.digest(HEAD) != weights.digest(embedding):
    raise UserError(
      f"{path}: config.json says tie_word_embeddings, but {HEAD} differs from {embedding};"
      f" set tie_word_embeddings to false there to use {HEAD}, or remove that tensor"
    )


def _check_header(weights: Weights, name: str, shape: tuple[int, ...], path: pathlib.Path) -> None:
  """Checks type and shape of a tensor on disk."""
  # The type first: quantised weights are packed, so their shapes differ too, which would not say
  # why.
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


# -- writing ---------------------------------------------------------------------------------------


def save(
  path: str | pathlib.Path,
  config: ModelConfig,
  params: PyTree,
  *,
  source: str | pathlib.Path | None = None,
  end_ids: Sequence[int] = (),
  max_shard_size: int = 5 * 10**9,
  card: str = "",
) -> None:
  """Writes a model folder; an older one of that name is replaced once the new one is complete.

  An interrupted export never looks like a model. In addition to the parameters, memory contains one
  or two tensors.

  Args:
    path: the folder to write.
    config: the model.
    params: {"params": ...}, on host or on devices; written in its own type. If it is divided among
      processes, the others call `take_part_in_save` at the same time.
    source: folder the model came from. Its tokenizer and generation settings are copied unchanged,
      and its `config.json` is kept if it describes this very model.
    end_ids: tokens that ended the completions of training. Those that the folder does not name as
      end tokens are added to its `eos_token_id`, so that every program stops there.
    max_shard_size: size in bytes above which the weights are divided into shards with an index.
    card: the model card, `README.md`; "" for none. That of `source` is about another model.
  """
  source = None if source is None else pathlib.Path(source)
  # Everything is written next to the folder's place, and renamed when it is complete.
  with replacing_folder(path) as new:
    entries = _entries(config, _flatten(params["params"]))
    fields = _config_fields(config, source, str(entries[0].dtype))
    # An id without a row in the embedding is never generated.
    ends = [id for id in end_ids if id < config.vocab]
    fields = with_ends(fields, ends)
    _write_json(new / "config.json", fields)
    copy_companions(source, new)
    # After the copies: settings of the source come first.
    if not (new / GENERATION).exists():
      ids = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
      _write_json(new / GENERATION, {k: v for k, v in ids.items() if v is not None})
    add_ends(new / GENERATION, ends)
    write_card(new, card)
    write_weights(new, entries, max_shard_size)


def take_part_in_save(config: ModelConfig, params: PyTree) -> None:
  """Sends this process's part of every tensor to another process, which calls `save`."""
  # The same tensors in the same order as there: gathering is a collective that all processes call.
  for entry in _entries(config, _flatten(params["params"])):
    entry.fetch()


def _entries(config: ModelConfig, leaves: dict[str, Any]) -> list[Entry]:
  """Lists every tensor of the folder, without their numbers."""
  entries = []
  for tensor in families.tensors(config):
    joined = [leaves[leaf] for leaf in tensor.leaves]
    shape = _stored_shape(tensor, [leaf.shape for leaf in joined])
    for lead, name in _disk_names(tensor, joined[0].shape).items():
      fetch = functools.partial(_fetch, joined, lead, tensor.transposed)
      entries.append(Entry(name, shape, np.dtype(joined[0].dtype), fetch))
  return entries


def _fetch(leaves: list[Any], lead: Lead, transposed: bool) -> np.ndarray:
  """Returns one tensor as it is stored on disk."""
  parts = [gather_to_host(leaf, lead) for leaf in leaves]
  joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
  return joined.T if transposed else joined


def _config_fields(config: ModelConfig, source: pathlib.Path | None, dtype: str) -> dict[str, Any]:
  """Returns the contents of `config.json`: the source's if they describe this model, else ours."""
  fields = families.to_hf(config)
  if source is not None and (source / "config.json").is_file():
    # A configuration that is not supported is not that of this model.
    with contextlib.suppress(UserError):
      given = read_json(source / "config.json")
      if given.get("model_type") == fields["model_type"] and families.from_hf(given) == config:
        fields = given | {"architectures": fields["architectures"]}
  # Transformers reads "dtype" since 4.56, other programs still "torch_dtype".
  return fields | {"dtype": dtype, "torch_dtype": dtype}


def with_ends(fields: dict[str, Any], end_ids: Sequence[int]) -> dict[str, Any]:
  """Returns fields whose `eos_token_id` names all end tokens, those that it had first."""
  given = fields.get("eos_token_id")
  had = given if isinstance(given, list) else [] if given is None else [given]
  more = [id for id in dict.fromkeys(end_ids) if id not in had]
  # Unchanged if nothing is missing: some readers expect a single id as a number.
  if not more:
    return fields
  found = [*had, *more]
  return fields | {"eos_token_id": found[0] if len(found) == 1 else found}


def add_ends(file: pathlib.Path, end_ids: Sequence[int]) -> None:
  """Adds end tokens to the `eos_token_id` of a file; one that names them all stays as it is."""
  fields = read_json(file)
  if with_ends(fields, end_ids) != fields:
    _write_json(file, with_ends(fields, end_ids))


def copy_companions(source: pathlib.Path | None, folder: pathlib.Path) -> None:
  """Copies those of the files in `COMPANIONS` that the source has."""
  if source is None:
    return
  for name in COMPANIONS:
    if (source / name).is_dir():
      shutil.copytree(source / name, folder / name)
    elif (source / name).is_file():
      shutil.copyfile(source / name, folder / name)


def write_card(folder: pathlib.Path, card: str) -> None:
  """Writes the model card, if there is one."""
  if card:
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(file: pathlib.Path, fields: dict[str, Any]) -> None:
  file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


# -- names and shapes ------------------------------------------------------------------------------


def _disk_names(tensor: Tensor, shape: tuple[int, ...]) -> dict[Lead, str]:
  """Returns a tensor's names on disk, by layer and expert."""
  # Every `{}` in the name is a leading axis of the leaf.
  stacked = shape[: tensor.name.count("{}")]
  return {lead: tensor.name.format(*lead) for lead in np.ndindex(*stacked)}


def _stored_shape(tensor: Tensor, leaves: list[tuple[int, ...]]) -> tuple[int, ...]:
  """Returns the shape on disk of a tensor that joins leaves along their last axis."""
  rest = leaves[0][tensor.name.count("{}") : -1]
  shape = (*rest, sum(leaf[-1] for leaf in leaves))
  return shape[::-1] if tensor.transposed else shape


def _has_no_effect(name: str, config: ModelConfig) -> bool:
  """Returns whether a tensor that the configuration does not account for can be ignored."""
  # Older folders contain masks and rotary frequencies, and a copy of the embedding as tied head,
  # which `_check_tied_head` compares with it.
  buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
  return name.endswith(buffers) or (config.tied and name == HEAD)


def _and_more(names: list[str]) -> str:
  return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
  """Returns the leaves of a tree by their dotted paths."""
  flat = {}
  for name, value in tree.items():
    flat |= (
      _flatten(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    )
  return flat


def _unflatten(flat: dict[str, Any]) -> PyTree:
  """Returns the tree of which `_flatten` makes `flat`."""
  tree: PyTree = {}
  for path, value in flat.items():
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree
