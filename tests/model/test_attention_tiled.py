"""Attention by tiles equals attention by blocks, with gradients, and reads every key it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logprobs
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import attention_kernels, attention_tiled, transformer
from dpo_jax.model.attention import Keys, Tokens, attend_blocks, visible
from tests.support import small_attention
from tests.support.small_attention import CONFIG, close, rows_of, value_and_gradient, without_lines


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Makes tiles so small that a row of a test has several."""
  monkeypatch.setattr(attention_tiled, "TILE", 8)


def tokens_of(batch):
  return Tokens(*map(jnp.asarray, (batch.position_NL, batch.pair_NL, batch.branch_NL)))


def test_widths_grow_by_halves_up_to_all_there_is():
  assert attention_tiled.key_widths(1) == (1,)
  assert attention_tiled.key_widths(5) == (1, 2, 3, 4, 5)
  assert attention_tiled.key_widths(23) == (1, 2, 3, 4, 6, 8, 12, 16, 23)


def test_a_tile_looks_back_to_where_its_first_pair_begins():
  # Tiles of 8; pairs of 20, 10 and 6 tokens in 40 columns: the last 4 are padding.
  pair_NL = np.repeat([0, 1, 2, -1], [20, 10, 6, 4])[None]
  found = attention_tiled.plan_tiles(
    Tokens(np.zeros_like(pair_NL), pair_NL, np.zeros_like(pair_NL))
  )
  # Columns 0-7, 8-15 and 16-23 see from 0 on: 1, 2 and 3 tiles. 24-31 hold pairs that begin at 20
  # and 30, and see the tile of column 20 and their own; 32-39 that of column 30 and their own.
  assert attention_tiled.key_widths(5) == (1, 2, 3, 4, 5)
  np.testing.assert_array_equal(found.bounds_Gx[0], [0, 1, 4, 5, 5, 5])
  assert found.order_Ti[0] == 0 and set(found.order_Ti[1:4].tolist()) == {1, 3, 4}


def test_every_group_of_rows_has_a_plan_of_its_own():
  # Rows of 32 columns, one a device: the first is one pair, the second has four of a tile each.
  pair_NL = np.stack([np.zeros(32, int), np.repeat([0, 1, 2, 3], 8)])
  tokens = Tokens(*map(jnp.asarray, (np.zeros_like(pair_NL), pair_NL, np.zeros_like(pair_NL))))
  with jax.set_mesh(Executor("mesh", 2).mesh):
    found = jax.jit(attention_tiled.plan_tiles)(tokens)
  np.testing.assert_array_equal(found.bounds_Gx, [[0, 1, 2, 3, 4], [0, 4, 4, 4, 4]])
  np.testing.assert_array_equal(found.order_Ti, [0, 1, 2, 3, 0, 1, 2, 3])


def test_tiles_of_padding_are_passed_over():
  pair_NL = np.repeat([[0, -1]], [8, 24], axis=1)
  found = attention_tiled.plan_tiles(
    Tokens(np.zeros_like(pair_NL), pair_NL, np.zeros_like(pair_NL))
  )
  np.testing.assert_array_equal(found.bounds_Gx[0, jnp.array([0, -1])], [3, 4])


@pytest.mark.parametrize("name", ["shared", "packed", "padded"])
def test_no_key_that_is_seen_is_left_out(name):
  batch = small_attention.batch_of(name, 3)
  tokens = tokens_of(batch)
  found = attention_tiled.plan_tiles(tokens)
  length = batch.ids_NL.shape[1]
  count = -(-length // attention_tiled.TILE)
  seen_NLL = np.asarray(visible(tokens, tokens)) & (batch.pair_NL >= 0)[:, :, None]
  looked = set()
  for number, width in enumerate(attention_tiled.key_widths(count)):
    for at in range(*found.bounds_Gx[0, number : number + 2]):
      row, place = divmod(int(found.order_Ti[at]), count)
      looked.add((row, place))
      first = max(0, place + 1 - width) * attention_tiled.TILE
      mine = seen_NLL[row, place * attention_tiled.TILE : (place + 1) * attention_tiled.TILE]
      assert not mine[:, :first].any()
  assert {(n, at // attention_tiled.TILE) for n, at in np.argwhere(seen_NLL.any(axis=2))} == looked


@pytest.mark.parametrize(
  ("name", "window", "cap", "kv_heads"),
  [("shared", 0, 0.0, 2), ("shared", 3, 0.0, 4), ("packed", 0, 1.5, 1), ("padded", 0, 0.0, 2)],
)
def test_attention_by_tiles_is_that_by_blocks(name, window, cap, kv_heads):
  batch = small_attention.batch_of(name, 3)
  tokens = tokens_of(batch)
  qkv, slope = rows_of(batch, kv_heads=kv_heads)
  seen = jnp.int32(window) if window else None

  def blocks(q, k, v):
    keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2))
    return attend_blocks(q, keys, tokens, seen, scale=0.5, cap=cap)

  def by_tiles(q, k, v):
    keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2))
    return attention_tiled.attend_tiles(
      q,
      keys,
      tokens,
      attention_tiled.plan_tiles(tokens),
      seen,
      attention_tiled.ScoreOptions(0.5, cap),
    )

  found, expected = (value_and_gradient(fn, qkv, slope) for fn in (by_tiles, blocks))
  close(found, expected)


@pytest.mark.parametrize(
  "how",
  [
    pytest.param(("mesh", 1, {"accumulate": 2}), marks=pytest.mark.slow),
    pytest.param(("mesh", 1, {"remat": "none"}), marks=pytest.mark.slow),
    pytest.param(("mesh", 1, {"remat": "full"}), marks=pytest.mark.slow),
    pytest.param(("pmap", 2, {}), marks=pytest.mark.slow),
    pytest.param(("mesh", 8, 2, 2, 2, {}), marks=pytest.mark.slow),
    pytest.param(("mesh", 4, 1, 1, 4, {}), marks=pytest.mark.slow),
  ],
)
def test_a_step_by_tiles_is_that_by_blocks(how):
  *mesh, more = how
  close(small_attention.steps("tiles", *mesh, **more), small_attention.expected_steps())


def test_bfloat16_stays_near_float32():
  """Tiles in bfloat16 lose no more precision in log-probs than blocks do, within a half."""
  batch = without_lines(small_attention.batch_of("shared", 2))

  def logps(name, dtype):
    model = transformer.build(CONFIG, attention=name, dtype=dtype)
    return np.asarray(jax.jit(logprobs.make_logps_fn(model))(small_attention.params(), batch))

  tiled, blocked = logps("tiles", "bfloat16"), logps("blocked", "bfloat16")
  exact = logps("blocked", "float32")
  # Each product rounds by 2^-9, and log-probs are sums of tens of nats.
  assert np.abs(tiled - exact).max() <= 1.5 * np.abs(blocked - exact).max()


@pytest.mark.parametrize("name", ["auto", "tiles"])
def test_tiles_are_the_attention_of_cpus(name):
  how = {"dtype": "float32", "device": jax.devices("cpu")[0]}
  assert attention_kernels.choose(name, CONFIG, **how) == ("tiles", "")
