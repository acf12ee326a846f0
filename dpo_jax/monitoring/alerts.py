"""Alerts: rules that find common failures of preference training in the metrics, with remedies.

Every rule computes one number from the metrics so far, its level. An alert is raised at level 1,
and its episode ends below `CLEAR`; an episode raises one alert. Training metrics are averaged over
recent steps before a rule reads them, and must pass the limit by more than the error of the
average. They are compared with averages: one batch may have half the loss of the next. A held-out
metric must pass the limit in two evaluations in a row, unless it is far beyond it; where its error
is known, as NAME_error, it must pass it by more than that.

A watch depends only on the metrics it has seen. So a resumed run continues its episodes, and the
report finds the same alerts again from `metrics.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

# -- limits --------------------------------------------------------------------------------------

CLEAR = 0.8  # an episode ends here, so that a value near its limit raises one alert, not many
SURE = 1.5  # a level at which one evaluation is enough
HALF_LIFE = 20  # steps after which a step counts half: long against the noise, short against a run
WARM = 20  # steps before averages are read

# Nats per token. e^0.2 is a perplexity a fifth higher on the very completions that people chose.
# Some drift is right: log-ratios of the reference's samples have a negative mean under π* too.
CHOSEN_DRIFT = 0.2
# Nats per token, for both completions, and the share of pairs in which both lose probability. The
# limit is lower here: if chosen and rejected fall alike, some other text gains.
BOTH_DRIFT, BOTH_FELL = 0.15, 0.75
# Nats per token at which the learning rate is the first suspect: every token e times less likely.
COLLAPSE = 1.0
# Share of the loss's improvement since the start that may be lost again: a share, since losses
# differ in scale and some pass through zero. Then the least rise that counts, as a share of the
# lowest loss. Held out: several standard errors of a few hundred pairs. In training: much more,
# since runs that ended well had risen by a quarter after a steep warm-up.
LOSS_LOST, HELD_OUT_RISE, TRAINING_RISE = 0.2, 0.1, 0.5
# Standard errors beyond which a rise of the averaged training loss is more than noise. Many, since
# the lowest average is picked from thousands of steps; fewer above the first step, which is one.
LOSS_NOISE, FIRST_NOISE = 6.0, 4.0
# Standard errors by which other metrics must be beyond their limit, or have changed.
NOISE = 2.0
# A first loss that is so close to that of the held-out rows, as a share, is that of every row.
SAME_LOSS = 1e-3
# Pairs with a shorter chosen completion have less than this share of the margin of the others;
# read only where the accuracy shows that pairs are distinguished at all.
LENGTH_SHARE, LENGTH_ACCURACY = 0.1, 0.6
# Nats per completion, and per token. Figure 2 of Rafailov et al. 2023 ends at 20 nats, where
# rewards have long been flat. At half a nat per token every token is 1.6 times as likely as under
# the reference; short completions reach this limit first.
KL, KL_TOKEN = 20.0, 0.5
# Share of the first evaluation's entropy that may be lost, and the rise of the share of repeated
# 4-grams. Both are well beyond the noise of a few dozen samples.
ENTROPY_LOST, REPEATED = 0.5, 0.2
# Accuracy on the training pairs, and their loss as a share of the loss at the start. Labels by
# people never agree so well: the pairs are memorized, or some marker gives the label away.
SURE_ACCURACY, SPENT_LOSS = 0.99, 0.03
# Share of the updates that must reach weights kept in few bits. It is 1 in float32, and also where
# they are rounded stochastically; rounded to nearest, small updates are lost at every step.
KEPT = 0.5


class Alert(NamedTuple):
  """One line about a failure: the value and the remedy."""

  step: int
  name: str
  text: str


def scan(records: Iterable[Mapping[str, Any]]) -> list[Alert]:
  """Returns all alerts of a run from the lines of its `metrics.jsonl`, as they were raised live."""
  watch, found = Watch(), []
  for record in records:
    found += watch.see_record(record)
  return found


class Watch:
  """Applies the rules to the metrics of a run, and keeps their state.

  watch = Watch()
  for alert in watch.see(step, metrics):  # training metrics, or an evaluation under eval/…
    print(alert.text)
  """

  def __init__(self) -> None:
    self._facts = _Facts()
    self._raised: set[str] = set()
    self._waiting: set[str] = set()  # rules whose limit one evaluation has passed

  def see(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
    """Adds the metrics of one step or one evaluation; returns the alerts that they raise."""
    # A value that is not finite would stay in an average for ever; the run itself stops at one.
    values = {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}
    self._facts.add(values)
    return [
      Alert(step, rule.name, text)
      for rule in RULES
      if rule.reads <= values.keys() and (text := self._apply(rule)) is not None
    ]

  def see_record(self, record: Mapping[str, Any]) -> list[Alert]:
    """Adds a line of `metrics.jsonl`: the metrics of a step and, if any, of its evaluation."""
    # Training metrics first, as in the run: an evaluation comes after the step of its line.
    parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, value in record.items():
      if name != "step":
        parts[name.startswith("eval/")][name] = value
    return [alert for part in parts for alert in self.see(record["step"], part)]

  def _apply(self, rule: Rule) -> str | None:
    """Returns the alert's text if an episode of the rule begins, else None."""
    if not all(self._facts.ready(name) for name in rule.reads):
      return None
    level, text = rule.level(self._facts)
    if level < 1:
      self._waiting.discard(rule.name)
      if level < CLEAR:
        self._raised.discard(rule.name)
      return None
    if rule.name in self._raised:
      return None
    if rule.held_out and level < SURE and rule.name not in self._waiting:
      self._waiting.add(rule.name)
      return None
    self._raised.add(rule.name)
    return text


# -- metrics over time ---------------------------------------------------------------------------


class _Series:
  """One metric over time: a training metric averaged over recent steps, a held-out one as it is.

  Attributes:
    first, last: the first and the last value; of a training metric, those of one batch.
    start: the average of the first values, as many as a rule needs; nan before.
    lowest: the lowest value of `now` so far.
  """

  def __init__(self, name: str):
    held_out = name.startswith("eval/")
    self.keep = 0.0 if held_out else 0.5 ** (1 / HALF_LIFE)
    self.needed = 1 if held_out else WARM
    self.first = self.last = self.start = self.lowest = math.nan
    self.lowest_deviation = self.lowest_share = math.nan
    self.sum = self.spread = 0.0
    self.count = 0

  def add(self, value: float) -> bool:
    """Adds a value; returns True if the average is the lowest so far."""
    if self.count:
      # By the difference of two steps, to which a trend adds little: what grows is no noise.
      self.spread += (1 - self.keep) * ((value - self.last) ** 2 / 2 - self.spread)
    else:
      self.first = value
    self.last = value
    self.sum += (1 - self.keep) * (value - self.sum)
    self.count += 1
    if self.count == self.needed:
      self.start = self.now
    if self.count < self.needed or self.now >= self.lowest:
      return False
    self.lowest, self.lowest_deviation = self.now, self.deviation
    self.lowest_share = self._share()
    return True

  @property
  def now(self) -> float:
    """The exponential average with its bias corrected; the latest value if held out."""
    # The sum starts at 0, so while it is young it is too small by this factor.
    return self.sum / (1 - self.keep**self.count)

  @property
  def deviation(self) -> float:
    """Standard deviation of single values around their average."""
    n = self.count
    return math.sqrt(self.spread / (1 - self.keep ** (n - 1))) if n > 1 else 0.0

  @property
  def error(self) -> float:
    """Standard error of `now`, if the values of different steps are independent."""
    return self.deviation * self._share()

  @property
  def lowest_error(self) -> float:
    """Standard error of `lowest`."""
    # An average that is lowest by luck often has a deviation that is low by luck too.
    return max(self.deviation, self.lowest_deviation) * self.lowest_share

  def _share(self) -> float:
    """Returns the standard error of the average in units of the deviation of single values."""
    k, n = self.keep, self.count
    return math.sqrt((1 - k) / (1 + k) * (1 - k ** (2 * n))) / (1 - k**n)


class _Facts:
  """Every metric over time, and a copy of all from when the held-out loss was lowest."""

  def __init__(self) -> None:
    self._series: dict[str, _Series] = {}
    self._then: dict[str, tuple[float, float]] = {}

  def add(self, values: Mapping[str, float]) -> None:
    lowest = {name: self._of(name).add(value) for name, value in values.items()}
    if lowest.get("eval/loss"):
      ready = {name: series for name, series in self._series.items() if self.ready(name)}
      self._then = {name: (series.now, series.error) for name, series in ready.items()}

  def _of(self, name: str) -> _Series:
    return self._series.setdefault(name, _Series(name))

  def ready(self, name: str) -> bool:
    return name in self._series and self._series[name].count >= self._series[name].needed

  def __getitem__(self, name: str) -> _Series:
    return self._series[name]

  def then(self, name: str) -> tuple[float, float]:
    """Returns a training metric when the held-out loss was lowest, and its standard error.

    Where too few steps had been taken for an average, it is that of the first steps.
    """
    series = self._series[name]
    return self._then.get(name, (series.start, series.error))

  def error(self, name: str) -> float:
    """Returns the standard error of a held-out metric at its latest value; 0 if it is not known."""
    beside = self._series.get(f"{name}_error")
    return beside.now if beside else 0.0

  def loss_at_first(self) -> tuple[float, bool]:
    """Returns the training loss at the start of the run, and whether it is without noise.

    A policy that is the reference gives most losses one value for every row, such as log 2, which
    the held-out rows then have too. Otherwise it is the average of the first steps.
    """
    loss, held_out = self._series["loss"], self._series.get("eval/loss")
    same = held_out is not None and abs(held_out.first - loss.first) <= SAME_LOSS * abs(loss.first)
    return (loss.first, True) if same else (loss.start, False)


# -- the rules -----------------------------------------------------------------------------------


class Rule(NamedTuple):
  """One kind of failure.

  Attributes:
    name: name of the alert.
    reads: metrics that the rule needs; it is applied when all of them arrive.
    level: returns the level, and the text of the alert for a level of 1 or above.
  """

  name: str
  reads: frozenset[str]
  level: Callable[[_Facts], tuple[float, str]]

  @property
  def held_out(self) -> bool:
    return any(name.startswith("eval/") for name in self.reads)


def _slower(drift: float) -> str:
  """Returns the remedy that comes first where probability is lost very fast; else nothing."""
  return "a lower --lr, " if -drift >= COLLAPSE else ""


def _at_least(metric: _Series) -> float:
  """Returns what an average is at least, within its error."""
  return metric.now - NOISE * metric.error


def _at_most(metric: _Series) -> float:
  """Returns what an average is at most, within its error."""
  return metric.now + NOISE * metric.error


def _chosen_falls(facts: _Facts) -> tuple[float, str]:
  drift = facts["drift/chosen"].now
  return -_at_most(facts["drift/chosen"]) / CHOSEN_DRIFT, (
    "the model gives the chosen completions less probability than the reference does"
    f" ({-drift:.2f} nats per token less); try {_slower(drift)}--config.loss.sft_weight=1,"
    " --loss=dpop or a larger --beta"
  )


def _both_fall(facts: _Facts) -> tuple[float, str]:
  share = facts["drift/both_fell"].now
  chosen, rejected = facts["drift/chosen"].now, facts["drift/rejected"].now
  mass = facts["drift/pair_mass"].now
  level = min(
    _at_least(facts["drift/both_fell"]) / BOTH_FELL,
    -_at_most(facts["drift/chosen"]) / BOTH_DRIFT,
    -_at_most(facts["drift/rejected"]) / BOTH_DRIFT,
  )
  return level, (
    f"in {share:.0%} of pairs both completions lose probability, {-chosen:.2f} and {-rejected:.2f}"
    f" nats per token, together {-mass:.1f} nats per pair; it moved to text in neither; try"
    f" {_slower(min(chosen, rejected))}--config.loss.sft_weight=1, --loss=dpop, a"
    " larger --beta or fewer --epochs"
  )


def _overfits(facts: _Facts) -> tuple[float, str]:
  # The evaluation before the first step has no training loss to be compared with.
  if not facts.ready("loss"):
    return 0.0, ""
  held_out, training = facts["eval/loss"], facts["loss"]
  rise = held_out.now - held_out.lowest
  limit = max(
    LOSS_LOST * (held_out.first - held_out.lowest),
    HELD_OUT_RISE * abs(held_out.lowest),
    NOISE * facts.error("eval/loss"),
  )
  grows, sign = True, ""
  if facts.ready("rewards/margins"):
    then, error = facts.then("rewards/margins")
    margin = facts["rewards/margins"]
    grows = margin.now - then > NOISE * math.hypot(margin.error, error)
    sign = f" and the training margin grew from {then:.3g} to {margin.now:.3g}"
  # If the training loss rises too, that is the rule `loss rises`, not overfitting.
  then, error = facts.then("loss")
  falls = then - training.now > NOISE * math.hypot(training.error, error)
  level = rise / limit if falls and grows and limit > 0 else 0.0
  return level, (
    f"the held-out loss rose from {held_out.lowest:.4g} to {held_out.now:.4g} while the training"
    f" loss fell from {then:.4g} to {training.now:.4g}{sign}; try fewer --epochs, a"
    " lower --lr or a larger --beta"
  )


def _length_bias(facts: _Facts) -> tuple[float, str]:
  accuracy = facts["eval/rewards/accuracies"].now
  longer = facts["eval/margins/chosen_longer"].now
  shorter = facts["eval/margins/chosen_shorter"].now
  # A margin of few pairs may be small by chance: what it is at most counts.
  most = shorter + NOISE * facts.error("eval/margins/chosen_shorter")
  kept = most / longer if longer > 0 else 1.0
  return min((1 - kept) / (1 - LENGTH_SHARE), accuracy / LENGTH_ACCURACY), (
    f"held-out accuracy is {accuracy:.2f}, but the margin is {longer:.3g} where the chosen"
    f" completion is longer and {shorter:.3g} where it is shorter: the model learns length; try"
    " --config.loss.ld_alpha=0.5 or --loss=simpo"
  )


def _far_away(facts: _Facts) -> tuple[float, str]:
  kl, per_token = facts["eval/sampled/kl"].now, facts["eval/sampled/kl_per_token"].now
  least = kl - NOISE * facts.error("eval/sampled/kl")
  # Of the same samples, so with the same relative error.
  share = least / kl if kl > 0 else 0.0
  return share * max(kl / KL, per_token / KL_TOKEN), (
    f"samples are {kl:.1f} nats from the reference, {per_token:.2f} per token; try a larger"
    " --beta, fewer --epochs or a lower --lr"
  )


def _entropy_falls(facts: _Facts) -> tuple[float, str]:
  entropy = facts["eval/sampled/entropy"]
  most = entropy.now + NOISE * facts.error("eval/sampled/entropy")
  lost = 1 - most / entropy.first if entropy.first > 0 else 0.0
  return lost / ENTROPY_LOST, (
    f"the entropy of samples fell from {entropy.first:.2f} to {entropy.now:.2f} nats per token:"
    " they become alike; try a larger --beta, --config.loss.sft_weight=1 or"
    " fewer --epochs"
  )


def _repeats(facts: _Facts) -> tuple[float, str]:
  repeated = facts["eval/sampled/repetition"]
  # Samples of the first evaluation have an error as well, which is smaller where few repeat.
  least = repeated.now - NOISE * facts.error("eval/sampled/repetition")
  return (least - repeated.first) / REPEATED, (
    f"{repeated.now:.0%} of the 4-grams of samples repeat earlier ones, {repeated.first:.0%} at"
    f" first; try a larger --beta, --config.loss.sft_weight=1 or a"
    " lower --lr"
  )


def _by_heart(facts: _Facts) -> tuple[float, str]:
  accuracy, loss = facts["rewards/accuracies"], facts["loss"]
  first, _ = facts.loss_at_first()
  start = abs(first)
  sure = 1 - (SURE_ACCURACY - accuracy.now) / (1 - SURE_ACCURACY)
  # Some losses reach 0 or pass below it.
  spent = SPENT_LOSS * start / max(loss.now, 1e-9 * start) if start > 0 else 0.0
  return min(sure, spent), (
    f"on the training pairs accuracy is {accuracy.now:.3f} and the loss {loss.now:.3g}, at first"
    f" {first:.3g}: they are memorized; try fewer --epochs, and check whether"
    " something other than quality separates chosen from rejected completions"
  )


def _loss_rises(facts: _Facts) -> tuple[float, str]:
  on_policy = facts.ready("objective")
  loss = facts["objective"] if on_policy else facts["loss"]
  first, exact = (loss.start, False) if on_policy else facts.loss_at_first()
  noise = LOSS_NOISE * math.hypot(loss.error, loss.lowest_error)
  level, lowest = _rise(loss.now, loss.lowest, first, noise)
  # A loss that blows up within the first steps has no low average: it is compared with the first
  # step too, whose loss is that of one batch and has the error of one.
  noise = FIRST_NOISE * math.hypot(loss.error, 0.0 if exact else loss.deviation)
  level, lowest = max((level, lowest), _rise(loss.now, loss.first, first, noise))
  return level, (
    f"the training loss rose from {lowest:.4g} to {loss.now:.4g}, averaged over steps; try a"
    " lower --lr, more --config.optimizer.warmup_steps or a larger --batch_size"
  )


def _rise(now: float, lowest: float, first: float, noise: float) -> tuple[float, float]:
  """Returns the level of a rise of the training loss, and what it rose from."""
  limit = max(LOSS_LOST * (first - lowest), TRAINING_RISE * abs(lowest), noise)
  return (now - lowest) / limit if limit > 0 else 0.0, lowest


def _updates_are_lost(facts: _Facts) -> tuple[float, str]:
  kept, changed = facts["update/kept"].now, facts["update/changed"].now
  return (1 - _at_most(facts["update/kept"])) / (1 - KEPT), (
    f"only {max(kept, 0.0):.0%} of the updates reach the weights, of which a step changes"
    f" {changed:.2%}: in bfloat16 the others round back to what they were; try"
    " --config.model.param_dtype=float32 (--config.model.compute_dtype=bfloat16 keeps its products"
    " fast) or a larger --lr"
  )


RULES = tuple(
  Rule(name, frozenset(reads), level)
  for name, level, reads in (
    ("chosen falls", _chosen_falls, ["drift/chosen"]),
    (
      "both fall",
      _both_fall,
      ["drift/both_fell", "drift/pair_mass", "drift/chosen", "drift/rejected"],
    ),
    ("overfitting", _overfits, ["eval/loss"]),
    (
      "length bias",
      _length_bias,
      [
        "eval/rewards/accuracies",
        "eval/margins/chosen_longer",
        "eval/margins/chosen_shorter",
      ],
    ),
    ("far from the reference", _far_away, ["eval/sampled/kl", "eval/sampled/kl_per_token"]),
    ("entropy falls", _entropy_falls, ["eval/sampled/entropy"]),
    ("repetition", _repeats, ["eval/sampled/repetition"]),
    ("memorized", _by_heart, ["loss", "rewards/accuracies"]),
    ("loss rises", _loss_rises, ["loss"]),
    ("updates are lost", _updates_are_lost, ["update/kept", "update/changed"]),
  )
)
