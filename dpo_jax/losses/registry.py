"""Builds a loss from its name and arguments, or refuses them with a one-line reason."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Imported for their declarations. The order is that of messages and tables.
from dpo_jax.losses import batchwise, checks, paired, reference_free
from dpo_jax.losses.declaration import (
  Declaration,
  LossFn,
  Running,
  declaration_of,
  declarations,
)
from dpo_jax.losses.divergences import DIVERGENCES, with_divergence
from dpo_jax.losses.probing import probe
from dpo_jax.structs import Array, UserError
from dpo_jax.utils import functions

_OWN = (paired, reference_free, batchwise)
_BY_NAME: dict[str, Declaration] = {
  one.name: one for module in _OWN for one in declarations() if one.fn.__module__ == module.__name__
}
LOSSES: dict[str, LossFn] = {name: one.fn for name, one in _BY_NAME.items()}
_ALIASES = {alias: one.name for one in _BY_NAME.values() for alias in one.aliases}
# Losses that do not read the reference.
REFERENCE_FREE = frozenset(name for name, one in _BY_NAME.items() if not one.reference)
# Losses that depend on the log-ratios only through their difference. In these f' of another
# divergence may replace the log-ratio.
MARGIN_LOSSES = frozenset(name for name, one in _BY_NAME.items() if one.margin)


def find(name: str) -> Declaration:
  """Returns the declaration of a loss by its name, an alias, or `module:function`.

  Raises:
    UserError: there is none, or a function of the user's own is not declared as it computes.
  """
  name = _ALIASES.get(name, name)
  if name in _BY_NAME:
    return _BY_NAME[name]
  if ":" in name:
    return _imported(name)
  raise UserError(f"loss.name is {name!r}, which is not a known loss; {_hint(name)}")


# Names of other trainers: of what learns from samples of the policy, and of losses.
_ON_POLICY = ("ppo", "grpo", "rloo", "reinforce", "dapo", "rlhf")
_ELSEWHERE = {"kto_pair": "kto", "aot_pair": "aot_unpaired", "bco": "bco_pair"} | dict.fromkeys(
  ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"), "rpo"
)


def _hint(name: str) -> str:
  """Says which loss was probably meant by a name that is none."""
  lower = name.lower()
  if lower in _ON_POLICY:
    return "'policy_gradient' learns from samples of the policy, with --config.on_policy.reward"
  if lower in _ELSEWHERE:
    return f"did you mean {_ELSEWHERE[lower]!r}?"
  if "," in name and "[" not in name:
    return "a sum of losses is written with +, such as 'sigmoid + 0.2*sft'"
  if weighted := re.fullmatch(r"([\d.]+)\s+(\w+)", name):
    return f"a weight is written with *: '{weighted[1]}*{weighted[2]}'"
  near = difflib.get_close_matches(lower, [*LOSSES, *_ALIASES], n=1)
  if near:
    return f"did you mean {near[0]!r}?"
  return f"known: {', '.join(LOSSES)}. One of your own is written as module:function"


@functools.cache
def _imported(name: str) -> Declaration:
  """Imports a loss of the user's own, and compares its declaration with what it computes."""
  fn = functions.import_function("loss", name)
  found = declaration_of(fn)
  if found is None:
    function = name.partition(":")[2]
    raise UserError(
      f"loss {name!r} is a function without a declaration; write above def {function}:"
      " @dpo_jax.losses.declare(reference=True, at_reference=math.log(2)), with its value where the"
      " policy is the reference, or (reference=False) if it reads none"
    )
  found = found._replace(name=name)
  probe(found)
  return found


def canonical(name: str) -> str:
  """Returns a name or a weighted sum with every alias replaced by the name of its loss."""
  parts = [(part, part.rpartition("*")[2].strip()) for part in str(name).split("+")]
  replaced = [
    part if loss not in _ALIASES else part.replace(loss, _ALIASES[loss]) for part, loss in parts
  ]
  return "+".join(replaced)


def kind_of(name: str) -> str:
  """Returns the kind of example a loss reads: "pairs", "text", "unpaired" or "ranked"."""
  return find(name).kind


def arguments(name: str) -> dict[str, Any]:
  """Returns the keyword arguments of a loss that a user may set, with their defaults."""
  return find(name).arguments


def types(name: str = "") -> dict[str, type]:
  """Returns the type of every argument of a loss and of every modifier, by its name.

  Args:
    name: a name or weighted sum, whose losses may be the user's own; those of this package are
      always included.
  """
  own = map(find, own_functions(name))
  found: dict[str, type] = {}
  for one in [*_BY_NAME.values(), *own]:
    for argument, default in one.arguments.items():
      # A whole number as a default must not forbid a fraction.
      kind = float if type(default) is int else type(default)
      if (known := (found | modifiers()).get(argument, kind)) is not kind:
        raise UserError(
          f"loss {one.name!r}: its argument {argument} is a {kind.__name__}, and that of other"
          f" losses a {known.__name__}; give it another name"
        )
      found[argument] = kind
  return found | modifiers()


def own_functions(name: str) -> list[str]:
  """Lists the losses of the user's own, `module:function`, in a name or weighted sum."""
  return [loss for _, loss in _parse(name) if ":" in loss] if ":" in name else []


def modifiers() -> dict[str, type]:
  """Returns the modifiers that `resolve` takes in addition to arguments of losses, with types."""
  return dict(checks.MODIFIERS)


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
    mismatched: for unpaired completions, whether it reads their mismatched completions.
    completions: for ranked completions, the fewest that a prompt must have.
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
  mismatched: bool = False
  completions: int = 2
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
      if self.divergence is not None and find(name).margin:
        pair = with_divergence(policy, reference, self.divergence)
      keys = find(name).supplied & supplied.keys()
      value = fn(*pair, **{key: supplied[key] for key in keys})
      # A single loss of weight 1 is returned as it is: a plain name compiles to its formula alone.
      value = value if weight == 1 else weight * value
      total = value if total is None else total + value
    assert total is not None
    return total

  def at_reference(self) -> Loss | None:
    """Returns a loss of the declared values where policy and reference are equal.

    It computes none of the formulas, so that step 0 can compare it with them. A term that reads no
    reference stays as it is. None if a term has no declared value.
    """
    terms = []
    for weight, name, fn in self.terms:
      declared = find(name)
      if declared.reference and declared.at_reference is None:
        return None
      if declared.reference:
        own = fn.keywords if isinstance(fn, functools.partial) else {}
        fn = functools.partial(_declared_value, declared, own)
      terms.append((weight, name, fn))
    # f' of a divergence is the same for both completions there, so that every margin is 0.
    return dataclasses.replace(self, terms=tuple(terms), divergence=None)

  def reads(self, supplied: str) -> bool:
    """Returns whether a term reads this argument of the batch or of the training state."""
    return any(supplied in find(name).supplied for _, name, _ in self.terms)

  @property
  def is_on_policy(self) -> bool:
    """True if the completions must be samples of the current policy, with their rewards."""
    return any(find(name).on_policy for _, name, _ in self.terms)

  @property
  def running_stats(self) -> dict[str, float]:
    """Returns the initial running statistics for the training state: {} for most losses."""
    if self.running_decay == 0:
      return {}
    return {running.argument: 0.0 for running in self._running}

  @property
  def _running(self) -> list[Running]:
    """The running means that terms receive."""
    found = [find(name).running for _, name, _ in self.terms]
    return [running for running in found if running is not None]

  def update_running_stats(
    self, running_stats: Mapping[str, Array], means: Mapping[str, Array]
  ) -> dict[str, Array]:
    """Returns the running statistics after a step, from the means in the step's metrics."""
    keep = self.running_decay
    updated = {}
    for key, batch_value, _ in self._running:
      if key in running_stats:
        old = running_stats[key]
        # The type stays that of the state, or the step would compile anew for its own output.
        updated[key] = (keep * old + (1 - keep) * batch_value(means)).astype(old.dtype)
    return updated


def _declared_value(
  declared: Declaration, own: Mapping[str, Any], policy: Any, reference: Any, **supplied: Any
) -> Array:
  """Returns the declared value of a loss where policy and reference are equal: [B]."""
  del reference
  value = declared.value_at_reference(policy, {**own, **supplied})
  # All kinds of log-probs begin with an array that has one line per example.
  return jnp.broadcast_to(jnp.asarray(value), jax.tree.leaves(policy)[0].shape[:1])


def resolve(name: str, **options: Any) -> Loss:
  """Builds a loss, or a weighted sum of losses, with arguments and modifiers bound.

  Args:
    name: a name in `LOSSES`, an alias, `module:function`, or a sum such as
      "0.8*sigmoid + 0.2*bco_pair + 1*sft" (MPO). In a sum `sft` is -log π(y_w)/|y_w|, in nats per
      token.
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
    UserError: a name that is not known, an argument that no term reads, a value out of range,
      or a combination that makes no sense. It is raised before anything is loaded.
  """
  # The order is important: 1. names, 2. which argument belongs to a loss and which is a modifier,
  # 3. values, 4. combinations. Each check relies on those before it.
  parts = [(weight, find(part)) for weight, part in _parse(name)]
  losses = [loss for _, loss in parts]
  checks.check_known(losses, options)
  checks.check_sum(losses)
  bound, extra = {}, dict(options)
  for key in options:
    if any(key in loss.arguments for loss in losses):
      bound[key] = extra.pop(key)
  checks.check_ranges(losses, options)
  checks.check_combination(losses, extra)
  terms = [(weight, loss.name, _bind(loss, bound, len(parts) > 1)) for weight, loss in parts]
  if extra.get("sft_weight"):
    terms.append((float(extra["sft_weight"]), "sft", reference_free.sft_mean))
  betas = [bound.get("beta", loss.arguments["beta"]) for loss in losses if "beta" in loss.arguments]
  decays = [loss.running.decay for loss in losses if loss.running is not None]
  running = float(options.get("running_decay", max(decays, default=0.0)))
  free = bool(extra.get("reference_free")) or not any(loss.reference for loss in losses)
  return Loss(
    name=canonical(name),
    terms=tuple(terms),
    kind=losses[0].kind if len(losses) == 1 else "pairs",
    # Rewards of a sum are reported in the β of its first term that has one.
    beta=betas[0] if betas else 1.0,
    needs_reference=not free,
    batch_wide=any(_is_batch_wide(loss, running) for loss in losses),
    mismatched=any(loss.mismatched for loss in losses),
    completions=max(loss.completions for loss in losses),
    divergence=_divergence(extra),
    ld_alpha=float(extra.get("ld_alpha", 1.0)),
    wpo=bool(extra.get("wpo")),
    running_decay=running,
  )


def _is_batch_wide(loss: Declaration, running_decay: float) -> bool:
  """Returns whether a loss reads the whole batch, with a running mean of this decay."""
  # With a running mean, kto's z0 comes from earlier batches and no longer from this one.
  replaced = loss.running is not None and loss.running.decay == 0 and running_decay > 0
  return loss.batch_wide and not replaced


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


def _bind(loss: Declaration, bound: dict[str, Any], in_sum: bool) -> LossFn:
  """Returns the loss with those of the given arguments bound that belong to it."""
  # Within a sum `sft` is a mean over tokens, on the scale of the losses it is added to.
  fn = reference_free.sft_mean if loss.fn is reference_free.sft and in_sum else loss.fn
  own = {key: value for key, value in bound.items() if key in loss.arguments}
  return functools.partial(fn, **own) if own else fn


def _divergence(extra: Mapping[str, Any]) -> Callable[[Array], Array] | None:
  """Returns f' of the divergence that the modifiers name; None for the reverse KL."""
  name = extra.get("link") or "reverse_kl"
  if name == "reverse_kl":
    return None
  if name == "alpha" and extra.get("link_alpha") is not None:
    return functools.partial(DIVERGENCES[name], link_alpha=extra["link_alpha"])
  return DIVERGENCES[name]
