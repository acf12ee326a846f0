"""Generation: samples completions, as token ids, batch by batch.

The random numbers of a sample are a function of (seed, prompt index, sample index) alone. It does
not depend on the other samples, on their order, on batch sizes or on devices.

Rows are divided over the devices that store the parameters. The cache grows with the completions,
so that short ones do not pay for the longest that is allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dpo_jax.generation import decoding
from dpo_jax.generation.decoding import Batch, Plan, SamplingParams
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils import progress

Ids = list[int]

FIRST_TOKENS = 64  # completion tokens for which the first cache has space; each next has twice that


def generate(
  config: ModelConfig,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  seed: int = 0,
  eos_ids: Sequence[int] = (),
  stop_fn: Callable[[Ids], int | None] | None = None,
  num: int = 1,
  batch_size: int = 256,
  width: int = 0,
  dtype: str = "float32",
  label: str = "",
) -> list[list[Ids]]:
  """Samples `num` completions of every prompt.

  The temperature is applied first, then top_k, then top_p to what is left, then min_p.

  Args:
    config: the model.
    params: its parameters. If several devices have complete copies, each generates its share of
      every batch. If the parameters are divided, all devices compute every row together.
    prompts: token ids, at least one per prompt.
    max_tokens: the maximum number of tokens of a completion.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens up to this total probability; 1 keeps all.
    min_p: keep tokens with at least this ratio to the most likely token's probability; 0 keeps all.
      Nguyen et al. 2024.
    seed: random seed, below 2**64.
    eos_ids: a completion ends with the first of these tokens.
    stop_fn: takes the ids of a completion so far and returns how many of them are the finished
      completion, None if it is not finished. Further ids must not change that number, since it is
      called only after some tokens, not after each.
    num: completions per prompt.
    batch_size: rows generated at once, rounded up to as many prompts as there are devices.
    width: pad every prompt to this many tokens and every batch to its full size, so that all calls
      share one compiled shape; at least the longest prompt. 0 chooses few shapes by the prompts.
    dtype: of activations and cache.
    label: what progress calls it where it takes seconds; "" shows none.

  Returns:
    ids[prompt][sample], with the end token if the model produced one.

  Raises:
    UserError: an argument is out of range, or a prompt does not suit the model.
  """
  check_sampling(
    max_tokens=max_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    seed=seed,
    num=num,
    batch_size=batch_size,
  )
  check_prompts(config, prompts, max_tokens)
  if width and width < max(map(len, prompts), default=0):
    raise ValueError(f"width is {width} and the longest prompt has {max(map(len, prompts))} tokens")
  # Once for all batches: arrays on the host would be copied to the device at every call.
  params = jax.tree.map(jnp.asarray, params)
  sampling = decoding.sampling_params(seed, temperature, top_k, top_p, min_p)
  plan = Plan(
    config,
    tuple(eos_ids),
    greedy=temperature == 0,
    by_rank=top_k > 0 or top_p < 1,
    by_ratio=min_p > 0,
    dtype=dtype,
  )
  mesh = _mesh_of(params)
  generate_batch = functools.partial(
    _generate_batch, plan, mesh, params, sampling, max_tokens, stop_fn
  )
  batches = _batches(prompts, num, batch_size, width, 1 if mesh is None else mesh.size)
  completions: list[list[Ids]] = [[[] for _ in range(num)] for _ in prompts]
  # One decoding step is too small to keep several cores busy, so two batches run at a time. Not on
  # several devices: two programs that each wait for all devices could wait for each other.
  with (
    progress.Progress(label, num * len(prompts), "completions") as shown,
    futures.ThreadPoolExecutor(max_workers=2 if mesh is None else 1) as pool,
  ):
    for batch, out_SaLc in pool.map(generate_batch, batches):
      shown.advance(_collect(completions, batch, out_SaLc))
  return completions


def _collect(completions: list[list[Ids]], batch: Batch, out_SaLc: np.ndarray) -> int:
  """Stores the rows of a batch under prompt and sample, without rows that only fill the batch.

  Returns:
    How many there were.
  """
  count = 0
  samples = batch.sample_K.tolist()
  # Rows are ordered by prompt, then sample; the last batch may have samples beyond `num`.
  out_NKLc = out_SaLc.reshape(len(batch.prompt_N), len(samples), -1)
  for prompt, out_KLc in zip(batch.prompt_N.tolist(), out_NKLc, strict=True):
    for sample, out_Lc in zip(samples, out_KLc, strict=True):
      if prompt >= 0 and sample < len(completions[prompt]):
        completions[prompt][sample] = out_Lc[out_Lc >= 0].tolist()
        count += 1
  return count


# --- batches --------------------------------------------------------------------------------------


def _batches(
  prompts: Sequence[Sequence[int]], num: int, batch_size: int, fixed: int = 0, devices: int = 1
) -> Iterator[Batch]:
  """Yields batches of prompts with similar lengths, in few shapes, since each shape is compiled.

  Args:
    prompts: token ids.
    num: samples per prompt.
    batch_size: rows, prompts times samples, of a batch.
    fixed: pad every prompt to this width and every batch to its full size; 0 for widths and sizes
      of a short list.
    devices: the number of prompts of a batch is a multiple of it.
  """

  def round_to_devices(rows: int) -> int:
    return -(-rows // devices) * devices

  # The shape of a row depends on its own prompt alone, so a prompt is computed in the same way
  # whatever is sampled with it.
  widths = np.array([fixed or _round_up(len(prompt)) for prompt in prompts])
  samples = min(num, batch_size)  # of one prompt in one batch; the rest follow in further batches
  rows = round_to_devices(max(1, batch_size // samples))
  # By width: in a batch of mixed lengths short prompts would pay for the longest.
  for width in np.unique(widths):
    (members,) = np.nonzero(widths == width)
    for start in range(0, len(members), rows):
      chosen = members[start : start + rows]
      size = rows if fixed else min(rows, round_to_devices(_next_power_of_two(len(chosen))))
      ids_NL = np.zeros((size, width), np.int32)
      lengths_N = np.ones(size, np.int32)
      prompt_N = np.full(size, -1, np.int32)
      for row, prompt in enumerate(chosen):
        # At the right end, so that the last token of every prompt is in the same column.
        ids_NL[row, width - len(prompts[prompt]) :] = prompts[prompt]
        lengths_N[row], prompt_N[row] = len(prompts[prompt]), prompt
      for first in range(0, num, samples):
        yield Batch(ids_NL, lengths_N, prompt_N, np.arange(first, first + samples, dtype=np.int32))


def _round_up(length: int) -> int:
  """Rounds up to 8, 16, 24, 32, 48, 64, 96, 128, 192, ...; above 8, less than half is padding."""
  step = 8
  while length > 4 * step:
    step *= 2
  return -(-length // step) * step


def _next_power_of_two(n: int) -> int:
  """Returns the smallest power of two that is at least n, for n >= 1."""
  return 1 << (n - 1).bit_length()


# --- one batch ------------------------------------------------------------------------------------


def _generate_batch(
  plan: Plan,
  mesh: Mesh | None,
  params: PyTree,
  sampling: SamplingParams,
  max_tokens: int,
  stop_fn: Callable[[Ids], int | None] | None,
  batch: Batch,
) -> tuple[Batch, np.ndarray]:
  """Returns the batch and its completions [R, T], -1 after the end of each, T <= `max_tokens`."""
  # If every device has all parameters, each decodes its rows by itself. Divided parameters need
  # one program for all devices.
  replicated = all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
  setting = {"plan": plan, "mesh": mesh if replicated else None}
  placed = batch
  if mesh is not None:

    def place(x: Any, spec: Any) -> jax.Array:
      return jax.device_put(x, NamedSharding(mesh, spec))

    placed = Batch(*map(place, batch, decoding.specs(mesh)[0]))
  state, out_SaLc = decoding.prefill(params, sampling, placed, **setting)
  out_SaLc = np.asarray(out_SaLc)
  # Decoding runs in pieces, with a larger cache for each. Between two of them the host looks for
  # stop texts, and ends the loop as soon as all completions are finished.
  for tokens in _growth(max_tokens):
    columns = batch.ids_NL.shape[1] + out_SaLc.shape[1] + tokens
    state, more_SaLc = decoding.decode(
      params, sampling, state, columns=columns, tokens=tokens, **setting
    )
    out_SaLc = np.concatenate([out_SaLc, more_SaLc], axis=1)
    # A copy: `asarray` of an array on device is read-only, and stops are written into it.
    done_Sa = np.array(state.done_Sa)
    if stop_fn is not None:
      _apply_stops(out_SaLc, done_Sa, stop_fn)
      # The device must know, or it would go on with what the host has ended.
      state = state._replace(done_Sa=jax.device_put(done_Sa, state.done_Sa.sharding))
    if done_Sa.all():
      break
  return batch, out_SaLc


def _growth(max_tokens: int) -> Iterator[int]:
  """Yields how many tokens each call of `decode` generates: 63, 64, 128, 256, ...

  The first is 63 since `prefill` generates one token. Doubling keeps the number of compiled shapes
  logarithmic in `max_tokens`, and a cache at most twice as long as its completions.
  """
  so_far, capacity = 1, FIRST_TOKENS
  while so_far < max_tokens:
    yield min(capacity, max_tokens) - so_far
    so_far, capacity = min(capacity, max_tokens), 2 * capacity


def _apply_stops(
  out_SaLc: np.ndarray, done_Sa: np.ndarray, stop_fn: Callable[[Ids], int | None]
) -> None:
  """Ends, in place, the completions that `stop_fn` reports as finished."""
  for row, out_Lc in enumerate(out_SaLc):
    ids = out_Lc[out_Lc >= 0].tolist()
    length = stop_fn(ids) if ids else None
    if length is not None:
      out_Lc[length:] = -1
      done_Sa[row] = True


def _mesh_of(params: PyTree) -> Mesh | None:
  """Returns the mesh of the devices that store the parameters, None for a single device."""
  sharding = jax.tree.leaves(params)[0].sharding
  mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
  return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


# --- checks ---------------------------------------------------------------------------------------


def check_sampling(
  *,
  max_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  seed: int = 0,
  num: int = 1,
  batch_size: int = 1,
) -> None:
  """Checks the arguments of `generate` that need no model.

  Raises:
    UserError: one is out of range.
  """
  counts = {"max_tokens": max_tokens, "num": num, "batch_size": batch_size}
  for name, value in counts.items():
    if value < 1:
      raise UserError(f"{name} is {value}; it must be at least 1")
  if not 0 <= temperature < float("inf"):
    raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more, and finite")
  if top_k < 0:
    raise UserError(f"top_k is {top_k}; it must be 0 (all tokens) or more")
  # At 0 no token would be left to sample.
  if not 0 < top_p <= 1:
    raise UserError(f"top_p is {top_p}; it must lie in (0, 1]")
  if not 0 <= min_p <= 1:
    raise UserError(f"min_p is {min_p}; it must lie between 0 (all tokens) and 1")
  # Programs take it as two words of 32 bits.
  if not 0 <= seed < 2**64:
    raise UserError(f"seed is {seed}; it must be 0 or more and below 2**64")


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
  """Checks prompts against the model's configuration; its weights are not needed.

  Raises:
    UserError: a prompt is empty, contains an id outside the vocabulary, or leaves too few positions
      for `max_tokens`.
  """
  for index, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(f"prompt {index} has no tokens; a completion needs one to follow")
    if min(prompt) < 0 or max(prompt) >= config.vocab:
      raise UserError(
        f"prompt {index} contains an id outside the model's vocabulary of {config.vocab}; "
        "use the model's own tokenizer"
      )
    # Only a learned table of positions ends; rotary positions can be computed for any length.
    if config.positions == "learned" and len(prompt) + max_tokens > config.max_positions:
      raise UserError(
        f"prompt {index} has {len(prompt)} tokens; with max_tokens {max_tokens} that exceeds the "
        f"model's {config.max_positions} positions; shorten one of them"
      )
