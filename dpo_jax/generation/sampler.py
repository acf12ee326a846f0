"""Generation: token ids sampled from a model, batch by batch.

The random numbers of a sample are a function of (seed, prompt index, sample index) alone, so what
is sampled beside it, in which order and on which device, changes nothing.

Rows are divided over the devices that hold the parameters. The cache grows as answers do, so that
short ones never pay for the longest that was allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dpo_jax.generation import decoding
from dpo_jax.generation.decoding import Batch, Knobs, Plan
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, UserError

Ids = list[int]

FIRST_TOKENS = 64  # of the answers that the first cache has room for; each later one has twice that


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
  ends: Callable[[Ids], int | None] | None = None,
  num: int = 1,
  batch_size: int = 256,
  width: int = 0,
  dtype: str = "float32",
) -> list[list[Ids]]:
  """Samples `num` answers to every prompt.

  Of the distribution at the temperature, what top_k keeps is cut by top_p, and that by min_p.

  Args:
    config, params: the model. Where several devices hold copies of the parameters, each generates
      its share of every batch; of parameters that are themselves divided, every device holds its
      part and they compute together.
    prompts: token ids, at least one a prompt.
    max_tokens: most tokens of an answer.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens up to this probability; 1 keeps all.
    min_p: keep the tokens at least this times as likely as the likeliest; 0 keeps all.
      Nguyen et al. 2024.
    seed: of the random numbers, below 2**64.
    eos_ids: an answer ends with the first of these.
    ends: of the ids of an answer so far, how many of them are the whole answer, or None if it goes
      on; the same whatever follows them. Asked now and then, not at every token.
    num: answers a prompt.
    batch_size: rows generated at once, rounded up to as many prompts as there are devices.
    width: at least the longest prompt's tokens: every batch is filled up to it and to its full
      size, so that all calls share one compiled shape; 0 chooses few shapes that suit the prompts.
    dtype: of activations and cache.

  Returns:
    ids[prompt][sample], the end token included where it was produced.
  """
  check_knobs(
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
  params = jax.tree.map(jnp.asarray, params)
  knobs = decoding.knobs(seed, temperature, top_k, top_p, min_p)
  plan = Plan(
    config,
    tuple(eos_ids),
    greedy=temperature == 0,
    ranked=top_k > 0 or top_p < 1,
    near=min_p > 0,
    dtype=dtype,
  )
  mesh = _mesh_of(params)
  answer = functools.partial(_answer, plan, mesh, params, knobs, max_tokens, ends)
  batches = _batches(prompts, num, batch_size, width, 1 if mesh is None else mesh.size)
  completions: list[list[Ids]] = [[[] for _ in range(num)] for _ in prompts]
  # A step of the loop is too small for two cores; two batches at a time are not. Two programs that
  # each wait for all devices could wait for each other.
  with futures.ThreadPoolExecutor(max_workers=2 if mesh is None else 1) as pool:
    for batch, out_RT in pool.map(answer, batches):
      _collect(completions, batch, out_RT)
  return completions


def _collect(completions: list[list[Ids]], batch: Batch, out_RT: np.ndarray) -> None:
  """Files the rows of a batch under their prompts and samples; those that fill it are left out."""
  samples = batch.sample_S.tolist()
  out_NST = out_RT.reshape(len(batch.prompt_N), len(samples), -1)
  for prompt, out_ST in zip(batch.prompt_N.tolist(), out_NST, strict=True):
    for sample, out_T in zip(samples, out_ST, strict=True):
      if prompt >= 0 and sample < len(completions[prompt]):
        completions[prompt][sample] = out_T[out_T >= 0].tolist()


# --- batches --------------------------------------------------------------------------------------


def _batches(
  prompts: Sequence[Sequence[int]], num: int, batch_size: int, fixed: int = 0, devices: int = 1
) -> Iterator[Batch]:
  """Prompts of like length together, in few shapes; shapes do not depend on the other prompts."""
  share = lambda rows: -(-rows // devices) * devices
  widths = np.array([fixed or _round_up(len(prompt)) for prompt in prompts])
  samples = min(num, batch_size)
  rows = share(max(1, batch_size // samples))
  for width in np.unique(widths):
    (members,) = np.nonzero(widths == width)
    for start in range(0, len(members), rows):
      chosen = members[start : start + rows]
      size = rows if fixed else min(rows, share(_power_of_two(len(chosen))))
      ids_NL = np.zeros((size, width), np.int32)
      lengths_N = np.ones(size, np.int32)
      prompt_N = np.full(size, -1, np.int32)
      for row, prompt in enumerate(chosen):
        ids_NL[row, width - len(prompts[prompt]) :] = prompts[prompt]
        lengths_N[row], prompt_N[row] = len(prompts[prompt]), prompt
      for first in range(0, num, samples):
        yield Batch(ids_NL, lengths_N, prompt_N, np.arange(first, first + samples, dtype=np.int32))


def _round_up(length: int) -> int:
  """The next of 8, 16, 24, 32, 48, 64, 96, 128, 192, ...: at most half is padding beyond 8."""
  step = 8
  while length > 4 * step:
    step *= 2
  return -(-length // step) * step


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()


# --- one batch ------------------------------------------------------------------------------------


def _answer(
  plan: Plan,
  mesh: Mesh | None,
  params: PyTree,
  knobs: Knobs,
  max_tokens: int,
  ends: Callable[[Ids], int | None] | None,
  batch: Batch,
) -> tuple[Batch, np.ndarray]:
  """The batch and its answers, -1 beyond the end of each: [R, T], T at most `max_tokens`."""
  # Where every device has all parameters, none need wait for another.
  whole = all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
  setting = {"plan": plan, "mesh": mesh if whole else None}
  placed = batch
  if mesh is not None:
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    placed = Batch(*map(put, batch, decoding.specs(mesh)[0]))
  state, out_RT = decoding.prefill(params, knobs, placed, **setting)
  out_RT = np.asarray(out_RT)
  for tokens in _growth(max_tokens):
    columns = batch.ids_NL.shape[1] + out_RT.shape[1] + tokens
    state, more_RT = decoding.decode(
      params, knobs, state, columns=columns, tokens=tokens, **setting
    )
    out_RT = np.concatenate([out_RT, more_RT], axis=1)
    done_R = np.array(state.done_R)
    if ends is not None:
      _cut(out_RT, done_R, ends)
      state = state._replace(done_R=jax.device_put(done_R, state.done_R.sharding))
    if done_R.all():
      break
  return batch, out_RT


def _growth(max_tokens: int) -> Iterator[int]:
  """Tokens by which answers and cache grow, from the first token on: 63, 64, 128, 256, ..."""
  so_far, room = 1, FIRST_TOKENS
  while so_far < max_tokens:
    yield min(room, max_tokens) - so_far
    so_far, room = min(room, max_tokens), 2 * room


def _cut(out_RT: np.ndarray, done_R: np.ndarray, ends: Callable[[Ids], int | None]) -> None:
  """Ends the answers that `ends` says are whole, in place."""
  for row, out_T in enumerate(out_RT):
    ids = out_T[out_T >= 0].tolist()
    length = ends(ids) if ids else None
    if length is not None:
      out_T[length:] = -1
      done_R[row] = True


def _mesh_of(params: PyTree) -> Mesh | None:
  """The devices that hold the parameters; None for a single one."""
  sharding = jax.tree.leaves(params)[0].sharding
  several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
  return sharding.mesh if several else None


# --- what is refused ------------------------------------------------------------------------------


def check_knobs(
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
  """What can be said against the arguments of `generate` without a model.

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
  if not 0 < top_p <= 1:
    raise UserError(f"top_p is {top_p}; it must lie in (0, 1]")
  if not 0 <= min_p <= 1:
    raise UserError(f"min_p is {min_p}; it must lie between 0 (all tokens) and 1")
  if not 0 <= seed < 2**64:
    raise UserError(f"seed is {seed}; it must be 0 or more and below 2**64")


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
  """What can be said against prompts without the weights of the model.

  Raises:
    UserError: one is empty, holds an id that the model does not know, or leaves no room.
  """
  for index, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(f"prompt {index} has no tokens; an answer needs one to be predicted from")
    if min(prompt) < 0 or max(prompt) >= config.vocab:
      raise UserError(
        f"prompt {index} holds an id outside the model's vocabulary of {config.vocab}; "
        "use the model's own tokenizer"
      )
    if config.positions == "learned" and len(prompt) + max_tokens > config.max_positions:
      raise UserError(
        f"prompt {index} has {len(prompt)} tokens; with max_tokens {max_tokens} that exceeds the "
        f"model's {config.max_positions} positions; shorten one of them"
      )
