"""Adapters in and out, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT adapts modules as they lie on disk. Where one tensor there holds several of our maps (GPT-2's
c_attn: query, key and value), their adapters are written as one of k times the rank, in blocks:

  A = [a_1; ...; a_k]     B = diag(b_1, ..., b_k)     alpha_pattern: the scale stays what it was

which computes the same. The weights file says so in its metadata, and reads back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from dpo_jax.distributed.gather import gather_to_host
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import safetensors_files
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
  """What belongs to a run's adapters beside their numbers.

  Attributes:
    settings: what they are made of.
    base: folder of the model they change.
    mark: `mark_of` that model's parameters.
  """

  settings: LoRA
  base: str
  mark: str


def mark_of(params: PyTree) -> str:
  """A short digest of a base: the first and last row of every array, rounded to bfloat16."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params["params"]):
    digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
    for end in (0, -1):
      row = gather_to_host(leaf, (end,) * (leaf.ndim - 1)).astype(jnp.bfloat16)
      digest.update(row.tobytes())
  return digest.hexdigest()[:16]


class _Module(NamedTuple):
  """A linear map on disk: its name there, `{}` for the layer, and which of our maps it holds."""

  name: str
  paths: tuple[str, ...]
  transposed: bool


def _modules(config: ModelConfig) -> list[_Module]:
  maps = lora.linear_maps(config)
  found = []
  for tensor in families.tensors(config):
    paths = tuple(leaf.removesuffix(".kernel") for leaf in tensor.leaves)
    if all(path in maps for path in paths):
      found.append(_Module(tensor.name.removesuffix(".weight"), paths, tensor.transposed))
  return found


# -- out -------------------------------------------------------------------------------------------


def save(
  path: str | pathlib.Path,
  config: ModelConfig,
  adapters: PyTree,
  about: Adapter,
  *,
  source: str | pathlib.Path | None = None,
) -> None:
  """Writes an adapter folder that `peft` loads; an older one is replaced when the new one is whole.

  Args:
    path: the folder to write.
    config: the base's.
    adapters: as `lora.init` makes them.
    about: what else the folder says.
    source: folder whose tokenizer is copied untouched.
  """
  arrays, fields, split = _to_peft(config, adapters, about)
  with replacing_folder(path) as new:
    (new / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    hf_checkpoint.copy_companions(None if source is None else pathlib.Path(source), new)
    entries = [Entry(name, x.shape, x.dtype, lambda x=x: x) for name, x in sorted(arrays.items())]
    write_file(new / WEIGHTS, entries, base=about.mark, split=",".join(split))


def _to_peft(
  config: ModelConfig, adapters: PyTree, about: Adapter
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
  """Tensors by name, the fields of the configuration, and the maps that were written in blocks."""
  settings, held = about.settings, lora.flat(jax.device_get(adapters))
  maps, known = lora.linear_maps(config), _modules(config)
  arrays, targets, ranks, alphas, split = {}, [], {}, {}, []
  plain = lambda x: int(x) if x == int(x) else x  # some readers want whole numbers where they are
  for module in known:
    own = [path for path in module.paths if path in held]
    if not own:
      continue
    short = _short(module, known)
    targets.append(short)
    rank = sum(held[path]["lora_a"].shape[-1] for path in own)
    if rank != settings.rank:
      more = rank / settings.rank
      ranks[short] = rank
      alphas[short] = plain(settings.alpha * (math.sqrt(more) if settings.rs else more))
    if len(module.paths) > 1:
      split += own
    a_layers = np.concatenate([held[path]["lora_a"] for path in own], axis=-1)
    b_layers = _blocks(module, held, maps)
    for layer, (a_DR, b_RF) in enumerate(zip(a_layers, b_layers, strict=True)):
      name = _PREFIX + module.name.format(layer)
      arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(a_DR.T)
      arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(b_RF.T)
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": about.base,
    "r": settings.rank,
    "lora_alpha": plain(settings.alpha),
    "use_rslora": settings.rs,
    "lora_dropout": settings.dropout,
    "target_modules": targets,
    "rank_pattern": ranks,
    "alpha_pattern": alphas,
    "fan_in_fan_out": not all(module.transposed for module in known),
    "bias": "none",
    "inference_mode": True,
  }
  return arrays, fields, split


def _short(module: _Module, known: list[_Module]) -> str:
  """The shortest end of a module's name that no other module shares: "q_proj", "attn.c_proj"."""
  parts = module.name.split("{}.")[-1].split(".")
  ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
  shared = lambda end: sum(f".{other.name}".endswith(f".{end}") for other in known) > 1
  return next((end for end in ends if not shared(end)), ends[-1])


def _blocks(module: _Module, held: dict[str, Any], maps: dict[str, tuple[int, ...]]) -> np.ndarray:
  """B^T of a module: every map's own b where its rows and columns meet, zero elsewhere."""
  ranks = [held[p]["lora_b"].shape[-2] if p in held else 0 for p in module.paths]
  widths = [maps[p][-1] for p in module.paths]
  out = np.zeros((maps[module.paths[0]][0], sum(ranks), sum(widths)), np.float32)
  row = column = 0
  for path, rank, width in zip(module.paths, ranks, widths, strict=True):
    if rank:
      out[:, row : row + rank, column : column + width] = held[path]["lora_b"]
    row, column = row + rank, column + width
  return out


# -- in --------------------------------------------------------------------------------------------

# Fields of adapters that compute something else; only these values are what is done here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "lora_bias": (False,),
  "use_dora": (False,),
  "modules_to_save": ([],),
  "trainable_token_indices": ([], {}),
  "target_parameters": ([],),
  "layer_replication": ([],),
}


def holds_one(path: str | pathlib.Path) -> bool:
  """Whether a folder is an adapter's, not a whole model's."""
  return (pathlib.Path(path) / CONFIG).is_file()


def digest(path: str | pathlib.Path) -> str:
  """Of the bytes of its two files."""
  files = [pathlib.Path(path) / name for name in (CONFIG, WEIGHTS)]
  return b"".join(map(safetensors_files.file_digest, files)).hex()


def read_settings(path: str | pathlib.Path) -> tuple[LoRA, str]:
  """What an adapter is made of, and the base that it names ("" for none).

  Raises:
    UserError: no adapter folder, or one of a kind that would not be honoured.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"adapter folder {path} does not exist; name a folder that PEFT or a run wrote")
  if not holds_one(path):
    raise UserError(f"{path} has no {CONFIG}; name a folder that PEFT or a run has written")
  fields = read_json(path / CONFIG)
  for name, neutral in _NEUTRAL.items():
    value = fields.get(name)
    if value is not None and value not in neutral:
      raise UserError(f"{path}: {name} is {value!r}; only {neutral[0]!r} is supported")
  for name in ("r", "lora_alpha", "lora_dropout"):
    if not is_number(fields.get(name, 0)):
      raise UserError(f"{path / CONFIG}: {name} is {fields[name]!r}; it must be a number")
  target = fields.get("target_modules") or ""
  settings = LoRA(
    rank=fields.get("r", 8),
    alpha=fields.get("lora_alpha", 8),
    rs=bool(fields.get("use_rslora")),
    dropout=fields.get("lora_dropout", 0.0),
    target=target if isinstance(target, str) else ",".join(target),
  )
  try:
    lora.check(settings._replace(target=""))
  except UserError as error:
    raise UserError(f"{path / CONFIG}: {error}") from error
  return settings, str(fields.get("base_model_name_or_path") or "")


def check_base(path: str | pathlib.Path, mark: str) -> None:
  """The base is the one an adapter was trained on, where its folder says which that was.

  Raises:
    UserError: it is another.
  """
  base = read_settings(path)[1]
  if _read_tensors(pathlib.Path(path))[1].get("base", mark) != mark:
    raise UserError(
      f"{path} is an adapter of {base}, whose weights are not those of this model; name that one as"
      " the model"
    )


def load(path: str | pathlib.Path, config: ModelConfig) -> tuple[LoRA, PyTree]:
  """Reads an adapter folder for a base.

  Args:
    path: the folder.
    config: the base's.

  Returns:
    The settings and the adapters on host, float32. One written by `save` comes back bit for bit.
    Modules of another rank or scale than the folder's own are brought to it by factors in b, layers
    without adapter have zeros in both parts, which training leaves alone.

  Raises:
    UserError: names what is missing, unexpected, broken, or shows that the base is another.
  """
  path = pathlib.Path(path)
  settings, base = read_settings(path)
  tensors, metadata = _read_tensors(path)
  fields = read_json(path / CONFIG)
  split = set(filter(None, metadata.get("split", "").split(",")))
  maps, tree = lora.linear_maps(config), {}
  for module in _modules(config):
    parts = [_pair(tensors, module.name.format(n)) for n in range(config.layers)]
    rank = max((a_RD.shape[0] for a_RD, _ in filter(None, parts)), default=0)
    if not rank:
      continue
    width = sum(maps[p][-1] for p in module.paths)
    a = np.zeros((config.layers, maps[module.paths[0]][1], rank), np.float32)
    b = np.zeros((config.layers, rank, width), np.float32)
    for layer, part in enumerate(parts):
      if part is None:
        continue
      a_RD, b_FR = part
      if a_RD.shape[1:] != a.shape[1:2] or b_FR.shape != (width, a_RD.shape[0]):
        raise UserError(
          f"{path} is an adapter of {base or 'another model'}: {module.name.format(layer)} has A"
          f" {list(a_RD.shape)} and B {list(b_FR.shape)} there, and maps {a.shape[1]} to {width} in"
          " this model; name its own base"
        )
      a[layer, :, : len(a_RD)] = a_RD.T
      b[layer, : len(a_RD)] = b_FR.T
      if not split.intersection(module.paths):
        b[layer] *= np.float32(_factor(fields, settings, module.name.format(layer), len(a_RD)))
    _take_apart(tree, module, a, b, maps, split)
  if tensors:
    raise UserError(
      f"{path} is an adapter of {base or 'another model'}: it holds {min(tensors)}, which this"
      f" {config.family} model of {config.layers} layers has no place for; name its own base"
    )
  if not tree:
    raise UserError(f"{path / WEIGHTS} holds no adapter; copy or train it again")
  return settings, tree


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """Of the model in a folder, or of the base that an adapter's folder names."""
  return hf_checkpoint.read_config(_base_of(path) if holds_one(path) else path)


def load_model(
  path: str | pathlib.Path, *, shardings: PyTree | Sharding | None = None
) -> tuple[ModelConfig, PyTree]:
  """`checkpoint.load` of a model's folder; of an adapter's, its base with the adapter merged.

  Raises:
    UserError: as `load` and `checkpoint.load`, or the base is not where the adapter says.
  """
  if not holds_one(path):
    return hf_checkpoint.load(path, shardings=shardings)
  config, params = hf_checkpoint.load(_base_of(path))
  check_base(path, mark_of(params))
  settings, own = load(path, config)
  merged = lora.merge(lora.attach(params, own, settings.scale))
  return config, merged if shardings is None else jax.device_put(merged, shardings)


def _base_of(path: str | pathlib.Path) -> pathlib.Path:
  base = pathlib.Path(read_settings(path)[1])
  if not (base / "config.json").is_file():
    raise UserError(
      f"{path} is an adapter of {base}, which is no model folder here; set base_model_name_or_path"
      f" in its {CONFIG} to where that model lies"
    )
  return base


def _read_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  file = path / WEIGHTS
  if not file.is_file():
    pickled = (path / "adapter_model.bin").is_file()
    way = "save it again with safe_serialization=True" if pickled else "copy the folder again"
    raise UserError(f"{path} has no {WEIGHTS}; {way}")
  try:
    with safe_open(file, framework="np") as weights:
      names = {name: name.removeprefix(_PREFIX) for name in weights.keys()}  # noqa: SIM118
      arrays = {short: weights.get_tensor(name) for name, short in names.items()}
      return arrays, weights.metadata() or {}
  except SafetensorError as error:
    raise UserError(f"{file} is broken or cut short ({error}); copy it again") from error


def _pair(tensors: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray] | None:
  """A and B of a module, taken out of `tensors`; None where it has no adapter."""
  names = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
  if not all(one in tensors for one in names):
    return None
  a_RD, b_FR = (tensors.pop(one).astype(np.float32) for one in names)
  return a_RD, b_FR


def _factor(fields: dict[str, Any], settings: LoRA, name: str, rank: int) -> float:
  """The scale of a module over that of the folder."""
  # PEFT: a pattern stands for the end of a module's name; the first that matches counts.
  alphas = (fields.get("alpha_pattern") or {}).items()
  alpha = next((x for end, x in alphas if re.match(rf"(.*\.)?({end})$", name)), settings.alpha)
  return settings._replace(rank=rank, alpha=alpha).scale / settings.scale


def _take_apart(tree, module, a, b, maps, split) -> None:
  """Adapters of our own maps: their blocks where `split` says so, else all of A for every map."""
  widths = [maps[path][-1] for path in module.paths]
  own = [path for path in module.paths if path in split]
  for path, part in zip(module.paths, np.split(b, np.cumsum(widths)[:-1], axis=-1), strict=True):
    if not own:
      lora.put(tree, path, {"lora_a": a.copy(), "lora_b": np.ascontiguousarray(part)})
    elif path in own:
      rank = a.shape[-1] // len(own)
      rows = slice(own.index(path) * rank, (own.index(path) + 1) * rank)
      block = {"lora_a": a[..., rows], "lora_b": part[:, rows]}
      lora.put(tree, path, jax.tree.map(np.ascontiguousarray, block))
