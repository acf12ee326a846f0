"""Compares the declaration of a loss with what its function computes, on a few made-up examples.

A declaration that is wrong would otherwise be noticed by nobody: a reference would be loaded and
computed for nothing, or a loss of the whole batch computed device by device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.declaration import Declaration
from dpo_jax.structs import PairLogps, RankedLogps, UnpairedLogps, UserError
from dpo_jax.utils import functions

_SIZE, _COMPLETIONS = 4, 3


def probe(loss: Declaration) -> None:
  """Evaluates a loss on a few examples, and checks that its declaration is right.

  Raises:
    UserError: the function fails, gives something other than one number per example, has no finite
      gradient, reads padding, or depends on what its declaration says it does not read; the message
      has what to write.
  """
  policy, reference = _logps(loss, 0), _logps(loss, 1)
  given = _supplied(loss)
  against = reference if loss.reference else None
  value_B = _evaluate(loss, policy, against, given)
  _check_gradient(loss, policy, against, given, "at ordinary log-probs")
  if loss.reference:
    # Training begins here, where a square root or a norm of log-ratios has no gradient.
    _check_gradient(loss, reference, reference, given, "where the policy is the reference")
    other_B = _evaluate(loss, policy, _logps(loss, 2), given)
    _compare(loss, "reference", bool((other_B != value_B).any()))
  longer_B = _evaluate(loss, _longer(policy), against, given)
  _compare(loss, "averages", bool((longer_B != value_B).any()))
  # Losses that sort would not notice small changes.
  below, above = (
    _evaluate(loss, _others_moved(policy, by), against, given)[0] for by in (-50.0, 50.0)
  )
  _compare(loss, "batch_wide", bool(below != above))
  _check_padding(loss, policy, against, given)
  if loss.margin:
    assert isinstance(policy, PairLogps)
    moved = policy._replace(chosen_B=policy.chosen_B + 1, rejected_B=policy.rejected_B + 1)
    same = np.allclose(_evaluate(loss, moved, reference, given), value_B, rtol=1e-4, atol=1e-5)
    _compare(loss, "margin", same)
  if loss.reference and loss.at_reference is not None:
    found = _evaluate(loss, reference, reference, given)
    expected = np.broadcast_to(loss.value_at_reference(reference, given), found.shape)
    if not np.allclose(found, expected, rtol=1e-5, atol=1e-6):
      raise UserError(
        f"loss {loss.name!r} is declared to be {_numbers(expected)} where the policy is the"
        f" reference, and is {_numbers(found)} there; correct at_reference, or the loss"
      )


def _compare(loss: Declaration, field: str, found: bool) -> None:
  """Checks a field of the declaration against what was found.

  Raises:
    UserError: the two differ.
  """
  reads = {
    "reference": "log-probs of the reference",
    "averages": "the numbers of tokens",
    "batch_wide": "the other examples of the batch",
    "margin": "the log-ratios only through their difference",
  }[field]
  if getattr(loss, field) != found:
    raise UserError(
      f"loss {loss.name!r} is declared with {field}={getattr(loss, field)}, yet its value"
      f" {'depends' if found else 'does not depend'} on {reads}; write {field}={found}, or correct"
      " the loss"
    )


def _evaluate(loss: Declaration, policy: Any, reference: Any, given: dict[str, Any]) -> np.ndarray:
  """Calls the function; returns one finite number per example: [B]."""
  try:
    value_B = np.asarray(loss.fn(policy, reference, **given))
  except Exception as error:  # users' functions may raise anything
    hint = ""
    if not loss.reference:
      hint = " (declared with reference=False, it is given None as reference)"
    elif loss.kind == "unpaired" and not loss.mismatched:
      hint = " (mismatched_B is given only if it is declared with mismatched=True)"
    raise UserError(f"loss {loss.name!r} fails with {functions.describe(error)}{hint}") from error
  if value_B.shape != (_SIZE,):
    raise UserError(
      f"loss {loss.name!r} gives an array of shape {list(value_B.shape)} for {_SIZE} examples; it"
      " must give one number per example, and the caller takes the mean"
    )
  if not np.isfinite(value_B).all():
    raise UserError(f"loss {loss.name!r} gives {_numbers(value_B)} at ordinary log-probs")
  return value_B


def _check_gradient(
  loss: Declaration, policy: Any, reference: Any, given: dict[str, Any], where: str
) -> None:
  """Differentiates the loss as training does: traced, so without values that Python could read.

  Raises:
    UserError: JAX cannot trace or differentiate it, or its gradient is not finite.
  """

  def total(policy: Any, reference: Any, given: dict[str, Any]) -> Any:
    return jnp.sum(loss.fn(policy, reference, **given))

  try:
    jax.eval_shape(jax.grad(total), policy, reference, given)
  except Exception as error:  # users' functions may raise anything
    reason = functions.describe(error).partition("\n")[0]
    raise UserError(
      f"loss {loss.name!r} fails where JAX differentiates it, with {reason}; compute it with"
      " jax.numpy alone: no numpy, no float(), and jnp.where instead of an if that reads values"
    ) from error
  gradient = jax.grad(total)(policy, reference, given)
  for name, value in gradient._asdict().items():
    if value is not None and "tokens" not in name and not np.isfinite(value).all():
      raise UserError(
        f"loss {loss.name!r} has no finite gradient {where}: that of {name} is"
        f" {_numbers(np.ravel(value)[:_SIZE])}. Square roots and norms have none at 0; add a small"
        " number inside"
      )


def _check_padding(loss: Declaration, policy: Any, reference: Any, given: dict[str, Any]) -> None:
  """Checks that examples of weight 0, and completions that are absent, change no other loss.

  Raises:
    UserError: they do.
  """
  weight_B = np.float32(np.arange(_SIZE) < _SIZE - 1)
  present_BK = np.ones((_SIZE, _COMPLETIONS), bool)
  present_BK[:, -1] = False
  padded = given | {
    key: value
    for key, value in {"weight_B": weight_B, "present_BK": present_BK}.items()
    if key in given
  }
  if loss.batch_wide:
    moved = _others_moved(policy, 50.0, first=_SIZE - 1)
    one_B, other_B = (_evaluate(loss, x, reference, padded) for x in (policy, moved))
    if not np.array_equal(one_B[:-1], other_B[:-1]):
      raise UserError(
        f"loss {loss.name!r} reads examples of weight 0, which fill up batches; add the argument"
        " weight_B, the weight of every example, and leave out those of weight 0"
      )
  if isinstance(policy, RankedLogps) and loss.completions < _COMPLETIONS:
    completions_BK = np.array(policy.completions_BK)
    completions_BK[:, -1] += 50
    moved = policy._replace(completions_BK=completions_BK)
    one_B, other_B = (_evaluate(loss, x, reference, padded) for x in (policy, moved))
    if not np.array_equal(one_B, other_B):
      raise UserError(
        f"loss {loss.name!r} reads completions that are absent, where a prompt has fewer than"
        " others; add the argument present_BK, true for those that are there, or declare"
        f" completions={_COMPLETIONS} if every prompt must have so many"
      )


# --- made-up examples -----------------------------------------------------------------------------


def _logps(loss: Declaration, seed: int) -> Any:
  """Returns log-probs of the loss's kind of example; those of two seeds differ by about a nat."""
  # Close to each other, so that a loss with a threshold is not flat between them.
  shape = (_SIZE, _COMPLETIONS)
  base_BK = -np.random.default_rng(7).uniform(5, 9, shape)
  logps_BK = (base_BK + np.random.default_rng(seed).normal(0, 0.5, shape)).astype(np.float32)
  tokens_BK = np.random.default_rng(8).integers(2, 6, shape).astype(np.float32)
  if loss.kind == "unpaired":
    mismatched_B = logps_BK[:, 1] if loss.mismatched else None
    return UnpairedLogps(logps_BK[:, 0], mismatched_B, tokens_BK[:, 0])
  if loss.kind == "ranked":
    return RankedLogps(logps_BK, tokens_BK)
  return PairLogps(logps_BK[:, 0], logps_BK[:, 1], tokens_BK[:, 0], tokens_BK[:, 1])


def _supplied(loss: Declaration) -> dict[str, Any]:
  """Returns values of the arguments that come from the batch or the training state."""
  made = {
    "weight_B": np.ones(_SIZE, np.float32),
    "margin_B": np.linspace(0.5, 2, _SIZE, dtype=np.float32),
    "label_B": np.float32(np.arange(_SIZE) % 2),
    "present_BK": np.ones((_SIZE, _COMPLETIONS), bool),
    "reward_BK": np.random.default_rng(9).normal(0, 1, (_SIZE, _COMPLETIONS)).astype(np.float32),
  }
  return {key: made[key] for key in loss.supplied if key in made}


def _longer(logps: Any) -> Any:
  """Returns the log-probs with other numbers of tokens."""
  fields = [name for name in logps._fields if "tokens" in name]
  return logps._replace(**{name: getattr(logps, name) + 3 for name in fields})


def _others_moved(logps: Any, by: float, first: int = 1) -> Any:
  """Returns the log-probs with all examples behind the first ones moved by so many nats."""
  moved = {}
  for name in logps._fields:
    value = getattr(logps, name)
    if value is not None and "tokens" not in name and name != "rejected_B":
      shift = np.full(value.shape, by, np.float32)
      shift[:first] = 0
      moved[name] = value + shift
  return logps._replace(**moved)


def _numbers(value_B: np.ndarray) -> str:
  return ", ".join(f"{x:.6g}" for x in value_B)
