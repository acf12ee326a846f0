"""FLOPs that the objective needs per step, and the rate of this machine's matrix products."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.model import transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.utils.matmul import exact


def step_flops(
  config: ModelConfig, *, reference: bool, adapters: int = 0
) -> Callable[[float, float], float]:
  """Returns a function (distinct tokens, scored tokens) -> FLOPs of a step's matrix products.

  A forward pass takes 2 FLOPs per parameter and token. A backward pass takes 2 for the gradient of
  the inputs and 2 for that of the parameters: 6 in all, or 4 for frozen parameters under adapters.
  The head counts at scored tokens only, and of experts only the chosen ones. Attention scores are
  left out, so the figure is a lower bound.

  Args:
    config: the policy's configuration.
    reference: True if the step also computes the reference, 2 FLOPs per parameter and token.
    adapters: number of trained adapter parameters; 0 trains the model itself.
  """
  body = 0.0
  layers = transformer.param_shapes(config)["params"]["layers"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
    # Matrices alone: norms and biases take FLOPs in proportion to the width, not to its square.
    if path[-1].key != "kernel":
      continue
    # Kernels of experts are [layers, experts, D, Ff], all others [layers, D, Ff].
    each = config.experts if len(leaf.shape) == 4 else None
    body += math.prod(leaf.shape) * (each.chosen / each.count if each else 1)
  head = config.vocab * config.width
  passes = (2 if adapters else 3) + reference
  # The leading 2 is a multiplication and an addition. Adapters take all three passes, also where
  # the model below them takes two.
  return lambda tokens, scored: (
    2 * (passes * (body * tokens + head * scored) + 3 * adapters * tokens)
  )


def product_rate(dtype: str) -> tuple[float, str]:
  """Measures the fastest of several large square matrix products, on all devices together.

  Inputs have type `dtype`, results `dtype` or float32. A CPU also tries float32 throughout: types
  without hardware support are computed in it.

  Returns:
    FLOPs per second, and the product that reached them, such as `2048 bfloat16 to float32`.
  """
  cpu = jax.default_backend() == "cpu"
  # Large enough that the rate no longer rises with the size, which an accelerator reaches later.
  sizes = (1024, 2048) if cpu else (4096, 8192, 12288)
  kinds = {(dtype, dtype), (dtype, "float32")} | ({("float32", "float32")} if cpu else set())
  # CPU devices share the same cores, so their rates do not add up.
  devices = 1 if cpu else len(jax.local_devices())
  tried = [
    (devices * _rate(size, *kind), f"{size} {kind[0]} to {kind[1]}")
    for size in sizes
    for kind in sorted(kinds)
  ]
  return max(tried)


def _rate(size: int, dtype: str, result: str, repeats: int = 8) -> float:
  """Returns FLOPs per second of a square product, the best of several runs."""
  # Random numbers: of ones, a processor that is short of power multiplies more per second.
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  precision = exact(dtype)["precision"]  # as in training
  product = jax.jit(
    lambda a, b: jnp.dot(a, b, precision=precision, preferred_element_type=jnp.dtype(result))
  )
  product(x, x).block_until_ready()  # compiles
  times = []
  # The best of several: other programs only ever make it slower.
  for _ in range(repeats):
    before = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - before)
  return 2 * size**3 / min(times)
