"""The proof at step 0: policy and reference are the same model, and the loss is what it must be."""

from __future__ import annotations

import math

import jax
import numpy as np

from dpo_jax import logprobs, metrics, step
from dpo_jax.structs import Array, PyTree, TokenBatch, UserError
from dpo_jax.training.run import Run
from dpo_jax.utils import messages, progress


def check_step_zero(
  run: Run, trained: PyTree, reference_params: PyTree | None, batch: TokenBatch
) -> None:
  """Checks on the first pairs that the policy is the reference, and reports the loss.

  With a reference of its own folder, or one rounded to a narrower type, the two differ, and some
  losses read no reference: then the loss is only reported. The line that is printed says which.

  Args:
    run: the run.
    trained, reference_params: placed, as the first step takes them.
    batch: the first batch, on host.

  Raises:
    UserError: the parts do not belong together; nothing has been trained or written yet.
  """
  objective, executor = run.objective, run.executor
  # One micro-batch is enough, and takes no more memory than a step does.
  first = jax.tree.map(lambda x: x[:1], batch)
  micro = jax.tree.map(lambda x: x[0], first)
  # The program that evaluation runs, so that it is compiled once.
  forward = executor.compile_forward(objective.logps)
  with progress.Progress("compiling"):
    policy_NS = forward(objective.policy(trained, reference_params), first)
  # Before the comparison below, which would put the blame for NaN on the reference.
  if not np.isfinite(policy_NS).all():
    raise UserError(
      f"the model gives log-probs that are not finite before any training, on rows"
      f" {sorted(set(micro.row_NS[~np.isfinite(policy_NS)].tolist()))[:8]}; its weights or its"
      " configuration are broken"
    )
  # Shown, so that a wrong template or a wrong boundary is seen before hours of training.
  if run.data.sampler is None:
    example, decode = run.data.examples[0], run.tokenizer.decode
    messages.say(
      f"first row: {decode(example.prompt)[-60:]!r} -> {decode(example.completions[0])[:60]!r}"
    )
  kind, reference_NS = objective.reference_kind, None
  if isinstance(kind, step.StoredReference):
    reference_NS = np.asarray(kind.logps_fn(micro))
  elif isinstance(kind, step.LiveReference):
    reference_NS = forward(reference_params, first)

  def mean(objective: step.Objective, logps_NS: Array) -> float:
    slots, running_stats = logprobs.slots_of(micro), objective.loss.running_stats
    sums, _ = step.batch_sums(objective, logps_NS, reference_NS, slots, running_stats)
    return float(metrics.divide(sums)["loss"])

  with progress.Progress("checking step 0"):
    found, name = mean(objective, policy_NS), objective.loss.name
  if reference_NS is None:
    messages.say(
      f"loss on the first batch {found:.6f} (not checked: loss {name} reads no reference)"
    )
    return
  # The loss of a policy that gives exactly the reference's log-probs: log 2 for DPO. The value that
  # the loss declares, since a wrong formula would agree with itself; that of the formula only where
  # none is declared.
  declared = objective.loss.at_reference()
  expected = mean(objective._replace(loss=declared or objective.loss), reference_NS)
  if not run.settings.starts_as_reference:
    messages.say(
      f"loss on the first batch {found:.6f} (not checked: policy and reference differ; equal ones"
      f" would give {expected:.6f})"
    )
    return
  # Written with `not <=`, so that NaN is refused. Relative for a large loss, which float32 rounds
  # in proportion to its size.
  if not abs(found - expected) <= 1e-5 * max(1.0, abs(expected)):
    raise UserError(
      f"at step 0 policy and reference are the same weights, yet the loss is {found:.6f} and not"
      f" {expected:.6f}: the two were not computed alike, and training would not be what it says"
    )
  value = f"log 2 = {found:.6f}" if abs(expected - math.log(2)) < 1e-6 else f"{found:.6f}"
  equal = "policy equals reference"
  if isinstance(kind, step.StoredReference):
    equal = "policy equals the stored log-probs of the reference"
  if declared is None:
    equal += f"; loss {name} declares no value there, so its own formula was compared"
  elif "log 2" not in value:
    equal += f"; the value that loss {name} declares there"
  messages.say(f"check passed: loss at the start is {value} ({equal})")
