"""A token at a time: what the decoder remembers of a text, and the two ways to add to it.

Axes beyond the key in `structs`: `J` key/value heads, `T` columns of the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.model.config import ModelConfig
from dpo_jax.model.transformer import Decoder, Keys, Tokens
from dpo_jax.structs import Array, PyTree


class Cache(NamedTuple):
  """What generation remembers: the keys of every layer, and who the T columns are.

  Attributes:
    keys: k and v, [layers, N, J, T, K].
    tokens: of every column, [N, T]; pair 0, or -1 where the column is padding or not yet written.
    filled: columns written so far, the same in all rows.
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
  """Reads prompts, each at the right end of its row.

  Args:
    ids_NL: prompts, padding on the left.
    lengths_N: tokens of each prompt.
    columns: length of the cache to make, at least L.
    dtype: as in `build`; also that of the cache.

  Returns:
    hidden_ND of the last token of every prompt, and the cache.
  """
  length = ids_NL.shape[1]
  position_NL = jnp.arange(length) - (length - lengths_N)[:, None]
  pair_NL = jnp.where(position_NL < 0, -1, 0)
  tokens = Tokens(jnp.maximum(position_NL, 0), pair_NL, jnp.zeros_like(pair_NL))
  decoder = Decoder(config, jnp.dtype(dtype), return_keys=True)
  hidden_NLD, keys = decoder.apply(params, ids_NL, tokens)

  cache = Cache(keys, Tokens(tokens.position_NL, pair_NL, tokens.branch_NL), jnp.asarray(length))
  return hidden_NLD[:, -1], widen(cache, columns)


def widen(cache: Cache, columns: int) -> Cache:
  """The same cache with room for so many columns."""
  room = columns - cache.tokens.pair_NL.shape[1]
  more = lambda x, value: jnp.pad(x, [(0, 0), (0, room)], constant_values=value)
  keys = Keys(*(jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, room), (0, 0)]) for x in cache.keys))
  position, pair, branch = cache.tokens
  return Cache(keys, Tokens(more(position, 0), more(pair, -1), more(branch, 0)), cache.filled)


def decode(
  config: ModelConfig,
  params: PyTree,
  cache: Cache,
  ids_N: Array,
  position_N: Array,
  *,
  dtype: str = "float32",
) -> tuple[Array, Cache]:
  """Reads one more token in every row: hidden_ND and the cache with it.

  The layers only read the cache; what they add is written once, after all of them, so the loop
  around this updates the cache in place.
  """
  decoder = Decoder(config, jnp.dtype(dtype), return_keys=True)
  position_N1 = position_N[:, None]
  tokens = Tokens(position_N1, jnp.zeros_like(position_N1), jnp.zeros_like(position_N1))
  hidden_N1D, new = decoder.apply(params, ids_N[:, None], tokens, cache.keys, cache.tokens)
  put = lambda old, x, axis: jax.lax.dynamic_update_slice_in_dim(old, x, cache.filled, axis)
  keys = Keys(*(put(old, x, 3) for old, x in zip(cache.keys, new, strict=True)))
  held = Tokens(*(put(old, x, 1) for old, x in zip(cache.tokens, tokens, strict=True)))
  return hidden_N1D[:, 0], Cache(keys, held, cache.filled + 1)
