"""What a decoder is made of, and its translation from and to a Hugging Face `config.json`.

One record describes every family: what differs between them is data here, not code in the
decoder. A field of `config.json` that is neither read nor known to be without effect on the
forward pass is refused by name, because honouring half a configuration gives wrong log-probs and
no error.
"""

from __future__ import annotations

import dataclasses
import math

from dpo_jax.structs import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the positions a model was first trained on.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" only the slow ones.
    factor: the stretch.
    low_factor, high_factor, original_positions: bounds of the "llama3" ramp between frequencies
      that are stretched and frequencies that are kept.
  """

  kind: str
  factor: float
  low_factor: float = 1.0
  high_factor: float = 4.0
  original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only language model.

  Attributes:
    family: the Hugging Face `model_type`; names of the tensors on disk follow it.
    vocab: number of token ids.
    width: size of the residual stream.
    layers: number of blocks.
    heads, kv_heads, head_width: query heads, key/value heads (a divisor) and the size of each.
    mlp_width: hidden size of the feed-forward part.
    max_positions: positions the model was built for; with learned positions, a hard limit.
    norm: "rms" (scale only) or "layer" (mean removed, scale and bias).
    norm_eps: added to the variance.
    positions: "rotary" or "learned".
    rope_theta, rope_scaling: base and stretch of rotary frequencies.
    activation: a name in `ACTIVATIONS` of the transformer.
    gated: SwiGLU-like, `down(act(gate(x)) * up(x))`, or plain, `down(act(up(x)))`.
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
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
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
    if self.positions == "rotary" and self.head_width % 2:
      raise UserError(f"model head width {self.head_width} is odd; rotary positions need it even")
    numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
    if self.rope_scaling is not None:
      numbers |= {k: v for k, v in vars(self.rope_scaling).items() if k != "kind"}
    for name, value in numbers.items():
      if not is_number(value) or not 0 < value < math.inf:
        raise UserError(f"model {name} is {value!r}; it must be a finite number above 0")
    scaling = self.rope_scaling
    if scaling and scaling.kind == "llama3" and not scaling.low_factor < scaling.high_factor:
      raise UserError(
        f"model low_factor is {scaling.low_factor} and high_factor {scaling.high_factor};"
        " the second must be above the first"
      )


def is_number(value: object) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
