"""Rotary position embeddings: frequencies, tables of cosines and sines, and the rotation itself.

Su et al. 2021, "RoFormer".
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.config import ROTARY, ModelConfig, RopeScaling
from dpo_jax.structs import Array


def rotary_names(config: ModelConfig) -> tuple[str, ...]:
  """Returns the names of the tables that some layer uses, in the order of `ROTARY`."""
  return tuple(name for name in ROTARY if name in (config.rotary_layers or ("main",)))


def rotary_frequencies(config: ModelConfig, name: str = "main") -> np.ndarray:
  """Computes the angle per position, in radians, of each pair of dimensions: [Hd / 2], float64.

  Su et al. 2021, eq. 15. The scaling "llama3" is that of the Llama 3.1 release, "yarn" that of Peng
  et al. 2023.

  Args:
    config: the model.
    name: a table in `ROTARY`; the angles of "none" are zero.
  """
  rotated = config.rotary_width or config.head_width
  if name == "none":
    return np.zeros(rotated // 2)
  base = config.rope_theta if name == "main" else config.local_theta
  inverse = base ** -(np.arange(0, rotated, 2) / rotated)
  scaling = config.rope_scaling
  # Windowed layers look back less far than the model was trained on, so "local" is not scaled.
  if scaling is None or name == "local":
    return inverse
  if scaling.kind == "linear":
    return inverse / scaling.factor
  # Both other kinds keep fast frequencies, which distinguish near positions, and divide slow ones,
  # which would reach angles that training never saw. `keep` is 1 for the former, 0 for the latter.
  if scaling.kind == "llama3":
    turns = scaling.original_positions * inverse / (2 * np.pi)
    keep = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
  else:
    keep = 1 - _yarn_ramp(scaling, rotated, base)
  keep = np.clip(keep, 0, 1)
  return inverse * (keep + (1 - keep) / scaling.factor)


def _yarn_ramp(scaling: RopeScaling, rotated: int, base: float) -> np.ndarray:
  """Computes the ramp of "yarn", not yet clipped: [Hd / 2].

  It is 0 at the dimension that makes high_factor turns over the original positions, and 1 at the
  dimension that makes low_factor turns.
  """

  def dimension(turns: float) -> float:
    """Returns the (fractional) dimension that makes so many turns: `rotary_frequencies` solved."""
    positions_per_radian = scaling.original_positions / (turns * 2 * math.pi)
    return rotated * math.log(positions_per_radian) / (2 * math.log(base))

  # Frequencies fall with the dimension, so many turns stand for a low dimension.
  low, high = dimension(scaling.high_factor), dimension(scaling.low_factor)
  if scaling.whole:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotated - 1)
  # Ends that coincide would divide by zero; transformers uses this width, too.
  return (np.arange(rotated // 2) - low) / (high - low or 0.001)


def _magnitude(config: ModelConfig, name: str) -> float:
  """Returns the factor of cosine and sine: 1 except for "yarn"."""
  scaling = config.rope_scaling
  if name != "main" or scaling is None or scaling.kind != "yarn":
    return 1.0
  return scaling.magnitude or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def rotary_table(config: ModelConfig, position_NL: Array) -> tuple[Array, Array] | None:
  """Computes cosine and sine of every position's angles, once for all layers: [N, L, 1, Hd / 2].

  Both are float32. Where layers differ, a leading axis lists the tables of `rotary_names`. None if
  the model learns its positions.
  """
  if config.positions != "rotary":
    return None

  def one_table(name: str) -> tuple[Array, Array]:
    frequencies = jnp.asarray(rotary_frequencies(config, name), jnp.float32)
    # float32 whatever the activations: in bfloat16, positions above 256 are rounded together.
    angle = position_NL[:, :, None, None].astype(jnp.float32) * frequencies
    magnitude = _magnitude(config, name)
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude

  tables = [one_table(name) for name in rotary_names(config)]
  return tables[0] if len(tables) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *tables)


def rotate(x_NLHHd: Array, table: tuple[Array, Array] | None) -> Array:
  """Rotates (x_i, x_{i + R/2}) of the first R dimensions of each head by the position's angle.

  Pairs are half a head apart, as in the weights on the Hugging Face hub, not neighbors as in the
  paper. Returns x unchanged if there is no table.
  """
  if table is None:
    return x_NLHHd
  cos, sin = table
  half = cos.shape[-1]
  # The dimensions after the first R carry no position and stay as they are.
  a, b, rest = jnp.split(x_NLHHd.astype(jnp.float32), (half, 2 * half), axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(
    x_NLHHd.dtype
  )
