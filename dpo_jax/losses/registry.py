"""A name and its arguments become a loss, or one line that says why not."""

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

# What a loss wants; all others want "pairs".
_KINDS = {"sft": "text", "kto": "unpaired", "plackett_luce": "ranked", "policy_gradient": "ranked"}
# Losses that read no reference.
FREE = frozenset({"simpo", "cpo", "orpo", "sft"})
# Losses that read the two log-ratios by their difference alone, so that f' of a divergence may
# replace them.
OF_MARGIN = frozenset({"sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "odpo"})
# Losses that a policy without reference still has a meaning for.
_MAY_BE_FREE = OF_MARGIN | {"ipo", "ipo_mean", "sigmoid_norm"}
# Losses of the sorted or pooled global batch.
_BATCH_WIDE = frozenset({"aot", "aot_unpaired", "kto"})
# Losses that divide by the number of tokens.
_AVERAGED = frozenset({"ipo_mean", "sigmoid_norm", "simpo", "orpo"})
# Arguments that come with the batch or the state of training, not from the user.
SUPPLIED = frozenset({"delta", "kl", "label_B", "margin_B", "present_BK", "reward_BK", "weight_B"})

# Running means over the batches before: what a loss calls it, and its next value from the metrics.
_RUNNING_STATS: dict[str, tuple[str, Callable[[Mapping[str, Array]], Array]]] = {
  "bco_pair": ("delta", lambda m: (m["rewards/chosen"] + m["rewards/rejected"]) / 2),
  "kto": ("kl", lambda m: jnp.maximum(m["kl"], 0.0)),
}
_DECAYS = {"bco_pair": 0.9, "kto": 0.0}


def kind_of(name: str) -> str:
  """What a loss is computed from: "pairs", "text", "unpaired" or "ranked"."""
  return _KINDS.get(name, "pairs")


def arguments(name: str) -> dict[str, Any]:
  """The keyword arguments a user gives a loss, with their defaults."""
  parameters = inspect.signature(LOSSES[name]).parameters.values()
  return {
    p.name: p.default
    for p in parameters
    if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in SUPPLIED
  }


def modifiers() -> dict[str, type]:
  """What `resolve` takes beside the arguments of losses, with the type of each."""
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
  """A loss with its arguments bound: (policy, reference, **supplied) -> loss_B.

  Attributes:
    name: as it was given.
    terms: (weight, name of a loss, the loss with its arguments bound); the loss is their sum.
    kind: "pairs", "text", "unpaired" or "ranked": what is in a row.
    beta: reward units per nat, of the rewards that are reported.
    needs_reference: whether log-probs of the reference are read.
    batch_wide: whether the loss of a pair depends on the other pairs of the global batch.
    divergence: takes the place of the log-ratio of either answer, in losses of the margin.
    ld_alpha: weight of answer tokens beyond the length of the shorter answer (LD-DPO).
    wpo: whether pairs are weighted by how likely the policy is to give them (WPO).
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
    """One loss a pair, nats or what the loss is measured in: [B].

    `supplied` may hold more than the loss reads (`SUPPLIED` has the names).
    """
    if not self.needs_reference:
      reference = None
    total = None
    for weight, name, fn in self.terms:
      pair = (policy, reference)
      if self.divergence is not None and name in OF_MARGIN:
        pair = with_divergence(policy, reference, self.divergence)
      wanted = inspect.signature(fn).parameters.keys() & supplied.keys() & SUPPLIED
      value = fn(*pair, **{key: supplied[key] for key in wanted})
      value = value if weight == 1 else weight * value
      total = value if total is None else total + value
    assert total is not None
    return total

  def reads(self, supplied: str) -> bool:
    """Whether a term reads this of what comes with the batch or the state of training."""
    return any(supplied in inspect.signature(fn).parameters for _, _, fn in self.terms)

  @property
  def samples(self) -> bool:
    """Whether the answers must be samples of the policy as it is, with their rewards."""
    return any(name == "policy_gradient" for _, name, _ in self.terms)

  @property
  def running_stats(self) -> dict[str, float]:
    """Running means that live in the state of training, at their start."""
    return {
      _RUNNING_STATS[name][0]: 0.0
      for _, name, _ in self.terms
      if name in _RUNNING_STATS and self.running_decay > 0
    }

  def update_running_stats(
    self, running_stats: Mapping[str, Array], means: Mapping[str, Array]
  ) -> dict[str, Array]:
    """The running means after a step, from the step's own means."""
    seen = {key: read(means) for key, read in _RUNNING_STATS.values() if key in running_stats}
    keep = self.running_decay
    mix = lambda old, new: (keep * old + (1 - keep) * new).astype(old.dtype)
    return {key: mix(running_stats[key], value) for key, value in seen.items()}


def resolve(name: str, **given: Any) -> Loss:
  """A loss by name, or a weighted sum of several, with arguments and modifiers bound.

  Args:
    name: as in `LOSSES`; or a sum such as "0.8*sigmoid + 0.2*bco_pair + 1*sft" (MPO), in which
      `sft` is -log π(y_w)/|y_w|.
    **given: arguments of the losses, by name; and modifiers:
      sft_weight: adds so much of -log π(y_w)/|y_w| (RPO).
      ld_alpha: in [0, 1], weight of answer tokens beyond the length of the shorter answer, in
        policy and reference (LD-DPO, Liu et al. 2024); 1 changes nothing.
      wpo: weights pairs by the likelihood under the policy (WPO, Zhou et al. 2024).
      link, link_alpha: an f-divergence in place of the reverse KL; see `divergences`.
      reference_free: the reference counts as uniform.
      running_decay: in [0, 1), of the running mean behind bco_pair's δ (0.9 unless given) or kto's
        z0 (0 unless given: the mean of the batch itself).

  Raises:
    UserError: a name that is not in `LOSSES`, an argument no term reads, a value out of range, or
      a combination without a meaning; said before anything is loaded.
  """
  parts = _parse(name)
  names = [part for _, part in parts]
  _check_known(names, given)
  _check_sum(names)
  bound, extra = {}, dict(given)
  for key in given:
    if any(key in arguments(part) for part in names):
      bound[key] = extra.pop(key)
  _check_ranges(names, given)
  _check_combination(names, extra)
  terms = [(weight, part, _bind(part, bound, len(parts) > 1)) for weight, part in parts]
  if extra.get("sft_weight"):
    terms.append((float(extra["sft_weight"]), "sft", paired.sft_mean))
  betas = [bound.get("beta", arguments(n)["beta"]) for n in names if "beta" in arguments(n)]
  decays = [_DECAYS[n] for n in names if n in _DECAYS]
  running = float(given.get("running_decay", max(decays, default=0.0)))
  free = bool(extra.get("reference_free")) or all(n in FREE for n in names)
  wide = [n for n in names if n in _BATCH_WIDE and not (n == "kto" and running > 0)]
  return Loss(
    name=name,
    terms=tuple(terms),
    kind=kind_of(names[0]) if len(names) == 1 else "pairs",
    beta=betas[0] if betas else 1.0,
    needs_reference=not free,
    batch_wide=bool(wide),
    divergence=_divergence(extra),
    ld_alpha=float(extra.get("ld_alpha", 1.0)),
    wpo=bool(extra.get("wpo")),
    running_decay=running,
  )


def _parse(name: str) -> list[tuple[float, str]]:
  """ "0.8*sigmoid + bco_pair" as [(0.8, "sigmoid"), (1.0, "bco_pair")]."""
  parts = []
  for part in str(name).split("+"):
    weight, star, loss = part.rpartition("*")
    try:
      number = float(weight) if star else 1.0
    except ValueError:
      number = math.nan
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
  fn = paired.sft_mean if name == "sft" and in_sum else LOSSES[name]
  own = {key: value for key, value in bound.items() if key in arguments(name)}
  return functools.partial(fn, **own) if own else fn


def _divergence(extra: Mapping[str, Any]) -> Callable[[Array], Array] | None:
  name = extra.get("link") or "reverse_kl"
  if name == "reverse_kl":
    return None
  if name == "alpha" and extra.get("link_alpha") is not None:
    return functools.partial(DIVERGENCES[name], link_alpha=extra["link_alpha"])
  return DIVERGENCES[name]


# --- what is refused ------------------------------------------------------------------------------


def _check_known(names: list[str], given: Mapping[str, Any]) -> None:
  for name in names:
    if name not in LOSSES:
      near = difflib.get_close_matches(name, LOSSES, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(LOSSES)}"
      raise UserError(f"loss.name is {name!r}, which is no loss of this project; {hint}")
  known = {key for name in names for key in arguments(name)}
  for key, value in given.items():
    if key not in known and key not in modifiers():
      takes = f"takes {', '.join(sorted(known))}" if known else "takes no argument"
      raise UserError(
        f"loss {'+'.join(names)!r} does not read {key} = {value!r}; it {takes} (where the"
        f" configuration gives it: --config.loss.{key}=None)"
      )


def _check_sum(names: list[str]) -> None:
  if len(names) == 1:
    return
  for name in names:
    if kind_of(name) not in ("pairs", "text"):
      raise UserError(
        f"loss {name!r} is computed from rows of another kind and cannot be a term of a sum;"
        " train with it alone"
      )
  if len(set(names)) < len(names):
    raise UserError(f"loss.name {'+'.join(names)!r} names a loss twice; add their weights")
  if len({name in FREE for name in names if name != "sft"}) > 1:
    raise UserError(
      f"loss.name {'+'.join(names)!r} mixes losses with and without a reference; their rewards"
      " would not be the same quantity"
    )


# Argument: (least, whether it may be that, upper bound not reached, what it is)
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


def _check_ranges(names: list[str], given: Mapping[str, Any]) -> None:
  for key, value in given.items():
    if key not in _RANGES:
      continue
    least, reached, below, what = _RANGES[key]
    if key == "label_smoothing" and "exo_pair" in names:
      reached, what = False, "above 0 and below 0.5 for exo_pair, which takes its logarithm"
    try:
      fits = least <= value < below and (reached or value > least)
    except TypeError:
      fits = False
    if not fits:
      raise UserError(f"loss.{key} is {value!r}; it must be {what}")


def _check_combination(names: list[str], extra: Mapping[str, Any]) -> None:
  def refuse(key: str, why: str) -> None:
    raise UserError(f"loss.{key} = {extra[key]!r} does not combine with {'+'.join(names)}: {why}")

  wrong_kind = kind_of(names[0]) != "pairs" if len(names) == 1 else False
  for key in ("sft_weight", "ld_alpha", "wpo", "link", "link_alpha", "reference_free"):
    # 0.0 is a value; False and None are the modifier left out.
    if wrong_kind and extra.get(key) is not None and extra[key] is not False:
      refuse(key, "it modifies losses of pairs")
  if extra.get("sft_weight") and "orpo" in names:
    refuse("sft_weight", "orpo has that term already; odds_weight says how much counts the rest")
  if extra.get("sft_weight") and "sft" in names:
    refuse("sft_weight", "sft is a term already; give it the weight")
  if extra.get("ld_alpha") is not None and (extra.get("sft_weight") or {"sft", "cpo"} & {*names}):
    refuse("ld_alpha", "the supervised term would lose the tokens it weighs down")
  for name in names:
    if extra.get("ld_alpha") is not None and name in _AVERAGED:
      refuse("ld_alpha", f"{name} averages over tokens, which already takes the length out")
    if extra.get("wpo") and name in _BATCH_WIDE:
      refuse("wpo", f"{name} sorts the batch, where a pair's weight has no meaning")
    if extra.get("reference_free") and name in FREE and name != "sft":
      refuse("reference_free", f"{name} reads no reference as it is")
    if extra.get("reference_free") and name not in _MAY_BE_FREE | FREE:
      refuse("reference_free", f"{name} is about the ratio to a reference")
    if extra.get("link") and name not in OF_MARGIN | {"sft"}:
      refuse("link", f"links replace the log-ratio in {', '.join(sorted(OF_MARGIN))}")
  if extra.get("link") and extra["link"] not in DIVERGENCES:
    raise UserError(f"loss.link is {extra['link']!r}; known: {', '.join(DIVERGENCES)}")
  if extra.get("link") and extra.get("reference_free"):
    refuse("link", "without a reference there is no ratio; leave reference_free out")
  if extra.get("link_alpha") is not None and extra.get("link") != "alpha":
    refuse("link_alpha", "it is read by loss.link=alpha alone")
  if extra.get("running_decay") is not None and not set(names) & _DECAYS.keys():
    refuse("running_decay", f"it is read by {', '.join(_DECAYS)} alone")
