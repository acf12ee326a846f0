"""Attention by fast kernels, over sequences that are gathered out of the rows.

Kernels know causal attention, not the mask rule of `TokenBatch`. Within one sequence, a prompt with
one completion, the two are the same. So for attention alone, queries, keys and values are gathered
into one row per sequence, and the results are gathered back. A token of a shared prompt is part of
several sequences; its result comes from the first of them. Everything else runs on the rows.

Both ways, forward and backward, are gathers and never scatters: no two sequences write to one
place, so no addition depends on the order in which a device runs it.

Memory: a device stores T W (2 H + 2 J) Hd elements for each of its groups, one layer at a time, and
as many again in the backward pass. T W is at least the number of tokens with every prompt once per
completion, and more where sequences differ in length. For comparison, the float32 scores of one
block of the blocked attention are N L 128 H elements.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.attention import Keys, attend
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.head_shares import attend_by_heads
from dpo_jax.structs import Array, Device, TokenBatch, UserError

# These run on sequences. "blocked" is `attention.attend_blocks`, which supports every model and
# device, and "tiles" is `attention_tiled.attend_tiles`; both run on rows.
SEQUENCE_KERNELS = ("cudnn", "splash", "xla")
NAMES = ("auto", "blocked", "tiles", *SEQUENCE_KERNELS)
_DEFAULT_OF_PLATFORM = {"cpu": "tiles", "gpu": "cudnn", "tpu": "splash"}


# --- choice ---------------------------------------------------------------------------------------


def check(name: str) -> None:
  """Refuses a name that is not in `NAMES`."""
  if name not in NAMES:
    raise UserError(f"model.attention is {name!r}; known: {', '.join(NAMES)}")


def choose(
  name: str,
  config: ModelConfig,
  *,
  dtype: str,
  device: Device,
) -> tuple[str, str]:
  """Chooses the attention that a run uses.

  Args:
    name: the requested attention, in `NAMES`; "auto" requests the fastest one of the platform.
    config: the model.
    dtype: type of activations.
    device: one of the run's devices.

  Returns:
    A name in `NAMES` other than "auto", and the reason why it is not the requested one ("" if it
    is).
  """
  check(name)
  wanted = _DEFAULT_OF_PLATFORM.get(device.platform, "blocked") if name == "auto" else name
  reason = ""
  if wanted == "cudnn":
    reason = _unsupported_by_cudnn(config, dtype, device)
  if wanted == "splash" and device.platform != "tpu":
    reason = f"splash runs on TPUs, and this is {device.platform}"
  return ("blocked", reason) if reason else (wanted, "")


def _unsupported_by_cudnn(config: ModelConfig, dtype: str, device: Device) -> str:
  """Returns the reason why cuDNN's kernel does not run a model on a device, or ""."""
  # AMD's GPUs have names here ("gfx90a"), NVIDIA's have numbers ("9.0").
  found = str(getattr(device, "compute_capability", ""))
  if not re.fullmatch(r"\d+\.\d+", found):
    return f"cudnn runs on NVIDIA GPUs, and this is {device.platform}"
  capability = tuple(map(int, found.split(".")))
  if capability < (8, 0):
    return f"cudnn needs a GPU of compute capability 8.0 or above, and this has {found}"
  if config.attention_cap:
    return f"cudnn takes no cap on attention scores, and the model's is {config.attention_cap}"
  if dtype not in ("bfloat16", "float16"):
    return f"cudnn takes model.compute_dtype bfloat16, and it is {dtype}"
  most = 256 if capability >= (9, 0) else 128
  if config.head_width % 8 or config.head_width > most:
    return (
      f"cudnn takes heads of a multiple of 8 up to {most} here, and the model's have"
      f" {config.head_width}"
    )
  return ""


# --- rows to sequences and back -------------------------------------------------------------------


class SequenceIndex(NamedTuple):
  """The correspondence of tokens of rows and places of sequences, group by group.

  Attributes:
    token_GTw: for every place of the sequences, its token in the rows; Y, one past the last, for
      padding.
    place_GNlK: for every token of the rows, its places in the sequences; X = T * W for none.
    origin_GTw: like token_GTw, but Y where the result of the token is read from another sequence.
    length_GT: number of tokens of every sequence.
  """

  token_GTw: Array
  place_GNlK: Array
  origin_GTw: Array
  length_GT: Array


def index_sequences(batch: TokenBatch) -> SequenceIndex | None:
  """Returns the index of a batch that lists its sequences; None if it does not list them."""
  if batch.sequence_GTW is None or batch.place_NLK is None:
    return None
  groups, sequences, width = batch.sequence_GTW.shape
  place_GNlK = jnp.asarray(batch.place_NLK).reshape(groups, -1, batch.place_NLK.shape[-1])
  token_GTw = jnp.asarray(batch.sequence_GTW).reshape(groups, sequences * width)
  size = place_GNlK.shape[1]
  # A place is the origin of its token's result if it is the token's first place.
  first_GTw = _gather(place_GNlK[..., 0], token_GTw, fill=-1)
  origin_GTw = jnp.where(first_GTw == jnp.arange(sequences * width), token_GTw, size)
  length_GT = (batch.sequence_GTW < size).sum(axis=-1, dtype=jnp.int32)
  return SequenceIndex(token_GTw, place_GNlK, origin_GTw, length_GT)


def _gather(x_GNl: Array, at_GTw: Array, fill: float = 0) -> Array:
  """Returns x at some indices of every group, `fill` for indices past the end: [G, Tw, …]."""
  return jax.vmap(lambda x_Nl, at_X: x_Nl.at[at_X].get(mode="fill", fill_value=fill))(x_GNl, at_GTw)


# The gradient of a gather is a scatter, which adds in an order that a GPU does not fix. Here the
# way back is known, so the gradient is a gather, too.
@jax.custom_vjp
def gather_both_ways(x_GNlHHd: Array, source_GTw: Array, target_GNlK: Array) -> Array:
  """Gathers x at `source`, 0 for indices past its end: [G, Tw, H, Hd].

  Args:
    x_GNlHHd: the array to read.
    source_GTw: index in x of each result.
    target_GNlK: indices in the result of each element of x, past the end for none. The gradient of
      x is the sum of the result's gradients there.
  """
  del target_GNlK  # read in the backward pass only
  return _gather(x_GNlHHd, source_GTw)


def _gather_forward(x_GNlHHd: Array, source_GTw: Array, target_GNlK: Array) -> tuple[Array, Array]:
  return gather_both_ways(x_GNlHHd, source_GTw, target_GNlK), target_GNlK


def _gather_backward(target_GNlK: Array, slope_GTwHHd: Array) -> tuple[Array, None, None]:
  if target_GNlK.shape[-1] == 1:
    return _gather(slope_GTwHHd, target_GNlK[..., 0]), None, None

  def from_sequence(k: int) -> Array:
    return _gather(slope_GTwHHd, target_GNlK[..., k]).astype(jnp.float32)

  # One sequence after another: one gather of all would be K times as large. Sums are float32, since
  # a shared prompt adds up the gradients of all its completions.
  total = from_sequence(0)
  for k in range(1, target_GNlK.shape[-1]):
    total = total + from_sequence(k)
  return total.astype(slope_GTwHHd.dtype), None, None


gather_both_ways.defvjp(_gather_forward, _gather_backward)


# --- attention ------------------------------------------------------------------------------------


class KernelOptions(NamedTuple):
  """Options of a kernel, the same for all layers.

  Attributes:
    kernel: a name in `SEQUENCE_KERNELS`.
    window: number of positions that a token sees back, its own included; 0 for all.
    scale: factor of query times key; 0 means 1 / sqrt(Hd).
    interpret: whether splash runs in Pallas's interpreter, on a CPU.
    cap: c of c tanh(score / c); 0 for no cap. cuDNN takes none.
  """

  kernel: str
  window: int = 0
  scale: float = 0.0
  interpret: bool = False
  cap: float = 0.0


class WindowChoice(NamedTuple):
  """The window of a layer, where layers of one model have different windows.

  Attributes:
    sizes: the windows, as in `KernelOptions`.
    kind: index in `sizes` of this layer's window.
  """

  sizes: tuple[int, ...]
  kind: Array


def attend_sequences(
  q_NLHHd: Array,
  k_NLJHd: Array,
  v_NLJHd: Array,
  index: SequenceIndex,
  options: KernelOptions,
  windows: WindowChoice | None = None,
) -> Array:
  """Computes `attention.attend_blocks` with a kernel, up to rounding: [N, L, H, Hd], 0 in padding.

  Every device computes its own groups of rows, and its own heads where heads are divided.

  Args:
    q_NLHHd, k_NLJHd, v_NLJHd: queries, keys and values of the rows.
    index: from `index_sequences`.
    options: of the kernel.
    windows: the window, where it is not that of `options` because layers have several.
  """
  width = index.token_GTw.shape[1] // index.length_GT.shape[1]
  sizes = windows.sizes if windows else (options.window,)
  # A window as long as the longest sequence hides nothing. Where all are, there is one program.
  sizes = tuple(size if size < width else 0 for size in sizes)
  different = tuple(dict.fromkeys(sizes))
  programs = [
    functools.partial(_attend, options=options._replace(window=size)) for size in different
  ]
  number = None
  if windows and len(programs) > 1:
    number = jnp.array([different.index(size) for size in sizes], jnp.int32)[windows.kind]

  def attend(qkv: tuple[Array, Array, Array], index: SequenceIndex, number: Array | None) -> Array:
    # A kernel's window is part of its program, not an input of it. So each window has a program of
    # its own, and every layer of the scan runs one of them.
    if number is not None:
      return jax.lax.switch(number, programs, qkv, index)
    return programs[0](qkv, index)

  return attend_by_heads(attend, (q_NLHHd, k_NLJHd, v_NLJHd), index, number)


def _attend(
  qkv: tuple[Array, Array, Array], index: SequenceIndex, *, options: KernelOptions
) -> Array:
  """Computes the attention of the rows of one device."""
  groups, count = index.length_GT.shape
  first_GNlK = index.place_GNlK[..., :1]

  def to_sequences(x_NLHHd: Array, target_GNlK: Array) -> Array:
    x_GNlHHd = x_NLHHd.reshape(groups, -1, *x_NLHHd.shape[2:])
    x_GTwHHd = gather_both_ways(x_GNlHHd, index.token_GTw, target_GNlK)
    return x_GTwHHd.reshape(groups * count, -1, *x_NLHHd.shape[2:])

  q_NLHHd, k_NLJHd, v_NLJHd = qkv
  # The result of a prompt's token is read from its first sequence, so its queries in the others
  # have no gradient. Its keys and values have one in every sequence.
  q = to_sequences(q_NLHHd, first_GNlK)
  k, v = to_sequences(k_NLJHd, index.place_GNlK), to_sequences(v_NLJHd, index.place_GNlK)
  # An empty sequence gets one token, of zeros: kernels disagree about sequences without any.
  length_x = jnp.maximum(index.length_GT.reshape(-1), 1)
  out = _KERNELS[options.kernel](q, k, v, length_x, options)
  out_GTwHHd = out.reshape(groups, -1, *q_NLHHd.shape[2:]).astype(q_NLHHd.dtype)
  out_GNlHHd = gather_both_ways(out_GTwHHd, first_GNlK[..., 0], index.origin_GTw[..., None])
  return out_GNlHHd.reshape(q_NLHHd.shape)


# Each kernel: causal attention over sequences, (q_TWHHd, k_TWJHd, v_TWJHd, length_x, options) ->
# [T, W, H, Hd].


def _dot_product_attention(q, k, v, length_x, options: KernelOptions) -> Array:
  """Calls `jax.nn.dot_product_attention`, by cuDNN or by XLA (which forms W x W scores)."""
  if options.cap:
    return _capped(q, k, v, length_x, options)
  mask: dict[str, Any] = {"query_seq_lengths": length_x, "key_value_seq_lengths": length_x}
  if 0 < options.window < q.shape[1]:
    # Padding stands at the end, where causal attention of real tokens does not look, so lengths
    # only save work. They are left out with a window, since cuDNN is not known to support both.
    mask = {"local_window_size": (options.window - 1, 0)}
  kernel = cast(Literal["cudnn", "xla"], options.kernel)
  return jax.nn.dot_product_attention(
    q, k, v, scale=options.scale or None, is_causal=True, implementation=kernel, **mask
  )


def _capped(q, k, v, length_x, options: KernelOptions) -> Array:
  """Computes W x W scores with a cap, which `jax.nn.dot_product_attention` does not know."""
  at_W = jnp.arange(q.shape[1])
  back_WW = at_W[:, None] - at_W
  seen_WW = (back_WW >= 0) & (back_WW < (options.window or q.shape[1]))
  seen_XWW = seen_WW & (at_W < length_x[:, None, None])
  keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2))
  return attend(q, [(keys, seen_XWW)], scale=options.scale, cap=options.cap)


def _splash(q, k, v, length_x, options: KernelOptions) -> Array:
  """Calls JAX's kernel for TPUs, one sequence at a time; padding only sees padding."""
  # Imported here, because Pallas for TPUs takes time to load and few runs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  width, heads, head_width = q.shape[1:]
  mask: Any = splash.CausalMask((width, width))
  if 0 < options.window < width:
    mask = splash.LocalMask((width, width), (options.window - 1, 0), 0)
  # Blocks must divide the width, which is a multiple of 128 (see `packing`).
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  sizes: Any = {f"block_{name}": math.gcd(width, 512) for name in names}
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=options.cap or None,
    interpret=options.interpret,
  )
  # Splash takes no scale; queries are scaled in float32, so that they are rounded only once.
  scale = options.scale or 1 / np.sqrt(head_width)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  segment_XW = (jnp.arange(width) >= length_x[:, None]).astype(jnp.int32)
  # Splash wants heads before positions.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out = jax.vmap(attend)(q, k, v, splash.SegmentIds(segment_XW, segment_XW))
  return cast(Array, out).swapaxes(1, 2)  # a tuple only where residuals are requested


_KERNELS: dict[str, Callable[..., Array]] = {
  "cudnn": _dot_product_attention,
  "splash": _splash,
  "xla": _dot_product_attention,
}
