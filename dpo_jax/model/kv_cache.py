"""The key/value cache of generation, and the two ways to fill it: prefill and decode."""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.transformer import Decoder, Keys, Tokens
from dpo_jax.structs import Array, PyTree


class Cache(NamedTuple):
  """Keys and values of earlier tokens.

  Attributes:
    keys: k and v of all layers, [layers, N, J, L, Hd].
    tokens: the token of each column, [N, T]; its pair is 0, or -1 where the column is padding or
      not yet written.
    filled: number of columns written so far, the same in all rows.
  """

  keys: Keys
  tokens: Tokens
  filled: Array


def prefill(
  config: ModelConfig,
  params: PyTree,
  ids_NL: Array,
  lengths_N: Array,
  *,
  columns: int,
  dtype: str = "float32",
) -> tuple[Array, Cache]:
  """Runs the model on prompts, and makes a cache of their keys.

  Args:
    config: the model.
    params: its parameters.
    ids_NL: prompts, padded on the left.
    lengths_N: number of tokens of each prompt.
    columns: number of columns of the cache, at least L.
    dtype: type of activations and of the cache, as in `transformer.build`.

  Returns:
    hidden_ND of the last token of every prompt, and the cache.
  """
  # Prompts end in the last column, so that all rows go on in the same column of the cache.
  length = ids_NL.shape[1]
  # Padding has negative positions here; it becomes position 0 of pair -1, which nobody sees.
  position_NL = jnp.arange(length) - (length - lengths_N)[:, None]
  pair_NL = jnp.where(position_NL < 0, -1, 0)
  tokens = Tokens(jnp.maximum(position_NL, 0), pair_NL, jnp.zeros_like(pair_NL))
  decoder = Decoder(config, jnp.dtype(dtype), return_keys=True)
  hidden_NLD, keys = cast(tuple[Array, Keys], decoder.apply(params, ids_NL, tokens))

  cache = Cache(keys, Tokens(tokens.position_NL, pair_NL, tokens.branch_NL), jnp.asarray(length))
  return hidden_NLD[:, -1], widen(cache, columns)


def widen(cache: Cache, columns: int) -> Cache:
  """Returns a cache with the same contents and `columns` columns."""
  added = columns - cache.tokens.pair_NL.shape[1]
  keys = Keys(*(jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, added), (0, 0)]) for x in cache.keys))

  def pad(x_NT: Array, value: int) -> Array:
    return jnp.pad(x_NT, [(0, 0), (0, added)], constant_values=value)

  position_NT, pair_NT, branch_NT = cache.tokens
  # Pair -1 hides the columns that are not yet written.
  tokens = Tokens(pad(position_NT, 0), pad(pair_NT, -1), pad(branch_NT, 0))
  return Cache(keys, tokens, cache.filled)


def decode(
  config: ModelConfig,
  params: PyTree,
  cache: Cache,
  ids_N: Array,
  position_N: Array,
  *,
  dtype: str = "float32",
) -> tuple[Array, Cache]:
  """Runs the model on one more token per row.

  Args:
    config: the model.
    params: its parameters.
    cache: keys of all earlier tokens.
    ids_N: the new tokens.
    position_N: their positions.
    dtype: as in `prefill`.

  Returns:
    hidden_ND of the new tokens, and the cache with their keys.
  """
  decoder = Decoder(config, jnp.dtype(dtype), return_keys=True)
  position_N1 = position_N[:, None]
  # Pair 0 and branch 0, as in `prefill`: a prompt and what continues it are one causal sequence.
  tokens = Tokens(position_N1, jnp.zeros_like(position_N1), jnp.zeros_like(position_N1))
  out = decoder.apply(params, ids_N[:, None], tokens, cache.keys, cache.tokens)
  hidden_N1D, new = cast(tuple[Array, Keys], out)

  def write(old: Array, x: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, x, cache.filled, axis)

  # The layers only read the cache. It is written once, after all of them, so that the compiler can
  # update it in place in the loop around this function instead of copying it.
  keys = Keys(*(write(old, x, 3) for old, x in zip(cache.keys, new, strict=True)))
  known = Tokens(*(write(old, x, 1) for old, x in zip(cache.tokens, tokens, strict=True)))
  return hidden_N1D[:, 0], Cache(keys, known, cache.filled + 1)
