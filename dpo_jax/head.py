"""The head (the unembedding) at scored tokens: logits, and log-probs one chunk of tokens at a time.

`target_logps` has a gradient of its own. With x the hidden state of a token, W the unembedding and
π its softmax, the gradient of log π(y) with respect to the logits is the *slope* s = onehot(y) - π.
Each token's slope is multiplied by one number c, the gradient of the loss with respect to the
token's log-prob, so that both products of the backward pass read the slopes as they are:

  dx = c (s W)        dW = Σ_tokens s (c x)ᵀ

Slopes are stored for the backward pass in the type of the hidden states, or computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, Head
from dpo_jax.utils import matmul


def logits(hidden_xD: Array, head: Head) -> Array:
  """Computes the logits of every vocabulary entry, in float32 or wider: [..., V]."""
  product_xV = matmul.product_of_rows(jnp.asarray(hidden_xD), jnp.asarray(head.kernel_VD))
  return _capped(_biased(product_xV, head), head)


def logits_of_groups(hidden_GmD: Array, head: Head) -> Array:
  """Computes `logits`, with one kernel for all groups or a kernel [V, D] per group."""
  if head.kernel_VD.ndim == 2:
    return logits(hidden_GmD, head)

  def logits_of_group(x_mD: Array, kernel_VD: Array) -> Array:
    return logits(x_mD, head._replace(kernel_VD=kernel_VD))

  return jax.vmap(logits_of_group)(hidden_GmD, head.kernel_VD)


def _biased(product_xV: Array, head: Head) -> Array:
  """Adds the head's bias."""
  return product_xV if head.bias_V is None else product_xV + head.bias_V.astype(product_xV.dtype)


def _capped(logits_xV: Array, head: Head) -> Array:
  """Caps logits softly, c tanh(z / c)."""
  cap = head.soft_cap
  return logits_xV if cap is None else cap * jnp.tanh(logits_xV / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def target_logps(
  kept: bool,
  place: Callable[..., Array],
  hidden_cGmD: Array,
  head: Head,
  target_cGm: Array,
  count: Array | int,
) -> Array:
  """Computes the log-prob of every target token, one chunk at a time: [c, G, m], in nats.

  It has a gradient rule of its own also because jax cannot differentiate a loop whose number of
  iterations is an array.

  Args:
    kept: whether the backward pass uses stored slopes.
    place: constrains on which devices the tokens of a chunk are, [G, m, D], or, with logits=True,
      its logits or slopes, [G, m, V]; it returns them.
    hidden_cGmD: input of the head, in chunks.
    head: the unembedding; its kernel is [V, D], or [G, V, D] with a copy per group.
    target_cGm: target tokens.
    count: number of chunks to run; the log-probs of later chunks are 0.
  """
  # False: where no gradient is computed, no slopes are stored.
  return _forward(False, place, hidden_cGmD, head, target_cGm, count)[0]


def _narrow(head: Head, hidden_cGmD: Array) -> Head:
  """Returns the head with its kernel in the type of the hidden states."""
  # Cast before the loop, not in it: the compilers of GPUs cast the whole table in every chunk.
  return head._replace(kernel_VD=head.kernel_VD.astype(hidden_cGmD.dtype))


def _slopes(logits_GmV: Array, norm_Gm: Array, target_Gm: Array, head: Head) -> Array:
  """Computes d log π(target) / d (product with the kernel): [G, m, V], float32 or wider."""
  is_target_GmV = target_Gm[..., None] == jnp.arange(logits_GmV.shape[-1])
  slope_GmV = is_target_GmV - jnp.exp(logits_GmV - norm_Gm[..., None])
  # d/dz c tanh(z / c) = 1 - (capped / c)².
  cap = head.soft_cap
  return slope_GmV if cap is None else slope_GmV * (1 - jnp.square(logits_GmV / cap))


def _forward(kept, place, hidden_cGmD, head, target_cGm, count):
  """Returns the log-probs, and what the backward pass needs: the inputs, norms and slopes."""
  narrow = _narrow(head, hidden_cGmD)

  def chunk_step(i, carry):
    logits_GmV = place(logits_of_groups(place(hidden_cGmD[i]), narrow), logits=True)
    norm_Gm = jax.nn.logsumexp(logits_GmV, axis=-1)
    picked_Gm = jnp.take_along_axis(logits_GmV, target_cGm[i][..., None], axis=-1)[..., 0]
    slope_GmV = None
    if kept:
      slope_GmV = _slopes(logits_GmV, norm_Gm, target_cGm[i], head).astype(hidden_cGmD.dtype)
    new_values = picked_Gm - norm_Gm, norm_Gm, slope_GmV
    return jax.tree.map(lambda all_c, new: all_c.at[i].set(new), carry, new_values)

  # The log-sum-exps are stored in any case: they take 1/V of the memory of the logits.
  zeros = jnp.zeros(target_cGm.shape, jnp.promote_types(hidden_cGmD.dtype, jnp.float32))
  vocab = head.kernel_VD.shape[-2]
  slope_cGmV = jnp.zeros((*zeros.shape, vocab), hidden_cGmD.dtype) if kept else None
  logps_cGm, *saved = jax.lax.fori_loop(0, count, chunk_step, (zeros, zeros, slope_cGmV))
  return logps_cGm, (hidden_cGmD, head, target_cGm, count, *saved)


def _backward(kept, place, saved, cotangent_cGm):
  """Returns the gradients of hidden states and head, one chunk at a time."""
  hidden_cGmD, head, target_cGm, count, norm_cGm, slope_cGmV = saved
  narrow, dtype = _narrow(head, hidden_cGmD), hidden_cGmD.dtype
  each = "g" if head.kernel_VD.ndim == 3 else ""

  def chunk_step(i, carry):
    hidden_grad_cGmD, kernel_grad, bias_grad_V = carry
    hidden_GmD = place(hidden_cGmD[i])
    if kept:
      slope_GmV = slope_cGmV[i]
    else:
      logits_GmV = logits_of_groups(hidden_GmD, narrow)
      slope_GmV = _slopes(logits_GmV, norm_cGm[i], target_cGm[i], head).astype(dtype)
    slope_GmV = place(slope_GmV, logits=True)
    slope_of_loss_Gm1 = place(cotangent_cGm[i][..., None])
    hidden_grad_GmD = matmul.contract(f"gmv,{each}vd->gmd", slope_GmV, narrow.kernel_VD)
    hidden_grad_GmD = place((slope_of_loss_Gm1 * hidden_grad_GmD).astype(dtype))
    scaled_GmD = (slope_of_loss_Gm1 * hidden_GmD).astype(dtype)
    # Sums over chunks are float32, also for a kernel that is stored in bfloat16.
    kernel_grad += matmul.contract(f"gmv,gmd->{each}vd", slope_GmV, scaled_GmD)
    if bias_grad_V is not None:
      bias_grad_V += matmul.contract("gmv,gm->v", slope_GmV, slope_of_loss_Gm1[..., 0])
    return hidden_grad_cGmD.at[i].set(hidden_grad_GmD), kernel_grad, bias_grad_V

  wide = jnp.promote_types(dtype, jnp.float32)
  bias_V = None if head.bias_V is None else jnp.zeros(head.bias_V.shape, wide)
  zeros = jnp.zeros_like(hidden_cGmD), jnp.zeros(head.kernel_VD.shape, wide), bias_V
  hidden_grad_cGmD, kernel_grad, bias_grad_V = jax.lax.fori_loop(0, count, chunk_step, zeros)
  # Not None where the head has a cap, which is a constant: a gradient has its input's structure.
  cap_grad: Any = None if head.soft_cap is None else jnp.zeros_like(head.soft_cap)
  head_grad = Head(
    kernel_VD=kernel_grad.astype(head.kernel_VD.dtype),
    bias_V=None if head.bias_V is None else bias_grad_V.astype(head.bias_V.dtype),
    soft_cap=cap_grad,
  )
  # None: targets and count are integers and have no gradient.
  return hidden_grad_cGmD, head_grad, None, None


target_logps.defvjp(_forward, _backward)
