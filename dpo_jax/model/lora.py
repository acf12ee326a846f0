"""Low-rank adapters of the decoder's linear maps: y = x W + s drop(x) a b, only a and b trained.

Hu et al. 2021, "LoRA". Adapters are a tree of their own, {"layers": {"query": {"lora_a", "lora_b"},
...}}, float32 and stacked over layers like the kernels they belong to. The model reads them as a
second collection next to its frozen parameters, with the scale s already multiplied into b: see
`attach`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model import families
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.layers import Linear
from dpo_jax.model.transformer import Decoder, example_inputs
from dpo_jax.structs import PyTree, UserError

ALL = "all-linear"


class LoRA(NamedTuple):
  """Settings of adapters.

  Attributes:
    rank: R.
    alpha: the update is multiplied by alpha / R.
    rs: multiplies by alpha / sqrt(R) instead, which keeps the size of the update at high ranks
      (rank-stabilised LoRA, Kalajdzievski 2023).
    dropout: probability that an adapter's input is dropped, in training.
    target: names of linear maps, or regular expressions for whole names, separated by commas or |.
      Names are those of this package ("query"), those of the model's folder ("q_proj",
      "mlp.c_proj"), or "all-linear".
  """

  rank: int
  alpha: float = 16.0
  rs: bool = False
  dropout: float = 0.0
  target: str = ALL

  @property
  def scale(self) -> float:
    """The factor s of the formula at the top of this module."""
    return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)


def check(settings: LoRA) -> None:
  """Checks settings without knowing the model.

  Raises:
    UserError: a value out of range, or an invalid regular expression.
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
        f"lora.target {pattern!r} is not a valid pattern ({error}); name maps such as q_proj,v_proj"
      ) from None


def _patterns(target: str) -> list[str]:
  """Splits a target into its patterns."""
  # A bar inside brackets is part of a pattern: "(up|down)_proj".
  parts = target.split(",") if "(" in target else re.split(r"[,|]", target)
  return [part.strip() for part in parts if part.strip()]


# -- linear maps -----------------------------------------------------------------------------------


def linear_maps(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Lists all maps that can have an adapter: path in the tree to kernel shape, [layers, D, Ff]."""
  found = set()

  def record(call, args, kwargs, context):
    if isinstance(context.module, Linear) and context.method_name == "__call__":
      found.add(tuple(context.module.path))
    return call(*args, **kwargs)

  # Observed in a run of the decoder, not listed by hand: a map that ignored its adapter (a kernel
  # of experts, say) would train nothing, in silence.
  with nn.intercept_methods(record):
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), *example_inputs())["params"]
  # Sorted, since `init` numbers the maps to give each a random key of its own.
  return {".".join(path): _get(shapes, path)["kernel"].shape for path in sorted(found)}


def modules(config: ModelConfig) -> dict[str, str]:
  """Returns the module of the model's folder that contains each map, `{}` for the layer."""
  found = {}
  for tensor in families.tensors(config):
    for leaf in tensor.leaves:
      path, _, kind = leaf.rpartition(".")
      if kind == "kernel":
        found[path] = tensor.name.removesuffix(".weight")
  return found


def select_maps(config: ModelConfig, target: str) -> dict[str, tuple[int, ...]]:
  """Returns the entries of `linear_maps` that `target` names.

  Raises:
    UserError: a name or pattern matches nothing; the message lists the known names.
  """
  maps, module_of = linear_maps(config), modules(config)
  names = {}
  for path in maps:
    # Three names each: ours, the folder's within a layer, and the last part of that.
    inside = module_of.get(path, path).split("{}.")[-1]  # "self_attn.q_proj"
    names[path] = (path.removeprefix("layers."), inside, inside.split(".")[-1])
  found = set()
  for pattern in _patterns(target) or [""]:  # an empty target matches nothing, and is refused
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
  """Makes adapters that do not change the model yet: b is zero. They are NumPy arrays.

  a is uniform in ±1/sqrt(D), as in PEFT (Kaiming with a slope of sqrt(5)). The result is a pure
  function of the arguments.

  Raises:
    UserError: the target matches nothing, or a map is narrower than the rank.
  """
  tree: PyTree = {}
  for index, (path, shape) in enumerate(select_maps(config, settings.target).items()):
    layers, width, features = shape
    if settings.rank > min(width, features):
      raise UserError(
        f"lora.rank is {settings.rank}, but {path.removeprefix('layers.')} maps {width} to"
        f" {features}; a rank above {min(width, features)} adds nothing there"
      )
    # A key per map: adapters of equal shape start with different numbers.
    key = jax.random.fold_in(jax.random.key(seed), index)
    bound = 1 / math.sqrt(width)
    a = jax.random.uniform(key, (layers, width, settings.rank), jnp.float32, -bound, bound)
    # b alone is zero. If both were, both gradients would be zero and nothing would ever train.
    b = np.zeros((layers, settings.rank, features), np.float32)
    set_at(tree, path, {"lora_a": np.asarray(a), "lora_b": b})
  return tree


def shapes(config: ModelConfig, settings: LoRA) -> PyTree:
  """Returns the tree of `init` as `jax.ShapeDtypeStruct`s; nothing is allocated."""
  tree: PyTree = {}
  for path, (layers, width, features) in select_maps(config, settings.target).items():
    a, b = (layers, width, settings.rank), (layers, settings.rank, features)
    names = {"lora_a": a, "lora_b": b}
    set_at(tree, path, {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in names.items()})
  return tree


def attach(frozen: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """Joins a base and adapters to parameters of the model, with the scale multiplied into b.

  Arrays of the base are shared, not copied. If `frozen` contains adapters, they are left out.
  """
  # The product with the scale is inside the differentiated function, so gradients are those of the
  # unscaled b, which is what optimizer and checkpoint store.
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, x: x * np.float32(scale) if path[-1].key == "lora_b" else x, adapters
  )
  return {"params": frozen["params"], "lora": scaled}


def merge(policy: PyTree) -> PyTree:
  """Merges `attach`ed adapters into their base: W + a b, in the base's type, on host."""
  merged: PyTree = jax.tree.map(lambda x: x, policy["params"])  # new nodes, the same arrays
  for path, adapter in flatten(policy["lora"]).items():
    node = _get(merged, path.split("."))
    kernel = node["kernel"]
    # The sum is float32 and rounded once.
    update = np.asarray(adapter["lora_a"]) @ np.asarray(adapter["lora_b"])
    node["kernel"] = (np.asarray(kernel, np.float32) + update).astype(kernel.dtype)
  return {"params": merged}


def count_parameters(adapters: PyTree) -> int:
  """Counts trained parameters."""
  return sum(x.size for x in jax.tree.leaves(adapters))


def flatten(adapters: PyTree, prefix: str = "") -> dict[str, dict[str, Any]]:
  """Returns adapters by the dotted path of their map, sorted."""
  if "lora_a" in adapters:
    return {prefix: adapters}
  found = {}
  for name in sorted(adapters):
    found |= flatten(adapters[name], f"{prefix}.{name}".lstrip("."))
  return found


def set_at(tree: PyTree, path: str, node: PyTree) -> None:
  """Sets the node at a dotted path, and makes the nodes above it where they are missing."""
  *parents, name = path.split(".")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[name] = node


def _get(tree: PyTree, path: Iterable[str]) -> PyTree:
  """Returns the node at a path."""
  for name in path:
    tree = tree[name]
  return tree
