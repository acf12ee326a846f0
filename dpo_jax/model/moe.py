"""A mixture of experts: a router sends every token through a few of many feed-forward parts.

Experts have no capacity limit, so no token is dropped. Pairs of a token and one of its experts are
sorted by expert, and each expert multiplies its run of them: only chosen experts do work.

Axes beyond the key in `structs`: `E` experts, `T` tokens, `F` hidden size of an expert, `K` chosen
experts of a token, `R` pairs of a token and a chosen expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, Routing


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
    x_TD = x_NLD.reshape(-1, c.width).astype(self.dtype)

    def kernel(name: str, *shape: int) -> Array:
      return Kernel(shape, c.init_std, self.dtype, self.param_dtype, name=name)()

    router_DE = kernel("router", c.width, settings.count)
    gate_EDF = kernel("gate", settings.count, c.width, c.mlp_width)
    up_EDF = kernel("up", settings.count, c.width, c.mlp_width)
    down_EFD = kernel("down", settings.count, c.mlp_width, c.width)

    # The softmax is float32: rounded, the probabilities of similar experts would tie.
    probs_TE = jax.nn.softmax(jnp.dot(x_TD, router_DE, preferred_element_type=jnp.float32))
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, settings.chosen)
    if settings.rescaled:
      weight_TK = weight_TK / weight_TK.sum(axis=-1, keepdims=True)
    self.sow("intermediates", "routing", routing(probs_TE, expert_TK, real_NL.reshape(-1)))

    # The order is important:
    # 1. Sort the pairs by expert, so that each expert's inputs are one run of rows.
    order_R = jnp.argsort(expert_TK.reshape(-1))
    sizes_E = jnp.bincount(expert_TK.reshape(-1), length=settings.count).astype(jnp.int32)

    def multiply(x_RD: Array, kernel_EDF: Array) -> Array:
      y_RF = jax.lax.ragged_dot(
        jnp.asarray(x_RD), jnp.asarray(kernel_EDF), sizes_E, preferred_element_type=jnp.float32
      )
      return y_RF.astype(self.dtype)

    # 2. Repeat each token once per chosen expert (pair r is of token r // K) and run the experts.
    x_RD = x_TD[order_R // settings.chosen]
    y_RD = multiply(self.act(multiply(x_RD, gate_EDF)) * multiply(x_RD, up_EDF), down_EFD)
    # 3. Undo the sort, so that the outputs of a token stand together, and sum them up in float32.
    y_TKD = y_RD[jnp.argsort(order_R)].reshape(*expert_TK.shape, c.width)
    y_TD = jnp.einsum("tkd,tk->td", y_TKD, weight_TK, preferred_element_type=jnp.float32)
    return y_TD.reshape(x_NLD.shape).astype(self.dtype)


def routing(probs_TE: Array, expert_TK: Array, real_T: Array) -> Routing:
  """Sums up how one layer spread its real tokens over the experts."""
  count = probs_TE.shape[-1]
  chosen_TE = jax.nn.one_hot(expert_TK, count).sum(axis=1)
  # Sums and not means: they add up over layers, micro-batches and devices, and are divided once.
  chosen_E, probs_E = (
    jnp.where(real_T[:, None], x_TE, 0.0).sum(axis=0) for x_TE in (chosen_TE, probs_TE)
  )
  # Counts have no gradient; the balancing loss reaches the router through the probabilities.
  return Routing(jax.lax.stop_gradient(chosen_E), probs_E, real_T.sum())
