"""The two compiled programs of generation: prefill of the prompts, and decoding of some tokens.

Both run over all rows of a batch, or on every device over its own rows. The random numbers of a row
are a function of (seed, prompt index, sample index) alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dpo_jax.logprobs import logits
from dpo_jax.model import kv_cache, transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Array, PyTree


class SamplingParams(NamedTuple):
  """The numbers that shape the distribution. They are traced: a new value does not recompile.

  The seed is two words of 32 bits, the upper one first: by default JAX has no 64-bit integers.
  """

  seed: Array
  temperature: Array
  top_k: Array
  top_p: Array
  min_p: Array


def sampling_params(
  seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> SamplingParams:
  """Returns the arguments of `sampler.generate` as arrays."""
  words = np.array([seed >> 32, seed % 2**32], np.uint32)
  # Greedy decoding (0) ignores the temperature; 1 avoids a division by zero in the program.
  numbers = map(jnp.asarray, (temperature or 1.0, top_k, top_p, min_p))
  return SamplingParams(jnp.asarray(words), *numbers)


class Plan(NamedTuple):
  """Static arguments: a program is compiled for each value of them and each shape.

  Attributes:
    config: the model.
    eos_ids: tokens that end a completion.
    greedy: take the most likely token, without random numbers.
    by_rank: apply top-k and top-p. False leaves out a sort over the vocabulary.
    by_ratio: apply min-p, a threshold on the ratio to the most likely token's probability.
    dtype: of activations and cache.
  """

  config: ModelConfig
  eos_ids: tuple[int, ...]
  greedy: bool
  by_rank: bool
  by_ratio: bool
  dtype: str


class Batch(NamedTuple):
  """N prompts with K samples each.

  Attributes:
    ids_NL: token ids, each prompt at the right end of its row.
    lengths_N: tokens of each prompt.
    prompt_N: index of each prompt; -1 for a row that only fills the batch.
    sample_K: indices of the samples.
  """

  ids_NL: Array
  lengths_N: Array
  prompt_N: Array
  sample_K: Array


class State(NamedTuple):
  """R = N * S completions that are being generated.

  Attributes:
    cache: keys and values of all tokens but the last.
    token_Sa: the last token of each completion.
    position_Sa: the position of that token.
    keys_Sa: one random key per completion.
    done_Sa: True for a completion that has ended.
    step: the number of tokens so far of each completion that has not ended.
  """

  cache: kv_cache.Cache
  token_Sa: Array
  position_Sa: Array
  keys_Sa: Array
  done_Sa: Array
  step: Array


def specs(mesh: Mesh) -> tuple[Batch, State]:
  """Returns the partition specs of batch and state: rows are divided over all devices."""

  def spec(*axes: Any) -> Any:  # a record has it in the place of an array
    return PartitionSpec(*axes)

  rows, everywhere = spec(mesh.axis_names), spec()
  cache = kv_cache.Cache(spec(None, mesh.axis_names), rows, everywhere)
  return Batch(rows, rows, rows, everywhere), State(cache, rows, rows, rows, rows, everywhere)


@functools.partial(jax.jit, static_argnames=("plan", "mesh"))
def prefill(
  params: PyTree, sampling: SamplingParams, batch: Batch, *, plan: Plan, mesh: Mesh | None = None
) -> tuple[State, Array]:
  """Prefills the cache with the prompts of a batch.

  Args:
    params: parameters of the model.
    sampling: temperature and the other numbers.
    batch: the prompts.
    plan: static arguments.
    mesh: divide the rows over these devices, each of which has all parameters. None: one device, or
      parameters that are themselves divided.

  Returns:
    The state after the first token of every completion, and these tokens [R, 1].
  """
  rows = functools.partial(_prefill_rows, plan)
  return _on_each_device(mesh, rows, specs(mesh)[0] if mesh else None)(params, sampling, batch)


@functools.partial(jax.jit, static_argnames=("columns", "tokens", "plan", "mesh"))
def decode(
  params: PyTree,
  sampling: SamplingParams,
  state: State,
  *,
  columns: int,
  tokens: int,
  plan: Plan,
  mesh: Mesh | None = None,
) -> tuple[State, Array]:
  """Generates `tokens` more tokens of every completion that has not ended.

  Args:
    params, sampling, plan, mesh: as in `prefill`.
    state: the state after the tokens so far.
    columns: the number of columns of the cache from here on, with space for these tokens.
    tokens: how many tokens to generate at most.

  Returns:
    The new state, and the tokens [Sa, tokens], -1 after the end of a completion.
  """
  rows = functools.partial(_decode_rows, plan, columns, tokens)
  return _on_each_device(mesh, rows, specs(mesh)[1] if mesh else None)(params, sampling, state)


def _on_each_device(mesh: Mesh | None, fn: Callable, given: PyTree) -> Callable:
  """Makes fn(params, sampling, rows) run on every device with its own rows.

  Args:
    mesh: the devices; None returns `fn` itself.
    fn: the program of one device.
    given: partition specs of its third argument.
  """
  if mesh is None:
    return fn
  of_batch, of_state = specs(mesh)
  everywhere = PartitionSpec()
  # shard_map, not shardings: jit would make one loop for all devices, and each would wait in every
  # iteration for the others, until the longest completion has ended.
  return jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=(everywhere, everywhere, given),
    out_specs=(of_state, of_batch.prompt_N),
    check_vma=False,
  )


def _prefill_rows(
  plan: Plan, params: PyTree, sampling: SamplingParams, batch: Batch
) -> tuple[State, Array]:
  hidden_ND, cache = kv_cache.prefill(
    plan.config,
    params,
    batch.ids_NL,
    batch.lengths_N,
    columns=batch.ids_NL.shape[1],
    dtype=plan.dtype,
  )

  # The prompt goes through the model once; only then are its keys and values repeated per sample.
  def each(x: Array, axis: int = 0) -> Array:
    return jnp.repeat(x, len(batch.sample_K), axis=axis)

  cache = kv_cache.Cache(
    jax.tree.map(lambda x: each(x, 1), cache.keys), jax.tree.map(each, cache.tokens), cache.filled
  )
  # Rows that only fill the batch start as ended, so that no loop waits for them.
  keys_Sa, none_Sa = _keys(sampling.seed, batch), each(batch.prompt_N < 0)
  step = jnp.asarray(1)
  token_Sa = _next_token(plan, params, sampling, each(hidden_ND), keys_Sa, step - 1)
  out_Sa, done_Sa = _record(plan, token_Sa, none_Sa)
  return State(cache, token_Sa, each(batch.lengths_N), keys_Sa, done_Sa, step), out_Sa[:, None]


def _decode_rows(
  plan: Plan, columns: int, tokens: int, params: PyTree, sampling: SamplingParams, state: State
) -> tuple[State, Array]:
  first, filled = state.step, state.cache.filled
  state = state._replace(cache=kv_cache.widen(state.cache, columns))
  # Filled with -1 from the start: the loop may end before it has written every column.
  out_SaLc = jnp.full((len(state.token_Sa), tokens), -1, jnp.int32)

  def continues(carry: tuple[State, Array]) -> Array:
    state, _ = carry
    # Under shard_map these are the rows of this device alone.
    return (state.step < first + tokens) & ~state.done_Sa.all()

  def advance(carry: tuple[State, Array]) -> tuple[State, Array]:
    state, out_SaLc = carry
    hidden_SaD, cache = kv_cache.decode(
      plan.config, params, state.cache, state.token_Sa, state.position_Sa, dtype=plan.dtype
    )
    token_Sa = _next_token(plan, params, sampling, hidden_SaD, state.keys_Sa, state.step)
    out_Sa, done_Sa = _record(plan, token_Sa, state.done_Sa)
    at = state.step - first
    out_SaLc = jax.lax.dynamic_update_slice_in_dim(out_SaLc, out_Sa[:, None], at, axis=1)
    rest = (state.position_Sa + 1, state.keys_Sa, done_Sa, state.step + 1)
    return State(cache, token_Sa, *rest), out_SaLc

  state, out_SaLc = jax.lax.while_loop(continues, advance, (state, out_SaLc))
  # Devices leave the loop after different numbers of tokens, but these two are replicated and must
  # be equal. On a device that left early all completions have ended, so nothing reads the columns
  # that it skipped.
  cache = state.cache._replace(filled=filled + tokens)
  return state._replace(cache=cache, step=first + tokens), out_SaLc


# --- one token ------------------------------------------------------------------------------------


def _next_token(
  plan: Plan,
  params: PyTree,
  sampling: SamplingParams,
  hidden_SaD: Array,
  keys_Sa: Array,
  step: Array,
) -> Array:
  """Returns the next token of every row, the most likely one or a random one: [Sa]."""
  logits_SaV = logits(hidden_SaD, transformer.head(plan.config, params))
  if plan.greedy:
    return logits_SaV.argmax(axis=-1).astype(jnp.int32)
  # The order is important: 1. temperature; 2. top-k, then top-p of what is left; 3. min-p. This is
  # the order of transformers, and top-p depends on the temperature.
  logits_SaV = logits_SaV / sampling.temperature
  if plan.by_rank:
    logits_SaV = _apply_top_k_top_p(logits_SaV, sampling.top_k, sampling.top_p)
  if plan.by_ratio:
    logits_SaV = _apply_min_p(logits_SaV, sampling.min_p)
  # A key per row and step, so that neither other rows nor the batch's shape change a sample.
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys_Sa, step)
  return jax.vmap(jax.random.categorical)(keys, logits_SaV).astype(jnp.int32)


def _record(plan: Plan, token_Sa: Array, done_Sa: Array) -> tuple[Array, Array]:
  """Returns the tokens, -1 for completions that had ended before, and the new `done_Sa`."""
  ended_Sa = jnp.isin(token_Sa, jnp.array(plan.eos_ids, jnp.int32))
  return jnp.where(done_Sa, -1, token_Sa).astype(jnp.int32), done_Sa | ended_Sa


def _keys(seed: Array, batch: Batch) -> Array:
  """Returns one random key per row, from (seed, prompt index, sample index): [Sa]."""
  fold = jax.random.fold_in
  # threefry by name: another default generator of JAX must not change the samples of a seed.
  key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
  of_prompt = jax.vmap(fold, (None, 0))(key, batch.prompt_N)
  of_sample = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(of_prompt, batch.sample_K)
  return of_sample.reshape(-1)


def _apply_top_k_top_p(logits_SaV: Array, top_k: Array, top_p: Array) -> Array:
  """Sets to -inf all but the k most likely tokens, and of these all beyond a total probability p.

  Args:
    logits_SaV: logits after the temperature.
    top_k: k, 0 for all tokens.
    top_p: p, 1 for all tokens; Holtzman et al. 2020.
  """
  vocab = logits_SaV.shape[-1]
  sorted_SaV = -jnp.sort(-logits_SaV, axis=-1)
  kept_k = jnp.arange(vocab) < jnp.where(top_k > 0, top_k, vocab)
  sorted_SaV = jnp.where(kept_k, sorted_SaV, -jnp.inf)
  probs_SaV = jax.nn.softmax(sorted_SaV, axis=-1)
  # A token stays if the tokens before it have less than p together: so the first always stays, and
  # the one that reaches p is included.
  before_SaV = jnp.cumsum(probs_SaV, axis=-1) - probs_SaV
  kept_SaV = kept_k & ((before_SaV < top_p) | (top_p >= 1))
  # Back to the original order by value: tokens as likely as the last one kept stay too.
  floor_Sa1 = jnp.where(kept_SaV, sorted_SaV, jnp.inf).min(axis=-1, keepdims=True)
  return jnp.where(logits_SaV >= floor_Sa1, logits_SaV, -jnp.inf)


def _apply_min_p(logits_SaV: Array, min_p: Array) -> Array:
  """Sets to -inf the tokens less likely than min_p times the most likely; Nguyen et al. 2024."""
  # In logits, where a ratio of probabilities is a difference: no softmax is needed, and tokens that
  # top-k removed do not matter.
  floor_Sa1 = logits_SaV.max(axis=-1, keepdims=True) + jnp.log(min_p)
  return jnp.where(logits_SaV >= floor_Sa1, logits_SaV, -jnp.inf)
