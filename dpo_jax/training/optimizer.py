"""The optimizer: AdamW with a schedule, clipping and a weight-decay mask, all from Optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils import rounding

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
  *,
  learning_rate: float,
  schedule: str,
  warmup_steps: int | None,
  total_steps: int,
  final_fraction: float,
) -> optax.Schedule:
  """Makes the learning rate by step: linear warm-up, then constant, linear or cosine.

  Args:
    learning_rate: the peak.
    schedule: "constant", "linear" or "cosine", after the warm-up.
    warmup_steps: steps until the peak; None is 10, at most a tenth of all.
    total_steps: the step on which a schedule that decays reaches its end.
    final_fraction: the end, as a fraction of the peak.

  Raises:
    UserError: a value out of range, or a warm-up longer than the run.
  """
  if warmup_steps is None:
    warmup_steps = min(10, total_steps // 10)
  if schedule not in SCHEDULES:
    raise UserError(f"optimizer.schedule is {schedule!r}; known: {', '.join(SCHEDULES)}")
  if not 0 <= learning_rate < float("inf"):
    raise UserError(f"optimizer.learning_rate is {learning_rate!r}; it must be 0 or above")
  if not 0 <= final_fraction <= 1:
    raise UserError(f"optimizer.final_fraction is {final_fraction!r}; it must lie in [0, 1]")
  if not 0 <= warmup_steps <= total_steps:
    raise UserError(
      f"optimizer.warmup_steps is {warmup_steps}; it must lie between 0 and the {total_steps} steps"
      f" of the run: lower it, or train for more with train.steps or train.epochs"
    )
  # At least 1: a decay over 0 steps would divide by zero.
  rest = max(total_steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(learning_rate),
    "linear": optax.linear_schedule(learning_rate, final_fraction * learning_rate, rest),
    "cosine": optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction),
  }[schedule]
  if warmup_steps == 0:
    return after
  # The first update already moves: step 0 runs at 1/(warmup + 1) of the peak.
  start = learning_rate / (warmup_steps + 1)
  warmup = optax.linear_schedule(start, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def decays(params: PyTree) -> PyTree:
  """Marks what weight decay applies to: matrices and adapters; never norms, biases or tables."""

  def one(path: tuple[Any, ...], _: Any) -> bool:
    # By name, not by rank: stacked layers give norms and biases a second axis.
    names = [str(getattr(key, "key", key)) for key in path]
    return names[-1] in ("kernel", "lora_a", "lora_b")

  return jax.tree_util.tree_map_with_path(one, params)


def from_host(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Makes an optimizer read its state from the host's memory at each update.

  The new state is placed by whoever compiles the update, in `out_shardings`.
  """

  def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
    return tx.update(updates, jax.device_put(state, jax.memory.Space.Device), params)

  return optax.GradientTransformation(tx.init, update)


def in_float32(tx: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
  """Makes an optimizer compute in float32 while its state stays in the types that it is kept in.

  Moments of bfloat16 parameters are bfloat16. In that type b2 = 0.999 is 1, and the second moment
  would only grow. So the new moments are computed in float32 and rounded stochastically. The
  updates that it returns are float32: whoever adds them to the parameters rounds the sum.

  Args:
    tx: an optimizer whose state counts the updates made, as `count`.
    seed: of the rounding.
  """

  def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
    if not rounding.has_narrow((updates, state, params)):
      return tx.update(updates, state, params)
    wide, following = tx.update(*rounding.widen((updates, state, params)))
    # A function of the seed and the step, so that a resumed run rounds alike. The second argument
    # keeps these numbers apart from those of dropout and of the parameters.
    _, count = optax.tree.get_all_with_path(state, "count")[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), count)
    return wide, rounding.round_as(following, state, key)

  return optax.GradientTransformation(tx.init, update)


def make_optimizer(
  schedule: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float = 1.0,
  seed: int = 0,
) -> optax.GradientTransformation:
  """Makes AdamW (Loshchilov and Hutter 2019) behind clipping to a global norm.

  Args:
    schedule: learning rate by step.
    b1, b2: decay rates of the two moments.
    eps: added to the root of the second moment.
    weight_decay: decoupled, of matrices and adapters: see `decays`.
    clip_norm: largest global norm of a gradient; 0 for no clipping.
    seed: of the stochastic rounding of bfloat16 moments.

  Raises:
    UserError: a value with which a step would not go downhill.
  """
  # At 1, Adam's correction of the bias, 1 - b^t, would be 0, and it is divided by.
  for name, value in (("b1", b1), ("b2", b2)):
    if not 0 <= value < 1:
      raise UserError(f"optimizer.{name} is {value!r}; it must be 0 or above and below 1")
  for name, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm)):
    if not 0 <= value < float("inf"):
      raise UserError(f"optimizer.{name} is {value!r}; it must be 0 or above")
  # At 0, a parameter whose gradient is exactly 0 would be updated by 0 / 0.
  if not 0 < eps < float("inf"):
    raise UserError(f"optimizer.eps is {eps!r}; it must be above 0, such as 1e-8")
  # The decay is multiplied by the learning rate, as in PyTorch's AdamW, so it follows the schedule.
  adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
  # Clipped first: the moments must not see the gradient of a burst either.
  tx = optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
  return in_float32(tx, seed)


def build(
  steps: int,
  *,
  learning_rate: float,
  schedule: str,
  warmup_steps: int | None,
  final_fraction: float,
  **settings: Any,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Makes the learning-rate schedule and the optimizer of a run of so many steps.

  Args:
    steps: updates of the run.
    learning_rate, schedule, warmup_steps, final_fraction: of `make_schedule`.
    settings: of `make_optimizer`.
  """
  made = make_schedule(
    learning_rate=learning_rate,
    schedule=schedule,
    warmup_steps=warmup_steps,
    total_steps=steps,
    final_fraction=final_fraction,
  )
  return made, make_optimizer(made, **settings)
