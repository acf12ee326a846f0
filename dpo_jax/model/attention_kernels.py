"""Attention by fast kernels, over sequences that are gathered out of the rows.

Kernels know causal attention, not the mask rule of `TokenBatch`. Within one sequence, a prompt with
one completion, the two are the same. So for attention alone, queries, keys and values are gathered
into lines of sequences, one after the other, and the results are gathered back. A token of a shared
prompt is part of several sequences; its result comes from the first of them. Everything else runs
on the rows.

Both ways, forward and backward, are gathers and never scatters: no two sequences write to one
place, so no addition depends on the order in which a device runs it.

Memory: a device stores T W (2 H + 2 J) Hd elements for each of its groups, one layer at a time, and
as many again in the backward pass. T W is at least the number of tokens with every prompt once per
completion. It is little more where sequences share lines, and T times the longest sequence where
each has a line of its own (cuDNN before Hopper, or with a window). For comparison, the float32
scores of one block of the blocked attention are N L 128 H elements.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

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
# Name of the results of splash that remat may keep: the output and its log-sum-exps.
REMAT_NAME = "attention_kernel"
_NO_LIMIT = 2**30  # more sequences than a line can have
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
  capability = _capability(device)
  if capability == (0,):
    return f"cudnn runs on NVIDIA GPUs, and this is {device.platform}"
  if capability < (8, 0):
    found = ".".join(map(str, capability))
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


def sequences_per_line(name: str, config: ModelConfig, device: Device) -> int:
  """Returns how many sequences may share a line of a kernel; 0 for attention that reads rows."""
  if name not in SEQUENCE_KERNELS:
    return 0
  return _NO_LIMIT if name != "cudnn" or _supports_ragged(config, device) else 1


def _supports_ragged(config: ModelConfig, device: Device) -> bool:
  """Returns whether cuDNN takes lines of several sequences."""
  # JAX refuses them before Hopper, and with a window they are not known to be supported.
  if _capability(device) < (9, 0) or any(config.windows):
    return False
  try:
    attend, _ = _ragged_attention()
  except (ImportError, AttributeError):  # the function is not a public one
    return False
  # JAX 0.10 gives keys the offsets of queries, whose heads may be more.
  counted = jax.__version_info__ >= (0, 11, 2) or config.heads == config.kv_heads
  return counted and {"q_offsets", "kv_offsets"} <= set(inspect.signature(attend).parameters)


def _capability(device: Device) -> tuple[int, ...]:
  """Returns the compute capability of an NVIDIA GPU, (0,) of other devices."""
  # AMD's GPUs have names here ("gfx90a"), NVIDIA's have numbers ("9.0").
  found = str(getattr(device, "compute_capability", ""))
  return tuple(map(int, found.split("."))) if re.fullmatch(r"\d+\.\d+", found) else (0,)


def is_kept(primitive: Any, *inputs: Any, **params: Any) -> bool:
  """Checkpoint policy: keeps the results of cuDNN's forward kernel where sequences share lines.

  JAX gives them no name. If it renames the kernel, they are computed again, as by other policies.
  """
  del params
  # Lengths have two axes where lines have several sequences, and nothing else has. In lines of one
  # sequence the results are mostly padding: for Llama 3.2 1B and 8 pairs of UltraFeedback's lengths
  # they take 2.0 GiB, and 0.6 GiB where sequences share lines.
  shared = any(getattr(x, "ndim", 0) == 2 for x in inputs)
  return shared and primitive.name.startswith("dot_product_attention_fwd")


# --- rows to lines and back -----------------------------------------------------------------------


class SequenceIndex(NamedTuple):
  """The correspondence of tokens of rows and places of lines, group by group.

  Attributes:
    token_GTw: for every place of the lines, its token in the rows; Y, one past the last, for
      padding.
    place_GNlK: for every token of the rows, its places in the lines; X = T * W for none.
    origin_GTw: like token_GTw, but Y where the result of the token is read from another sequence.
    start_GTSq: position in its line where every sequence starts; W for none.
    length_GT: number of tokens of every line; padding stands behind them.
  """

  token_GTw: Array
  place_GNlK: Array
  origin_GTw: Array
  start_GTSq: Array
  length_GT: Array


def index_sequences(batch: TokenBatch) -> SequenceIndex | None:
  """Returns the index of a batch that lists its sequences; None if it does not list them."""
  if batch.sequence_GTW is None or batch.start_GTSq is None or batch.place_NLK is None:
    return None
  groups, lines, width = batch.sequence_GTW.shape
  place_GNlK = jnp.asarray(batch.place_NLK).reshape(groups, -1, batch.place_NLK.shape[-1])
  token_GTw = jnp.asarray(batch.sequence_GTW).reshape(groups, lines * width)
  size = place_GNlK.shape[1]
  # A place is the origin of its token's result if it is the token's first place.
  first_GTw = _gather(place_GNlK[..., 0], token_GTw, fill=-1)
  origin_GTw = jnp.where(first_GTw == jnp.arange(lines * width), token_GTw, size)
  length_GT = (batch.sequence_GTW < size).sum(axis=-1, dtype=jnp.int32)
  return SequenceIndex(token_GTw, place_GNlK, origin_GTw, jnp.asarray(batch.start_GTSq), length_GT)


def _gather(x_GNl: Array, at_GTw: Array, fill: float = 0) -> Array:
  """Returns x at some indices of every group, `fill` for indices past the end: [G, Tw, …]."""
  return jax.vmap(lambda x_Nl, at_X: x_Nl.at[at_X].get(mode="fill", fill_value=fill))(x_GNl, at_GTw)


# The gradient of a gather is a scatter, which adds in an order that a GPU does not fix. Here the
# way back is known, so the gradient is a gather, too.
@jax.custom_vjp
def gather_both_ways(x_GNlD: Array, source_GTw: Array, target_GNlK: Array) -> Array:
  """Gathers x at `source`, 0 for indices past its end: [G, Tw, D].

  Args:
    x_GNlD: the array to read.
    source_GTw: index in x of each result.
    target_GNlK: indices in the result of each element of x, past the end for none. The gradient of
      x is the sum of the result's gradients there.
  """
  del target_GNlK  # read in the backward pass only
  return _gather(x_GNlD, source_GTw)


def _gather_forward(x_GNlD: Array, source_GTw: Array, target_GNlK: Array) -> tuple[Array, Array]:
  return gather_both_ways(x_GNlD, source_GTw, target_GNlK), target_GNlK


def _gather_backward(target_GNlK: Array, slope_GTwD: Array) -> tuple[Array, None, None]:
  if target_GNlK.shape[-1] == 1:
    return _gather(slope_GTwD, target_GNlK[..., 0]), None, None

  def from_sequence(k: int) -> Array:
    return _gather(slope_GTwD, target_GNlK[..., k]).astype(jnp.float32)

  # One sequence after another: one gather of all would be K times as large. Sums are float32, since
  # a shared prompt adds up the gradients of all its completions.
  total = from_sequence(0)
  for k in range(1, target_GNlK.shape[-1]):
    total = total + from_sequence(k)
  return total.astype(slope_GTwD.dtype), None, None


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
  groups, lines = index.length_GT.shape
  first_GNlK = index.place_GNlK[..., :1]

  # Moved as rows of all heads: TPUs pad the last axis to 128 numbers, and a head may have fewer.
  def to_lines(x_NLHHd: Array, target_GNlK: Array) -> Array:
    x_GNlD = x_NLHHd.reshape(groups, -1, math.prod(x_NLHHd.shape[2:]))
    x_GTwD = gather_both_ways(x_GNlD, index.token_GTw, target_GNlK)
    return x_GTwD.reshape(groups * lines, -1, *x_NLHHd.shape[2:])

  q_NLHHd, k_NLJHd, v_NLJHd = qkv
  # The result of a prompt's token is read from its first sequence, so its queries in the others
  # have no gradient. Its keys and values have one in every sequence.
  q = to_lines(q_NLHHd, first_GNlK)
  k, v = to_lines(k_NLJHd, index.place_GNlK), to_lines(v_NLJHd, index.place_GNlK)
  parts = Parts(index.start_GTSq.reshape(groups * lines, -1), index.length_GT.reshape(-1))
  out = _KERNELS[options.kernel](q, k, v, parts, options)
  out_GTwD = out.reshape(groups, -1, math.prod(q_NLHHd.shape[2:])).astype(q_NLHHd.dtype)
  out_GNlD = gather_both_ways(out_GTwD, first_GNlK[..., 0], index.origin_GTw[..., None])
  return out_GNlD.reshape(q_NLHHd.shape)


class Parts(NamedTuple):
  """The sequences of lines: `start_GTSq` and `length_GT`, the lines of all groups in one list."""

  start_TSq: Array
  length_T: Array


def _segments(parts: Parts, width: int) -> Array:
  """Numbers the sequences of every line: [T, W].

  Padding has the number of the last sequence. That is right for causal attention: no real token
  looks ahead to it, and what it sees itself is never read.
  """
  starts_TWSq = parts.start_TSq[:, None, :] <= jnp.arange(width)[:, None]
  return starts_TWSq.sum(axis=-1, dtype=jnp.int32)


# Each kernel: causal attention over the sequences of lines, (q_TWHHd, k_TWJHd, v_TWJHd, parts,
# options) -> [T, W, H, Hd]. A window counts positions of a sequence, which are neighbours in the
# line, so that it is the same window there.


def _xla(q, k, v, parts: Parts, options: KernelOptions) -> Array:
  """Computes W x W scores by XLA."""
  width = q.shape[1]
  at_W, segment_TW = jnp.arange(width), _segments(parts, width)
  back_WW = at_W[:, None] - at_W
  seen_WW = (back_WW >= 0) & (back_WW < (options.window or width))
  seen_TWW = seen_WW & (segment_TW[:, :, None] == segment_TW[:, None, :])
  if options.cap:
    # `jax.nn.dot_product_attention` knows no cap.
    keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2))
    return attend(q, [(keys, seen_TWW)], scale=options.scale, cap=options.cap)
  return jax.nn.dot_product_attention(
    q, k, v, mask=seen_TWW[:, None], scale=options.scale or None, implementation="xla"
  )


def _cudnn(q, k, v, parts: Parts, options: KernelOptions) -> Array:
  """Calls cuDNN's kernel."""
  if parts.start_TSq.shape[1] > 1:
    return _cudnn_ragged(q, k, v, parts, options)
  # An empty line gets one token, of zeros: kernels disagree about sequences without any.
  length_T = jnp.maximum(parts.length_T, 1)
  mask: dict[str, Any] = {"query_seq_lengths": length_T, "key_value_seq_lengths": length_T}
  if 0 < options.window < q.shape[1]:
    # Padding stands at the end, where causal attention of real tokens does not look, so lengths
    # only save work. They are left out with a window, since cuDNN is not known to support both.
    mask = {"local_window_size": (options.window - 1, 0)}
  return jax.nn.dot_product_attention(
    q, k, v, scale=options.scale or None, is_causal=True, implementation="cudnn", **mask
  )


def _cudnn_ragged(q, k, v, parts: Parts, options: KernelOptions) -> Array:
  """Calls cuDNN's kernel for lines of several sequences; what it writes to padding is undefined."""
  width = q.shape[1]
  start_TSq, end_T1 = parts.start_TSq, parts.length_T[:, None]
  exists_TSq = start_TSq < width
  next_TSq = jnp.minimum(jnp.pad(start_TSq[:, 1:], ((0, 0), (0, 1)), constant_values=width), end_T1)
  length_TSq = jnp.where(exists_TSq, next_TSq - start_TSq, -1)
  # One entry more than sequences, and -1 where there is none.
  offset = jnp.pad(jnp.where(exists_TSq, start_TSq, -1), ((0, 0), (0, 1)), constant_values=-1)
  attend, mask_type = _ragged_attention()
  return attend(
    q,
    k,
    v,
    q_seqlen=length_TSq,
    kv_seqlen=length_TSq,
    q_offsets=offset,
    kv_offsets=offset,
    scale=options.scale or 1 / math.sqrt(q.shape[-1]),
    mask_type=mask_type,
  )


def _ragged_attention() -> tuple[Any, Any]:
  """Returns the function of JAX that calls cuDNN with offsets, and its causal mask.

  `jax.nn.dot_product_attention` has no argument for offsets.
  """
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  return cudnn.dot_product_attention, cudnn.MaskType.PADDING_CAUSAL


def _splash(q, k, v, parts: Parts, options: KernelOptions) -> Array:
  """Calls JAX's kernel for TPUs, one line at a time."""
  # Imported here, because Pallas for TPUs takes time to load and few runs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  width, heads, head_width = q.shape[1:]
  mask: Any = splash.CausalMask((width, width))
  if 0 < options.window < width:
    mask = splash.LocalMask((width, width), (options.window - 1, 0), 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  sizes: Any = {f"block_{name}": _splash_block(width, head_width) for name in names}
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=REMAT_NAME,
    attn_logits_soft_cap=options.cap or None,
    interpret=options.interpret,
  )
  # Splash takes no scale; queries are scaled in float32, so that they are rounded only once.
  scale = options.scale or 1 / np.sqrt(head_width)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  segment_TW: Any = _segments(parts, width)
  # Splash wants heads before positions.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out = jax.vmap(attend)(q, k, v, splash.SegmentIds(segment_TW, segment_TW))
  return cast(Array, out).swapaxes(1, 2)  # a tuple only where residuals are requested


def _splash_block(width: int, head_width: int) -> int:
  """Returns the size of splash's blocks, which divides the width of a line, a multiple of 128.

  It is 512 or the next size above that divides the width. Smaller blocks take more instructions
  per score, 1.8 times as many at 256. Larger ones contain more scores that the causal mask hides.
  Heads of more than 256 leave no memory for larger ones.
  """
  if head_width > 256:
    return math.gcd(width, 512)
  return next(size for size in range(min(width, 512), width + 1, 128) if width % size == 0)


_KERNELS: dict[str, Callable[..., Array]] = {
  "cudnn": _cudnn,
  "splash": _splash,
  "xla": _xla,
}
