"""The one decoder: a scanned Flax Linen transformer over the rows of a `TokenBatch`.

Families differ by `ModelConfig` alone. Layers are stacked on axis 0 of their parameters and run
by `nn.scan`, so that compile time does not grow with depth. Attention follows the mask rule of
`TokenBatch`, in blocks of queries: a key never comes later in its row, so a block needs only the
keys up to its own end, and no length x length array is kept for the backward pass.

Axes beyond the key in `structs`: `J` key/value heads, `Q` queries and `C` keys of one block of
attention.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, Head, Model, PyTree, TokenBatch, UserError

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}

# What the backward pass keeps of a layer: "none" everything, "dots" the outputs of linear maps
# (attention scores are formed again), "full" only the layer's input.
REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}

QUERY_BLOCK = 128


class Tokens(NamedTuple):
  """The part of a `TokenBatch` that decides who sees whom."""

  position_NL: Array
  pair_NL: Array
  branch_NL: Array

  def columns(self, start: int, stop: int) -> Tokens:
    return Tokens(*(x_NL[:, start:stop] for x_NL in self))


def visible(query: Tokens, key: Tokens) -> Array:
  """Who sees whom: same pair, key not later, key in the prompt or in my branch: [N, Q, C]."""
  q = [x_NL[:, :, None] for x_NL in query]
  k = [x_NL[:, None, :] for x_NL in key]
  (position_q, pair_q, branch_q), (position_k, pair_k, branch_k) = q, k
  return (
    (pair_q == pair_k) & (position_q >= position_k) & ((branch_k == 0) | (branch_k == branch_q))
  )


class Keys(NamedTuple):
  """Keys and values of C columns, heads first: products over a cache are four times quicker so."""

  k_NJCK: Array
  v_NJCK: Array


def attend(q_NQHK: Array, parts: list[tuple[Keys, Array]]) -> Array:
  """Softmax attention of grouped queries, scores and sums in float32: [N, Q, H, K].

  Args:
    q_NQHK: queries.
    parts: keys, each with its visible_NQC; the softmax runs over all of them together.
  """
  N, Q, H, K = q_NQHK.shape
  J = parts[0][0].k_NJCK.shape[1]
  # Heads first and the division last: plain batched products, the quickest form on CPU.
  q_NJxK = q_NQHK.reshape(N, Q, J, H // J, K).transpose(0, 2, 3, 1, 4).reshape(N, J, -1, K)

  def scores(keys: Keys, visible_NQC: Array) -> Array:
    s = jnp.einsum("njxk,njck->njxc", q_NJxK, keys.k_NJCK, preferred_element_type=jnp.float32)
    s = s.reshape(N, J, H // J, Q, -1) * (1.0 / math.sqrt(K))
    return jnp.where(visible_NQC[:, None, None], s, -1e30)

  def mix(weights_NJGQC: Array, keys: Keys) -> Array:
    weights = weights_NJGQC.astype(keys.v_NJCK.dtype).reshape(N, J, H // J * Q, -1)
    return jnp.einsum("njxc,njck->njxk", weights, keys.v_NJCK, preferred_element_type=jnp.float32)

  scored = [scores(*part) for part in parts]
  top = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scored])
  weights = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scored]
  total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
  out = sum(mix(w, keys) for w, (keys, _) in zip(weights, parts, strict=True))
  out = (out.reshape(N, J, H // J, Q, K) / total).astype(q_NQHK.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(N, Q, H, K)


def attend_blocks(q_NLHK: Array, keys: Keys, tokens: Tokens) -> Array:
  """`attend` over whole rows, a block of queries at a time, scores never kept: [N, L, H, K]."""
  length = q_NLHK.shape[1]

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(q_NQHK, keys, query, key):
    return attend(q_NQHK, [(keys, visible(query, key))])

  out = []
  for start in range(0, length, QUERY_BLOCK):
    stop = min(start + QUERY_BLOCK, length)
    earlier = Keys(*(x_NJLK[:, :, :stop] for x_NJLK in keys))
    query, key = tokens.columns(start, stop), tokens.columns(0, stop)
    out.append(block(q_NLHK[:, start:stop], earlier, query, key))
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position turns each half of a head's dimensions: [K / 2], float64.

  Su et al. 2021, eq. 15; the "llama3" stretch is that of the Llama 3.1 release.
  """
  inverse = config.rope_theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
  scaling = config.rope_scaling
  if scaling is None:
    return inverse
  if scaling.kind == "linear":
    return inverse / scaling.factor
  turns = scaling.original_positions * inverse / (2 * np.pi)
  keep = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
  keep = np.clip(keep, 0, 1)
  return inverse * (keep + (1 - keep) / scaling.factor)


def rotary_table(config: ModelConfig, position_NL: Array) -> tuple[Array, Array] | None:
  """Cosine and sine of every position's angles, float32, once for all layers: [N, L, 1, K / 2]."""
  if config.positions != "rotary":
    return None
  frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
  angle = position_NL[:, :, None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_NLHK: Array, table: tuple[Array, Array] | None) -> Array:
  """Turns (x_i, x_{i + K/2}) by the position's angle; unchanged where positions are learned."""
  if table is None:
    return x_NLHK
  cos, sin = table
  a, b = jnp.split(x_NLHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_NLHK.dtype)


class Linear(nn.Module):
  """y = x @ kernel + bias, accumulated in float32; kernel [in, out]."""

  features: int
  bias: bool
  std: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = nn.initializers.normal(self.std)
    kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
    # One row of tokens: the gradient of a product over [N, L] axes is a third slower on CPU.
    y = jnp.dot(
      x.astype(self.dtype).reshape(-1, x.shape[-1]),
      kernel.astype(self.dtype),
      preferred_element_type=jnp.float32,
    ).reshape(*x.shape[:-1], self.features)
    if self.bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    return y.astype(self.dtype)


class Norm(nn.Module):
  """Root-mean-square or layer normalisation, in float32."""

  kind: str
  eps: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    if self.kind == "layer":
      y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    if self.kind == "layer":
      y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    return y.astype(self.dtype)


class Block(nn.Module):
  """Attention and feed-forward, each normalised before and added after."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any
  return_keys: bool

  def linear(self, name: str, features: int, bias: bool, *, residual: bool = False) -> Linear:
    # 2 * layers maps write to the residual stream; scaled so, their sum starts with the std of one.
    std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1.0)
    return Linear(features, bias, std, self.dtype, self.param_dtype, name=name)

  def norm(self, name: str) -> Norm:
    config = self.config
    return Norm(config.norm, config.norm_eps, self.dtype, self.param_dtype, name=name)

  @nn.compact
  def __call__(
    self, x_NLD: Array, past: Keys | None, tokens: Tokens, past_tokens: Tokens | None, table: Any
  ) -> tuple[Array, Keys | None]:
    """The residual stream after this layer and, if asked for, the keys it made.

    Args:
      x_NLD: the residual stream before.
      past: this layer's keys of earlier columns, None if the rows are whole.
      tokens, past_tokens: who the columns of `x_NLD` and of `past` are.
      table: of `rotary_table`.
    """
    c = self.config
    split = lambda y, heads: y.reshape(*y.shape[:2], heads, c.head_width)

    y = self.norm("attention_norm")(x_NLD)
    q = split(self.linear("query", c.heads * c.head_width, c.qkv_bias)(y), c.heads)
    k = split(self.linear("key", c.kv_heads * c.head_width, c.qkv_bias)(y), c.kv_heads)
    v = split(self.linear("value", c.kv_heads * c.head_width, c.qkv_bias)(y), c.kv_heads)
    q, k = rotate(q, table), rotate(k, table)
    keys = Keys(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    if past is None:
      y = attend_blocks(q, keys, tokens)
    else:
      y = attend(q, [(past, visible(tokens, past_tokens)), (keys, visible(tokens, tokens))])
    y = y.reshape(*y.shape[:2], c.heads * c.head_width)
    x_NLD = x_NLD + self.linear("out", c.width, c.out_bias, residual=True)(y)

    y = self.norm("mlp_norm")(x_NLD)
    act = ACTIVATIONS[c.activation]
    up = self.linear("up", c.mlp_width, c.mlp_bias)(y)
    y = act(self.linear("gate", c.mlp_width, c.mlp_bias)(y)) * up if c.gated else act(up)
    x_NLD = x_NLD + self.linear("down", c.width, c.mlp_bias, residual=True)(y)
    return x_NLD, keys if self.return_keys else None


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
    return jnp.take(table_VD, ids_NL, axis=0, mode="fill")


class Decoder(nn.Module):
  """Ids to hidden states after the final norm, and the keys of every layer if asked for."""

  config: ModelConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = "none"
  return_keys: bool = False

  @nn.compact
  def __call__(
    self,
    ids_NL: Array,
    tokens: Tokens,
    past: Keys | None = None,
    past_tokens: Tokens | None = None,
  ) -> tuple[Array, Keys | None]:
    c = self.config
    table = lambda entries, name: Table(entries, c.width, c.init_std, self.param_dtype, name=name)
    x_NLD = table(c.vocab, "embed")(ids_NL)
    if c.positions == "learned":
      x_NLD = x_NLD + table(c.max_positions, "positions")(tokens.position_NL)
    if not c.tied:
      table(c.vocab, "head")(jnp.zeros((1, 1), jnp.int32))  # makes the parameter; `head` reads it

    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
    layers = nn.scan(
      block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.layers,
    )(c, self.dtype, self.param_dtype, self.return_keys, name="layers")
    rotary = rotary_table(c, tokens.position_NL)
    x_NLD, keys = layers(x_NLD.astype(self.dtype), past, tokens, past_tokens, rotary)
    norm = Norm(c.norm, c.norm_eps, self.dtype, self.param_dtype, name="final_norm")
    return norm(x_NLD), keys


def build(config: ModelConfig, *, dtype: str = "float32", remat: str = "dots") -> Model:
  """The model as pure functions of its parameters.

  Args:
    config: what to build.
    dtype: of activations and of the inputs of products; norms, softmax and sums stay float32.
    remat: what the backward pass keeps, a name in `REMAT`.
  """
  if remat not in REMAT:
    raise UserError(f"remat {remat!r} is not known; known are {', '.join(REMAT)}")
  decoder = Decoder(config, jnp.dtype(dtype), remat=remat)

  def hidden(params: PyTree, batch: TokenBatch) -> Array:
    tokens = Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)
    return decoder.apply(params, batch.ids_NL, tokens)[0]

  return Model(hidden=hidden, head=functools.partial(head, config), vocab=config.vocab)


def head(config: ModelConfig, params: PyTree) -> Head:
  """The unembedding: the embedding table itself where they are tied."""
  return Head(kernel_VD=params["params"]["embed" if config.tied else "head"]["embedding"])


def init_params(config: ModelConfig, seed: int, *, dtype: str = "float32") -> PyTree:
  """Initial parameters, a pure function of (config, seed): {"params": {...}} of `dtype` arrays."""
  return _init(config, jax.random.key(seed), dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(config: ModelConfig, key: jax.Array, dtype: str) -> PyTree:
  return Decoder(config, param_dtype=jnp.dtype(dtype)).init(key, *_example())


def param_shapes(config: ModelConfig) -> PyTree:
  """The tree of `init_params` as `jax.ShapeDtypeStruct`s; nothing is allocated."""
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), *_example())


def _example() -> tuple[Array, Tokens]:
  zeros = jnp.zeros((1, 1), jnp.int32)
  return zeros, Tokens(zeros, zeros, zeros)
