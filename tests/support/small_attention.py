"""Provides rows, gradients and steps for the tests of all kinds of attention."""

import functools

import jax
import numpy as np
import optax

from dpo_jax import logprobs, losses, step
from dpo_jax.data import collate
from dpo_jax.data.examples import fill_up
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import attention_kernels, families, transformer
from tests.support import tiny

LLAMA = {
  "model_type": "llama",
  "vocab_size": tiny.VOCAB,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 48,
}
CONFIG = families.from_hf(LLAMA)
HEADS, KV_HEADS, HEAD = 4, 2, 8
MANY = 2**30  # sequences of a line: as many as fit


def examples(count, completions, seed=0):
  """Returns ragged examples; every second one has a completion less, where others have two."""
  some = tiny.pairs(count, seed=seed, completions=completions)
  cut = [e._replace(completions=e.completions[: max(1, completions - e.row % 2)]) for e in some]
  return fill_up(cut, completions)


def batch_of(name="shared", completions=2, groups=2, count=5, per_line=MANY):
  """Builds a batch that lists its sequences and has a row and a line of nothing but padding."""
  some = examples(count, completions)
  sizes = collate.fit_sizes([some], layout=name, row_length=48, groups=groups, per_line=per_line)
  sizes = sizes._replace(rows=sizes.rows + groups * completions, lines=sizes.lines + 1)
  return collate.collate(some, layout=name, row_length=48, groups=groups, sizes=sizes)


def without_lines(batch):
  return batch._replace(sequence_GTW=None, start_GTSq=None, place_NLK=None)


def close(found, expected):
  def one(path, x, y):
    bound = 1e-5 * max(np.abs(y).max(), 1e-30)
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=bound, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(one, found, expected)


def rows_of(batch, seed=0, heads=HEADS, kv_heads=KV_HEADS, dtype=np.float32):
  """Samples queries, keys and values, and the output's gradient, which is 0 at padding."""
  rng = np.random.default_rng(seed)

  def make(heads):
    return rng.normal(size=(*batch.ids_NL.shape, heads, HEAD)).astype(dtype)

  real = (batch.pair_NL >= 0)[..., None, None]
  return (make(heads), make(kv_heads), make(kv_heads)), make(heads) * real


def value_and_gradient(attend, qkv, slope):
  """Returns the output at real tokens, and the gradients of Σ output · slope by q, k and v."""

  def value(*qkv):
    out = attend(*qkv)
    return (out * slope).sum(), out

  gradient, out = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*qkv)
  return np.where(slope != 0, out, 0), gradient


@functools.cache
def params():
  return jax.tree.map(np.asarray, transformer.init_params(CONFIG, 0))


def steps(attention, mode, *mesh, accumulate=1, config=CONFIG, remat="dots"):
  """Trains two steps on ragged rankings and returns parameters and losses."""
  executor = Executor(mode, *mesh)
  loss = losses.resolve("plackett_luce", beta=0.5)
  tx = optax.adamw(1e-3, eps=1e-3)
  model = transformer.build(config, attention=attention, remat=remat)
  objective = step.Objective(logprobs.make_logps_fn(model), loss, completions=3)
  init = functools.partial(step.init_state, tx=tx, loss=loss)
  start = jax.tree.map(np.asarray, transformer.init_params(config, 0))
  state = executor.compile_init(init)(executor.place(start))
  reference_params = executor.place(start)
  train_step_fn = executor.compile_step(
    functools.partial(step.train_step, objective=objective, tx=tx)
  )
  found = []
  sets = [examples(16, 3, seed=index) for index in range(2)]
  per_line = attention_kernels.sequences_per_line(attention, config, executor.devices[0])
  for batch in tiny.one_shape(sets, executor.groups, accumulate, per_line=per_line):
    assert (batch.sequence_GTW is None) == (not per_line)
    state, means = train_step_fn(state, reference_params, executor.place_batch(batch))
    found.append(float(executor.metrics_to_host(means)["loss"]))
  return executor.to_host(state.params), found


@functools.cache
def expected_steps():
  return steps("blocked", "mesh", 1)
