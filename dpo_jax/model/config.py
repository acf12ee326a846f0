"""The configuration of a decoder, and the checks of its values.

One record describes every family. Differences between families, and between the layers of one
model, are data here, so the decoder has no code for a single family.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpo_jax.structs import UserError

# Rotary tables that a layer may use: the model's, that of windowed layers, or none at all.
ROTARY = ("main", "local", "none")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The scaling of rotary frequencies to more positions than a model was first trained on.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" divides only the slow ones; "yarn"
      also does, by another ramp, and scales queries and keys besides (Peng et al. 2023).
    factor: the divisor.
    low_factor, high_factor: bounds of the ramp between frequencies that are divided and those that
      are kept, in turns over `original_positions` ("yarn" calls them beta_slow, beta_fast).
    original_positions: number of positions that the model was first trained on.
    magnitude: factor of cosine and sine, for "yarn"; 0 means the paper's 0.1 log(factor) + 1.
    whole: whether "yarn" rounds the ends of its ramp to whole dimensions.
  """

  kind: str
  factor: float
  low_factor: float = 1.0
  high_factor: float = 4.0
  original_positions: int = 8192
  magnitude: float = 0.0
  whole: bool = True


@dataclasses.dataclass(frozen=True)
class Experts:
  """Settings of a mixture of experts: many feed-forward parts, and a router that chooses some.

  Attributes:
    count: number of experts per layer, each of `mlp_width`.
    chosen: number of experts per token.
    rescaled: whether the weights of the chosen experts are rescaled to sum to 1.
    balance: weight of the auxiliary load-balancing loss, as the model's folder states it.
  """

  count: int
  chosen: int
  rescaled: bool
  balance: float = 0.0


# Frozen, and so hashable: compiled functions take a configuration as a static argument.
@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The configuration of one decoder-only language model.

  Attributes:
    family: the Hugging Face `model_type`, which decides the names of the tensors on disk.
    vocab: number of token ids.
    width: size of the residual stream.
    layers: number of blocks.
    heads, kv_heads: numbers of query heads and of key/value heads; the second divides the first.
    head_width: size of a head.
    mlp_width: hidden size of the feed-forward part, or of one expert.
    max_positions: number of positions the model was built for; a hard limit if they are learned.
    norm: "rms" (scale only) or "layer" (mean removed, scale and bias).
    norm_eps: added to the variance.
    norm_offset: added to the stored scale; 1 for families that store the scale minus 1.
    pre_norms, post_norms: whether the inputs of attention and feed-forward part are normalised, and
      whether their outputs are.
    qk_norm: "head" normalises each query and key head by itself, "all" the heads of a token
      together; "" does neither.
    positions: "rotary" or "learned".
    rope_theta, rope_scaling: base and scaling of rotary frequencies.
    local_theta: base of the table "local", which is never scaled.
    rotary_width: number of leading dimensions of a head that are rotated; 0 for all.
    rotary_layers: a name in `ROTARY` per layer; () means "main" for all layers.
    windows: number of positions that each layer sees back, its own included; 0 means all. An empty
      tuple means 0 for all layers.
    attention_scale: factor of query times key; 0 means 1 / sqrt(head_width).
    attention_cap, logit_cap: c of c tanh(z / c), on scores and on logits; 0 for no cap.
    embed_scale: factor of the embedding before the first layer.
    activation: a name in `ACTIVATIONS` of the transformer.
    gated: whether the feed-forward part is `down(act(gate(x)) * up(x))`, as in SwiGLU, or
      `down(act(up(x)))`.
    experts: settings of a mixture of experts; None for one feed-forward part.
    qkv_bias, out_bias, mlp_bias: whether these linear maps have a bias.
    tied: whether the head is the embedding table.
    init_std: standard deviation of initial weights.
    bos_id, eos_ids, pad_id: special ids that the model's folder names; None or () if it names none.
  """

  family: str
  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  mlp_width: int
  max_positions: int
  norm: str
  norm_eps: float
  positions: str
  activation: str
  gated: bool
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  tied: bool
  norm_offset: float = 0.0
  pre_norms: bool = True
  post_norms: bool = False
  qk_norm: str = ""
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  local_theta: float = 10000.0
  rotary_width: int = 0
  rotary_layers: tuple[str, ...] = ()
  windows: tuple[int, ...] = ()
  attention_scale: float = 0.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  embed_scale: float = 1.0
  experts: Experts | None = None
  init_std: float = 0.02
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None

  def __post_init__(self) -> None:
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
    for name in (*sizes, "max_positions"):
      value = getattr(self, name)
      # In Python a bool is an int: `true` in a file would pass for 1.
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model {name} is {value!r}; it must be a positive whole number")
    # Every key/value head serves the same number of query heads.
    if self.heads % self.kv_heads:
      raise UserError(
        f"model has {self.heads} heads and {self.kv_heads} key/value heads; "
        "the second must divide the first"
      )
    rotated = self.rotary_width or self.head_width
    # Dimensions are rotated in pairs.
    if self.positions == "rotary" and (rotated % 2 or not 0 < rotated <= self.head_width):
      raise UserError(
        f"model head width {self.head_width} rotates {rotated} dimensions; rotary positions need an"
        " even number, at most the width"
      )
    self._check_layers()
    self._check_numbers()

  def _check_layers(self) -> None:
    """Checks what is given per layer, and the experts."""
    for name, values in (("windows", self.windows), ("rotary_layers", self.rotary_layers)):
      if values and len(values) != self.layers:
        raise UserError(f"model {name} names {len(values)} layers; the model has {self.layers}")
    # Sizes may differ from layer to layer; `attention_kernels.choose` knows who supports that.
    for window in self.windows:
      if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise UserError(f"model window is {window!r}; it must be 0 (all) or a number of positions")
    if self.experts and not 1 <= self.experts.chosen <= self.experts.count:
      raise UserError(
        f"model chooses {self.experts.chosen} of {self.experts.count} experts; choose 1 or more,"
        " and no more than there are"
      )

  def _check_numbers(self) -> None:
    """Checks that real numbers are finite and in range."""
    numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
    numbers |= {"local_theta": self.local_theta, "embed_scale": self.embed_scale}
    scaling = self.rope_scaling
    if scaling is not None:
      others = ("kind", "magnitude", "whole")  # not numbers, or 0 is allowed
      numbers |= {k: v for k, v in vars(scaling).items() if k not in others}
    for name, value in numbers.items():
      # Python's json reads Infinity and NaN; no comparison with NaN holds, so it is refused, too.
      if not is_number(value) or not 0 < value < math.inf:
        raise UserError(f"model {name} is {value!r}; it must be a finite number above 0")
    # Here 0 has a meaning of its own: the default scale, or no cap.
    for name in ("attention_scale", "attention_cap", "logit_cap"):
      value = getattr(self, name)
      if not is_number(value) or not 0 <= value < math.inf:
        raise UserError(f"model {name} is {value!r}; it must be 0 (none) or a number above")
    # The ramp between the two bounds divides by their difference. "linear" has no ramp.
    if scaling and scaling.kind in ("llama3", "yarn") and scaling.low_factor >= scaling.high_factor:
      raise UserError(
        f"model low_factor is {scaling.low_factor} and high_factor {scaling.high_factor};"
        " the second must be above the first"
      )


def is_number(value: object) -> bool:
  """Returns whether a value is an int or a float of Python; a bool is not counted as a number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


class FromRow(Protocol):
  """Anything that knows the row of the data it came from."""

  @property
  def row(self) -> int: ...


class Tokens(FromRow, Protocol):
  """A row of the data as token ids."""

  @property
  def prompt(self) -> np.ndarray: ...

  @property
  def completions(self) -> Sequence[np.ndarray]: ...


def check_ids(examples: Sequence[Tokens], config: ModelConfig) -> None:
  """Refuses examples with a token id that has no row in the embedding.

  On devices such an id does not fail: JAX clamps indices, so it would be read as another token.

  Raises:
    UserError: names the first row with such an id.
  """
  for example in examples:
    for ids in (example.prompt, *example.completions):
      if len(ids) and ids.max() >= config.vocab:
        raise UserError(
          f"data row {example.row} contains token id {ids.max()}, and the model's vocabulary is"
          f" {config.vocab}; name the tokenizer that belongs to the model, or leave that token out"
        )


def check_positions(examples: Sequence[FromRow], tokens_B: np.ndarray, config: ModelConfig) -> None:
  """Refuses examples that are longer than a table of learned positions.

  Args:
    examples: B examples.
    tokens_B: tokens of their longest sequences: a prompt with one completion.
    config: the model. Rotary positions have no limit.

  Raises:
    UserError: the longest sequence has more tokens than the model has positions.
  """
  if config.positions != "learned":
    return
  longest = int(tokens_B.argmax())
  # Positions past the end of a table read NaN: see `layers.Table`.
  if tokens_B[longest] > config.max_positions:
    raise UserError(
      f"data row {examples[longest].row} has {tokens_B[longest]} tokens and the model"
      f" {config.max_positions} positions (max_position_embeddings), which"
      f" {(tokens_B > config.max_positions).sum():,} of {len(tokens_B):,} rows exceed; set"
      f" --max_length={config.max_positions}"
    )
