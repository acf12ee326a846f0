"""The training loop: from the initial parameters, or the latest checkpoint, to the last step.

`prepare` does all that may still fail before training and writes nothing into the workdir; `train`
takes the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax import logprobs, step
from dpo_jax.distributed import executor, memory, preemption, processes
from dpo_jax.model import transformer
from dpo_jax.monitoring import divergence, loggers
from dpo_jax.monitoring.loggers import Callback, Loggers, Silent
from dpo_jax.structs import PyTree, TokenBatch
from dpo_jax.training import datasets, reference_cache, verdict
from dpo_jax.training.checkpoint import Best, Checkpoints, SavingTimes, latest_step
from dpo_jax.training.evaluator import Evaluator, make_evaluator
from dpo_jax.training.metrics_writer import MetricsWriter
from dpo_jax.training.run import Run
from dpo_jax.training.sanity import check_step_zero
from dpo_jax.utils import following


class Prepared(NamedTuple):
  """A run that is ready to take its next step.

  Attributes:
    start: steps that the latest checkpoint has; 0 for a new run.
    like: shapes and types of the state, and where its leaves are read to.
    state: the state before the first step; None where a checkpoint brings it.
    reference_params: the frozen reference, placed; None where the state has it or nothing needs it.
    feed_after: (start, share) -> the batches of the steps after `start`.
  """

  start: int
  like: step.TrainState
  state: step.TrainState | None
  reference_params: PyTree | None
  feed_after: Callable[..., datasets.Feed]


class Trained(NamedTuple):
  """The end of training: the parameters and the best checkpoint.

  Attributes:
    params: what was trained: one copy of it, on device, or on host where it was read again.
    step: the step that it is of.
    best: the best checkpoint; None if no evaluation tells.
  """

  params: PyTree
  step: int
  best: Best | None


def prepare(run: Run, trained: PyTree, reference_params: PyTree | None) -> Prepared:
  """Places the parameters and checks step 0; nothing is written into the workdir.

  Args:
    run: the run.
    trained, reference_params: as `setup.build` returns them; taken over, and gone afterwards.

  Raises:
    UserError: the parts do not belong together.
  """
  # By the names of folders alone: `Checkpoints` would tidy the folder, and nothing of the workdir
  # is changed before training may start.
  start = latest_step(run.workdir / "checkpoints") or 0
  init, moves = _initializer(run, reference_params)
  like = state_like(run, trained, reference_params)
  sizes = None
  if run.data.sampler:
    # Those of the initial parameters, also for a run that is resumed: the same shapes as before.
    policy = run.objective.policy(trained, reference_params)
    sizes = run.data.sampler.sizes(run.executor.gather_locally(policy))
  feed_after = functools.partial(datasets.make_feed, run.data, sizes)
  if reference_params is not None:
    reference_params = run.executor.place(reference_params)
  reference_params = fill_store(run, reference_params)
  state = None
  if start:
    # The checkpoint's parameters take the place of these: free the memory before they are read.
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, trained)
  else:
    # Compiled for the shardings of the state: plain `jit(tx.init)` puts all moments on one device.
    state = run.executor.compile_init(init)(run.executor.place(trained))
    params = _policy_params(run, state, reference_params) if run.data.sampler else None
    batch, _ = feed_after(0)(1, params)
    check_step_zero(run, state.params, reference_params, batch)
    if moves:
      state = state._replace(reference=reference_params)
  # In the state (or the checkpoint) from here on, and so no argument of the step.
  if moves:
    reference_params = None
  return Prepared(start, like, state, reference_params, feed_after)


def state_like(run: Run, trained: PyTree, reference_params: PyTree | None) -> step.TrainState:
  """Returns shapes, types and places of a run's state, from what `setup.build` returns."""
  init, moves = _initializer(run, reference_params)
  # Shapes alone: a resumed run must not fill memory with moments that it replaces at once.
  like = jax.eval_shape(init, trained)
  return run.executor.abstract(like._replace(reference=reference_params) if moves else like)


def _initializer(
  run: Run, reference_params: PyTree | None
) -> tuple[Callable[[PyTree], step.TrainState], bool]:
  """Returns a function trained -> state at step 0, and whether the reference is the state's."""
  # A reference that follows the policy is part of what evolves: state and checkpoints have it.
  sync = run.objective.sync
  init = functools.partial(_init, run, None)
  if sync and sync.average:
    init = functools.partial(_init, run, jax.eval_shape(lambda: reference_params))
  return init, following.is_in_state(sync)


def _init(run: Run, averaged_like: PyTree | None, trained: PyTree) -> step.TrainState:
  """Returns the state at step 0, with an average as reference if shapes are given for it."""
  state = step.init_state(trained, run.tx, run.objective.loss)
  if averaged_like is None:
    return state
  return state._replace(reference=following.init_average(trained, averaged_like))


def fill_store(run: Run, reference_params: PyTree | None) -> PyTree | None:
  """Computes what a reference store lacks.

  Args:
    run: the run.
    reference_params: placed; deleted where nothing needs them any more.

  Returns:
    What is needed of the reference from then on: with a store, only the base of adapters.
  """
  if not run.store:
    return reference_params
  forward = run.executor.compile_forward(logprobs.make_token_fn(run.model))

  def token_fn(batch: TokenBatch) -> np.ndarray:
    return forward(reference_params, jax.tree.map(lambda x: x[None], batch))

  reference_cache.fill_all(
    run.store,
    run.lacking,
    token_fn,
    batch_size=run.data.settings.batch_size // run.data.settings.accumulate,
    batching=run.data.batching,
  )
  # Adapters need their base in every step. A stored reference needs no parameters any more.
  if run.adapter:
    return reference_params
  # Deleted rather than dropped: the caller still has a name for it, and the step needs the memory.
  jax.tree.map(lambda x: x.delete(), reference_params)
  return None


def train(run: Run, prepared: Prepared, callbacks: Sequence[Callback] = ()) -> Trained:
  """Takes all steps that are left, and leaves metrics and checkpoints in the workdir.

  Args:
    run: the run; its workdir exists and belongs to it.
    prepared: as `prepare` returns it; its state is gone afterwards.
    callbacks: called with the metrics of every step and evaluation, in the first process.

  Returns:
    What was trained, as it ends or as it was best (`export.best`).

  Raises:
    Diverged: the weights are broken; no checkpoint has them.
    Stopped: Ctrl-C or SIGTERM has come, and all is saved.
  """
  start, state, reference_params = prepared.start, prepared.state, prepared.reference_params
  # Accuracy needs completions that are ordered, which only pairs and rankings have.
  ranks = run.objective.loss.kind in ("pairs", "ranked")
  checkpoints = Checkpoints(
    run.workdir / "checkpoints",
    keep=run.settings.checkpoint_keep,
    best="rewards/accuracies" if ranks else "loss",
    higher=ranks,
    tidy=True,
  )
  try:
    if start:
      # The latest may be unreadable: then the run resumes from the one before.
      start, saved = checkpoints.restore_latest(prepared.like)
      state = run.executor.place(saved)
      del saved
    assert state is not None
    # The step donates the state: a buffer that the reference shares would be gone with it, or end
    # the process.
    if reference_params is not None:
      executor.assert_separate(state, reference_params)
    parts = {
      "policy": prepared.like.params,
      "optimiser": prepared.like.opt_state,
      "reference": reference_params,
    }
    # Only the first process writes metrics: several would mix their lines in one file.
    logs: Loggers | Silent = Silent()
    if processes.is_main_process():
      logs = Loggers(run.workdir, start_step=start, total_steps=run.steps, callbacks=callbacks)
    with preemption.Notice() as notice, logs as log:
      if start:
        log.say(f"resuming after step {start} of {run.steps}")
      # Made here, not in `prepare`: where the latest checkpoint was unreadable, `start` is earlier.
      feed = prepared.feed_after(start, share=run.executor.share)
      with memory.explain_out_of_memory(parts, memory.device_capacity()):
        state = _take_steps(run, state, reference_params, feed, start, checkpoints, log, notice)
    checkpoints.wait()
    best = checkpoints.best()
    if run.settings.export_best and best and best.step != run.steps:
      state = None  # its memory is needed
      like = prepared.like.params
      return Trained(checkpoints.restore_params(best.step, like), best.step, best)
  finally:
    # Also after an error: the checkpoint that is being written ends whole.
    checkpoints.close()
  return Trained(run.executor.unreplicate(state.params), run.steps, best)


def _take_steps(
  run: Run,
  state: step.TrainState,
  reference_params: PyTree | None,
  feed: datasets.Feed,
  start: int,
  checkpoints: Checkpoints,
  log: Loggers | Silent,
  notice: preemption.Notice,
) -> step.TrainState:
  """Takes steps start + 1 to the last, with evaluation and checkpoints where they are due.

  At a notice of preemption it saves after the step that it is at, and raises `Stopped`.
  """
  train_step_fn = run.executor.compile_step(
    functools.partial(step.train_step, objective=run.objective, tx=run.tx)
  )
  evaluator = make_evaluator(run, reference_params)
  # The value before training, with which every later evaluation is compared.
  before: dict[str, float] = {}
  if start == 0 and evaluator.ready:
    before = evaluator(state)
    log.write_eval(0, before)
    _keep_held_out(run, verdict.BEFORE, evaluator)
  writer = _make_writer(run, start, checkpoints, log, before)
  clock = SavingTimes(run.settings.checkpoint_minutes)
  shapes: set[tuple[tuple[int, ...], ...]] = set()
  for index in range(start + 1, run.steps + 1):
    params = _policy_params(run, state, reference_params) if run.data.sampler else None
    batch, facts = feed(index, params)
    shape = tuple(x.shape for x in jax.tree.leaves(batch))
    # Another shape compiles for seconds or minutes, in which the run would seem to hang.
    if shapes and shape not in shapes:
      log.say(f"step {index}: new batch shape, compiling again ({len(shapes) + 1} shapes so far)")
    shapes.add(shape)
    # The state is donated: the old one's memory becomes the new one's.
    state, means = train_step_fn(state, reference_params, run.executor.place_batch(batch))
    # Read a step later: reading now would make the device wait for the host.
    writer.add(index, means, facts, batch)
    last = index == run.steps
    evaluating = evaluator.ready and (last or _is_due(index, run.settings.eval_every))
    # `should_stop` and `is_due` come first, since both must be called at every step. At the last
    # one the run ends anyway.
    leaving = notice.should_stop(index) and not last
    by_clock = clock.is_due(index)
    saving = leaving or last or by_clock or _is_due(index, run.settings.checkpoint_every)
    saving |= evaluating and run.settings.export_best
    if not (evaluating or saving):
      continue
    # The order is important: 1. the metrics of this very step, which stop the run before a state
    # that has diverged is kept; 2. evaluation, whose metrics decide which checkpoint is the best;
    # 3. the checkpoint; 4. leaving, once it is on disk.
    writer.flush(at_end=last)
    found = evaluator(state) if evaluating else None
    if found:
      log.write_eval(index, found)
      writer.check_evaluation(index, found)
    if last:
      _keep_held_out(run, verdict.AFTER, evaluator)
    # A step that may turn out to be the beginning of a divergence must not push out a good one.
    if saving and (leaving or not writer.suspect):
      # One copy: the tree of all devices under pmap would bind the checkpoint to their number.
      checkpoints.save(index, run.executor.unreplicate(state), found)
      clock.saved()
      if run.settings.export_best and found:
        _keep_best(run, index, checkpoints, evaluator)
    if leaving:
      checkpoints.wait()
      raise notice.stopped(index)
    writer.restart_clock()
  return state


def _make_writer(
  run: Run,
  start: int,
  checkpoints: Checkpoints,
  log: Loggers | Silent,
  before: dict[str, float],
) -> MetricsWriter:
  """Makes the writer of metrics, which knows how the run began.

  Args:
    run, start, checkpoints, log: as in `_take_steps`.
    before: metrics of the held-out rows before the first step; {} for a run that is resumed.
  """
  shapes = jax.tree.leaves(transformer.param_shapes(run.model_config))
  first = divergence.Divergence()
  first.add_held_out(before)
  if start:
    # Only the first process need see the workdir.
    text = ""
    if processes.is_main_process():
      records = loggers.read_metrics(run.workdir / loggers.METRICS)
      first = divergence.first_of(records)
      text = f"{first.first_loss:.6g} {first.first_logp:.6g}"
    first = divergence.Divergence(*map(float, processes.from_main_process(text).split()))
  return MetricsWriter(
    log,
    checkpoints,
    to_host=run.executor.metrics_to_host,
    schedule=run.schedule,
    data_path=run.settings.data_path,
    mixture=run.data.mixture,
    divergence=first,
    learning_rate=run.settings.learning_rate,
    usual_rates=divergence.usual_rates(
      run.objective.loss.kind,
      adapters=run.adapter is not None,
      weights=sum(x.size for x in shapes),
    ),
  )


def _keep_held_out(run: Run, name: str, evaluator: Evaluator) -> None:
  """Writes what the verdict on the run compares, from the first process."""
  if evaluator.held_out is not None and processes.is_main_process():
    verdict.write(run.workdir, name, evaluator.held_out)


def _keep_best(run: Run, index: int, checkpoints: Checkpoints, evaluator: Evaluator) -> None:
  """Keeps the evaluation of a step under its number, if its checkpoint is the best so far."""
  checkpoints.wait()
  best = checkpoints.best()
  if best and best.step == index:
    _keep_held_out(run, str(index), evaluator)


def _policy_params(run: Run, state: step.TrainState, reference_params: PyTree | None) -> PyTree:
  """Returns the policy's parameters, one copy of them, on device, to sample from."""
  local_copy = run.executor.local_copy
  return run.objective.policy(
    local_copy(state.params), None if reference_params is None else local_copy(reference_params)
  )


def _is_due(index: int, every: int) -> bool:
  return every > 0 and index % every == 0
