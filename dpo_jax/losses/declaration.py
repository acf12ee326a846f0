"""Declarations: a loss says on its function what it needs, and all other code reads it there.

`declare` is the one place where a loss says which examples it takes, whether it reads a reference,
the values that its arguments may have, and its value where the policy is the reference. The
registry, the command line, set-up, the check at step 0 and the tests find it through `LOSSES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from dpo_jax.structs import Array, UserError

LossFn = Callable[..., Array]
_Fn = TypeVar("_Fn", bound=Callable[..., Array])

KINDS = ("pairs", "text", "unpaired", "ranked")
# Arguments that come from the batch, with the kinds of examples that have them. A loss receives
# those that its function names; the user sets all others.
SUPPLIED: dict[str, tuple[str, ...]] = {
  "weight_B": ("pairs", "unpaired", "ranked"),
  "margin_B": ("pairs",),
  "label_B": ("unpaired",),
  "present_BK": ("ranked",),
  "reward_BK": ("ranked",),
}
# What an argument may be: an interval such as "[0, 0.5)", or a tuple of words.
Range = str | tuple[str, ...]
# β means the same in all losses, so that no loss repeats its range.
_USUAL_RANGES: dict[str, Range] = {"beta": "(0, inf)"}


class Running(NamedTuple):
  """A running mean over earlier batches, which a loss receives as an argument.

  Attributes:
    argument: the argument that receives it; the mean starts at 0.
    batch_value: computes the value of one batch from the metrics of the step.
    decay: share of the mean that a step keeps by default; 0 means that the loss uses its batch's
      own value, and there is no running mean unless the user sets `running_decay`.
  """

  argument: str
  batch_value: Callable[[Mapping[str, Array]], Array]
  decay: float


class Declaration(NamedTuple):
  """The needs of a loss; the fields are the arguments of `declare`, and those below.

  Attributes:
    name: name of the function.
    fn: the function.
    arguments: the keyword arguments that the user may set, with their defaults.
    supplied: names of the keyword arguments that come from the batch or the training state.
  """

  name: str
  fn: LossFn
  arguments: dict[str, Any]
  supplied: frozenset[str]
  kind: str
  reference: bool
  at_reference: float | Callable[..., Array] | None
  ranges: dict[str, Range]
  averages: bool
  margin: bool
  uniform_reference: bool
  batch_wide: bool
  likelihood: bool
  mismatched: bool
  completions: int
  on_policy: bool
  running: Running | None
  aliases: tuple[str, ...]

  def value_at_reference(self, policy: Any, given: Mapping[str, Any]) -> Any:
    """Returns the declared value where the policy is the reference: a number, or [B].

    Args:
      policy: log-probs, which are those of the reference too.
      given: arguments that are set or supplied; the others have their defaults.
    """
    if not callable(self.at_reference):
      return self.at_reference
    known = {
      name: parameter.default for name, parameter in inspect.signature(self.fn).parameters.items()
    } | dict(given)
    _, *names = inspect.signature(self.at_reference).parameters
    return self.at_reference(policy, **{name: known[name] for name in names})


# In the order of the definitions, which is that of tables and messages.
_DECLARED: dict[Callable[..., Any], Declaration] = {}
# Stands for an argument that was left out, where None is a value.
_LEFT_OUT: Any = object()


def declare(
  *,
  reference: bool,
  kind: str = "pairs",
  at_reference: float | Callable[..., Array] | None = _LEFT_OUT,
  ranges: Mapping[str, Range] | None = None,
  averages: bool = False,
  margin: bool = False,
  uniform_reference: bool = False,
  batch_wide: bool = False,
  likelihood: bool = False,
  mismatched: bool = False,
  completions: int = 2,
  on_policy: bool = False,
  running: Running | None = None,
  aliases: tuple[str, ...] = (),
) -> Callable[[_Fn], _Fn]:
  """Declares a function to be a loss: (policy, reference, *, arguments) -> loss_B.

  The function is returned as it is. Its keyword arguments need defaults, unless they are named in
  `SUPPLIED`: then they come from the batch.

  Args:
    reference: whether it reads the reference. If not, none is loaded, and the function gets None.
    kind: kind of example: "pairs" (the log-probs are `PairLogps`), "text" (`PairLogps`, chosen
      alone), "unpaired" (`UnpairedLogps`) or "ranked" (`RankedLogps`).
    at_reference: value where policy and reference are equal, which step 0 compares with the loss: a
      number; or a function (policy, argument, ...) -> [B] that names the arguments it reads; or
      None if nothing simpler than the loss itself gives it. Required of losses with a reference.
    ranges: what each argument may be: an interval such as "(0, inf)" or "[0, 0.5)", or a tuple of
      words. Required for every argument but `beta` and those that are true or false.
    averages: whether it divides by numbers of tokens.
    margin: whether it reads the log-ratios only through their difference; f' of a divergence may
      then replace them.
    uniform_reference: whether it keeps a meaning when the reference is uniform (`reference_free`);
      every loss of the margin does.
    batch_wide: whether the loss of an example depends on the other examples of the global batch.
    likelihood: whether it contains -log π(y_w), so that `sft_weight` would add that term twice.
    mismatched: for unpaired completions, whether it reads `mismatched_B`.
    completions: for ranked completions, the fewest that a prompt must have.
    on_policy: whether the completions must be samples of the current policy, with rewards.
    running: a running mean that it receives.
    aliases: other names that the user may write.

  Raises:
    UserError: the declaration does not fit the function; the message has the line to write.
  """

  def add(fn: _Fn) -> _Fn:
    name = getattr(fn, "__name__", type(fn).__name__)
    own, supplied = _keywords(name, fn, kind, running)
    if kind not in KINDS:
      raise UserError(f"loss {name!r}: kind is {kind!r}; known: {', '.join(KINDS)}")
    if reference and at_reference is _LEFT_OUT:
      raise UserError(
        f"loss {name!r}: declare its value where the policy is the reference, which step 0 checks:"
        f" @declare(reference=True, at_reference=...), a number such as math.log(2), a function of"
        " the log-probs and arguments, or None if only the loss itself gives it"
      )
    if not (at_reference in (None, _LEFT_OUT) or isinstance(at_reference, int | float | Callable)):
      raise UserError(
        f"loss {name!r}: at_reference is {at_reference!r}; it must be a number such as math.log(2),"
        " a function of the log-probs and arguments, or None"
      )
    all_ranges = {key: _USUAL_RANGES[key] for key in own if key in _USUAL_RANGES} | dict(
      ranges or {}
    )
    _check_ranges_of(name, own, all_ranges)
    _DECLARED[fn] = Declaration(
      name=name,
      fn=fn,
      arguments=own,
      supplied=supplied,
      kind=kind,
      reference=reference,
      at_reference=at_reference if reference else None,
      ranges=all_ranges,
      averages=averages,
      margin=margin,
      uniform_reference=uniform_reference or margin,
      batch_wide=batch_wide,
      likelihood=likelihood,
      mismatched=mismatched,
      completions=completions,
      on_policy=on_policy,
      running=running,
      aliases=aliases,
    )
    return fn

  return add


def declarations() -> Iterable[Declaration]:
  """Returns the declarations of all losses that have been defined so far."""
  return list(_DECLARED.values())


def declaration_of(fn: Callable[..., Any]) -> Declaration | None:
  """Returns the declaration of a function; None if it has none."""
  return _DECLARED.get(fn)


# --- the function's arguments ---------------------------------------------------------------------


def _keywords(
  name: str, fn: LossFn, kind: str, running: Running | None
) -> tuple[dict[str, Any], frozenset[str]]:
  """Returns the keyword arguments that a user may set, with defaults, and those supplied."""
  parameters = list(inspect.signature(fn).parameters.values())
  keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
  if [p.name for p in parameters[:2]] != ["policy", "reference"] or len(parameters) != 2 + len(
    keywords
  ):
    raise UserError(
      f"loss {name!r} takes {inspect.signature(fn)}; write it as"
      f" def {name}(policy, reference, *, beta=0.1): the log-probs, then arguments by name"
    )
  supplied = {p.name for p in keywords if p.name in SUPPLIED}
  if running is not None:
    if running.argument not in {p.name for p in keywords}:
      raise UserError(f"loss {name!r} has a running mean but no argument {running.argument!r}")
    supplied.add(running.argument)
  for argument in supplied & SUPPLIED.keys():
    if kind not in SUPPLIED[argument]:
      raise UserError(
        f"loss {name!r} reads {argument}, which {kind} examples do not have; declare"
        f" kind={SUPPLIED[argument][0]!r}, or give the argument another name"
      )
  own = {p.name: p.default for p in keywords if p.name not in supplied}
  if "name" in own:
    raise UserError(
      f"loss {name!r}: its argument name would be the field loss.name, which chooses the loss; give"
      " it another name"
    )
  for argument, default in own.items():
    if not isinstance(default, (bool, int, float, str)):
      raise UserError(
        f"loss {name!r}: its argument {argument} needs a default that is a number or a text, such"
        f" as {argument}=1.0 (those that come from the batch are named {', '.join(SUPPLIED)})"
      )
  return own, frozenset(supplied)


def _check_ranges_of(name: str, own: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
  """Checks that every argument has a range that contains its default."""
  for argument in ranges:
    if argument not in own:
      raise UserError(f"loss {name!r} declares a range of {argument!r}, which is no argument of it")
  for argument, default in own.items():
    if isinstance(default, bool):
      continue
    if argument not in ranges:
      line = '("words", "it may be")' if isinstance(default, str) else '"(0, inf)"'
      raise UserError(
        f"loss {name!r}: declare what its argument {argument} may be:"
        f' @declare(..., ranges={{"{argument}": {line}}})'
      )
    _check_range(name, argument, default, ranges[argument])
    if not contains(ranges[argument], default):
      raise UserError(
        f"loss {name!r}: the default {argument}={default!r} is not"
        f" {in_words(ranges[argument])}, as its range says"
      )


def _check_range(name: str, argument: str, default: Any, allowed: Any) -> None:
  """Checks that a range is an interval, or for texts a tuple of words."""
  if isinstance(default, str):
    if isinstance(allowed, tuple) and all(isinstance(word, str) for word in allowed):
      return
    words = [allowed] if isinstance(allowed, str) else list(allowed)
    line = f"({', '.join(map(repr, words))}{',' if len(words) == 1 else ''})"
    raise UserError(
      f"loss {name!r}: the range of {argument} is {allowed!r}; write a tuple of words, {line}"
    )
  if not isinstance(allowed, str):
    raise UserError(
      f"loss {name!r}: the range of {argument} is {allowed!r}; write an interval as a text, such as"
      ' "(0, inf)" or "[0, 1]"'
    )


# --- ranges ---------------------------------------------------------------------------------------


def _bounds(interval: str) -> tuple[float, float, bool, bool]:
  """Parses an interval such as "[0, 0.5)": its bounds, and whether each belongs to it.

  Raises:
    UserError: the text is no interval.
  """
  try:
    low, high = (float(part) for part in interval[1:-1].split(","))
  except ValueError:
    low = high = math.nan
  if not (interval[:1] in ("(", "[") and interval[-1:] in (")", "]") and low < high):
    raise UserError(f'{interval!r} is no interval; write one as "(0, inf)", "[0, 1]" or "[0, 0.5)"')
  return low, high, interval[0] == "[", interval[-1] == "]"


def contains(allowed: Range, value: Any) -> bool:
  """Returns whether a value lies in a range; false for nan and for a value of another type."""
  if isinstance(allowed, tuple):
    return value in allowed
  low, high, low_belongs, high_belongs = _bounds(allowed)
  if isinstance(value, (bool, str)):
    return False
  try:
    above = low <= value if low_belongs else low < value
    return bool(above and (value <= high if high_belongs else value < high))
  except TypeError:  # a list, which does not compare with a number
    return False


def in_words(allowed: Range) -> str:
  """Describes a range in words: "(0, inf)" is "a number above 0"."""
  if isinstance(allowed, tuple):
    return f"one of {', '.join(allowed)}"
  low, high, low_belongs, high_belongs = _bounds(allowed)
  if math.isinf(low) and math.isinf(high):
    return "a finite number"
  if math.isinf(high):
    return f"a number of {low:g} or above" if low_belongs else f"a number above {low:g}"
  if math.isinf(low):
    return f"a number of {high:g} or below" if high_belongs else f"a number below {high:g}"
  if low_belongs:
    return f"a number from {low:g} to {'' if high_belongs else 'below '}{high:g}"
  return f"a number above {low:g}{', at most' if high_belongs else ' and below'} {high:g}"
