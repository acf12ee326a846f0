"""Attention by kernels that form no length x length array: rows are taken apart into texts for it.

All else runs on rows as they are. For attention alone queries, keys and values are gathered into a
row for every text, a prompt with one answer, where plain causal attention is the mask rule of
`TokenBatch`; what comes of it is gathered back, for the tokens of a prompt from their first text.
Both ways, and both ways backward, are gathers: no two texts ever write to one place.

A device holds T W (2 H + 2 J) K elements for each of its groups, one layer at a time, and as many
again backward; T W is at least the number of tokens with every prompt once for each of its answers,
and more where texts differ in length. The float32 scores of one block of the blocked attention are
N L 128 H.

Axes beyond the key in `structs`: `J` key/value heads, `X` and `Y` places of a group.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.distributed import sharding
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, TokenBatch, UserError

# "blocked" is `attention.attend_blocks`, which takes all there is, "tiles" is
# `attention_tiled.attend_tiles`; the others take texts.
TEXTS = ("cudnn", "splash", "xla")
NAMES = ("auto", "blocked", "tiles", *TEXTS)
_OF_PLATFORM = {"cpu": "tiles", "gpu": "cudnn", "tpu": "splash"}


# --- which of them --------------------------------------------------------------------------------


def check(name: str) -> None:
  """Refuses a name that is none of `NAMES`."""
  if name not in NAMES:
    raise UserError(f"model.attention is {name!r}; known: {', '.join(NAMES)}")


def choose(
  name: str,
  config: ModelConfig,
  *,
  dtype: str,
  device: jax.Device,
  sequence: int = 1,
  divided: bool = False,
) -> tuple[str, str]:
  """The attention that is taken, and why it is not the one that was asked for ("" if it is).

  Args:
    name: in `NAMES`; "auto" asks for the kernel of the platform.
    config: the model.
    dtype: of activations.
    device: one of those at work.
    sequence: devices among which the tokens of a row are divided.
    divided: whether one program is for several devices.
  """
  check(name)
  wanted = _OF_PLATFORM.get(device.platform, "blocked") if name == "auto" else name
  if wanted == "blocked":
    return wanted, ""
  if wanted == "tiles":
    why = "its loops are for one device, and parallel.mode=mesh divides a program among several"
    alone = not divided and sequence == 1
    return (wanted, "") if alone else ("blocked", "" if name == "auto" else why)
  why = _against(config, sequence)
  if not why and wanted == "cudnn":
    why = _against_cudnn(config, dtype, device)
  if not why and wanted == "splash" and device.platform != "tpu":
    why = f"splash runs on TPUs, and this is {device.platform}"
  return ("blocked", why) if why else (wanted, "")


def _against(config: ModelConfig, sequence: int) -> str:
  """What no kernel takes."""
  if config.attention_cap:
    return f"the model caps attention scores at {config.attention_cap}"
  if len(set(config.windows)) > 1:
    return "layers of the model see windows of different sizes"
  if sequence > 1:
    return f"tokens of a row are divided among parallel.sequence {sequence} devices"
  return ""


def _against_cudnn(config: ModelConfig, dtype: str, device: jax.Device) -> str:
  found = str(getattr(device, "compute_capability", ""))
  if not re.fullmatch(r"\d+\.\d+", found):
    return f"cudnn runs on NVIDIA GPUs, and this is {device.platform}"
  capability = tuple(map(int, found.split(".")))
  if capability < (8, 0):
    return f"cudnn needs a GPU of compute capability 8.0 or above, and this has {found}"
  if dtype not in ("bfloat16", "float16"):
    return f"cudnn takes model.compute_dtype bfloat16, and it is {dtype}"
  most = 256 if capability >= (9, 0) else 128
  if config.head_width % 8 or config.head_width > most:
    return (
      f"cudnn takes heads of a multiple of 8 up to {most} here, and the model's have"
      f" {config.head_width}"
    )
  return ""


# --- rows to texts and back -----------------------------------------------------------------------


class Texts(NamedTuple):
  """Where tokens stand in texts, and texts in rows, group by group.

  Attributes:
    token_GX: of every place of the texts, the token of the rows; one past the end for none.
    place_GYK: of every token of the rows, its places; T * W for none.
    origin_GX: as token_GX, but none where the token is read in another text.
    length_GT: tokens of every text.
  """

  token_GX: Array
  place_GYK: Array
  origin_GX: Array
  length_GT: Array


def texts_of(batch: TokenBatch) -> Texts | None:
  """Of a batch that lists its texts; None of one that does not."""
  if batch.sequence_GTW is None or batch.place_NLK is None:
    return None
  groups, texts, width = batch.sequence_GTW.shape
  place_GYK = jnp.asarray(batch.place_NLK).reshape(groups, -1, batch.place_NLK.shape[-1])
  token_GX = jnp.asarray(batch.sequence_GTW).reshape(groups, texts * width)
  size = place_GYK.shape[1]
  read_GX = _taken(place_GYK[..., 0], token_GX, fill=-1)
  origin_GX = jnp.where(read_GX == jnp.arange(texts * width), token_GX, size)
  length_GT = (batch.sequence_GTW < size).sum(axis=-1, dtype=jnp.int32)
  return Texts(token_GX, place_GYK, origin_GX, length_GT)


def _taken(x_GY: Array, at_GX: Array, fill: float = 0) -> Array:
  """What stands at some places of a group, `fill` past its end: [G, X, …]."""
  return jax.vmap(lambda x_Y, at_X: x_Y.at[at_X].get(mode="fill", fill_value=fill))(x_GY, at_GX)


@jax.custom_vjp
def moved(x_GYHK: Array, there_GX: Array, back_GYK: Array) -> Array:
  """x at the places `there`, 0 for places past its end: [G, X, H, K].

  Args:
    x_GYHK: what is moved.
    there_GX: where each result comes from.
    back_GYK: where each of x goes to, past the end for nowhere; its gradient is read there.
  """
  del back_GYK
  return _taken(x_GYHK, there_GX)


def _moved_forward(x_GYHK: Array, there_GX: Array, back_GYK: Array) -> tuple[Array, Array]:
  return moved(x_GYHK, there_GX, back_GYK), back_GYK


def _moved_backward(back_GYK: Array, slope_GXHK: Array) -> tuple[Array, None, None]:
  if back_GYK.shape[-1] == 1:
    return _taken(slope_GXHK, back_GYK[..., 0]), None, None
  # One after another, so that no array of all the texts of all tokens is made.
  wide = lambda k: _taken(slope_GXHK, back_GYK[..., k]).astype(jnp.float32)
  total = sum(map(wide, range(1, back_GYK.shape[-1])), start=wide(0))
  return total.astype(slope_GXHK.dtype), None, None


moved.defvjp(_moved_forward, _moved_backward)


# --- attention ------------------------------------------------------------------------------------


class Kind(NamedTuple):
  """What is the same for all layers.

  Attributes:
    kernel: "cudnn", "splash" or "xla".
    window: positions back that a token sees, itself included; 0 for all.
    scale: of query times key; 0 is 1 / sqrt(K).
    interpret: whether splash is run by the interpreter, on a CPU.
  """

  kernel: str
  window: int = 0
  scale: float = 0.0
  interpret: bool = False


def attend_texts(q_NLHK: Array, k_NLJK: Array, v_NLJK: Array, texts: Texts, kind: Kind) -> Array:
  """`attention.attend_blocks` by a kernel: the same but for rounding; 0 in padding: [N, L, H, K].

  Every device takes its own groups of rows, and its own heads where they are divided.
  """
  apart = sharding.for_own_rows(
    functools.partial(_attend, kind=kind), heads=math.gcd(q_NLHK.shape[2], k_NLJK.shape[2])
  )
  return apart((q_NLHK, k_NLJK, v_NLJK), texts)


def _attend(qkv: tuple[Array, Array, Array], texts: Texts, *, kind: Kind) -> Array:
  groups, count = texts.length_GT.shape
  first_GYK = texts.place_GYK[..., :1]

  def apart(x_NLHK: Array, back_GYK: Array) -> Array:
    x_GYHK = x_NLHK.reshape(groups, -1, *x_NLHK.shape[2:])
    x_GXHK = moved(x_GYHK, texts.token_GX, back_GYK)
    return x_GXHK.reshape(groups * count, -1, *x_NLHK.shape[2:])

  q_NLHK, k_NLJK, v_NLJK = qkv
  # A prompt's queries are read in its first text alone: those in others have no gradient.
  q = apart(q_NLHK, first_GYK)
  k, v = apart(k_NLJK, texts.place_GYK), apart(v_NLJK, texts.place_GYK)
  # A text of no token is given one, of zeros: kernels differ in what they make of none.
  length_X = jnp.maximum(texts.length_GT.reshape(-1), 1)
  out = _KERNELS[kind.kernel](q, k, v, length_X, kind)
  out_GXHK = out.reshape(groups, -1, *q_NLHK.shape[2:]).astype(q_NLHK.dtype)
  out_GYHK = moved(out_GXHK, first_GYK[..., 0], texts.origin_GX[..., None])
  return out_GYHK.reshape(q_NLHK.shape)


# Causal attention over texts: (q_XWHK, k_XWJK, v_XWJK, length_X, kind) -> [X, W, H, K].


def _library(q, k, v, length_X, kind: Kind) -> Array:
  """`jax.nn.dot_product_attention`, by cuDNN or (forming W x W scores) by XLA."""
  how: dict[str, Any] = {"query_seq_lengths": length_X, "key_value_seq_lengths": length_X}
  if 0 < kind.window < q.shape[1]:
    # Padding stands behind a text, where its tokens do not look: lengths only save work. With a
    # window they are left out, since cuDNN is not known to take both.
    how = {"local_window_size": (kind.window - 1, 0)}
  return jax.nn.dot_product_attention(
    q, k, v, scale=kind.scale or None, is_causal=True, implementation=kind.kernel, **how
  )


def _splash(q, k, v, length_X, kind: Kind) -> Array:
  """JAX's kernel for TPUs, a text at a time; padding only sees padding."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  width, heads, head_width = q.shape[1:]
  mask: Any = splash.CausalMask((width, width))
  if 0 < kind.window < width:
    mask = splash.LocalMask((width, width), (kind.window - 1, 0), 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  sizes: Any = {f"block_{name}": math.gcd(width, 512) for name in names}
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    interpret=kind.interpret,
  )
  scale = kind.scale or 1 / np.sqrt(head_width)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  of_X = (jnp.arange(width) >= length_X[:, None]).astype(jnp.int32)
  first = lambda x: x.swapaxes(1, 2)
  return first(jax.vmap(attend)(first(q), first(k), first(v), splash.SegmentIds(of_X, of_X)))


_KERNELS: dict[str, Callable[..., Array]] = {
  "cudnn": _library,
  "splash": _splash,
  "xla": _library,
}
