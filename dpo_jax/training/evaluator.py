"""Evaluation in the course of training: held-out metrics, and facts of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np

from dpo_jax import logprobs, metrics, step
from dpo_jax.data import batches
from dpo_jax.distributed.executor import Executor
from dpo_jax.evaluation import sample_probe
from dpo_jax.evaluation.estimates import share_estimate, standard_error
from dpo_jax.generation import rollouts
from dpo_jax.structs import Array, PairLogps, PyTree, TokenBatch
from dpo_jax.training import verdict
from dpo_jax.training.run import Run
from dpo_jax.utils import following, progress


def make_evaluator(run: Run, reference_params: PyTree | None) -> Evaluator:
  """Makes the evaluator of a run.

  Args:
    run: the run.
    reference_params: a frozen reference, placed; None where there is none, or the state has it.
  """
  rows: list[TokenBatch] = []
  # On policy there is no completion to evaluate: held-out prompts are only sampled from.
  if run.data.held_out and run.data.sampler is None:
    # Kept in memory, all of one shape: every evaluation runs one compiled program on them.
    size = run.settings.eval_batch_size
    rows = list(
      batches.eval_batches(run.data.held_out, batch_size=size, batching=run.data.batching)
    )
  groups = run.data.groups
  return Evaluator(run.executor, run.objective, reference_params, rows, _make_probe(run), groups)


def _make_probe(run: Run) -> sample_probe.Probe | None:
  """Makes the probe that samples completions of held-out prompts, None where none are requested."""
  if not run.settings.eval_samples:
    return None
  return sample_probe.make_probe(
    run.model_config,
    run.objective.logps,
    run.data.held_out,
    samples=run.settings.eval_samples,
    eos_ids=rollouts.eos_ids(run.model_config, run.tokenizer),
    max_tokens=run.settings.eval_max_tokens,
    seed=run.settings.seed,
  )


class Evaluator:
  """Held-out metrics of a state, and facts of its samples.

  The log-probs of a reference that does not change are computed once, when this is made.

  Attributes:
    ready: whether there is anything to evaluate.
    held_out: of the latest evaluation, for the verdict on the run; None without completions.
  """

  def __init__(
    self,
    executor: Executor,
    objective: step.Objective,
    reference_params: PyTree | None,
    rows: Sequence[TokenBatch],
    probe: sample_probe.Probe | None = None,
    groups: Mapping[str, range] = MappingProxyType({}),
  ):
    """Computes the log-probs of the reference.

    Args:
      executor: compiles the forward pass.
      objective: what training minimises.
      reference_params: a frozen reference, placed, or None.
      rows: held-out batches without a micro-batch axis, on host.
      probe: samples from a policy.
      groups: name -> rows of the data set (`TokenBatch.row_NS`) whose metrics are named NAME/…, or
        without a name for ""; empty for one group of all.
    """
    self._executor, self._objective = executor, objective
    self._reference_params, self._rows, self._probe = reference_params, rows, probe
    self._groups = groups
    # `Objective.logps` drops nothing: dropout belongs to training alone.
    self._forward = executor.compile_forward(objective.logps)
    self._reference_XS = self._frozen_logps()
    self.ready = bool(rows or probe)
    self.held_out: verdict.HeldOut | None = None

  def __call__(self, state: step.TrainState) -> dict[str, float]:
    """Computes means over all held-out examples, and facts of samples.

    Every example is seen before the loss, once: a loss that looks at the whole batch looks at all.
    """
    found = self._probe(*self._local_params(state)) if self._probe else {}
    return found | (self._means(state) if self._rows else {})

  def _frozen_logps(self) -> np.ndarray | None:
    """Returns the log-probs of a reference that does not change, None where there is none."""
    kind = self._objective.reference_kind
    if not self._rows or isinstance(kind, step.NoReference):
      return None
    if isinstance(kind, step.StoredReference):
      return np.concatenate([kind.logps_fn(batch) for batch in self._rows])
    # One that follows the policy is part of the state, and is computed at every evaluation.
    return None if kind.sync else self._logps(self._reference_params)

  def _logps(self, params: PyTree) -> np.ndarray:
    """Returns the log-probs of every slot of every batch, one batch below the other."""
    # The compiled forward pass takes batches as the step does, with an axis of micro-batches.
    with_micro_batches = (jax.tree.map(lambda x: x[None], batch) for batch in self._rows)
    with progress.Progress("evaluating", len(self._rows), "batches") as shown:
      return np.concatenate([self._forward(params, x) for x in shown.of(with_micro_batches)])

  def _means(self, state: step.TrainState) -> dict[str, float]:
    """Computes the metrics of all held-out examples, group by group."""
    slots = jax.tree.map(lambda *x: np.concatenate(x), *map(logprobs.slots_of, self._rows))
    reference = self._reference_XS
    if state.reference is not None:
      reference = self._logps(following.current(state.reference, self._reference_params))
    # Read and not updated: an evaluation must not change the training that follows.
    running_stats = self._executor.to_host(state.running_stats)
    policy = self._logps(self._objective.policy(state.params, self._reference_params))

    def sums_of(some: logprobs.Slots) -> tuple[metrics.Sums, np.ndarray]:
      # All examples at once: a batch-wide loss of each batch by itself would be another number.
      sums, loss_B = step.sums_and_losses(self._objective, policy, reference, some, running_stats)
      return sums, np.asarray(loss_B)

    found = {}
    row_XS = np.concatenate([batch.row_NS for batch in self._rows])
    for name, rows in (self._groups or {"": None}).items():
      some = slots
      if rows is not None:
        # What is not of the group has the weight of an empty slot, so that even a batch-wide loss
        # is that of the group by itself.
        mine_XS = (row_XS >= rows.start) & (row_XS < rows.stop)
        some = slots._replace(weight_NS=slots.weight_NS * mine_XS)
      sums, loss_B = sums_of(some)
      prefix = f"{name}/" if name else ""
      examples = self._examples(policy, reference, some, loss_B, row_XS)
      found |= _divided(sums, prefix) | _counted(examples, prefix)
      errors = self._errors(policy, reference, some, examples)
      found |= {prefix + key: error for key, error in errors.items()}
      if not name:  # other groups have names, and are not judged by
        self.held_out = examples
    return found

  def _errors(
    self,
    policy_XS: Array,
    reference_XS: Array | None,
    slots: logprobs.Slots,
    held_out: verdict.HeldOut,
  ) -> dict[str, float]:
    """Returns standard errors of means that alerts read, where there are enough examples."""
    found = {"loss_error": standard_error(held_out.loss_B, held_out.weight_B)}
    if self._objective.loss.kind == "pairs":
      ratio_XS = policy_XS if reference_XS is None else policy_XS - reference_XS
      chosen_B, rejected_B = np.asarray(ratio_XS).reshape(-1, 2).T
      chosen_tokens_B, rejected_tokens_B = np.asarray(slots.tokens_NS).reshape(-1, 2).T
      weight_B = np.asarray(slots.weight_NS).reshape(-1, 2)[:, 0]
      shorter_B = (weight_B > 0) & (chosen_tokens_B < rejected_tokens_B)
      if shorter_B.sum() > 1:
        margin_B = self._objective.loss.beta * (chosen_B - rejected_B)[shorter_B]
        found["margins/chosen_shorter_error"] = standard_error(margin_B, weight_B[shorter_B])
    return {name: error for name, error in found.items() if np.isfinite(error)}

  def _examples(
    self,
    policy_XS: Array,
    reference_XS: Array | None,
    slots: logprobs.Slots,
    loss_B: np.ndarray,
    row_XS: np.ndarray,
  ) -> verdict.HeldOut:
    """Returns what the verdict on the run compares: losses of examples, and orders of pairs."""
    kind, completions = self._objective.loss.kind, self._objective.completions
    weight_B = np.asarray(slots.weight_NS).reshape(-1, completions)[:, 0]
    right_B = margin_B = None
    if kind == "pairs":
      # As in the metrics: policy minus reference comes first, and a margin of 0 is half right.
      zeros_XS = np.zeros_like(policy_XS)
      policy, reference = (
        PairLogps(*np.asarray(x_XS).reshape(-1, 2).T)
        for x_XS in (policy_XS, zeros_XS if reference_XS is None else reference_XS)
      )
      right_B = np.asarray(metrics.pairs_in_order(policy, reference))
      ratios = policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B
      margin_B = np.asarray(self._objective.loss.beta * (ratios[0] - ratios[1]))
    if kind == "text":  # the loss is a mean over tokens
      tokens_B = np.asarray(slots.tokens_NS).reshape(-1)
      weight_B, loss_B = weight_B * tokens_B, loss_B / np.maximum(tokens_B, 1)
    row_B = np.asarray(row_XS).reshape(-1, completions)[:, 0]
    return verdict.HeldOut(loss_B, weight_B, right_B, margin_B, row_B).select(weight_B > 0)

  def _local_params(self, state: step.TrainState) -> tuple[PyTree, PyTree | None]:
    """Returns one copy of the policy and of the reference, which share the base of adapters."""
    local_copy = self._executor.local_copy
    reference_params = following.current(state.reference, self._reference_params)
    if reference_params is not None:
      reference_params = local_copy(reference_params)
    policy = self._objective.policy(local_copy(state.params), reference_params)
    return policy, reference_params if self._objective.loss.needs_reference else None


def _counted(examples: verdict.HeldOut, prefix: str) -> dict[str, float]:
  """Returns the number of examples, named with a prefix, and of pairs the interval of accuracy."""
  found = {f"{prefix}pairs": float(len(examples.loss_B))}
  if examples.right_B is not None and len(examples.loss_B):
    right = share_estimate(examples.right_B, examples.weight_B)
    found |= {f"{prefix}rewards/accuracies_low": right.low}
    found |= {f"{prefix}rewards/accuracies_high": right.high}
  return found


def _divided(sums: metrics.Sums, prefix: str = "") -> dict[str, float]:
  """Returns means, named with a prefix."""
  return {f"{prefix}{key}": float(value) for key, value in metrics.divide(sums).items()}
