"""Reading and writing adapters in PEFT's format: a configuration and a safetensors file.

PEFT adapts modules as they are stored. If one tensor on disk contains k of our maps (as GPT-2's
c_attn does query, key and value), their adapters are written as one of k times the rank, in blocks:

  A = [a_1; ...; a_k]     B = diag(b_1, ..., b_k)

It computes the same, and `alpha_pattern` keeps the scale what it was. The metadata of the weights
file lists such maps, so they are read back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from dpo_jax.distributed.gather import gather_to_host
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft_fields, safetensors_files
from dpo_jax.hf.safetensors_files import Entry, read_json, write_file
from dpo_jax.model import families, lora
from dpo_jax.model.config import ModelConfig, is_number
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils.files import replacing_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class Adapter(NamedTuple):
  """Facts about a run's adapters that their folder states in addition to their numbers.

  Attributes:
    settings: rank, scale and target.
    base: folder of the model that they change.
    fingerprint: `fingerprint_of` that model's parameters.
  """

  settings: LoRA
  base: str
  fingerprint: str


def fingerprint_of(params: PyTree) -> str:
  """Computes a short digest of a base from the first and last row of every array."""
  # In bfloat16, so that a base has one fingerprint whatever type it was loaded in.
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params["params"]):
    digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
    # Two rows instead of all: a base may be tens of gigabytes, and training changes every row.
    for end in (0, -1):
      row = gather_to_host(leaf, (end,) * (leaf.ndim - 1)).astype(jnp.bfloat16)
      digest.update(row.tobytes())
  return digest.hexdigest()[:16]


class _Module(NamedTuple):
  """A linear map on disk.

  Attributes:
    name: its name there, with `{}` for the layer.
    paths: the maps of this package that it contains, in order.
    transposed: whether it is stored as [out, in].
  """

  name: str
  paths: tuple[str, ...]
  transposed: bool


def _modules(config: ModelConfig) -> list[_Module]:
  """Lists the modules that can have an adapter."""
  maps = lora.linear_maps(config)
  found = []
  for tensor in families.tensors(config):
    paths = tuple(leaf.removesuffix(".kernel") for leaf in tensor.leaves)
    if all(path in maps for path in paths):
      found.append(_Module(tensor.name.removesuffix(".weight"), paths, tensor.transposed))
  return found


# -- writing ---------------------------------------------------------------------------------------


def save(
  path: str | pathlib.Path,
  config: ModelConfig,
  adapters: PyTree,
  about: Adapter,
  *,
  source: str | pathlib.Path | None = None,
  end_ids: Sequence[int] = (),
  card: str = "",
) -> None:
  """Writes an adapter folder for `peft`; an older one is replaced once the new one is complete.

  Args:
    path: the folder to write.
    config: configuration of the base.
    adapters: a tree as from `lora.init`.
    about: facts that the folder states.
    source: folder whose tokenizer is copied unchanged.
    end_ids, card: as in `checkpoint.save`.
  """
  arrays, fields, split = _to_peft(config, adapters, about)
  with replacing_folder(path) as new:
    (new / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    hf_checkpoint.copy_companions(None if source is None else pathlib.Path(source), new)
    if (new / hf_checkpoint.GENERATION).exists():
      ends = [id for id in end_ids if id < config.vocab]
      hf_checkpoint.add_ends(new / hf_checkpoint.GENERATION, ends)
    hf_checkpoint.write_card(new, card)
    entries = [Entry(name, x.shape, x.dtype, lambda x=x: x) for name, x in sorted(arrays.items())]
    write_file(new / WEIGHTS, entries, base=about.fingerprint, split=",".join(split))


def _to_peft(
  config: ModelConfig, adapters: PyTree, about: Adapter
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
  """Returns tensors by name, the fields of the configuration, and the maps written in blocks."""
  settings, by_path = about.settings, lora.flatten(jax.device_get(adapters))
  maps, known = lora.linear_maps(config), _modules(config)
  arrays, targets, ranks, alphas, split = {}, [], {}, {}, []
  for module in known:
    own = [path for path in module.paths if path in by_path]
    if not own:
      continue
    short = _short_name(module, known)
    targets.append(short)
    # Blocks add up: a joined module has the ranks of its maps together.
    rank = sum(by_path[path]["lora_a"].shape[-1] for path in own)
    if rank != settings.rank:
      # PEFT divides alpha by this module's rank (or its root); a larger alpha makes up for it.
      ratio = rank / settings.rank
      ranks[short] = rank
      alphas[short] = _whole(settings.alpha * (math.sqrt(ratio) if settings.rs else ratio))
    if len(module.paths) > 1:
      split += own
    a_layers = np.concatenate([by_path[path]["lora_a"] for path in own], axis=-1)
    b_layers = _blocks(module, by_path, maps)
    for layer, (a_DR, b_RFf) in enumerate(zip(a_layers, b_layers, strict=True)):
      # PEFT stores both parts as [out, in]; safetensors writes contiguous arrays only.
      name = _PREFIX + module.name.format(layer)
      arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(a_DR.T)
      arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(b_RFf.T)
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": about.base,
    "r": settings.rank,
    "lora_alpha": _whole(settings.alpha),
    "use_rslora": settings.rs,
    "lora_dropout": settings.dropout,
    "target_modules": targets,
    "rank_pattern": ranks,
    "alpha_pattern": alphas,
    # True for modules that store their weights as [in, out], as GPT-2's do.
    "fan_in_fan_out": not all(module.transposed for module in known),
    "bias": "none",
    "inference_mode": True,
  }
  return arrays, fields, split


def _whole(x: float) -> int | float:
  """Returns a whole number as an int, because some readers do not accept 16.0."""
  return int(x) if x == int(x) else x


def _short_name(module: _Module, known: list[_Module]) -> str:
  """Returns the shortest end of a module's name that names no other: "q_proj", "attn.c_proj"."""
  parts = module.name.split("{}.")[-1].split(".")
  ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
  for end in ends:
    if sum(f".{other.name}".endswith(f".{end}") for other in known) == 1:
      return end
  return ends[-1]


def _blocks(
  module: _Module, by_path: dict[str, Any], maps: dict[str, tuple[int, ...]]
) -> np.ndarray:
  """Returns B of a module, transposed, [layers, R, F]: b of each map in its block, else zero."""
  ranks = [by_path[p]["lora_b"].shape[-2] if p in by_path else 0 for p in module.paths]
  widths = [maps[p][-1] for p in module.paths]
  out = np.zeros((maps[module.paths[0]][0], sum(ranks), sum(widths)), np.float32)
  row = column = 0
  for path, rank, width in zip(module.paths, ranks, widths, strict=True):
    if rank:
      out[:, row : row + rank, column : column + width] = by_path[path]["lora_b"]
    row, column = row + rank, column + width
  return out


# -- reading ---------------------------------------------------------------------------------------


def is_adapter(path: str | pathlib.Path) -> bool:
  """Returns whether a folder contains an adapter, not a whole model."""
  return (pathlib.Path(path) / CONFIG).is_file()


def digest(path: str | pathlib.Path) -> str:
  """Computes a digest of all bytes of an adapter's two files."""
  files = [pathlib.Path(path) / name for name in (CONFIG, WEIGHTS)]
  return b"".join(map(safetensors_files.file_digest, files)).hex()


def read_settings(path: str | pathlib.Path) -> tuple[LoRA, str]:
  """Reads an adapter's settings, and the folder of the base that it names ("" for none).

  Raises:
    UserError: the folder contains no adapter, or one of a kind that is not supported.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"adapter folder {path} does not exist; name a folder that PEFT or a run wrote")
  if not is_adapter(path):
    raise UserError(f"{path} has no {CONFIG}; name a folder that PEFT or a run has written")
  fields = read_json(path / CONFIG)
  peft_fields.check(path, fields)
  for name in ("r", "lora_alpha", "lora_dropout"):
    if not is_number(fields.get(name, 0)):
      raise UserError(f"{path / CONFIG}: {name} is {fields[name]!r}; it must be a number")
  # A list of names, or one regular expression.
  target = fields.get("target_modules") or ""
  settings = LoRA(
    rank=fields.get("r", 8),
    alpha=fields.get("lora_alpha", 8),
    rs=bool(fields.get("use_rslora")),
    dropout=fields.get("lora_dropout", 0.0),
    target=target if isinstance(target, str) else ",".join(target),
  )
  # Without the target, whose names are checked where the base is known.
  try:
    lora.check(settings._replace(target=""))
  except UserError as error:
    raise UserError(f"{path / CONFIG}: {error}") from error
  return settings, str(fields.get("base_model_name_or_path") or "")


def check_base(path: str | pathlib.Path, fingerprint: str) -> None:
  """Checks that a base is the one that an adapter was trained on.

  Args:
    path: the adapter's folder. One that PEFT wrote states no fingerprint, and passes.
    fingerprint: `fingerprint_of` the base.

  Raises:
    UserError: the adapter was trained on another base.
  """
  base = read_settings(path)[1]
  if _read_tensors(pathlib.Path(path))[1].get("base", fingerprint) != fingerprint:
    raise UserError(
      f"{path} is an adapter of {base}, whose weights are not those of this model; name that one as"
      " the model"
    )


def load(path: str | pathlib.Path, config: ModelConfig) -> tuple[LoRA, PyTree]:
  """Reads an adapter folder.

  Adapters that `save` wrote come back bit for bit. In other folders, modules may differ in rank and
  scale: a factor in b makes up for another scale, and zeros fill up a lower rank. A layer without
  an adapter has zeros in both parts. Their gradients are zero, so training does not change them.

  Args:
    path: the folder.
    config: configuration of the base.

  Returns:
    The settings, and the adapters as NumPy arrays of float32.

  Raises:
    UserError: names the tensor or file that is missing, unexpected or broken, or that shows that
      the adapter is one of another base.
  """
  path = pathlib.Path(path)
  settings, base = read_settings(path)
  tensors, metadata = _read_tensors(path)
  fields = read_json(path / CONFIG)
  split = set(filter(None, metadata.get("split", "").split(",")))
  maps, tree = lora.linear_maps(config), {}
  # Pairs are taken out of `tensors`, so that what is left at the end has no place in this model.
  for module in _modules(config):
    parts = [_take_pair(tensors, module.name.format(n)) for n in range(config.layers)]
    for layer, part in enumerate(parts):
      name = module.name.format(layer)
      if part is not None and not peft_fields.has_adapter(fields, name):
        raise UserError(
          f"{path} contains an adapter of {name}, which its {CONFIG} leaves out (target_modules,"
          " exclude_modules, layers_to_transform): PEFT would pass it over; make the two agree"
        )
    # Layers are stacked, so all get the highest rank of any.
    rank = max((a_RD.shape[0] for a_RD, _ in filter(None, parts)), default=0)
    if not rank:
      continue
    # Maps that share a module read the same inputs, and their outputs stand side by side.
    width = sum(maps[p][-1] for p in module.paths)
    a = np.zeros((config.layers, maps[module.paths[0]][1], rank), np.float32)
    b = np.zeros((config.layers, rank, width), np.float32)
    for layer, part in enumerate(parts):
      if part is None:
        continue
      a_RD, b_FfR = part
      if a_RD.shape[1:] != a.shape[1:2] or b_FfR.shape != (width, a_RD.shape[0]):
        raise UserError(
          f"{path} is an adapter of {base or 'another model'}: {module.name.format(layer)} has A"
          f" {list(a_RD.shape)} and B {list(b_FfR.shape)} there, and maps {a.shape[1]} to {width}"
          " in this model; name its own base"
        )
      a[layer, :, : len(a_RD)] = a_RD.T
      b[layer, : len(a_RD)] = b_FfR.T
      # What was written in blocks has the scale of the folder: see alpha_pattern in `_to_peft`.
      if not split.intersection(module.paths):
        b[layer] *= np.float32(_factor(fields, settings, module.name.format(layer), len(a_RD)))
    _split_module(tree, module, a, b, maps, split)
  if tensors:
    for name in sorted(tensors):
      if what := peft_fields.explain_tensor(name):
        raise UserError(f"{path} contains {name}, {what}: not supported; {peft_fields.MERGE}")
    raise UserError(
      f"{path} is an adapter of {base or 'another model'}: it contains {min(tensors)}, which this"
      f" {config.family} model of {config.layers} layers has no place for; name its own base"
    )
  if not tree:
    raise UserError(f"{path / WEIGHTS} contains no adapter; copy or train it again")
  return settings, tree


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """Reads the configuration of the model in a folder, or of the base that an adapter names."""
  return hf_checkpoint.read_config(_base_of(path) if is_adapter(path) else path)


def load_model(
  path: str | pathlib.Path, *, shardings: PyTree | Sharding | None = None
) -> tuple[ModelConfig, PyTree]:
  """Loads a model folder, or the base of an adapter folder with the adapter merged into it.

  Raises:
    UserError: as `load` and `checkpoint.load`, or the base is not at the path that the adapter
      names.
  """
  if not is_adapter(path):
    return hf_checkpoint.load(path, shardings=shardings)
  # On host, because merging needs whole arrays; placed on devices afterwards.
  config, params = hf_checkpoint.load(_base_of(path))
  check_base(path, fingerprint_of(params))
  settings, own = load(path, config)
  merged = lora.merge(lora.attach(params, own, settings.scale))
  return config, merged if shardings is None else jax.device_put(merged, shardings)


def _base_of(path: str | pathlib.Path) -> pathlib.Path:
  """Returns the folder of an adapter's base, which must contain a model."""
  base = pathlib.Path(read_settings(path)[1])
  if not (base / "config.json").is_file():
    raise UserError(
      f"{path} is an adapter of {base}, which is not a model folder here; set"
      f" base_model_name_or_path in its {CONFIG} to the folder of that model"
    )
  return base


def _read_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads all tensors of an adapter by their names without PEFT's prefix, and the metadata."""
  file = path / WEIGHTS
  if not file.is_file():
    pickled = (path / "adapter_model.bin").is_file()
    way = "save it again with safe_serialization=True" if pickled else "copy the folder again"
    raise UserError(f"{path} has no {WEIGHTS}; {way}")
  try:
    with safe_open(file, framework="np") as weights:
      # The file is not a dictionary: only `keys` lists its names.
      names = {name: name.removeprefix(_PREFIX) for name in weights.keys()}  # noqa: SIM118
      arrays = {short: weights.get_tensor(name) for name, short in names.items()}
      return arrays, weights.metadata() or {}
  except SafetensorError as error:
    raise UserError(f"{file} is broken or cut short ({error}); copy it again") from error


def _take_pair(tensors: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Removes A and B of a module from `tensors` and returns them; None if it has no adapter."""
  names = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
  if not all(one in tensors for one in names):
    return None
  a_RD, b_FfR = (tensors.pop(one).astype(np.float32) for one in names)
  return a_RD, b_FfR


def _factor(fields: dict[str, Any], settings: LoRA, name: str, rank: int) -> float:
  """Returns the scale of a module divided by that of the folder."""
  # In PEFT a pattern matches the end of a module's name, and the first match counts.
  alphas = (fields.get("alpha_pattern") or {}).items()
  alpha = next((x for end, x in alphas if re.match(rf"(.*\.)?({end})$", name)), settings.alpha)
  return settings._replace(rank=rank, alpha=alpha).scale / settings.scale


def _split_module(
  tree: PyTree,
  module: _Module,
  a: np.ndarray,
  b: np.ndarray,
  maps: dict[str, tuple[int, ...]],
  split: set[str],
) -> None:
  """Divides the adapter of a module among its maps, and adds these to `tree`.

  Args:
    tree: adapters so far.
    module: the module.
    a: its A, transposed: [layers, D, R].
    b: its B, transposed: [layers, R, F], the columns of its maps side by side.
    maps: `lora.linear_maps` of the model.
    split: maps that were written in blocks; each gets its block alone. Other maps get all of A.
  """
  widths = [maps[path][-1] for path in module.paths]
  own = [path for path in module.paths if path in split]
  for path, part in zip(module.paths, np.split(b, np.cumsum(widths)[:-1], axis=-1), strict=True):
    if not own:
      lora.set_at(tree, path, {"lora_a": a.copy(), "lora_b": np.ascontiguousarray(part)})
    elif path in own:
      # Block i has rows i * rank to (i + 1) * rank of A, and of the map's columns of B. The rest of
      # these columns is zero.
      rank = a.shape[-1] // len(own)
      rows = slice(own.index(path) * rank, (own.index(path) + 1) * rank)
      block = {"lora_a": a[..., rows], "lora_b": part[:, rows]}
      lora.set_at(tree, path, jax.tree.map(np.ascontiguousarray, block))
