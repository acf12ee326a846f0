"""Evaluation of a run that has ended: its held-out rows before and after, with its own numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import step
from dpo_jax.evaluation.estimates import Estimate, mean_estimate, share_estimate
from dpo_jax.evaluation.evaluate import plain
from dpo_jax.structs import PyTree
from dpo_jax.training import setup, splits, verdict
from dpo_jax.training.evaluator import make_evaluator
from dpo_jax.training.run import Run
from dpo_jax.training.verdict import HeldOut
from dpo_jax.utils import following


def measure(opened: setup.Reopened) -> dict[str, Any]:
  """Evaluates a run on all rows that it held out.

  The compiled functions, the numbers and their types are those of training.

  Args:
    opened: the run; its parameters are taken over.

  Returns:
    Folders and files; `pairs`, or `examples` of other data; estimates as `eval_…`, with
    `eval_…_before` for what training started from, if that is known; the `verdict` on the two;
    `trained_on`, the number of held-out rows that were trained on too; and `in_training`, the same
    estimates of the examples that training evaluated, if these were fewer.
  """
  run, reference_params = opened.run, opened.reference_params
  if reference_params is not None:
    reference_params = run.executor.place(reference_params)
  # Without names: the metrics of sources and sets stay in the run's own files.
  groups = {name: rows for name, rows in run.data.groups.items() if not name}
  run = run._replace(data=run.data._replace(groups=groups))
  before = _before(opened, run, reference_params)
  if not run.adapter:  # what was trained takes its place
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, opened.start)
  after = _after(opened._replace(run=run), reference_params)
  if before is not None and not np.array_equal(_rows(before), _rows(after)):
    before = None
  unit = "pairs" if run.objective.loss.kind == "pairs" else "examples"
  found: dict[str, Any] = {
    "workdir": str(run.workdir),
    "model": str(opened.model),
    "reference": opened.reference,
    "data": opened.data,
    unit: len(after.loss_B),
    **_numbers(after),
  }
  if before is not None:
    found |= {f"{name}_before": value.mean for name, value in _estimates(before).items()}
    found["verdict"] = verdict.judge(before, after)
  rows, trained = run.data.rows, splits.read_trained(run.workdir)
  if rows is not None and trained is not None:
    digests = [row.digest for row in rows.held_out]
    found["trained_on"] = int(np.isin(np.array(digests, np.uint64), trained).sum())
  in_training = np.isin(_rows(after), _rows_in_training(run, opened.limit))
  # A loss of the whole batch is not that of some of its examples.
  if not in_training.all() and not run.objective.loss.batch_wide:
    some = after.select(in_training)
    found["in_training"] = {unit: len(some.loss_B)} | _numbers(some)
  return found


def _before(opened: setup.Reopened, run: Run, reference_params: PyTree | None) -> HeldOut | None:
  """Returns the evaluation before the first step: computed, or else as the run kept it."""
  if opened.start is None or run.objective.sync:
    kept = verdict.read(run.workdir, verdict.BEFORE)
    return None if kept is None or kept.row_B is None else _sorted(kept)
  stats = {key: jnp.float32(x) for key, x in run.objective.loss.running_stats.items()}
  evaluator = make_evaluator(run, reference_params)
  evaluator(step.TrainState(jnp.int32(0), run.executor.place(opened.start), (), stats))
  assert evaluator.held_out is not None
  return _sorted(evaluator.held_out)


def _after(opened: setup.Reopened, reference_params: PyTree | None) -> HeldOut:
  """Returns the evaluation of what was trained."""
  run, state = setup.load_trained(opened)
  in_state = following.is_in_state(run.objective.sync)
  evaluator = make_evaluator(run, None if in_state else reference_params)
  evaluator(state)
  assert evaluator.held_out is not None
  return _sorted(evaluator.held_out)


def _rows(held_out: HeldOut) -> np.ndarray:
  """Returns the rows of the examples: every evaluation here has them."""
  assert held_out.row_B is not None
  return held_out.row_B


def _sorted(held_out: HeldOut) -> HeldOut:
  """Returns an evaluation in the order of the rows: batches may have had another."""
  return held_out.select(np.argsort(_rows(held_out), kind="stable"))


def _rows_in_training(run: Run, limit: int) -> list[int]:
  """Returns the rows that training evaluated: the first ones of every set."""
  ends = np.cumsum(run.data.set_sizes)
  starts = ends - run.data.set_sizes
  return [
    example.row
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    for example in run.data.held_out[start : min(end, start + limit)]
  ]


def _numbers(held_out: HeldOut) -> dict[str, Any]:
  return plain(_estimates(held_out))


def _estimates(held_out: HeldOut) -> dict[str, Estimate]:
  """Computes accuracy and margin, of pairs, and the loss."""
  found = {}
  if held_out.right_B is not None and held_out.margin_B is not None:
    found["eval_accuracy"] = share_estimate(held_out.right_B, held_out.weight_B)
    found["eval_margin"] = mean_estimate(held_out.margin_B, held_out.weight_B)
  return found | {"eval_loss": mean_estimate(held_out.loss_B, held_out.weight_B)}
