"""The record of a run that set-up makes and the loop reads: built parts and plain values."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import optax

from dpo_jax import step
from dpo_jax.data.examples import Lazy
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.distributed.executor import Executor
from dpo_jax.hf import peft
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Model
from dpo_jax.training.datasets import TrainingData
from dpo_jax.training.reference_cache import Store


class LoopSettings(NamedTuple):
  """The plain values of a configuration that are needed once everything is built.

  Attributes:
    seed: of the run.
    eval_every: steps from one evaluation to the next; 0 is only at the end.
    eval_batch_size: pairs that are evaluated at a time.
    eval_samples: completions sampled at every evaluation; 0 for none.
    eval_max_tokens: most tokens of one of them; 0 is the longest held-out completion.
    checkpoint_every: steps from one checkpoint to the next; 0 is only at the end.
    checkpoint_minutes: minutes from one checkpoint to the next; 0 is never by the clock.
    checkpoint_keep: how many of the latest checkpoints stay.
    export_best: whether the best checkpoint is exported in place of the last.
    starts_as_reference: whether policy and reference are the same numbers before the first step.
    learning_rate: the largest of the run.
    compute_dtype: of matrix products.
    data_path: of the examples, for messages.
    source: folder of the tokenizer that goes along with the exported model.
  """

  seed: int
  eval_every: int
  eval_batch_size: int
  eval_samples: int
  eval_max_tokens: int
  checkpoint_every: int
  checkpoint_minutes: float
  checkpoint_keep: int
  export_best: bool
  starts_as_reference: bool
  learning_rate: float
  compute_dtype: str
  data_path: str
  source: str


class Run(NamedTuple):
  """A run, built: everything that the loop reads and nothing that evolves.

  Attributes:
    workdir: folder of the run; set-up neither makes nor touches it.
    settings: plain values.
    executor: devices, and how functions are compiled for them.
    objective: what the step minimises.
    model, model_config, tokenizer: the policy.
    data: examples or prompts, and how batches are made of them.
    steps: updates of the whole run.
    schedule, tx: learning rate by step, and the optimizer.
    adapter: facts of the adapters that are trained; None where the model itself is.
    attention: name of the implementation that runs.
    store: log-probs of the reference on disk; None where the reference is computed in every step.
    lacking: examples whose log-probs the store does not have yet.
    began: when the run began: a chat template may write the date.
    inputs: a digest of everything that the run learns from, by names for messages.
  """

  workdir: pathlib.Path
  # Plain values: from here on no code reads a configuration.
  settings: LoopSettings
  executor: Executor
  objective: step.Objective
  model: Model
  model_config: ModelConfig
  tokenizer: Tokenizer
  data: TrainingData
  steps: int
  schedule: optax.Schedule
  tx: optax.GradientTransformation
  adapter: peft.Adapter | None
  attention: str = "blocked"
  store: Store | None = None
  # Examples, not log-probs: the loop computes those once the parameters are placed.
  lacking: tuple[Lazy, ...] = ()
  began: datetime.datetime = datetime.datetime.min
  inputs: Mapping[str, str] = MappingProxyType({})
