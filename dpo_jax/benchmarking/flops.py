"""What a step has to compute at the least, and how fast this machine computes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.model import transformer
from dpo_jax.model.config import ModelConfig


def step_flops(
  config: ModelConfig, *, reference: bool, adapters: int = 0
) -> Callable[[float, float], float]:
  """(distinct tokens, scored tokens) -> FLOPs of the matrix products of a step.

  A forward pass takes 2 a parameter and token, a backward pass as much for the gradient of inputs
  and as much for that of parameters: 6 in all, 4 where parameters are frozen beneath adapters. The
  head is counted at scored tokens. Of experts those count that are chosen. Attention scores are
  left out.

  Args:
    config: the policy's.
    reference: whether the reference is computed along, 2 a parameter and token.
    adapters: numbers in the adapters that are trained in place of the model; 0 trains the model.
  """
  body = 0.0
  layers = transformer.param_shapes(config)["params"]["layers"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
    if path[-1].key != "kernel":
      continue
    # Kernels of experts are [layers, experts, D, F], all others [layers, D, F].
    each = config.experts if len(leaf.shape) == 4 else None
    body += math.prod(leaf.shape) * (each.chosen / each.count if each else 1)
  head = config.vocab * config.width
  passes = (2 if adapters else 3) + reference
  return lambda tokens, scored: (
    2 * (passes * (body * tokens + head * scored) + 3 * adapters * tokens)
  )


def product_rate(dtype: str) -> tuple[float, str]:
  """FLOPs a second of the quickest of several large matrix products, on all devices together.

  Tried are square products of a few sizes, of inputs of `dtype` to results of it and to float32. A
  CPU also tries float32 throughout: what it has no units for is computed so.

  Returns:
    The rate, and which product it was, such as `2048 bfloat16 to float32`.
  """
  cpu = jax.default_backend() == "cpu"
  sizes = (1024, 2048) if cpu else (4096, 8192, 12288)
  kinds = {(dtype, dtype), (dtype, "float32")} | ({("float32", "float32")} if cpu else set())
  # Devices of a CPU share its cores.
  devices = 1 if cpu else len(jax.local_devices())
  tried = [
    (devices * _rate(size, *kind), f"{size} {kind[0]} to {kind[1]}")
    for size in sizes
    for kind in sorted(kinds)
  ]
  return max(tried)


def _rate(size: int, dtype: str, result: str, repeats: int = 8) -> float:
  """FLOPs a second of a square product, the best of several."""
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.dtype(result)))
  product(x, x).block_until_ready()
  times = []
  for _ in range(repeats):
    before = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - before)
  return 2 * size**3 / min(times)
