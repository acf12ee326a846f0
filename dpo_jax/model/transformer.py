"""The one decoder: a scanned Flax Linen transformer over the rows of a `TokenBatch`.

Families differ by `ModelConfig` alone. Layers are stacked on axis 0 of their parameters and run
by `nn.scan`, so that compile time does not grow with depth; what differs between them is scanned
beside them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.distributed.sharding import by_heads
from dpo_jax.model import attention_kernels, attention_tiled
from dpo_jax.model.attention import Keys, Tokens, attend, attend_blocks, visible
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.layers import Linear, Norm, Table, scramble
from dpo_jax.model.moe import Mixture
from dpo_jax.model.rope import rotary_names, rotary_table, rotate
from dpo_jax.structs import Array, Head, Model, PyTree, Routing, TokenBatch, UserError
from dpo_jax.utils import matmul

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}

# What the backward pass keeps of a layer: "none" everything, "dots" the outputs of linear maps
# (and attention scores are formed again), "full" only the layer's input.
REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(matmul.NAME, attention_tiled.REMAT_NAME),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerData(NamedTuple):
  """What differs between the layers of one model; None where nothing does.

  Attributes:
    window: positions back that a layer sees, itself included.
    table: which of the rotary tables it turns by.
  """

  window: Array | None
  table: Array | None


def layer_data(config: ModelConfig) -> LayerData:
  """Of every layer, on axis 0."""
  window = table = None
  if any(config.windows):
    # A layer that sees all has a window no text reaches.
    window = jnp.array([w or 2**30 for w in config.windows], jnp.int32)
  if len(names := rotary_names(config)) > 1:
    table = jnp.array([names.index(name) for name in config.rotary_layers], jnp.int32)
  return LayerData(window, table)


def token_codes(key: jax.Array, batch: TokenBatch) -> Array:
  """A random uint32 for every token, by its data row, branch and position alone: [N, L].

  So neither layout, micro-batches nor devices change what dropout drops.
  """
  row_NL = jnp.take_along_axis(batch.row_NS, batch.slot_NL, axis=1)
  code_NL = jax.random.bits(key)
  for place_NL in (row_NL, batch.branch_NL, batch.position_NL):
    code_NL = scramble(code_NL + jnp.asarray(place_NL, jnp.uint32))
  return code_NL


def norm(c: ModelConfig, name: str, dtype: Any, param_dtype: Any) -> Norm:
  """The norm of this model."""
  return Norm(c.norm, c.norm_eps, c.norm_offset, dtype, param_dtype, name=name)


class Block(nn.Module):
  """Attention and feed-forward part, each added to the residual stream."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any
  return_keys: bool
  dropout: float
  attention: str

  def linear(self, name: str, features: int, bias: bool, *, residual: bool = False) -> Linear:
    # 2 * layers maps write to the residual stream; scaled so, their sum starts with the std of one.
    std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1.0)
    return Linear(features, bias, std, self.dtype, self.param_dtype, self.dropout, name=name)

  def norm(self, name: str, x: Array, wanted: bool = True) -> Array:
    return norm(self.config, name, self.dtype, self.param_dtype)(x) if wanted else x

  @nn.compact
  def __call__(
    self,
    x_NLD: Array,
    past: Keys | None,
    layer: LayerData,
    tokens: Tokens,
    past_tokens: Tokens | None,
    table: Any,
    codes_NL: Array | None,
    plan: attention_kernels.SequenceIndex | attention_tiled.TilePlan | None,
  ) -> tuple[Array, Keys | None]:
    """The residual stream after this layer and, if asked for, the keys it made.

    Args:
      x_NLD: the residual stream before.
      past: this layer's keys of earlier columns, None if the rows are whole.
      layer: what is this layer's own.
      tokens, past_tokens: who the columns of `x_NLD` and of `past` are.
      table: of `rotary_table`.
      codes_NL: of `token_codes`, for dropout in adapters; None for none.
      plan: of the rows, as their attention takes it; None for blocks.
    """
    c = self.config
    if layer.table is not None:
      table = jax.tree.map(lambda x: x[layer.table], table)

    y = self.norm("attention_norm", x_NLD, c.pre_norms)
    q, k, v = self.heads(y, table, codes_NL)
    keys = Keys(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    shape = {"scale": c.attention_scale, "cap": c.attention_cap}
    if past is not None:
      parts = [(past, past_tokens), (keys, tokens)]
      y = attend(q, [(held, visible(tokens, who, layer.window)) for held, who in parts], **shape)
    elif isinstance(plan, attention_tiled.TilePlan):
      y = attention_tiled.attend_tiles(
        q, keys, tokens, plan, layer.window, attention_tiled.ScoreOptions(**shape)
      )
    elif isinstance(plan, attention_kernels.SequenceIndex):
      window = max(c.windows, default=0)  # that of all layers: see `attention_kernels.choose`
      y = attention_kernels.attend_sequences(
        q, k, v, plan, attention_kernels.KernelOptions(self.attention, window, c.attention_scale)
      )
    else:
      y = attend_blocks(q, keys, tokens, layer.window, **shape)
    y = y.reshape(*y.shape[:2], c.heads * c.head_width)
    y = self.linear("out", c.width, c.out_bias, residual=True)(y, codes_NL)
    x_NLD = x_NLD + self.norm("attention_post_norm", y, c.post_norms)

    y = self.norm("mlp_norm", x_NLD, c.pre_norms)
    y = self.mixture(y, tokens.pair_NL) if c.experts else self.mlp(y, codes_NL)
    x_NLD = x_NLD + self.norm("mlp_post_norm", y, c.post_norms)
    return x_NLD, keys if self.return_keys else None

  def heads(self, y_NLD: Array, table: Any, codes_NL: Array | None) -> tuple[Array, Array, Array]:
    """Queries, keys and values, normalised and turned: [N, L, H or J, K]."""
    c = self.config

    def one(name: str, heads: int, *, placed: bool = True) -> Array:
      x = self.linear(name, heads * c.head_width, c.qkv_bias)(y_NLD, codes_NL)
      x = self.norm(f"{name}_norm", x, placed and c.qk_norm == "all")
      x = by_heads(x.reshape(*x.shape[:2], heads, c.head_width))
      x = self.norm(f"{name}_norm", x, placed and c.qk_norm == "head")
      return rotate(x, table) if placed else x

    return one("query", c.heads), one("key", c.kv_heads), one("value", c.kv_heads, placed=False)

  def mlp(self, y_NLD: Array, codes_NL: Array | None) -> Array:
    c = self.config
    act = ACTIVATIONS[c.activation]
    up = self.linear("up", c.mlp_width, c.mlp_bias)(y_NLD, codes_NL)
    gate = lambda: self.linear("gate", c.mlp_width, c.mlp_bias)(y_NLD, codes_NL)
    y = act(gate()) * up if c.gated else act(up)
    return self.linear("down", c.width, c.mlp_bias, residual=True)(y, codes_NL)

  def mixture(self, y_NLD: Array, pair_NL: Array) -> Array:
    act = ACTIVATIONS[self.config.activation]
    part = Mixture(self.config, act, self.dtype, self.param_dtype, name="experts")
    return part(y_NLD, pair_NL >= 0)


class Decoder(nn.Module):
  """Ids to hidden states after the final norm, and the keys of every layer if asked for."""

  config: ModelConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = "none"
  return_keys: bool = False
  dropout: float = 0.0
  attention: str = "blocked"

  @nn.compact
  def __call__(
    self,
    ids_NL: Array,
    tokens: Tokens,
    past: Keys | None = None,
    past_tokens: Tokens | None = None,
    codes_NL: Array | None = None,
    plan: attention_kernels.SequenceIndex | attention_tiled.TilePlan | None = None,
  ) -> tuple[Array, Keys | None]:
    c = self.config
    table = lambda entries, name: Table(entries, c.width, c.init_std, self.param_dtype, name=name)
    x_NLD = table(c.vocab, "embed")(ids_NL).astype(self.dtype)
    x_NLD = x_NLD * jnp.asarray(c.embed_scale, self.dtype) if c.embed_scale != 1 else x_NLD
    if c.positions == "learned":
      x_NLD = x_NLD + table(c.max_positions, "positions")(tokens.position_NL)
    if not c.tied:
      table(c.vocab, "head")(jnp.zeros((1, 1), jnp.int32))  # makes the parameter; `head` reads it

    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
    scanned = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0, "intermediates": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, 0, *[nn.broadcast] * 5),
      length=c.layers,
    )
    own = (self.dtype, self.param_dtype, self.return_keys, self.dropout, self.attention)
    layers = scanned(c, *own, name="layers")
    rotary = rotary_table(c, tokens.position_NL)
    x_NLD = x_NLD.astype(self.dtype)
    shared = (tokens, past_tokens, rotary, codes_NL, plan)
    x_NLD, keys = layers(x_NLD, past, layer_data(c), *shared)
    return norm(c, "final_norm", self.dtype, self.param_dtype)(x_NLD), keys


def build(
  config: ModelConfig,
  *,
  dtype: str = "float32",
  remat: str = "dots",
  dropout: float = 0.0,
  attention: str = "blocked",
) -> Model:
  """The model as pure functions of its parameters.

  Args:
    config: what to build.
    dtype: of activations and of the inputs of products; norms, softmax and sums stay float32.
    remat: what the backward pass keeps, a name in `REMAT`.
    dropout: probability that an adapter does not see an input, where `hidden` is given a key.
    attention: as `attention_kernels.choose` has it; batches that list no texts are taken by
      "blocked".
  """
  if remat not in REMAT:
    raise UserError(f"remat {remat!r} is not known; known are {', '.join(REMAT)}")
  decoder = Decoder(config, jnp.dtype(dtype), remat=remat, dropout=dropout, attention=attention)

  def run(params: PyTree, batch: TokenBatch, key: jax.Array | None, **how: Any) -> Any:
    tokens = Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)
    if attention == "tiles":
      how["plan"] = attention_tiled.plan_tiles(tokens)
    elif attention != "blocked":
      how["plan"] = attention_kernels.index_sequences(batch)
    if key is None or not dropout:
      return decoder.apply(params, batch.ids_NL, tokens, **how)
    codes_key, masks_key = jax.random.split(key)
    how |= {"codes_NL": token_codes(codes_key, batch), "rngs": {"dropout": masks_key}}
    return decoder.apply(params, batch.ids_NL, tokens, **how)

  def hidden(params: PyTree, batch: TokenBatch, key: jax.Array | None = None) -> Array:
    return run(params, batch, key)[0]

  def routed(
    params: PyTree, batch: TokenBatch, key: jax.Array | None = None
  ) -> tuple[Array, Routing]:
    (hidden_NLD, _), left = run(params, batch, key, mutable=["intermediates"])
    (by_layer,) = left["intermediates"]["layers"]["experts"]["routing"]
    return hidden_NLD, jax.tree.map(lambda x: x.sum(axis=0), by_layer)

  return Model(
    hidden=hidden,
    head=functools.partial(head, config),
    vocab=config.vocab,
    routed=routed if config.experts else None,
  )


def head(config: ModelConfig, params: PyTree) -> Head:
  """The unembedding: the embedding table itself where they are tied."""
  kernel_VD = params["params"]["embed" if config.tied else "head"]["embedding"]
  return Head(kernel_VD=kernel_VD, soft_cap=config.logit_cap or None)


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
