"""What a decoder is made of.

One record describes every family: what differs between them, and between the layers of one of
them, is data here, not code in the decoder.
"""

from __future__ import annotations

import dataclasses
import math

from dpo_jax.structs import UserError

# Which rotary table a layer turns by: the model's, that of windowed layers, or none at all.
ROTARY = ("main", "local", "none")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the positions a model was first trained on.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" only the slow ones; "yarn" too,
      by another ramp, and scales what is turned (Peng et al. 2023).
    factor: the stretch.
    low_factor, high_factor: bounds of the ramp between frequencies that are stretched and those
      that are kept, in turns over `original_positions` ("yarn" calls them beta_slow, beta_fast).
    original_positions: what the model was first trained on.
    magnitude: of cosine and sine, for "yarn"; 0 is the paper's 0.1 log(factor) + 1.
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
  """A feed-forward part that is many, of which a router chooses a few for every token.

  Attributes:
    count: experts of a layer, each of `mlp_width`.
    chosen: experts that a token goes through.
    rescaled: whether the weights of the chosen ones are made to sum to 1.
    balance: weight of the term that spreads tokens over experts, as the model's folder has it.
  """

  count: int
  chosen: int
  rescaled: bool
  balance: float = 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only language model.

  Attributes:
    family: the Hugging Face `model_type`; names of the tensors on disk follow it.
    vocab: number of token ids.
    width: size of the residual stream.
    layers: number of blocks.
    heads, kv_heads, head_width: query heads, key/value heads (a divisor) and the size of each.
    mlp_width: hidden size of the feed-forward part, or of one expert.
    max_positions: positions the model was built for; with learned positions, a hard limit.
    norm: "rms" (scale only) or "layer" (mean removed, scale and bias).
    norm_eps: added to the variance.
    norm_offset: added to the stored scale: 1 where a scale of 0 changes nothing.
    pre_norms, post_norms: whether attention and feed-forward part read a normalised stream, and
      whether what they write is normalised.
    qk_norm: "head" normalises each query and key by itself, "all" those of all heads together,
      "" neither.
    positions: "rotary" or "learned".
    rope_theta, rope_scaling: base and stretch of rotary frequencies.
    local_theta: base of the table "local", which has no stretch.
    rotary_width: dimensions of a head that turn, the first ones; 0 for all.
    rotary_layers: a name in `ROTARY` for every layer; () is "main" throughout.
    windows: how many positions back each layer sees, itself included, 0 for all; () is 0 for all.
    attention_scale: of query times key; 0 is 1 / sqrt(head_width).
    attention_cap, logit_cap: c of c tanh(z / c), on scores and on logits; 0 for none.
    embed_scale: of the embedding before the first layer.
    activation: a name in `ACTIVATIONS` of the transformer.
    gated: SwiGLU-like, `down(act(gate(x)) * up(x))`, or plain, `down(act(up(x)))`.
    experts: for a mixture of experts; None for one feed-forward part.
    qkv_bias, out_bias, mlp_bias: which linear maps carry a bias.
    tied: the head is the embedding table.
    init_std: standard deviation of initial weights.
    bos_id, eos_ids, pad_id: special ids that the model's folder names; None or () without.
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
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model {name} is {value!r}; it must be a positive whole number")
    if self.heads % self.kv_heads:
      raise UserError(
        f"model has {self.heads} heads and {self.kv_heads} key/value heads; "
        "the second must divide the first"
      )
    turned = self.rotary_width or self.head_width
    if self.positions == "rotary" and (turned % 2 or not 0 < turned <= self.head_width):
      raise UserError(
        f"model head width {self.head_width} turns {turned} dimensions; rotary positions need an"
        " even number, at most the width"
      )
    self._check_layers()
    self._check_numbers()

  def _check_layers(self) -> None:
    for name, values in (("windows", self.windows), ("rotary_layers", self.rotary_layers)):
      if values and len(values) != self.layers:
        raise UserError(f"model {name} names {len(values)} layers; the model has {self.layers}")
    for window in self.windows:
      if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise UserError(f"model window is {window!r}; it must be 0 (all) or a number of positions")
    if self.experts and not 1 <= self.experts.chosen <= self.experts.count:
      raise UserError(
        f"model chooses {self.experts.chosen} of {self.experts.count} experts; choose 1 or more,"
        " and no more than there are"
      )

  def _check_numbers(self) -> None:
    numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
    numbers |= {"local_theta": self.local_theta, "embed_scale": self.embed_scale}
    scaling = self.rope_scaling
    if scaling is not None:
      rest = ("kind", "magnitude", "whole")
      numbers |= {k: v for k, v in vars(scaling).items() if k not in rest}
    for name, value in numbers.items():
      if not is_number(value) or not 0 < value < math.inf:
        raise UserError(f"model {name} is {value!r}; it must be a finite number above 0")
    for name in ("attention_scale", "attention_cap", "logit_cap"):
      value = getattr(self, name)
      if not is_number(value) or not 0 <= value < math.inf:
        raise UserError(f"model {name} is {value!r}; it must be 0 (none) or a number above")
    if scaling and scaling.kind in ("llama3", "yarn") and scaling.low_factor >= scaling.high_factor:
      raise UserError(
        f"model low_factor is {scaling.low_factor} and high_factor {scaling.high_factor};"
        " the second must be above the first"
      )


def is_number(value: object) -> bool:
  """A real number, of Python, which a truth value is not."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)
