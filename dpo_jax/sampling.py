"""Generation: token ids sampled from a model, a jitted loop over a cache of keys.

The random numbers of a sample are a function of (seed, prompt index, sample index) alone, so what
is sampled beside it, and in which order, changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.logprobs import logits
from dpo_jax.model import cache as caches
from dpo_jax.model import transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, PyTree, UserError

Ids = list[int]


class Knobs(NamedTuple):
  """Numbers that shape the distribution; traced, so that no value of them compiles anew.

  The seed is two words of 32 bits, the upper first.
  """

  seed: Array
  temperature: Array
  top_k: Array
  top_p: Array


def generate(
  config: ModelConfig,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  eos_ids: Sequence[int] = (),
  num: int = 1,
  batch_size: int = 256,
  width: int = 0,
  dtype: str = "float32",
) -> list[list[Ids]]:
  """Samples `num` answers to every prompt.

  Args:
    config, params: the model.
    prompts: token ids, at least one a prompt.
    max_tokens: most tokens of an answer.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens up to this probability; 1 keeps all.
    seed: of the random numbers, below 2**64.
    eos_ids: an answer ends with the first of these.
    num: answers a prompt.
    batch_size: rows generated at once.
    width: at least the longest prompt's tokens: every batch is filled up to it and to its full
      size, so that all calls share one compiled shape; 0 chooses few shapes that suit the prompts.
    dtype: of activations and cache.

  Returns:
    ids[prompt][sample], the end token included where it was produced.
  """
  _check(config, prompts, max_tokens, temperature, top_k, top_p, num, batch_size)
  if width and width < max(map(len, prompts), default=0):
    raise ValueError(f"width is {width} and the longest prompt has {max(map(len, prompts))} tokens")
  if not 0 <= seed < 2**64:
    raise UserError(f"seed is {seed}; it must be 0 or more and below 2**64")
  params = jax.tree.map(jnp.asarray, params)
  knobs = Knobs(
    jnp.asarray(np.array([seed >> 32, seed % 2**32], np.uint32)),
    jnp.asarray(temperature or 1.0),
    jnp.asarray(top_k),
    jnp.asarray(top_p),
  )
  answers: list[list[Ids]] = [[[] for _ in range(num)] for _ in prompts]

  def run(batch: Batch) -> tuple[Batch, np.ndarray]:
    out_RT = _sample(
      config,
      params,
      batch,
      knobs,
      columns=batch.ids_NL.shape[1] + max_tokens,
      eos_ids=tuple(eos_ids),
      greedy=temperature == 0,
      filtered=top_k > 0 or top_p < 1,
      dtype=dtype,
    )
    return batch, np.asarray(out_RT)

  # A step of the loop is too small for two cores; two batches at a time are not.
  with futures.ThreadPoolExecutor(max_workers=2) as pool:
    for batch, out_RT in pool.map(run, _batches(prompts, num, batch_size, width)):
      _collect(answers, batch, out_RT)
  return answers


def _collect(answers: list[list[Ids]], batch: Batch, out_RT: np.ndarray) -> None:
  """Files the rows of a batch under their prompts and samples; those that fill it are left out."""
  samples = batch.sample_S.tolist()
  out_NST = out_RT.reshape(len(batch.prompt_N), len(samples), -1)
  for prompt, out_ST in zip(batch.prompt_N.tolist(), out_NST, strict=True):
    for sample, out_T in zip(samples, out_ST, strict=True):
      if prompt >= 0 and sample < len(answers[prompt]):
        answers[prompt][sample] = out_T[out_T >= 0].tolist()


class Batch(NamedTuple):
  """N prompts, each to be answered S times.

  Attributes:
    ids_NL: prompts at the right end of their rows.
    lengths_N: tokens of each.
    prompt_N: index of each prompt; -1 fills the batch.
    sample_S: indices of the samples.
  """

  ids_NL: Array
  lengths_N: Array
  prompt_N: Array
  sample_S: Array


def _batches(
  prompts: Sequence[Sequence[int]], num: int, batch_size: int, fixed: int = 0
) -> Iterator[Batch]:
  """Prompts of like length together, in few shapes; shapes do not depend on the other prompts."""
  widths = np.array([fixed or _round_up(len(prompt)) for prompt in prompts])
  samples = min(num, batch_size)
  rows = max(1, batch_size // samples)
  for width in np.unique(widths):
    (members,) = np.nonzero(widths == width)
    for start in range(0, len(members), rows):
      chosen = members[start : start + rows]
      size = rows if fixed else min(rows, _power_of_two(len(chosen)))
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


@functools.partial(
  jax.jit, static_argnames=("config", "columns", "eos_ids", "greedy", "filtered", "dtype")
)
def _sample(
  config: ModelConfig,
  params: PyTree,
  batch: Batch,
  knobs: Knobs,
  *,
  columns: int,
  eos_ids: tuple[int, ...],
  greedy: bool,
  filtered: bool,
  dtype: str,
) -> Array:
  """Answers of R = N * S rows, -1 beyond the end of each: [R, max_tokens]."""
  samples, max_tokens = len(batch.sample_S), columns - batch.ids_NL.shape[1]
  head = transformer.head(config, params)
  keys_R = _keys(knobs.seed, batch)
  eos = jnp.array(eos_ids, jnp.int32)

  def pick(hidden_RD: Array, step: Array) -> Array:
    logits_RV = logits(hidden_RD, head)
    if greedy:
      return logits_RV.argmax(axis=-1)
    logits_RV = logits_RV / knobs.temperature
    if filtered:
      logits_RV = _filter(logits_RV, knobs.top_k, knobs.top_p)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys_R, step)
    return jax.vmap(jax.random.categorical)(keys, logits_RV)

  def note(out_RT: Array, done_R: Array, token_R: Array, step: Array) -> tuple[Array, Array]:
    kept_R = jnp.where(done_R, -1, token_R).astype(jnp.int32)
    out_RT = jax.lax.dynamic_update_slice_in_dim(out_RT, kept_R[:, None], step, axis=1)
    return out_RT, done_R | jnp.isin(token_R, eos)

  def going_on(state) -> Array:
    step, _, _, done_R, _ = state
    return (step < max_tokens) & ~done_R.all()

  def advance(state):
    step, cache, token_R, done_R, out_RT = state
    position_R = lengths_R + step - 1
    hidden_RD, cache = caches.decode(config, params, cache, token_R, position_R, dtype=dtype)
    token_R = pick(hidden_RD, step)
    out_RT, done_R = note(out_RT, done_R, token_R, step)
    return step + 1, cache, token_R, done_R, out_RT

  hidden_ND, cache = caches.prefill(
    config, params, batch.ids_NL, batch.lengths_N, columns=columns, dtype=dtype
  )
  # A prompt is read once, whatever the number of its samples.
  each = lambda x, axis=0: jnp.repeat(x, samples, axis=axis)
  cache = caches.Cache(
    transformer.Keys(*(each(x, 1) for x in cache.keys)),
    transformer.Tokens(*(each(x) for x in cache.tokens)),
    cache.filled,
  )
  lengths_R, done_R = each(batch.lengths_N), each(batch.prompt_N < 0)
  token_R = pick(each(hidden_ND), jnp.asarray(0))
  out_RT = jnp.full((len(done_R), max_tokens), -1, jnp.int32)
  out_RT, done_R = note(out_RT, done_R, token_R, jnp.asarray(0))
  state = (jnp.asarray(1), cache, token_R, done_R, out_RT)
  return jax.lax.while_loop(going_on, advance, state)[-1]


def _keys(seed: Array, batch: Batch) -> Array:
  """A random key a row, of (seed, prompt index, sample index): [R]."""
  fold = jax.random.fold_in
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  of_prompt = jax.vmap(fold, (None, 0))(key, batch.prompt_N)
  of_sample = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(of_prompt, batch.sample_S)
  return of_sample.reshape(-1)


def _filter(logits_RV: Array, top_k: Array, top_p: Array) -> Array:
  """Leaves the k likeliest tokens, and of them the likeliest that reach probability p together."""
  vocab = logits_RV.shape[-1]
  sorted_RV = -jnp.sort(-logits_RV, axis=-1)
  kept_k = jnp.arange(vocab) < jnp.where(top_k > 0, top_k, vocab)
  sorted_RV = jnp.where(kept_k, sorted_RV, -jnp.inf)
  probs_RV = jax.nn.softmax(sorted_RV, axis=-1)
  # A token stays while those before it fall short of p: the first always does.
  before_RV = jnp.cumsum(probs_RV, axis=-1) - probs_RV
  kept_RV = kept_k & ((before_RV < top_p) | (top_p >= 1))
  floor_R1 = jnp.where(kept_RV, sorted_RV, jnp.inf).min(axis=-1, keepdims=True)
  return jnp.where(logits_RV >= floor_R1, logits_RV, -jnp.inf)


def _check(
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  num: int,
  batch_size: int,
) -> None:
  for name, value in (("max_tokens", max_tokens), ("num", num), ("batch_size", batch_size)):
    if value < 1:
      raise UserError(f"{name} is {value}; it must be at least 1")
  if not 0 <= temperature < float("inf"):
    raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more, and finite")
  if top_k < 0:
    raise UserError(f"top_k is {top_k}; it must be 0 (all tokens) or more")
  if not 0 < top_p <= 1:
    raise UserError(f"top_p is {top_p}; it must lie in (0, 1]")
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
