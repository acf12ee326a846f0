"""A mixture of experts: a router sends every token through a few of many feed-forward parts.

No token is dropped and none waits: assignments are sorted by expert and multiplied in runs, so the
work is that of the chosen experts alone.

Axes beyond the key in `structs`: `E` experts, `T` tokens, `F` hidden size of an expert.
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
  """Weights of maps [..., in, out], without a bias."""

  shape: tuple[int, ...]
  std: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self) -> Array:
    init = nn.initializers.normal(self.std)
    return self.param("kernel", init, self.shape, self.param_dtype).astype(self.dtype)


class Mixture(nn.Module):
  """y = Σ_e w_e expert_e(x) over the chosen experts, w the router's softmax. Shazeer et al. 2017.

  Leaves a `Routing` among the intermediates, for whoever balances the load.
  """

  config: ModelConfig
  act: Callable[[Array], Array]
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x_NLD: Array, real_NL: Array) -> Array:
    """The experts' answer to every token: [N, L, D].

    Args:
      x_NLD: what the router and the experts read.
      real_NL: which tokens are not padding; the others are left out of the `Routing`.
    """
    c, settings = self.config, self.config.experts
    x_TD = x_NLD.reshape(-1, c.width).astype(self.dtype)
    kernel = lambda name, *shape: Kernel(
      shape, c.init_std, self.dtype, self.param_dtype, name=name
    )()
    router_DE = kernel("router", c.width, settings.count)
    gate_EDF = kernel("gate", settings.count, c.width, c.mlp_width)
    up_EDF = kernel("up", settings.count, c.width, c.mlp_width)
    down_EFD = kernel("down", settings.count, c.mlp_width, c.width)

    probs_TE = jax.nn.softmax(jnp.dot(x_TD, router_DE, preferred_element_type=jnp.float32))
    weight_TK, expert_TK = jax.lax.top_k(probs_TE, settings.chosen)
    if settings.rescaled:
      weight_TK = weight_TK / weight_TK.sum(axis=-1, keepdims=True)
    self.sow("intermediates", "routing", routing(probs_TE, expert_TK, real_NL.reshape(-1)))

    order_R = jnp.argsort(expert_TK.reshape(-1))
    sizes_E = jnp.bincount(expert_TK.reshape(-1), length=settings.count).astype(jnp.int32)
    each = lambda x_RD, kernel: jax.lax.ragged_dot(
      x_RD, kernel, sizes_E, preferred_element_type=jnp.float32
    ).astype(self.dtype)
    x_RD = x_TD[order_R // settings.chosen]
    y_RD = each(self.act(each(x_RD, gate_EDF)) * each(x_RD, up_EDF), down_EFD)
    y_TKD = y_RD[jnp.argsort(order_R)].reshape(*expert_TK.shape, c.width)
    y_TD = jnp.einsum("tkd,tk->td", y_TKD, weight_TK, preferred_element_type=jnp.float32)
    return y_TD.reshape(x_NLD.shape).astype(self.dtype)


def routing(probs_TE: Array, expert_TK: Array, real_T: Array) -> Routing:
  """The sums of one layer."""
  count = probs_TE.shape[-1]
  chosen_TE = jax.nn.one_hot(expert_TK, count).sum(axis=1)
  keep = lambda x_TE: jnp.where(real_T[:, None], x_TE, 0.0).sum(axis=0)
  return Routing(jax.lax.stop_gradient(keep(chosen_TE)), keep(probs_TE), real_T.sum())
