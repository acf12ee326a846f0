"""A language model in a few lines of pure functions, and random pairs for every identity."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import collate
from dpo_jax.data.examples import Example
from dpo_jax.structs import Head, Model

VOCAB, WIDTH = 37, 16


def init(seed=0, vocab=VOCAB, width=WIDTH):
  """Parameters as numpy arrays, so that two trees never share buffers."""
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
  """One layer of attention under the mask rule of `TokenBatch`."""
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
  """Random pairs with ragged lengths and ragged weights."""
  rng = np.random.default_rng(seed)
  ids = lambda: rng.integers(0, vocab, rng.integers(1, longest)).astype(np.int32)
  return [
    Example(ids(), tuple(ids() for _ in range(completions)), float(rng.uniform(0.2, 2.0)), row)
    for row in range(count)
  ]


def labelled(count, seed):
  """`pairs` with labels for kto, every second row of them desirable; others do not read them."""
  return [
    pair._replace(scores=(float(i % 2),) * 2) for i, pair in enumerate(pairs(count, seed=seed))
  ]


def batches(count, groups, accumulate=1):
  """So many batches of 16 ragged pairs: see `one_shape`."""
  return one_shape([labelled(16, seed) for seed in range(count)], groups, accumulate)


def one_shape(sets, groups, accumulate=1, **how):
  """A batch of each set of examples, all of one shape: a step compiles once for all of them."""
  how = {"row_length": 48, "groups": groups, **how}
  cut = [[some[i::accumulate] for i in range(accumulate)] for some in sets]
  sizes = collate.fit_sizes([part for parts in cut for part in parts], **how)
  return [collate.collate_many(parts, sizes=sizes, **how) for parts in cut]
