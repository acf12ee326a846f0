"""The parts of a decoder that have weights: linear maps, norms, tables."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.distributed.sharding import by_rows, by_vocabulary, sequence_parts
from dpo_jax.structs import Array
from dpo_jax.utils.matmul import NAME, product


def scramble(x: Array) -> Array:
  """uint32 to uint32, one to one and without pattern: MurmurHash3's finaliser. Appleby 2011.

  Random bits by threefry take twenty times the operations, a cost that dropout would feel.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def drop_by_code(x_NLD: Array, key: jax.Array, codes_NL: Array, rate: float) -> Array:
  """Zero with probability `rate`, else x / (1 - rate): a function of key and the token's code."""
  codes_NL = scramble(codes_NL ^ jax.random.bits(key))
  # Multiples of an odd number: different for all inputs of a token.
  along_D = jnp.arange(x_NLD.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
  keep_NLD = scramble(codes_NL[..., None] + along_D) >= jnp.uint32(int(rate * 2**32))
  return jnp.where(keep_NLD, x_NLD / (1 - rate), 0).astype(x_NLD.dtype)


class Linear(nn.Module):
  """y = x @ kernel + bias, accumulated in float32; kernel [in, out].

  Where the collection "lora" holds an adapter of this map, y = x @ kernel + drop(x) @ a @ b + bias,
  a [in, rank], b [rank, out] with its scale in it (`lora.attach`). Hu et al. 2021, eq. 3.
  """

  features: int
  bias: bool
  std: float
  dtype: Any
  param_dtype: Any
  dropout: float

  @nn.compact
  def __call__(self, x: Array, codes_NL: Array | None = None) -> Array:
    init = nn.initializers.normal(self.std)
    kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
    y = self.product(x, kernel)
    if self.has_variable("lora", "lora_a"):
      y = y + self.adapter(x, codes_NL)
    if self.bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    # The name stands after the cast, because remat "dots" keeps exactly the array that carries it:
    # before the cast that would be the float32 sum, twice the bytes of a bfloat16 activation.
    return by_rows(checkpoint_name(y.astype(self.dtype), NAME))

  def product(self, x: Array, kernel: Array) -> Array:
    """x @ kernel, float32."""
    shape = (*x.shape[:-1], kernel.shape[-1])
    # One row of tokens: the gradient of a product over [N, L] axes is a third slower on CPU. Two
    # axes that are both divided cannot be joined without sending one of them.
    if sequence_parts(x.shape[-2]) == 1:
      x = x.reshape(-1, x.shape[-1])
    return product(x.astype(self.dtype), kernel).reshape(shape)

  def adapter(self, x: Array, codes_NL: Array | None) -> Array:
    """drop(x) @ a @ b, float32; nothing is dropped without codes."""
    if codes_NL is not None:
      x = drop_by_code(x, self.make_rng("dropout"), codes_NL, self.dropout)
    for name in ("lora_a", "lora_b"):
      x = self.product(x, self.get_variable("lora", name))
    return x


class Norm(nn.Module):
  """Root-mean-square or layer normalisation, in float32."""

  kind: str
  eps: float
  offset: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    if self.kind == "layer":
      y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    init = nn.initializers.constant(1.0 - self.offset)
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    y = y * (scale.astype(jnp.float32) + self.offset if self.offset else scale)
    if self.kind == "layer":
      y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    return y.astype(self.dtype)


class Table(nn.Module):
  """A table of vectors looked up by id: [V, D]."""

  entries: int
  width: int
  std: float
  param_dtype: Any

  @nn.compact
  def __call__(self, ids_NL: Array) -> Array:
    init = nn.initializers.normal(self.std)
    table_VD = self.param("embedding", init, (self.entries, self.width), self.param_dtype)
    # Ids outside the table give NaN, which no loss survives in silence.
    table_VD = by_vocabulary(table_VD)
    return by_rows(jnp.take(table_VD, ids_NL, axis=0, mode="fill"))
