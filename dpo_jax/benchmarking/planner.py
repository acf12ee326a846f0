"""The memory and FLOPs that a run would need, without any weights or data.

The very step that training takes is compiled for shapes alone, over as many of JAX's CPU devices as
the run is to have. The bytes of its arguments are counted from the shapes; what it needs besides is
what the compiler reports. An accelerator's compiler lays out and fuses differently: its figure for
activations is another, that for the arguments is the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import logprobs, losses, step
from dpo_jax.benchmarking import timing
from dpo_jax.benchmarking.flops import step_flops
from dpo_jax.data import batches
from dpo_jax.data.batches import Batching
from dpo_jax.data.examples import Example
from dpo_jax.distributed import memory
from dpo_jax.distributed.executor import Executor
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import attention_kernels, families, lora, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Device, PyTree, TokenBatch, UserError
from dpo_jax.training import setup
from dpo_jax.training.datasets import BatchSettings
from dpo_jax.training.setup import automatic
from dpo_jax.utils import following


class Lengths(NamedTuple):
  """Lengths of the examples that are planned for, log-normal as those of `timing.make_pairs`.

  Attributes:
    mean: tokens of a prompt and one completion.
    prompt_fraction: the prompt's share of them.
    sigma: standard deviation of the logarithm of each length.
  """

  mean: float
  prompt_fraction: float = 0.5
  sigma: float = 0.5


def lengths_of(
  config: ConfigDict,
  *,
  mean: float | None = None,
  prompt_fraction: float | None = None,
  sigma: float | None = None,
) -> Lengths:
  """Returns the lengths that are given, or else those of the configuration's own synthetic rows.

  Args:
    config: has a section `synthetic` if it is one of the benchmark.
    mean, prompt_fraction, sigma: as in `Lengths`; None for the configuration's, or the usual ones.
  """
  own = config.get("synthetic") or {}

  def choose(given: float | None, name: str, usual: float) -> float:
    return own.get(name, usual) if given is None else given

  return Lengths(
    choose(mean, "mean_length", 250),
    choose(prompt_fraction, "prompt_fraction", Lengths._field_defaults["prompt_fraction"]),
    choose(sigma, "sigma", Lengths._field_defaults["sigma"]),
  )


class Outline(NamedTuple):
  """A step of a run, in shapes alone.

  Attributes:
    executor: its devices.
    take: (state, reference, batch) -> the next state and metrics, not compiled.
    state, reference: shapes with their shardings.
    batch: of synthetic examples, on host.
    policy: shapes of the whole policy.
    trained: how many numbers are trained.
    live: whether every step computes the reference.
    attention: the implementation that runs.
    windows: positions that the layers see back, each size once; 0 for all.
    flops: FLOPs of products that the objective needs for the batch, on all devices.
    chunks: chunks of logits that a pass through the head computes, the mean of the micro-batches.
  """

  executor: Executor
  take: Callable[..., Any]
  state: step.TrainState
  reference: PyTree | None
  batch: TokenBatch
  policy: PyTree
  trained: int
  live: bool
  attention: str
  windows: tuple[int, ...]
  flops: float
  chunks: float

  def lower(self) -> jax.stages.Lowered:
    """Lowers the step that training takes, without an array."""
    batch = self.executor.abstract_batch(self.batch)
    return self.executor.lower_step(self.take, self.state, self.reference, batch)

  def compile(self) -> jax.stages.Compiled:
    """Compiles the step that training takes, without an array."""
    return self.lower().compile()


def outline(
  config: ConfigDict,
  lengths: Lengths,
  devices: Sequence[Device] | None = None,
  room: int | None = None,
) -> Outline:
  """Describes a run's step in shapes.

  Args:
    config: of the run; micro-batches and remat that it leaves open are chosen and put into it.
    lengths: of the examples.
    devices: those that the step is for, which need not be here; None for JAX's own.
    room: bytes of a device, by which the open fields are chosen; None takes what a CPU takes.

  Raises:
    UserError: as `setup.build` raises it.
  """
  checked = setup.check(config, devices)
  if devices is not None:
    checked.executor.memory = room  # devices that are not here report none
  adapters = setup.describe_adapters(config)
  loss, executor = checked.loss, checked.executor
  model_config = _model_config(config)
  attention = setup.choose_attention(config, model_config, executor)
  completions = _completions(config, loss)
  setup.check_balance(config, model_config)
  examples = _examples(config, lengths, model_config.vocab, completions)
  automatic.settle(config, checked, model_config, adapters, attention, examples, room=room)
  _, objective = setup.make_objective(
    config, model_config, checked, adapters, attention, completions
  )
  # How many steps there are changes the schedule's numbers, not the program.
  _, tx = setup.make_optimizer(config, config.train.steps or 1000)
  live = isinstance(objective.reference_kind, step.LiveReference)
  shapes = transformer.param_shapes(model_config)
  policy = _as(shapes, config.model.param_dtype)
  trained, reference_params = policy, _as(shapes, config.reference.param_dtype) if live else None
  if adapters:
    start = peft.load(config.lora.path, model_config)[1] if config.lora.path else None
    # Adapters are small enough to be made, and only their shapes are kept.
    trained = _shapes_of(start or lora.init(model_config, adapters, config.seed))
    # The base is the reference: it is there for any loss, and once.
    reference_params = lora.attach(policy, trained, adapters.scale) if start else policy
  # No array is made: the model may be larger than the memory of this machine.
  state = jax.eval_shape(functools.partial(step.init_state, tx=tx, loss=loss), trained)
  if objective.sync and objective.sync.average:
    average = jax.eval_shape(following.init_average, trained, reference_params)
    state = state._replace(reference=average)
  elif objective.sync:
    state, reference_params = state._replace(reference=reference_params), None
  batch = _batch(
    examples,
    BatchSettings(
      config.train.batch_size, config.train.accumulate, config.seed, config.data.balance
    ),
    Batching(
      layout=config.data.layout,
      row_length=config.data.row_length,
      groups=executor.groups,
      per_line=attention_kernels.sequences_per_line(attention, model_config, executor.devices[0]),
    ),
  )
  flops = step_flops(model_config, reference=live, adapters=count(trained) if adapters else 0)
  return Outline(
    executor=executor,
    take=functools.partial(step.train_step, objective=objective, tx=tx),
    state=executor.abstract_placed(state),
    reference=None if reference_params is None else executor.abstract_placed(reference_params),
    batch=batch,
    policy=policy,
    trained=count(trained),
    live=live,
    attention=attention,
    windows=tuple(model_config.windows),
    # Of the tokens themselves, without padding, as the benchmark counts them.
    flops=float(flops(int((batch.pair_NL >= 0).sum()), int((batch.weight_NL > 0).sum()))),
    chunks=_chunks(batch, model_config.vocab, executor),
  )


def count(tree: PyTree) -> int:
  """Counts the numbers of a tree of arrays or shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _chunks(batch: TokenBatch, vocab: int, executor: Executor) -> float:
  """Returns how many chunks of logits a pass through the head computes, the mean of all passes."""
  scored_AGM = batch.scored_GM
  # Past the end of its group, an index is padding.
  end = batch.ids_NL[0].size // scored_AGM.shape[1]
  budget = logprobs.logit_budget(executor.devices[0].platform, executor.memory)
  # Under pmap each device has a program of its own, with one group.
  parts = scored_AGM.shape[1] if executor.mode == "pmap" else 1
  passes = scored_AGM.reshape(-1, scored_AGM.shape[1] // parts, scored_AGM.shape[2])
  divided = executor.vocabulary_parts(vocab)
  counts = [logprobs.chunks_run(scored_GM, end, vocab, budget, divided) for scored_GM in passes]
  return sum(counts) / len(counts)


def plan(config: ConfigDict, lengths: Lengths, room: int | None = None) -> dict[str, Any]:
  """Works out the memory and FLOPs of a step.

  Args:
    config, lengths, room: as `outline` takes them.

  Returns:
    `parameters`, and `trained` of them; `devices`; bytes on the fullest device: `params` (what is
    trained), `reference` (with adapters: their base), `optimizer`, `step` (gradients, activations
    and all else that the compiled step needs besides its arguments) and their sum, `total`;
    `kept_on_host`, bytes for every device; `flops_per_step`, on all devices; `rows` and
    `row_length` of a micro-batch on all devices.

  Raises:
    UserError: as `setup.build` raises it.
  """
  run = outline(config, lengths, room=room)
  # The donated state is argument and output in the same bytes, which are counted once.
  about = run.compile().memory_analysis()
  assert about is not None, "the compiler of this platform reports no memory"
  held = held_bytes(run) | {
    "step": about.temp_size_in_bytes + about.output_size_in_bytes - about.alias_size_in_bytes,
  }
  return {
    "parameters": count(run.policy),
    "trained": run.trained,
    "devices": len(run.executor.devices),
    "bytes_per_device": held | {"total": sum(held.values())},
    "kept_on_host": memory.host_bytes(run.state),
    "flops_per_step": run.flops,
    "rows": run.batch.ids_NL.shape[1],
    "row_length": run.batch.ids_NL.shape[2],
  }


def held_bytes(run: Outline) -> dict[str, int]:
  """Returns the bytes of what a run stores between steps, on the fullest device."""
  return {
    "params": memory.device_bytes(run.state.params),
    # In the state where it follows the policy.
    "reference": memory.device_bytes((run.reference, run.state.reference)),
    "optimizer": memory.device_bytes(run.state.opt_state),
  }


def _model_config(config: ConfigDict) -> ModelConfig:
  """Reads the shape of the model from its folder's config.json or from `model.scratch`."""
  if config.model.path:
    return hf_checkpoint.read_config(config.model.path)
  if not config.model.scratch:
    raise UserError(
      "model.path is empty; name a folder with a config.json, --config.model.path=DIR"
    )
  return families.from_scratch(config.model.scratch.to_dict())


def _completions(config: ConfigDict, loss: losses.Loss) -> int:
  """Returns the slots of an example; ranked completions are taken to be as many as on policy."""
  ranked: int = config.on_policy.num
  if loss.kind == "unpaired":
    return 2 if loss.mismatched else 1
  return {"text": 1, "pairs": 2}.get(loss.kind, ranked)


def _as(shapes: PyTree, dtype: str) -> PyTree:
  """Returns the same shapes in another type."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def _shapes_of(tree: PyTree) -> PyTree:
  """Returns the shapes and types of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _examples(config: ConfigDict, lengths: Lengths, vocab: int, completions: int) -> list[Example]:
  """Makes synthetic examples.

  Args:
    config: of the run.
    lengths: of prompts and completions.
    vocab: number of ids.
    completions: of an example.
  """
  # More than one batch, so that a balanced batch has neighbours to exchange examples with.
  rows = timing.make_pairs(
    vocab,
    pairs=max(256, 2 * config.train.batch_size),
    mean_length=lengths.mean,
    prompt_fraction=lengths.prompt_fraction,
    sigma=lengths.sigma,
    max_length=config.data.max_length,
    seed=config.seed,
  )
  examples = []
  for number, row in enumerate(rows):
    two = [np.asarray(row[name], np.int32) for name in ("chosen_ids", "rejected_ids")]
    # The same two completions again, where a loss ranks more of them.
    some = tuple((two * completions)[:completions])
    # Any values will do: that the field is there makes it another program.
    stored = bool(config.reference.store)
    known = tuple(np.zeros(len(ids), np.float32) for ids in some) if stored else ()
    prompt = np.asarray(row["prompt_ids"], np.int32)
    examples.append(Example(prompt, some, row=number, reference=known))
  return examples


def _batch(examples: Sequence[Example], settings: BatchSettings, batching: Batching) -> TokenBatch:
  """Makes a batch of examples as training does."""
  stream = batches.batches(
    examples,
    batch_size=settings.batch_size,
    batching=batching,
    accumulate=settings.accumulate,
    seed=settings.seed,
    balance=settings.balance,
  )
  return next(stream)


# Changes that may save memory: fields and their values, where they are not so already.
_CHANGES: tuple[dict[str, Any], ...] = (
  {"model.remat": "full"},
  {"train.accumulate": 2},  # times what it is
  {"reference.param_dtype": "bfloat16"},
  {"reference.store": "DIR"},
  {"parallel.fsdp": 0},  # all devices
  {"parallel.offload_optimizer": True},
  {"model.param_dtype": "bfloat16", "reference.param_dtype": "bfloat16"},
)


# Changes that may save time, where there is memory for them.
_FASTER: tuple[dict[str, Any], ...] = (
  {"train.accumulate": 1},
  {"model.remat": "dots"},
  {"model.remat": "none"},
  {"reference.store": "DIR"},
)


def changes(
  config: ConfigDict, devices: int, *, faster: bool = False
) -> Iterator[tuple[str, ConfigDict]]:
  """Yields configurations that may need less memory, or time, each with the flags that make it.

  Args:
    config: of the run.
    devices: how many it has.
    faster: whether changes are wanted that may save time.
  """
  loss = losses.resolve(config.loss.name, **_given(config))
  for change in _FASTER if faster else _CHANGES:
    values = dict(change)
    if "train.accumulate" in values and not faster:
      values["train.accumulate"] = 2 * max(1, config.train.accumulate)
      # Set-up would refuse it.
      if config.train.batch_size % (values["train.accumulate"] * devices):
        continue
    if "parallel.fsdp" in values:
      values["parallel.fsdp"] = devices // config.parallel.tensor
    # A change of the reference alone does nothing where no reference is kept on the devices.
    refers = (
      any(name.startswith("reference.") for name in values) and "model.param_dtype" not in values
    )
    if refers and (config.lora.rank or config.reference.store or not loss.needs_reference):
      continue
    if all(_value(config, name) == value for name, value in values.items()):
      continue
    # A copy, so that each change is made to the user's own configuration and to no other change.
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(values)
    yield " ".join(f"--config.{name}={value}" for name, value in values.items()), other


def remark(named: str) -> str:
  """Returns what a change costs besides time, in words; "" for nothing.

  Args:
    named: the flags that make the change, as `changes` yields them.
  """
  if "model.param_dtype=bfloat16" not in named:
    return ""
  # Gradients and activations are smaller too; what a user must know is what happens to the weights.
  return (
    "  weights and moments are rounded stochastically to bfloat16: noisier than float32, compare"
    " the held-out loss"
  )


def _given(config: ConfigDict) -> dict[str, Any]:
  return {k: v for k, v in config.loss.items() if k != "name" and v is not None}


def _value(config: ConfigDict, name: str) -> Any:
  section, field = name.split(".")
  return config[section][field]


def show(found: dict[str, Any]) -> Iterator[str]:
  """Yields the lines of a plan."""
  trained, whole = found["trained"], found["parameters"]
  yield f"parameters   {whole:,}" + ("" if trained == whole else f", trained {trained:,}")
  yield f"micro-batch  {found['rows']} rows of {found['row_length']} tokens"
  yield f"a step       {found['flops_per_step']:.3e} FLOPs in products"
  yield "on the device:" if found["devices"] == 1 else f"on each of {found['devices']} devices:"
  for name, count in found["bytes_per_device"].items():
    yield f"  {name:<10} {count / memory.GIB:9.3f} GiB"
  if found["kept_on_host"]:
    yield f"  and {found['kept_on_host'] / memory.GIB:.3f} GiB in the memory of its host"
