"""Provides a language model in a few lines of pure functions, and random pairs to test it with."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import collate
from dpo_jax.data.examples import Example
from dpo_jax.structs import Head, Model

VOCAB, WIDTH = 37, 16


def init(seed=0, vocab=VOCAB, width=WIDTH):
  """Samples parameters as NumPy arrays, so that two trees never share device buffers."""
  rng = np.random.default_rng(seed)
  shapes = {
    "embed": (vocab, width),
    "position": (64, width),
    "query": (width, width),
    "key": (width, width),
    "value": (width, width),
    "head": (vocab, width),
    "bias": (vocab,),
  }
  return {k: rng.normal(0, 0.3, shape).astype(np.float32) for k, shape in shapes.items()}


def hidden(params, batch):
  """Computes one layer of attention under the mask rule of `TokenBatch`."""
  x_NLD = params["embed"][batch.ids_NL] + params["position"][batch.position_NL]
  q_NLD, k_NLD, v_NLD = (x_NLD @ params[name] for name in ("query", "key", "value"))
  same = batch.pair_NL[:, :, None] == batch.pair_NL[:, None, :]
  past = batch.position_NL[:, :, None] >= batch.position_NL[:, None, :]
  branch = batch.branch_NL
  mine = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
  scores = jnp.where(same & past & mine, jnp.einsum("nld,nmd->nlm", q_NLD, k_NLD), -1e30)
  mixed_NLD = x_NLD + jnp.einsum("nlm,nmd->nld", jax.nn.softmax(scores), v_NLD)
  return jnp.tanh(mixed_NLD)


MODEL = Model(hidden, lambda params: Head(params["head"], params["bias"]), VOCAB)


def pairs(count, seed=0, completions=2, vocab=VOCAB, longest=9):
  """Samples pairs with different lengths and different weights."""
  rng = np.random.default_rng(seed)

  def ids():
    return rng.integers(0, vocab, rng.integers(1, longest)).astype(np.int32)

  return [
    Example(ids(), tuple(ids() for _ in range(completions)), float(rng.uniform(0.2, 2.0)), row)
    for row in range(count)
  ]


def with_context(examples, seed=0):
  """Gives tokens weights of 0, ½ and 1 at random; the last token of a completion has 1."""
  rng = np.random.default_rng(seed)

  def weights(ids):
    sampled = rng.choice([0, 0.5, 1], len(ids)).astype(np.float32)
    sampled[-1:] = 1
    return sampled

  return [e._replace(token_weights=tuple(map(weights, e.completions))) for e in examples]


def labelled(count, seed):
  """Returns `pairs` with labels for kto, every second pair desirable; other losses ignore them."""
  return [
    pair._replace(scores=(float(i % 2),) * 2) for i, pair in enumerate(pairs(count, seed=seed))
  ]


def batches(count, groups, accumulate=1):
  """Returns `count` batches of 16 ragged pairs with context in them, all of one shape."""
  sets = [with_context(labelled(16, seed), seed) for seed in range(count)]
  return one_shape(sets, groups, accumulate)


def one_shape(sets, groups, accumulate=1, **how):
  """Builds one batch per set of examples, all of one shape, so that a step compiles only once."""
  how = {"row_length": 48, "groups": groups, **how}
  cut = [[some[i::accumulate] for i in range(accumulate)] for some in sets]
  sizes = collate.fit_sizes([part for parts in cut for part in parts], **how)
  return [collate.collate_many(parts, sizes=sizes, **how) for parts in cut]
