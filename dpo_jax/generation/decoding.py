"""The programs of generation: one that reads prompts, one that writes some tokens of the answers.

Both run over all rows of a batch, or on every device over rows of its own. The random numbers of a
row are a function of (seed, prompt index, sample index) alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dpo_jax.logprobs import logits
from dpo_jax.model import kv_cache, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, PyTree


class Knobs(NamedTuple):
  """Numbers that shape the distribution; traced, so that no value of them compiles anew.

  The seed is two words of 32 bits, the upper first.
  """

  seed: Array
  temperature: Array
  top_k: Array
  top_p: Array
  min_p: Array


def knobs(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> Knobs:
  """Those of `sampler.generate`, as arrays; greedy decoding reads no temperature."""
  words = np.array([seed >> 32, seed % 2**32], np.uint32)
  numbers = map(jnp.asarray, (temperature or 1.0, top_k, top_p, min_p))
  return Knobs(jnp.asarray(words), *numbers)


class Plan(NamedTuple):
  """What programs are compiled for, beside shapes.

  Attributes:
    ranked: whether tokens are kept by rank (top-k, top-p), which takes a sort.
    near: whether they are kept by their probability beside the likeliest's (min-p).
  """

  config: ModelConfig
  eos_ids: tuple[int, ...]
  greedy: bool
  ranked: bool
  near: bool
  dtype: str


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


class State(NamedTuple):
  """R = N * S answers under way.

  Attributes:
    cache: of all tokens but the last.
    token_R: the last token of each.
    position_R: its position.
    keys_R: of the random numbers.
    done_R: whether the answer is whole.
    step: tokens so far, of the answers that are not.
  """

  cache: kv_cache.Cache
  token_R: Array
  position_R: Array
  keys_R: Array
  done_R: Array
  step: Array


def specs(mesh: Mesh) -> tuple[Batch, State]:
  """How the arrays of both are divided over the devices: by rows."""
  rows, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
  cache = kv_cache.Cache(PartitionSpec(None, mesh.axis_names), rows, everywhere)
  return Batch(rows, rows, rows, everywhere), State(cache, rows, rows, rows, rows, everywhere)


@functools.partial(jax.jit, static_argnames=("plan", "mesh"))
def prefill(
  params: PyTree, knobs: Knobs, batch: Batch, *, plan: Plan, mesh: Mesh | None = None
) -> tuple[State, Array]:
  """Prefills the cache with the prompts of a batch.

  Args:
    params, knobs, batch, plan: the model, what is asked of it, and of what.
    mesh: devices, each with all parameters, among which the rows are divided.

  Returns:
    The state at the first token of all answers, and that token, [R, 1].
  """
  rows = functools.partial(_prefill_rows, plan)
  return _each(mesh, rows, specs(mesh)[0] if mesh else None)(params, knobs, batch)


@functools.partial(jax.jit, static_argnames=("columns", "tokens", "plan", "mesh"))
def decode(
  params: PyTree,
  knobs: Knobs,
  state: State,
  *,
  columns: int,
  tokens: int,
  plan: Plan,
  mesh: Mesh | None = None,
) -> tuple[State, Array]:
  """The state some tokens later, and the tokens, -1 beyond the end of an answer: [R, tokens].

  Args:
    params, knobs, state: of the batch so far.
    columns: of the cache from here on, with room for these tokens.
    tokens: to write, of answers that do not end before.
    plan, mesh: as in `prefill`.
  """
  rows = functools.partial(_decode_rows, plan, columns, tokens)
  return _each(mesh, rows, specs(mesh)[1] if mesh else None)(params, knobs, state)


def _each(mesh: Mesh | None, fn: Callable, given: PyTree) -> Callable:
  """fn(params, knobs, rows), on every device by itself: none waits for another's rows."""
  if mesh is None:
    return fn
  of_batch, of_state = specs(mesh)
  everywhere = PartitionSpec()
  return jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=(everywhere, everywhere, given),
    out_specs=(of_state, of_batch.prompt_N),
    check_vma=False,
  )


def _prefill_rows(plan: Plan, params: PyTree, knobs: Knobs, batch: Batch) -> tuple[State, Array]:
  hidden_ND, cache = kv_cache.prefill(
    plan.config,
    params,
    batch.ids_NL,
    batch.lengths_N,
    columns=batch.ids_NL.shape[1],
    dtype=plan.dtype,
  )
  # A prompt is read once, whatever the number of its samples.
  each = lambda x, axis=0: jnp.repeat(x, len(batch.sample_S), axis=axis)
  cache = kv_cache.Cache(
    jax.tree.map(lambda x: each(x, 1), cache.keys), jax.tree.map(each, cache.tokens), cache.filled
  )
  keys_R, none_R = _keys(knobs.seed, batch), each(batch.prompt_N < 0)
  step = jnp.asarray(1)
  token_R = _pick(plan, params, knobs, each(hidden_ND), keys_R, step - 1)
  out_R, done_R = _note(plan, token_R, none_R)
  return State(cache, token_R, each(batch.lengths_N), keys_R, done_R, step), out_R[:, None]


def _decode_rows(
  plan: Plan, columns: int, tokens: int, params: PyTree, knobs: Knobs, state: State
) -> tuple[State, Array]:
  first, filled = state.step, state.cache.filled
  state = state._replace(cache=kv_cache.widen(state.cache, columns))
  out_RT = jnp.full((len(state.token_R), tokens), -1, jnp.int32)

  def going_on(carry) -> Array:
    state, _ = carry
    return (state.step < first + tokens) & ~state.done_R.all()

  def advance(carry):
    state, out_RT = carry
    hidden_RD, cache = kv_cache.decode(
      plan.config, params, state.cache, state.token_R, state.position_R, dtype=plan.dtype
    )
    token_R = _pick(plan, params, knobs, hidden_RD, state.keys_R, state.step)
    out_R, done_R = _note(plan, token_R, state.done_R)
    at = state.step - first
    out_RT = jax.lax.dynamic_update_slice_in_dim(out_RT, out_R[:, None], at, axis=1)
    rest = (state.position_R + 1, state.keys_R, done_R, state.step + 1)
    return State(cache, token_R, *rest), out_RT

  state, out_RT = jax.lax.while_loop(going_on, advance, (state, out_RT))
  # Devices leave the loop apart; one that leaves early has no answer left that would read these.
  cache = state.cache._replace(filled=filled + tokens)
  return state._replace(cache=cache, step=first + tokens), out_RT


# --- one token ------------------------------------------------------------------------------------


def _pick(
  plan: Plan, params: PyTree, knobs: Knobs, hidden_RD: Array, keys_R: Array, step: Array
) -> Array:
  """A token for every row, the likeliest or drawn: [R]."""
  logits_RV = logits(hidden_RD, transformer.head(plan.config, params))
  if plan.greedy:
    return logits_RV.argmax(axis=-1).astype(jnp.int32)
  logits_RV = logits_RV / knobs.temperature
  if plan.ranked:
    logits_RV = _keep_ranks(logits_RV, knobs.top_k, knobs.top_p)
  if plan.near:
    logits_RV = _keep_near(logits_RV, knobs.min_p)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys_R, step)
  return jax.vmap(jax.random.categorical)(keys, logits_RV).astype(jnp.int32)


def _note(plan: Plan, token_R: Array, done_R: Array) -> tuple[Array, Array]:
  """What is written of these tokens, -1 where the answer was whole, and who is done after them."""
  ended_R = jnp.isin(token_R, jnp.array(plan.eos_ids, jnp.int32))
  return jnp.where(done_R, -1, token_R).astype(jnp.int32), done_R | ended_R


def _keys(seed: Array, batch: Batch) -> Array:
  """A random key a row, of (seed, prompt index, sample index): [R]."""
  fold = jax.random.fold_in
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  of_prompt = jax.vmap(fold, (None, 0))(key, batch.prompt_N)
  of_sample = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(of_prompt, batch.sample_S)
  return of_sample.reshape(-1)


def _keep_ranks(logits_RV: Array, top_k: Array, top_p: Array) -> Array:
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


def _keep_near(logits_RV: Array, min_p: Array) -> Array:
  """Leaves the tokens of probability at least min_p times the likeliest's."""
  floor_R1 = logits_RV.max(axis=-1, keepdims=True) + jnp.log(min_p)
  return jnp.where(logits_RV >= floor_R1, logits_RV, -jnp.inf)
