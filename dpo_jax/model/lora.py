"""Low-rank adapters of the decoder's linear maps: y = x W + s drop(x) a b, only a and b trained.

Hu et al. 2021, "LoRA". What is trained is a tree of its own, {"layers": {"query": {"lora_a",
"lora_b"}, ...}}, float32 and stacked over layers like the kernels it belongs to. The model reads it
as a second collection beside its frozen parameters, with the scale s already in b: `attach`.

Axes beyond the key in `structs`: `R` rank, `F` outputs of a map; its inputs are `D` here.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model import families
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.layers import Linear
from dpo_jax.model.transformer import Decoder, _example
from dpo_jax.structs import PyTree, UserError

ALL = "all-linear"


class LoRA(NamedTuple):
  """What adapters are made of.

  Attributes:
    rank: R.
    alpha: the update is scaled by alpha / R.
    rs: by alpha / sqrt(R) instead, which keeps its size at high ranks. Kalajdzievski 2023.
    dropout: probability that an adapter does not see an input, in training.
    target: names of linear maps, or patterns of whole names, separated by commas or |: those here
      ("query"), those of the model's folder ("q_proj", "mlp.c_proj"), or "all-linear".
  """

  rank: int
  alpha: float = 16.0
  rs: bool = False
  dropout: float = 0.0
  target: str = ALL

  @property
  def scale(self) -> float:
    """s of the formula above."""
    return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)


def check(settings: LoRA) -> None:
  """What can be said against the settings before a model is known.

  Raises:
    UserError: a value out of range, or a pattern that is none.
  """
  if settings.rank < 1:
    raise UserError(f"lora.rank is {settings.rank}; it must be 1 or above, or 0 for no adapters")
  if not 0 < settings.alpha < math.inf:
    raise UserError(f"lora.alpha is {settings.alpha}; it must be above 0, such as twice the rank")
  if not 0 <= settings.dropout < 1:
    raise UserError(f"lora.dropout is {settings.dropout}; it must be 0 or above and below 1")
  for pattern in _patterns(settings.target):
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"lora.target {pattern!r} is no pattern ({error}); name maps such as q_proj,v_proj"
      ) from None


def _patterns(target: str) -> list[str]:
  # A bar inside brackets belongs to its pattern.
  parts = target.split(",") if "(" in target else re.split(r"[,|]", target)
  return [part.strip() for part in parts if part.strip()]


# -- which maps ------------------------------------------------------------------------------------


def linear_maps(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Every map that reads an adapter: path in the tree to shape of its kernels, [layers, D, F].

  Taken from the decoder itself: a map that would ignore its adapter is not among them.
  """
  found = set()

  def note(call, args, kwargs, context):
    if isinstance(context.module, Linear) and context.method_name == "__call__":
      found.add(tuple(context.module.path))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), *_example())["params"]
  kernel = lambda path: _at(shapes, path)["kernel"]
  return {".".join(path): kernel(path).shape for path in sorted(found)}


def modules(config: ModelConfig) -> dict[str, str]:
  """Module in the model's folder, `{}` for the layer, that holds each of our maps."""
  found = {}
  for tensor in families.tensors(config):
    for leaf in tensor.leaves:
      path, _, kind = leaf.rpartition(".")
      if kind == "kernel":
        found[path] = tensor.name.removesuffix(".weight")
  return found


def matched(config: ModelConfig, target: str) -> dict[str, tuple[int, ...]]:
  """The maps that `target` names, as `linear_maps` has them.

  Raises:
    UserError: a name or pattern that matches nothing; lists the names there are.
  """
  maps, module_of = linear_maps(config), modules(config)
  names = {}
  for path in maps:
    inside = module_of.get(path, path).split("{}.")[-1]  # "self_attn.q_proj"
    names[path] = (path.removeprefix("layers."), inside, inside.split(".")[-1])
  found = set()
  for pattern in _patterns(target) or [""]:
    hits = [
      path
      for path in maps
      if pattern == ALL or any(re.fullmatch(pattern, name) for name in names[path])
    ]
    if not hits:
      known = ", ".join(f"{own} ({last})" for own, _, last in names.values())
      raise UserError(
        f"lora.target {pattern!r} matches no linear map of this {config.family} model; there are"
        f" {known}, or {ALL}"
      )
    found |= set(hits)
  return {path: shape for path, shape in maps.items() if path in found}


# -- trees -----------------------------------------------------------------------------------------


def init(config: ModelConfig, settings: LoRA, seed: int) -> PyTree:
  """Adapters that change nothing yet, b being zero; a pure function of its arguments, on host.

  a is uniform in ±1/sqrt(D), as PEFT has it (Kaiming with a slope of sqrt(5)).

  Raises:
    UserError: the target matches nothing, or a map is narrower than the rank.
  """
  tree: PyTree = {}
  for index, (path, shape) in enumerate(matched(config, settings.target).items()):
    layers, width, features = shape
    if settings.rank > min(width, features):
      raise UserError(
        f"lora.rank is {settings.rank}, but {path.removeprefix('layers.')} maps {width} to"
        f" {features}; a rank above {min(width, features)} adds nothing there"
      )
    key = jax.random.fold_in(jax.random.key(seed), index)
    bound = 1 / math.sqrt(width)
    a = jax.random.uniform(key, (layers, width, settings.rank), jnp.float32, -bound, bound)
    b = np.zeros((layers, settings.rank, features), np.float32)
    put(tree, path, {"lora_a": np.asarray(a), "lora_b": b})
  return tree


def attach(frozen: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """What the model takes as parameters: the base of `frozen`, and adapters with the scale in b.

  No array of the base is copied. Other adapters that `frozen` holds stay behind.
  """
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, x: x * np.float32(scale) if path[-1].key == "lora_b" else x, adapters
  )
  return {"params": frozen["params"], "lora": scaled}


def merge(policy: PyTree) -> PyTree:
  """One plain tree that computes what `attach`ed parameters do: W + a b, in the base's type."""
  merged: PyTree = jax.tree.map(lambda x: x, policy["params"])  # new nodes, the same arrays
  for path, adapter in flat(policy["lora"]).items():
    node = _at(merged, path.split("."))
    kernel = node["kernel"]
    update = np.asarray(adapter["lora_a"]) @ np.asarray(adapter["lora_b"])
    node["kernel"] = (np.asarray(kernel, np.float32) + update).astype(kernel.dtype)
  return {"params": merged}


def count(adapters: PyTree) -> int:
  """Trained parameters."""
  return sum(x.size for x in jax.tree.leaves(adapters))


def flat(adapters: PyTree, prefix: str = "") -> dict[str, dict[str, Any]]:
  """Adapters by the path of their map, sorted."""
  if "lora_a" in adapters:
    return {prefix: adapters}
  found = {}
  for name in sorted(adapters):
    found |= flat(adapters[name], f"{prefix}.{name}".lstrip("."))
  return found


def put(tree: PyTree, path: str, node: PyTree) -> None:
  """Sets the node at a dotted path, making those above it."""
  *parents, name = path.split(".")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[name] = node


def _at(tree: PyTree, path: Any) -> PyTree:
  for name in path:
    tree = tree[name]
  return tree
