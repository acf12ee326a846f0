"""Builds a loss from its name and arguments, or refuses them with a one-line reason."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from dpo_jax.losses import batchwise, paired
from dpo_jax.losses.divergences import DIVERGENCES, with_divergence
from dpo_jax.structs import Array, UserError

LossFn = Callable[..., Array]

LOSSES: dict[str, LossFn] = {
  fn.__name__: fn
  for fn in (
    paired.sigmoid,
    paired.cdpo,
    paired.robust,
    paired.ipo,
    paired.ipo_mean,
    paired.hinge,
    paired.exo_pair,
    paired.nca_pair,
    paired.bco_pair,
    paired.sppo_hard,
    paired.apo_zero,
    paired.apo_down,
    batchwise.aot,
    batchwise.aot_unpaired,
    paired.discopop,
    paired.sigmoid_norm,
    paired.dpop,
    paired.odpo,
    paired.chi_po,
    paired.simpo,
    paired.cpo,
    paired.orpo,
    batchwise.kto,
    batchwise.plackett_luce,
    batchwise.policy_gradient,
    paired.sft,
  )
}

# The kind of example a loss is computed from; losses not listed take "pairs".
_KINDS = {"sft": "text", "kto": "unpaired", "plackett_luce": "ranked", "policy_gradient": "ranked"}
# Losses that do not read the reference.
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo", "sft"})
# Losses that depend on the log-ratios only through their difference. In these f' of another
# divergence may replace the log-ratio.
MARGIN_LOSSES = frozenset({"sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "odpo"})
# Losses that keep a meaning when the reference is uniform.
_ALLOW_REFERENCE_FREE = MARGIN_LOSSES | {"ipo", "ipo_mean", "sigmoid_norm"}
# Losses of a pair that depend on the other pairs of the global batch.
_BATCH_WIDE = frozenset({"aot", "aot_unpaired", "kto"})
# Losses that divide by the number of tokens.
_LENGTH_AVERAGED = frozenset({"ipo_mean", "sigmoid_norm", "simpo", "orpo"})
# Arguments that come from the batch or the training state, not from the user.
SUPPLIED = frozenset({"delta", "kl", "label_B", "margin_B", "present_BK", "reward_BK", "weight_B"})

# Running statistics over earlier batches, by loss: the argument of the loss that receives it, and
# the function that computes the value of one batch from the step's metrics.
_RUNNING_STATS: dict[str, tuple[str, Callable[[Mapping[str, Array]], Array]]] = {
  "bco_pair": ("delta", lambda m: (m["rewards/chosen"] + m["rewards/rejected"]) / 2),
  "kto": ("kl", lambda m: jnp.maximum(m["kl"], 0.0)),
}
# Share of the running mean that a step keeps by default; with 0 `kto` uses the batch's own mean.
_DECAYS = {"bco_pair": 0.9, "kto": 0.0}


def kind_of(name: str) -> str:
  """Returns the kind of example a loss reads: "pairs", "text", "unpaired" or "ranked"."""
  return _KINDS.get(name, "pairs")


def arguments(name: str) -> dict[str, Any]:
  """Returns the keyword arguments of a loss that a user may set, with their defaults."""
  parameters = inspect.signature(LOSSES[name]).parameters.values()
  return {
    p.name: p.default
    for p in parameters
    if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in SUPPLIED
  }


def modifiers() -> dict[str, type]:
  """Returns the modifiers that `resolve` takes in addition to arguments of losses, with types."""
  return {
    "sft_weight": float,
    "ld_alpha": float,
    "wpo": bool,
    "link": str,
    "link_alpha": float,
    "reference_free": bool,
    "running_decay": float,
  }


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss with its arguments bound: a function (policy, reference, **supplied) -> loss_B.

  Attributes:
    name: name or weighted sum that the user gave.
    terms: (weight, name of a loss, the loss with its arguments bound); the loss is their sum.
    kind: the kind of example: "pairs", "text", "unpaired" or "ranked".
    beta: β of the reported rewards, in reward units per nat.
    needs_reference: whether the loss reads log-probs of the reference.
    batch_wide: whether the loss of a pair depends on the other pairs of the global batch.
    divergence: f' as a function of the log-ratio; it replaces the log-ratio of both completions in
      losses of the margin. None means reverse KL.
    ld_alpha: weight of the tokens of a completion beyond the length of the pair's shorter
      completion (LD-DPO).
    wpo: whether pairs are weighted by their likelihood under the policy (WPO).
    running_decay: share of a running mean that a step keeps.
  """

  name: str
  terms: tuple[tuple[float, str, LossFn], ...]
  kind: str
  beta: float
  needs_reference: bool
  batch_wide: bool
  divergence: Callable[[Array], Array] | None = None
  ld_alpha: float = 1.0
  wpo: bool = False
  running_decay: float = 0.0

  def __call__(self, policy: Any, reference: Any = None, **supplied: Any) -> Array:
    """Computes one loss per pair, in the unit of the loss: [B].

    Args:
      policy, reference: `PairLogps`, `UnpairedLogps` or `RankedLogps`, by `kind`.
      **supplied: arguments from the batch or the training state, named in `SUPPLIED`. Those that
        no term reads are ignored.
    """
    if not self.needs_reference:
      reference = None
    total = None
    for weight, name, fn in self.terms:
      pair = (policy, reference)
      if self.divergence is not None and name in MARGIN_LOSSES:
        pair = with_divergence(policy, reference, self.divergence)
      keys = inspect.signature(fn).parameters.keys() & supplied.keys() & SUPPLIED
      value = fn(*pair, **{key: supplied[key] for key in keys})
      # A single loss of weight 1 is returned as it is: a plain name compiles to its formula alone.
      value = value if weight == 1 else weight * value
      total = value if total is None else total + value
    assert total is not None
    return total

  def reads(self, supplied: str) -> bool:
    """Returns whether a term reads this argument of `SUPPLIED`."""
    return any(supplied in inspect.signature(fn).parameters for _, _, fn in self.terms)

  @property
  def is_on_policy(self) -> bool:
    """True if the completions must be samples of the current policy, with their rewards."""
    return any(name == "policy_gradient" for _, name, _ in self.terms)

  @property
  def running_stats(self) -> dict[str, float]:
    """Returns the initial running statistics for the training state: {} for most losses."""
    return {
      _RUNNING_STATS[name][0]: 0.0
      for _, name, _ in self.terms
      if name in _RUNNING_STATS and self.running_decay > 0
    }

  def update_running_stats(
    self, running_stats: Mapping[str, Array], means: Mapping[str, Array]
  ) -> dict[str, Array]:
    """Returns the running statistics after a step, from the means in the step's metrics."""
    keep = self.running_decay
    updated = {}
    for key, batch_value in _RUNNING_STATS.values():
      if key in running_stats:
        old = running_stats[key]
        # The type stays that of the state, or the step would compile anew for its own output.
        updated[key] = (keep * old + (1 - keep) * batch_value(means)).astype(old.dtype)
    return updated


def resolve(name: str, **options: Any) -> Loss:
  """Builds a loss, or a weighted sum of losses, with arguments and modifiers bound.

  Args:
    name: a name in `LOSSES`, or a sum such as "0.8*sigmoid + 0.2*bco_pair + 1*sft" (MPO). In a sum
      `sft` is -log π(y_w)/|y_w|, in nats per token.
    **options: arguments of the losses, by name, and modifiers:
      sft_weight: weight of an added term -log π(y_w)/|y_w| (RPO).
      ld_alpha: in [0, 1], weight of the tokens of a completion beyond the length of the pair's
        shorter completion, in policy and reference (LD-DPO, Liu et al. 2024); 1 changes nothing.
      wpo: weights pairs by their likelihood under the policy (WPO, Zhou et al. 2024).
      link, link_alpha: the f-divergence that replaces the reverse KL; see `divergences`.
      reference_free: treats the reference as uniform.
      running_decay: in [0, 1), share that a step keeps of the running mean behind bco_pair's δ
        (default 0.9) or kto's z0 (default 0, which uses the batch's own mean).

  Raises:
    UserError: a name that is not in `LOSSES`, an argument that no term reads, a value out of range,
      or a combination that makes no sense. It is raised before anything is loaded.
  """
  # The order is important: 1. names, 2. which argument belongs to a loss and which is a modifier,
  # 3. values, 4. combinations. Each check relies on those before it.
  parts = _parse(name)
  names = [part for _, part in parts]
  _check_known(names, options)
  _check_sum(names)
  bound, extra = {}, dict(options)
  for key in options:
    if any(key in arguments(part) for part in names):
      bound[key] = extra.pop(key)
  _check_ranges(names, options)
  _check_combination(names, extra)
  terms = [(weight, part, _bind(part, bound, len(parts) > 1)) for weight, part in parts]
  if extra.get("sft_weight"):
    terms.append((float(extra["sft_weight"]), "sft", paired.sft_mean))
  betas = [bound.get("beta", arguments(n)["beta"]) for n in names if "beta" in arguments(n)]
  decays = [_DECAYS[n] for n in names if n in _DECAYS]
  running = float(options.get("running_decay", max(decays, default=0.0)))
  free = bool(extra.get("reference_free")) or all(n in REFERENCE_FREE for n in names)
  # With a running mean, kto's z0 comes from earlier batches and no longer from this one.
  wide = [n for n in names if n in _BATCH_WIDE and not (n == "kto" and running > 0)]
  return Loss(
    name=name,
    terms=tuple(terms),
    kind=kind_of(names[0]) if len(names) == 1 else "pairs",
    # Rewards of a sum are reported in the β of its first term that has one.
    beta=betas[0] if betas else 1.0,
    needs_reference=not free,
    batch_wide=bool(wide),
    divergence=_divergence(extra),
    ld_alpha=float(extra.get("ld_alpha", 1.0)),
    wpo=bool(extra.get("wpo")),
    running_decay=running,
  )


def _parse(name: str) -> list[tuple[float, str]]:
  """Parses "0.8*sigmoid + bco_pair" into [(0.8, "sigmoid"), (1.0, "bco_pair")]."""
  parts = []
  for part in str(name).split("+"):
    weight, star, loss = part.rpartition("*")
    try:
      number = float(weight) if star else 1.0
    except ValueError:
      number = math.nan
    # This comparison also refuses nan, which a failed conversion gives.
    if not 0 < number < math.inf:
      raise UserError(
        f"loss.name is {name!r}: {weight.strip()!r} is no weight above 0; a sum is written as in"
        " '0.8*sigmoid + 0.2*bco_pair'"
      )
    if not loss.strip() and loss != name:
      raise UserError(
        f"loss.name is {name!r}: a term of the sum names no loss; a sum is written as in"
        " '0.8*sigmoid + 0.2*bco_pair'"
      )
    parts.append((number, loss.strip()))
  return parts


def _bind(name: str, bound: dict[str, Any], in_sum: bool) -> LossFn:
  """Returns the loss with those of the given arguments bound that belong to it."""
  # Within a sum `sft` is a mean over tokens, on the scale of the losses it is added to.
  fn = paired.sft_mean if name == "sft" and in_sum else LOSSES[name]
  own = {key: value for key, value in bound.items() if key in arguments(name)}
  return functools.partial(fn, **own) if own else fn


def _divergence(extra: Mapping[str, Any]) -> Callable[[Array], Array] | None:
  """Returns f' of the divergence that the modifiers name; None for the reverse KL."""
  name = extra.get("link") or "reverse_kl"
  if name == "reverse_kl":
    return None
  if name == "alpha" and extra.get("link_alpha") is not None:
    return functools.partial(DIVERGENCES[name], link_alpha=extra["link_alpha"])
  return DIVERGENCES[name]


# --- checks of names, values and combinations -----------------------------------------------------


def _check_known(names: list[str], options: Mapping[str, Any]) -> None:
  """Refuses unknown losses, and arguments that none of the losses reads."""
  for name in names:
    if name not in LOSSES:
      near = difflib.get_close_matches(name, LOSSES, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(LOSSES)}"
      raise UserError(f"loss.name is {name!r}, which is not a known loss; {hint}")
  known = {key for name in names for key in arguments(name)}
  # A setting that nothing reads would be ignored in silence, such as label_smoothing of sigmoid.
  for key, value in options.items():
    if key not in known and key not in modifiers():
      takes = f"takes {', '.join(sorted(known))}" if known else "takes no argument"
      raise UserError(
        f"loss {'+'.join(names)!r} does not read {key} = {value!r}; it {takes} (where the"
        f" configuration gives it: --config.loss.{key}=None)"
      )


def _check_sum(names: list[str]) -> None:
  """Refuses sums whose terms read different examples, repeat a loss, or differ in their rewards."""
  if len(names) == 1:
    return
  for name in names:
    if kind_of(name) not in ("pairs", "text"):
      raise UserError(
        f"loss {name!r} is computed from another kind of example and cannot be a term of a sum;"
        " train with it alone"
      )
  if len(set(names)) < len(names):
    raise UserError(f"loss.name {'+'.join(names)!r} contains a loss twice; add their weights")
  # `sft` alone combines with either kind: it reports no reward.
  if len({name in REFERENCE_FREE for name in names if name != "sft"}) > 1:
    raise UserError(
      f"loss.name {'+'.join(names)!r} mixes losses with and without a reference; their rewards"
      " would not be the same quantity"
    )


# Argument: (lower bound, whether the bound is allowed, excluded upper bound, description). An upper
# bound of 1 + 1e-9 allows 1 itself.
_RANGES: dict[str, tuple[float, bool, float, str]] = {
  "beta": (0, False, math.inf, "a number above 0, such as 0.1"),
  "label_smoothing": (0, True, 0.5, "the share of wrong labels, from 0 to below 0.5"),
  "tau": (0, False, 1 + 1e-9, "a number above 0, at most 1"),
  "penalty": (0, True, math.inf, "a number of 0 or above"),
  "margin_scale": (0, True, math.inf, "a number of 0 or above"),
  "clip": (0, False, math.inf, "a number above 0"),
  "gamma": (0, True, math.inf, "a number of 0 or above"),
  "sft_weight": (0, True, math.inf, "a number of 0 or above"),
  "odds_weight": (0, True, math.inf, "a number of 0 or above"),
  "desirable_weight": (0, False, math.inf, "a number above 0"),
  "undesirable_weight": (0, False, math.inf, "a number above 0"),
  "ld_alpha": (0, True, 1 + 1e-9, "a number from 0 to 1"),
  "link_alpha": (0, False, 1, "a number above 0 and below 1"),
  "running_decay": (0, True, 1, "a number from 0 to below 1"),
}


def _check_ranges(names: list[str], options: Mapping[str, Any]) -> None:
  """Refuses values outside the range of their argument."""
  for key, value in options.items():
    if key not in _RANGES:
      continue
    least, reached, below, what = _RANGES[key]
    if key == "label_smoothing" and "exo_pair" in names:
      reached, what = False, "above 0 and below 0.5 for exo_pair, which takes its logarithm"
    try:
      in_range = least <= value < below and (reached or value > least)
    except TypeError:  # a text or a list, which does not compare with a number
      in_range = False
    if not in_range:
      raise UserError(f"loss.{key} is {value!r}; it must be {what}")


def _check_combination(names: list[str], extra: Mapping[str, Any]) -> None:
  """Refuses modifiers that would be ignored, or would change the meaning of a loss."""

  def refuse(key: str, why: str) -> None:
    raise UserError(f"loss.{key} = {extra[key]!r} does not combine with {'+'.join(names)}: {why}")

  # In a sum every term is of pairs, or sft, by `_check_sum`.
  wrong_kind = kind_of(names[0]) != "pairs" if len(names) == 1 else False
  for key in ("sft_weight", "ld_alpha", "wpo", "link", "link_alpha", "reference_free"):
    # 0.0 is a value; False and None are the modifier left out.
    if wrong_kind and extra.get(key) is not None and extra[key] is not False:
      refuse(key, "it modifies losses of pairs")
  if extra.get("sft_weight") and "orpo" in names:
    refuse("sft_weight", "orpo already contains that term; odds_weight weights the other one")
  if extra.get("sft_weight") and "sft" in names:
    refuse("sft_weight", "sft is already a term of the sum; set its weight there")
  if extra.get("ld_alpha") is not None and (extra.get("sft_weight") or {"sft", "cpo"} & {*names}):
    refuse("ld_alpha", "it would also reduce the weight of tokens in the supervised term")
  for name in names:
    if extra.get("ld_alpha") is not None and name in _LENGTH_AVERAGED:
      refuse("ld_alpha", f"{name} averages over tokens, which already removes the effect of length")
    if extra.get("wpo") and name in _BATCH_WIDE:
      refuse(
        "wpo",
        f"{name} compares pairs of the whole batch, where the weight of one pair has no meaning",
      )
    if extra.get("reference_free") and name in REFERENCE_FREE and name != "sft":
      refuse("reference_free", f"{name} does not read a reference anyway")
    if extra.get("reference_free") and name not in _ALLOW_REFERENCE_FREE | REFERENCE_FREE:
      refuse("reference_free", f"{name} needs the ratio to a reference")
    if extra.get("link") and name not in MARGIN_LOSSES | {"sft"}:
      refuse("link", f"it replaces the log-ratio only in {', '.join(sorted(MARGIN_LOSSES))}")
  if extra.get("link") and extra["link"] not in DIVERGENCES:
    raise UserError(f"loss.link is {extra['link']!r}; known: {', '.join(DIVERGENCES)}")
  if extra.get("link") and extra.get("reference_free"):
    refuse("link", "without a reference there is no ratio; leave out reference_free")
  if extra.get("link_alpha") is not None and extra.get("link") != "alpha":
    refuse("link_alpha", "only loss.link=alpha reads it")
  if extra.get("running_decay") is not None and not set(names) & _DECAYS.keys():
    refuse("running_decay", f"only {', '.join(_DECAYS)} read it")
