"""The decoder of all families: a scanned Flax Linen transformer over the rows of a `TokenBatch`.

Families differ by `ModelConfig` alone. Parameters of layers are stacked on axis 0, and `nn.scan`
runs the layers, so that compile time does not grow with depth. Settings that differ between layers
are arrays over layers, scanned together with the parameters.
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
from dpo_jax.model.layers import Linear, Norm, Table, hash_uint32
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

# Rematerialization: which arrays of a layer the forward pass keeps for the backward pass, which
# computes the others again. "none" keeps everything; "dots" the outputs of linear maps and of fused
# attention (scores are computed again); "narrow" those of them that are no wider than the model;
# "full" only the layer's input.
_keep_names = jax.checkpoint_policies.save_only_these_names
_KEEP_NARROW = jax.checkpoint_policies.save_from_both_policies(
  _keep_names(matmul.NAME, attention_tiled.REMAT_NAME, attention_kernels.REMAT_NAME),
  # Of a kernel that gives its results no names.
  attention_kernels.is_kept,
)
REMAT = {
  "none": None,
  # Names are those of results inside functions with a gradient of their own, which the policy for
  # plain products does not see.
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_from_both_policies(
      jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _keep_names(matmul.WIDE_NAME)
    ),
    _KEEP_NARROW,
  ),
  "narrow": _KEEP_NARROW,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerData(NamedTuple):
  """Settings that differ between the layers of one model; None if all layers share one.

  Attributes:
    window: number of positions that a layer sees back, its own included.
    table: index of its rotary table.
    kind: index of its window in `window_sizes`.
  """

  window: Array | None
  table: Array | None
  kind: Array | None


def window_sizes(config: ModelConfig) -> tuple[int, ...]:
  """Returns the different windows of a model's layers; 0 for all positions."""
  return tuple(dict.fromkeys(config.windows)) or (0,)


def layer_data(config: ModelConfig) -> LayerData:
  """Returns the settings of all layers, stacked on axis 0."""
  window = table = kind = None
  if any(config.windows):
    # A scan runs one program for all layers, so a layer without a window gets one that is longer
    # than any sequence.
    window = jnp.array([w or 2**30 for w in config.windows], jnp.int32)
  if len(sizes := window_sizes(config)) > 1:
    kind = jnp.array([sizes.index(size) for size in config.windows], jnp.int32)
  if len(names := rotary_names(config)) > 1:
    table = jnp.array([names.index(name) for name in config.rotary_layers], jnp.int32)
  return LayerData(window, table, kind)


def token_codes(key: jax.Array, batch: TokenBatch) -> Array:
  """Computes a random uint32 per token from its row of the data, branch and position: [N, L].

  Nothing else enters, so dropout drops the same inputs in every layout, with any number of
  micro-batches and on any number of devices.
  """
  row_NL = jnp.take_along_axis(batch.row_NS, batch.slot_NL, axis=1)
  code_NL = jax.random.bits(key)
  # Hashing between the additions keeps (row 1, branch 2) apart from (row 2, branch 1).
  for place_NL in (row_NL, batch.branch_NL, batch.position_NL):
    code_NL = hash_uint32(code_NL + jnp.asarray(place_NL, jnp.uint32))
  return code_NL


def norm(c: ModelConfig, name: str, dtype: Any, param_dtype: Any) -> Norm:
  """Makes a norm of the model's kind."""
  return Norm(c.norm, c.norm_eps, c.norm_offset, dtype, param_dtype, name=name)


class Block(nn.Module):
  """One layer: attention and feed-forward part, each added to the residual stream."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any
  return_keys: bool
  dropout: float
  attention: str

  def linear(
    self, name: str, features: int, bias: bool, *, residual: bool = False, wide: bool = False
  ) -> Linear:
    """Makes a linear map; `residual` if its output is added to the residual stream.

    `wide` if its output is wider than the model.
    """
    # 2 * layers maps write to the residual stream. Scaled by 1 / sqrt of that number, their sum
    # starts with the standard deviation of one of them (Radford et al. 2019, section 2.3).
    std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1.0)
    kept = matmul.WIDE_NAME if wide else matmul.NAME
    own = (features, bias, std, self.dtype, self.param_dtype, self.dropout, kept)
    return Linear(*own, name=name)

  def norm(self, name: str, x: Array, enabled: bool = True) -> Array:
    """Normalises x, or returns it unchanged where the model has no such norm."""
    return norm(self.config, name, self.dtype, self.param_dtype)(x) if enabled else x

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
    """Computes the layer.

    Args:
      x_NLD: the residual stream before the layer.
      past: this layer's keys of earlier columns; None if the rows are complete.
      layer: this layer's own settings.
      tokens, past_tokens: tokens in the columns of `x_NLD` and of `past`.
      table: cosine and sine, from `rotary_table`.
      codes_NL: from `token_codes`, for dropout in adapters; None for no dropout.
      plan: precomputed indices for attention by kernels or by tiles; None for blocks.

    Returns:
      The residual stream after the layer, and the layer's new keys if `return_keys`, else None.
    """
    c = self.config
    if layer.table is not None:
      table = jax.tree.map(lambda x: x[layer.table], table)

    y = self.norm("attention_norm", x_NLD, c.pre_norms)
    q, k, v = self.heads(y, table, codes_NL)
    # Heads first, the order of the cache: see `attention.Keys`.
    keys = Keys(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    options = {"scale": c.attention_scale, "cap": c.attention_cap}
    if past is not None:
      assert past_tokens is not None
      # Old and new keys stay two arrays: joining them would copy the cache in every layer.
      cached = (past, visible(tokens, past_tokens, layer.window))
      y = attend(q, [cached, (keys, visible(tokens, tokens, layer.window))], **options)
    elif isinstance(plan, attention_tiled.TilePlan):
      y = attention_tiled.attend_tiles(
        q, keys, tokens, plan, layer.window, attention_tiled.ScoreOptions(**options)
      )
    elif isinstance(plan, attention_kernels.SequenceIndex):
      kernel = attention_kernels.KernelOptions(
        self.attention, window_sizes(c)[0], c.attention_scale, cap=c.attention_cap
      )
      windows = None
      if layer.kind is not None:
        windows = attention_kernels.WindowChoice(window_sizes(c), layer.kind)
      y = attention_kernels.attend_sequences(q, k, v, plan, kernel, windows)
    else:
      y = attend_blocks(q, keys, tokens, layer.window, **options)
    y = y.reshape(*y.shape[:2], c.heads * c.head_width)
    y = self.linear("out", c.width, c.out_bias, residual=True)(y, codes_NL)
    x_NLD = x_NLD + self.norm("attention_post_norm", y, c.post_norms)

    y = self.norm("mlp_norm", x_NLD, c.pre_norms)
    y = self.mixture(y, tokens.pair_NL) if c.experts else self.mlp(y, codes_NL)
    x_NLD = x_NLD + self.norm("mlp_post_norm", y, c.post_norms)
    return x_NLD, keys if self.return_keys else None

  def heads(self, y_NLD: Array, table: Any, codes_NL: Array | None) -> tuple[Array, Array, Array]:
    """Computes queries, keys and values, each [N, L, H or J, Hd]; the first two are rotated."""
    c = self.config

    def project(name: str, heads: int) -> Array:
      x = self.linear(name, heads * c.head_width, c.qkv_bias)(y_NLD, codes_NL)
      # Values enter no score, so they are neither normalised nor rotated.
      scored = name != "value"
      # "all" normalises before the heads are split, "head" after.
      x = self.norm(f"{name}_norm", x, scored and c.qk_norm == "all")
      x = by_heads(x.reshape(*x.shape[:2], heads, c.head_width))
      x = self.norm(f"{name}_norm", x, scored and c.qk_norm == "head")
      return rotate(x, table) if scored else x

    return project("query", c.heads), project("key", c.kv_heads), project("value", c.kv_heads)

  def mlp(self, y_NLD: Array, codes_NL: Array | None) -> Array:
    """Computes the feed-forward part."""
    c = self.config
    act = ACTIVATIONS[c.activation]
    up = self.linear("up", c.mlp_width, c.mlp_bias, wide=True)(y_NLD, codes_NL)
    if c.gated:
      y = act(self.linear("gate", c.mlp_width, c.mlp_bias, wide=True)(y_NLD, codes_NL)) * up
    else:
      y = act(up)
    return self.linear("down", c.width, c.mlp_bias, residual=True)(y, codes_NL)

  def mixture(self, y_NLD: Array, pair_NL: Array) -> Array:
    """Computes the feed-forward part of a mixture of experts."""
    act = ACTIVATIONS[self.config.activation]
    experts = Mixture(self.config, act, self.dtype, self.param_dtype, name="experts")
    return experts(y_NLD, pair_NL >= 0)


class Decoder(nn.Module):
  """The transformer without its unembedding.

  It maps ids to hidden states after the final norm, and to the keys of every layer if
  `return_keys`. Arguments are those of `Block`.
  """

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

    def table(entries: int, name: str) -> Table:
      return Table(entries, c.width, c.init_std, self.param_dtype, name=name)

    x_NLD = table(c.vocab, "embed")(ids_NL).astype(self.dtype)
    x_NLD = x_NLD * jnp.asarray(c.embed_scale, self.dtype) if c.embed_scale != 1 else x_NLD
    if c.positions == "learned":
      x_NLD = x_NLD + table(c.max_positions, "positions")(tokens.position_NL)
    if not c.tied:
      # The head runs elsewhere, only where a token is scored. This call makes its parameter.
      table(c.vocab, "head")(jnp.zeros((1, 1), jnp.int32))

    block = Block
    if self.remat != "none":
      # In a scan the compiler cannot merge the second computation with the first: no barriers.
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
    scanned = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0, "intermediates": 0},
      split_rngs={"params": True, "dropout": True},
      # Flax's type leaves out the tuple that its documentation describes.
      in_axes=(0, 0, *[nn.broadcast] * 5),  # pyright: ignore[reportArgumentType]
      length=c.layers,
    )
    # The first two arguments (`past`, `layer`) are scanned over layers; the other five are shared.
    own = (self.dtype, self.param_dtype, self.return_keys, self.dropout, self.attention)
    layers = scanned(c, *own, name="layers")
    rotary = rotary_table(c, tokens.position_NL)
    # A scan's carry has one type throughout, and a float32 table of positions has widened it.
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
  """Builds a model: pure functions of its parameters.

  Args:
    config: the model's configuration.
    dtype: type of activations and of the inputs of products; norms, softmax and sums stay float32.
    remat: which arrays are kept for the backward pass, a name in `REMAT`.
    dropout: probability that an adapter's input is dropped, in calls of `hidden` with a key.
    attention: a result of `attention_kernels.choose`. Batches that list no sequences use "blocked"
      instead of a kernel.

  Raises:
    UserError: an unknown `remat`.
  """
  if remat not in REMAT:
    raise UserError(f"remat {remat!r} is not known; known are {', '.join(REMAT)}")
  decoder = Decoder(config, jnp.dtype(dtype), remat=remat, dropout=dropout, attention=attention)

  def apply(params: PyTree, batch: TokenBatch, key: jax.Array | None, **options: Any) -> Any:
    tokens = Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)
    # Once per batch, outside the scan: all layers share the plan.
    if attention == "tiles":
      options["plan"] = attention_tiled.plan_tiles(tokens)
    elif attention != "blocked":
      options["plan"] = attention_kernels.index_sequences(batch)
    if key is None or not dropout:
      return decoder.apply(params, batch.ids_NL, tokens, **options)
    # One key for what tokens have in common, one that Flax splits by layer and by map.
    codes_key, masks_key = jax.random.split(key)
    options |= {"codes_NL": token_codes(codes_key, batch), "rngs": {"dropout": masks_key}}
    return decoder.apply(params, batch.ids_NL, tokens, **options)

  def hidden(params: PyTree, batch: TokenBatch, key: jax.Array | None = None) -> Array:
    return apply(params, batch, key)[0]

  def routed(
    params: PyTree, batch: TokenBatch, key: jax.Array | None = None
  ) -> tuple[Array, Routing]:
    (hidden_NLD, _), variables = apply(params, batch, key, mutable=["intermediates"])
    # `sow` collects a tuple with one entry per call; the scan stacks entries over layers.
    (by_layer,) = variables["intermediates"]["layers"]["experts"]["routing"]
    return hidden_NLD, jax.tree.map(lambda x: x.sum(axis=0), by_layer)

  return Model(
    hidden=hidden,
    head=functools.partial(head, config),
    vocab=config.vocab,
    routed=routed if config.experts else None,
  )


def head(config: ModelConfig, params: PyTree) -> Head:
  """Returns the unembedding, which is the embedding table if the two are tied."""
  kernel_VD = params["params"]["embed" if config.tied else "head"]["embedding"]
  # A view of the parameters: a tied table gets gradients from both of its uses.
  return Head(kernel_VD=kernel_VD, soft_cap=config.logit_cap or None)


def init_params(config: ModelConfig, seed: int, *, dtype: str = "float32") -> PyTree:
  """Computes initial parameters, {"params": {...}} in `dtype`: a pure function of its arguments."""
  return _init(config, jax.random.key(seed), dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(config: ModelConfig, key: jax.Array, dtype: str) -> PyTree:
  return Decoder(config, param_dtype=jnp.dtype(dtype)).init(key, *example_inputs())


def param_shapes(config: ModelConfig) -> PyTree:
  """Returns the tree of `init_params` as `jax.ShapeDtypeStruct`s; nothing is allocated."""
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), *example_inputs())


def example_inputs() -> tuple[Array, Tokens]:
  """Returns the smallest inputs of a decoder, enough to initialise its parameters."""
  zeros = jnp.zeros((1, 1), jnp.int32)
  return zeros, Tokens(zeros, zeros, zeros)
