"""The parts of a decoder that have weights: linear maps with adapters, norms, tables."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.distributed.sharding import (
  by_rows,
  by_vocabulary,
  copy_over_fsdp,
  sequence_parts,
  vocabulary_parts,
)
from dpo_jax.structs import Array
from dpo_jax.utils.matmul import NAME, product


def hash_uint32(x: Array) -> Array:
  """Hashes uint32 to uint32, one to one: the finaliser of MurmurHash3 (Appleby 2011).

  JAX's own generator, threefry, takes twenty times as many operations, which would slow dropout.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def drop_by_code(x_NLD: Array, key: jax.Array, codes_NL: Array, rate: float) -> Array:
  """Drops inputs with probability `rate` and scales the others by 1 / (1 - rate): [N, L, D].

  Which inputs are dropped is a function of the key and of each token's code alone.
  """
  codes_NL = hash_uint32(codes_NL ^ jax.random.bits(key))
  # Multiples of an odd number are different for all inputs of a token.
  along_D = jnp.arange(x_NLD.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
  keep_NLD = hash_uint32(codes_NL[..., None] + along_D) >= jnp.uint32(int(rate * 2**32))
  return jnp.where(keep_NLD, x_NLD / (1 - rate), 0).astype(x_NLD.dtype)


class Linear(nn.Module):
  """A linear map, y = x @ kernel + bias with kernel [in, out], accumulated in float32.

  If the collection "lora" contains an adapter of this map, y = x @ kernel + drop(x) @ a @ b + bias
  with a [in, rank] and b [rank, out], which includes the scale (`lora.attach`). Hu et al. 2021,
  eq. 3.

  `kept` is the name by which rematerialization knows the output.
  """

  features: int
  bias: bool
  std: float
  dtype: Any
  param_dtype: Any
  dropout: float
  kept: str = NAME

  @nn.compact
  def __call__(self, x: Array, codes_NL: Array | None = None) -> Array:
    init = nn.initializers.normal(self.std)
    kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
    y = self.product(x, kernel)
    if self.has_variable("lora", "lora_a"):
      y = y + self.adapter(x, codes_NL)
    if self.bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    # The name stands after the cast, because remat keeps exactly the array that carries it:
    # before the cast that would be the float32 sum, twice the bytes of a bfloat16 activation.
    return by_rows(checkpoint_name(y.astype(self.dtype), self.kept))

  def product(self, x: Array, kernel: Array) -> Array:
    """Computes x @ kernel in float32."""
    shape = (*x.shape[:-1], kernel.shape[-1])
    # Rows are joined into one, because the gradient of a product with two leading axes is a third
    # slower on a CPU. Not where a mesh divides both axes: to join them, devices would have to send
    # activations.
    if sequence_parts(x.shape[-2]) == 1:
      x = x.reshape(-1, x.shape[-1])
    return product(x.astype(self.dtype), kernel).reshape(shape)

  def adapter(self, x: Array, codes_NL: Array | None) -> Array:
    """Computes drop(x) @ a @ b in float32; without codes nothing is dropped."""
    if codes_NL is not None:
      x = drop_by_code(x, self.make_rng("dropout"), codes_NL, self.dropout)
    for name in ("lora_a", "lora_b"):
      x = self.product(x, self.get_variable("lora", name))
    return x


class Norm(nn.Module):
  """Root-mean-square norm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016), in float32."""

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
    # The stored scale starts at 1 - offset, so that the effective one starts at 1.
    init = nn.initializers.constant(1.0 - self.offset)
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    y = y * (scale.astype(jnp.float32) + self.offset if self.offset else scale)
    if self.kind == "layer":
      y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    return y.astype(self.dtype)


class Table(nn.Module):
  """A table [V, D] of vectors that are looked up by id."""

  entries: int
  width: int
  std: float
  param_dtype: Any

  @nn.compact
  def __call__(self, ids_NL: Array) -> Array:
    init = nn.initializers.normal(self.std)
    table_VD = self.param("embedding", init, (self.entries, self.width), self.param_dtype)
    table_VD = by_vocabulary(table_VD)
    shared = vocabulary_parts(self.entries, ["fsdp"]) > 1
    # Devices that have parts of the vocabulary look up the ids of all of them. Otherwise the
    # compiler would gather the table, and add its gradient up whole on every device.
    ids_NL = copy_over_fsdp(ids_NL) if shared else ids_NL
    # mode="fill" returns NaN for ids outside the table, which shows in any loss. Indexing would
    # clip the ids, in silence.
    out_NLD = jnp.take(table_VD, ids_NL, axis=0, mode="fill")
    return by_rows(copy_over_fsdp(out_NLD) if shared else out_NLD)
