"""A mixture of experts: a router sends every token through a few of many feed-forward parts.

Experts have no capacity limit, so no token is dropped. Pairs of a token and one of its experts are
sorted by expert, and each expert multiplies its run of them: only chosen experts do work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, Routing
from dpo_jax.utils.matmul import exact


class Kernel(nn.Module):
  """The weights of linear maps [..., in, out], without biases."""

  shape: tuple[int, ...]
  std: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self) -> Array:
    init = nn.initializers.normal(self.std)
    return self.param("kernel", init, self.shape, self.param_dtype).astype(self.dtype)


class Mixture(nn.Module):
  """A layer of experts: y = Σ_e w_e expert_e(x) over the chosen experts (Shazeer et al. 2017).

  w is the softmax of the router over all experts. The layer also stores a `Routing` among Flax's
  intermediates, from which the step computes the load-balancing loss.
  """

  config: ModelConfig
  act: Callable[[Array], Array]
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x_NLD: Array, real_NL: Array) -> Array:
    """Computes the layer: [N, L, D].

    Args:
      x_NLD: input of the router and of the experts.
      real_NL: False for padding, which is left out of the `Routing`.
    """
    c, settings = self.config, self.config.experts
    assert settings is not None
    x_TkD = x_NLD.reshape(-1, c.width).astype(self.dtype)

    def kernel(name: str, *shape: int) -> Array:
      return Kernel(shape, c.init_std, self.dtype, self.param_dtype, name=name)()

    router_DE = kernel("router", c.width, settings.count)
    gate_EDFf = kernel("gate", settings.count, c.width, c.mlp_width)
    up_EDFf = kernel("up", settings.count, c.width, c.mlp_width)
    down_EFfD = kernel("down", settings.count, c.mlp_width, c.width)

    # The softmax is float32: rounded, the probabilities of similar experts would tie.
    probs_TkE = jax.nn.softmax(jnp.dot(x_TkD, router_DE, **exact(x_TkD.dtype)))
    weight_TkEk, expert_TkEk = jax.lax.top_k(probs_TkE, settings.chosen)
    if settings.rescaled:
      weight_TkEk = weight_TkEk / weight_TkEk.sum(axis=-1, keepdims=True)
    self.sow("intermediates", "routing", routing(probs_TkE, expert_TkEk, real_NL.reshape(-1)))

    # The order is important:
    # 1. Sort the pairs by expert, so that each expert's inputs are one run of rows.
    order_As = jnp.argsort(expert_TkEk.reshape(-1))
    sizes_E = jnp.bincount(expert_TkEk.reshape(-1), length=settings.count).astype(jnp.int32)

    def multiply(x_AsD: Array, kernel_EDFf: Array) -> Array:
      y_RF = jax.lax.ragged_dot(
        jnp.asarray(x_AsD), jnp.asarray(kernel_EDFf), sizes_E, **exact(self.dtype)
      )
      return y_RF.astype(self.dtype)

    # 2. Repeat each token once per chosen expert (pair r is of token r // K) and run the experts.
    x_AsD = x_TkD[order_As // settings.chosen]
    y_AsD = multiply(self.act(multiply(x_AsD, gate_EDFf)) * multiply(x_AsD, up_EDFf), down_EFfD)
    # 3. Undo the sort, so that the outputs of a token stand together, and sum them up in float32.
    y_TkEkD = y_AsD[jnp.argsort(order_As)].reshape(*expert_TkEk.shape, c.width)
    y_TkD = jnp.einsum("tkd,tk->td", y_TkEkD, weight_TkEk, preferred_element_type=jnp.float32)
    return y_TkD.reshape(x_NLD.shape).astype(self.dtype)


def routing(probs_TkE: Array, expert_TkEk: Array, real_Tk: Array) -> Routing:
  """Sums up how one layer spread its real tokens over the experts."""
  count = probs_TkE.shape[-1]
  chosen_TkE = jax.nn.one_hot(expert_TkEk, count).sum(axis=1)
  # Sums and not means: they add up over layers, micro-batches and devices, and are divided once.
  chosen_E, probs_E = (
    jnp.where(real_Tk[:, None], x_TkE, 0.0).sum(axis=0) for x_TkE in (chosen_TkE, probs_TkE)
  )
  # Counts have no gradient; the balancing loss reaches the router through the probabilities.
  return Routing(jax.lax.stop_gradient(chosen_E), probs_E, real_Tk.sum())
