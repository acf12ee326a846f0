"""Divergence: finds a run whose weights are broken, so that it stops with the likely cause.

The loss does not tell: `ipo` may double at the right learning rate, and one of bounded terms, such
as `kto`, stays as it was in a model that is lost. But with every loss, the completions to learn
from stay about as likely as they were. So their mean log-prob is watched: of chosen, best or
desirable completions, or of supervised texts, in nats per completion.

A step is bad if that log-prob is both `TIMES` that before any update, and `NATS` below it. Before
any update the first step has that of one batch, and a batch of one or two short completions says
little: the average of the held-out rows counts where it is lower, and a step is not bad while its
own completions are about as likely as under the reference. A run has diverged if most of the last
`WINDOW` steps are bad: a batch of odd rows is a step or two. Runs at the right learning rate stay
within 1.3 times, for every kind of loss; at a rate a thousand times as large they pass 10
(docs/evaluation.md has the numbers). What lies in between is left to the alerts and to the verdict
by the held-out rows.

One step beyond both limits `LOST` times over decides alone. At a rate of 1,000 the next steps may
look harmless: weights so large that the outputs no longer depend on the input give every token the
same probability, and a gradient of 0.

Samples of the policy are likely by construction: on policy, a run stops only at a loss or gradient
that is not finite.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dpo_jax.structs import UserError

TIMES, NATS, WINDOW = 5.0, 30.0, 10
LOST = 1000.0  # times `TIMES` and `NATS`: no batch of odd rows is so unlikely
DRIFT = 0.1  # nats per token by which completions of a bad step are less likely than under π_ref
LAST = 3  # steps that decide at the end of a run, which may have fewer than a window
# Metrics that are watched, in this order: a run has one of them.
WATCHED = ("logps/chosen", "logps/best", "logps/desirable")
SMALL = 100_000_000  # weights of a model that takes a much larger learning rate


class Diverged(UserError):
  """Ends a run whose weights are broken, or whose loss is not finite."""


class Divergence:
  """Watches the metrics of every step.

  Attributes:
    first_loss: of the first step; nan as long as there is none.
    first_logp: before any update: of the first step, or of the held-out rows if that is lower.
    suspect: whether the latest step is bad: its weights should not replace those saved before.
  """

  def __init__(self, first_loss: float = math.nan, first_logp: float = math.nan):
    """Starts with what the first step had, where a run is resumed."""
    self.first_loss, self.first_logp, self.suspect = first_loss, first_logp, False
    self._lost = False
    self._bad: collections.deque[bool] = collections.deque(maxlen=WINDOW)

  def add_held_out(self, metrics: Mapping[str, Any]) -> None:
    """Adds the metrics of the held-out rows before the first step."""
    logp = watched(metrics)
    if not math.isnan(logp) and not logp >= self.first_logp:
      self.first_logp = logp

  def add(self, metrics: Mapping[str, Any]) -> None:
    """Adds the metrics of a step."""
    loss, logp = float(metrics["loss"]), watched(metrics)
    if math.isnan(self.first_loss):
      self.first_loss = loss
      self.first_logp = float(np.fmin(logp, self.first_logp))
    if math.isnan(self.first_logp):
      self.first_logp = logp
    # Of a batch without desirable completions, there is no log-prob: the step is as the one before.
    if not math.isnan(logp):
      first = self.first_logp
      drift = metrics.get("drift/chosen")
      # Both of the same completions, so their lengths do not matter.
      less_likely = drift is None or not float(drift) > -DRIFT
      self.suspect = less_likely and logp < TIMES * first and logp < first - NATS
      self._lost |= less_likely and logp < LOST * TIMES * first and logp < first - LOST * NATS
    self._bad.append(self.suspect)

  def has_diverged(self, *, at_end: bool = False) -> bool:
    """Returns True if most of the last steps are bad, or one was so bad that it decides alone.

    Args:
      at_end: whether this was the last step of the run: then fewer steps decide.
    """
    if self._lost:
      return True
    if at_end:
      last = list(self._bad)[-LAST:]
      return sum(last) > len(last) / 2
    return sum(self._bad) > WINDOW / 2


def first_of(records: Iterable[Mapping[str, Any]]) -> Divergence:
  """Returns a watch that has seen only how a run began, from its `metrics.jsonl`."""
  records = list(records)
  steps = [record for record in records if record.get("loss") is not None]
  logps = (value for value in map(watched, steps) if not math.isnan(value))
  found = Divergence(float(steps[0]["loss"]) if steps else math.nan, next(logps, math.nan))
  for record in records:
    if record["step"] == 0:
      found.add_held_out({key.removeprefix("eval/"): value for key, value in record.items()})
  return found


def watched(metrics: Mapping[str, Any]) -> float:
  """Returns the log-prob that is watched, in nats per completion; nan where a step has none."""
  found = (metrics[name] for name in WATCHED if metrics.get(name) is not None)
  return float(next(found, math.nan))


def usual_rates(kind: str, *, adapters: bool, weights: int) -> str:
  """Returns the usual learning rates of AdamW for a run such as this, as a phrase.

  Those of Rafailov et al. 2023 (1e-6), Tunstall et al. 2023 (5e-7), Meng et al. 2024 (3e-7 to 1e-6)
  and of the defaults of TRL and peft's examples; small models take more.

  Args:
    kind: of the loss; "text" is supervised.
    adapters: whether adapters are trained.
    weights: numbers that are trained.
  """
  if adapters:
    return "1e-4 to 3e-4 for adapters" if kind == "text" else "5e-6 to 1e-4 for adapters"
  if weights < SMALL:
    return "1e-5 to 1e-3 for a model of this size"
  return "1e-5 to 5e-5" if kind == "text" else "5e-7 to 1e-5"
