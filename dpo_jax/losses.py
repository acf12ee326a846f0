"""Every preference loss, once: log-probabilities in, one number a pair out.

With c = log π(y_w|x)/π_ref(y_w|x), r the same of y_l, m = c - r and z = βm, all in nats and summed
over answer tokens. To add a loss: write the function, name it in `LOSSES`, test it by hand, and
give it a row in the README's table.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps, UserError


def margins(policy: PairLogps, reference: PairLogps) -> Array:
  """m: how much more than the reference the policy prefers chosen to rejected, nats: [B].

  Policy is compared with reference within an answer first: the two are close, so their difference
  is exact where the difference between answers would have rounded it away.
  """
  return (policy.chosen_B - reference.chosen_B) - (policy.rejected_B - reference.rejected_B)


def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Array:
  """DPO: minus the log-likelihood of the label under Bradley-Terry.

    loss = -log σ(β m),   m = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)

  Args:
    policy: completion log-probs under the policy being trained, summed, in nats.
    reference: the same under the frozen reference.
    beta: reward units per nat; larger holds the policy nearer the reference.

  Returns:
    loss_B: one loss a pair; the caller takes the mean. log 2 where policy equals reference.

  Rafailov et al. 2023, eq. 7.
  """
  # log_sigmoid, not log(sigmoid): finite, with a gradient, at margins of -1000.
  return -jax.nn.log_sigmoid(beta * margins(policy, reference))


def cdpo(
  policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Array:
  """Conservative DPO: cross-entropy against labels that are wrong with probability ε.

    loss = -(1-ε) log σ(z) - ε log σ(-z)

  The margin is drawn to the finite log((1-ε)/ε)/β. `label_smoothing` is ε, in [0, 1/2).
  Mitchell 2023, "A note on DPO with noisy preferences", eq. 4.
  """
  z_B = beta * margins(policy, reference)
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(z_B) - label_smoothing * jax.nn.log_sigmoid(
    -z_B
  )


def robust(
  policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Array:
  """Robust DPO: unbiased for the loss on clean labels when a share ε of them was flipped.

    loss = (-(1-ε) log σ(z) + ε log σ(-z)) / (1-2ε)

  Unbounded below on a single pair; log 2 where policy equals reference. `label_smoothing` is ε, in
  [0, 1/2). Chowdhury et al. 2024, eq. 12.
  """
  z_B = beta * margins(policy, reference)
  clean_B = -(1 - label_smoothing) * jax.nn.log_sigmoid(z_B)
  return (clean_B + label_smoothing * jax.nn.log_sigmoid(-z_B)) / (1 - 2 * label_smoothing)


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Array:
  """IPO: the margin itself, in nats, is regressed onto 1/(2β).

    loss = (m - 1/(2β))²

  β is the paper's τ; sums over tokens, not averages. 1/(4β²) where policy equals reference.
  Azar et al. 2023, eq. 17.
  """
  return jnp.square(margins(policy, reference) - 1 / (2 * beta))


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Array:
  """SLiC's hinge on DPO's margin.

    loss = max(0, 1 - z)

  One where policy equals reference. Zhao et al. 2023, eq. 1, in the form of Liu et al. 2023, eq. 9.
  """
  return jax.nn.relu(1 - beta * margins(policy, reference))


def sft(policy: PairLogps, reference: PairLogps | None = None) -> Array:
  """Supervised training on the chosen answer; the reference is not read.

  loss = -log π(y_w|x), nats a sequence; the caller divides by the tokens of the whole batch.
  """
  del reference
  return -policy.chosen_B


LossFn = Callable[..., Array]

LOSSES: dict[str, LossFn] = {
  "sigmoid": sigmoid,
  "cdpo": cdpo,
  "robust": robust,
  "ipo": ipo,
  "hinge": hinge,
  "sft": sft,
}

# Averaged over tokens of the global batch, not over pairs; sees the chosen answer alone and no
# reference. Everything else is a mean over pairs.
SUPERVISED = frozenset({"sft"})


def arguments(name: str) -> dict[str, Any]:
  """The keyword arguments a loss takes, with their defaults."""
  parameters = inspect.signature(LOSSES[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def resolve(name: str, **given: float) -> LossFn:
  """A loss with its arguments bound: (policy, reference) -> loss_B.

  Raises:
    UserError: a name that is not in `LOSSES`, an argument the loss does not read, or a value out
      of range; said before anything is loaded.
  """
  if name not in LOSSES:
    near = difflib.get_close_matches(str(name), LOSSES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(LOSSES)}"
    raise UserError(f"loss.name is {name!r}, which is no loss of this project; {hint}")
  known = arguments(name)
  for key, value in given.items():
    if key not in known:
      takes = f"takes {', '.join(known)}" if known else "takes no argument"
      raise UserError(f"loss {name!r} does not read {key} = {value!r}; it {takes}")
  beta, epsilon = given.get("beta", 1.0), given.get("label_smoothing", 0.0)
  if not 0 < beta < float("inf"):
    raise UserError(f"loss.beta is {beta!r}; it must be a number above 0, such as 0.1")
  if not 0 <= epsilon < 0.5:
    raise UserError(
      f"loss.label_smoothing is {epsilon!r}; it is the share of wrong labels, from 0 to below 0.5"
    )
  return functools.partial(LOSSES[name], **given)
