"""Heads divided among devices: each is somewhere, and attention is that of one device."""

import itertools
import re

import jax
import numpy as np
import pytest

from dpo_jax.distributed import sharding
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import attention_kernels, attention_tiled, head_shares
from dpo_jax.model.attention import Keys, Tokens, attend_blocks
from dpo_jax.model.head_shares import Shares, share_heads
from tests.support.small_attention import batch_of, close, rows_of, value_and_gradient


@pytest.mark.parametrize(
  ("heads", "kv_heads", "devices", "expected"),
  [
    (32, 8, 4, Shares(copies=1, keys=2, queries=4)),  # Llama 3 8B: two of eight each
    (32, 8, 16, Shares(copies=2, keys=1, queries=2)),
    (14, 2, 4, Shares(copies=2, keys=1, queries=4)),  # Qwen 2.5 0.5B: 7 heads as 4 and 3
    (14, 2, 8, Shares(copies=4, keys=1, queries=2)),
    (4, 1, 8, Shares(copies=4, keys=1, queries=1)),  # Gemma 3 1B: four devices have none
    (7, 7, 4, Shares(copies=1, keys=2, queries=1)),  # seven heads and one of zeros
    (12, 12, 1, Shares(copies=1, keys=12, queries=1)),
  ],
)
def test_shares_by_hand(heads, kv_heads, devices, expected):
  assert share_heads(heads, kv_heads, devices) == expected


def test_every_head_has_a_place_and_no_device_has_much_more_than_its_part():
  for kv_heads, group, devices in itertools.product(range(1, 13), range(1, 9), range(1, 17)):
    copies, keys, queries = share_heads(kv_heads * group, kv_heads, devices)
    assert copies * queries >= group and devices * keys >= kv_heads * copies
    # No device has more heads than a device that were alone, and of key/value heads neither.
    assert keys * queries <= kv_heads * group and keys <= kv_heads
    if kv_heads % devices == 0:
      assert (copies, keys, queries) == (1, kv_heads // devices, group)
    # Never worse than copying no key, or than copying each for every query head.
    plain, single = -(-kv_heads // devices) * group, -(-kv_heads * group // devices)
    if group <= devices:
      assert keys * queries <= min(plain, single)


@pytest.mark.parametrize(
  ("mesh", "heads", "kv_heads"),
  [
    ((2, 1, 1, 2), 4, 2),
    ((4, 1, 1, 4), 14, 2),  # copies and a query head of zeros
    ((4, 1, 1, 4), 3, 3),  # key/value heads of zeros
    ((8, 2, 2, 2), 6, 2),  # one key/value head for two devices
    ((4, 1, 2, 2), 3, 1),  # over tensor, too
    ((4, 1, 4, 1), 6, 2),
  ],
)
@pytest.mark.parametrize("kind", ["blocked", "tiles", "xla"])
def test_attention_on_a_mesh_is_that_of_one_device(monkeypatch, kind, mesh, heads, kv_heads):
  monkeypatch.setattr(attention_tiled, "TILE", 8)
  batch = jax.tree.map(np.asarray, batch_of("shared", 2))
  qkv, slope = rows_of(batch, heads=heads, kv_heads=kv_heads)
  tokens = Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)

  def attend(q, k, v):
    keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2))
    if kind == "xla":
      index = attention_kernels.index_sequences(batch)
      return attention_kernels.attend_sequences(
        q, k, v, index, attention_kernels.KernelOptions("xla")
      )
    if kind == "tiles":
      plan = attention_tiled.plan_tiles(tokens)
      return attention_tiled.attend_tiles(
        q, keys, tokens, plan, np.int32(5), attention_tiled.ScoreOptions()
      )
    return attend_blocks(q, keys, tokens, np.int32(5))

  # Both rows as one group are what a single device has; the mesh of eight has two groups.
  expected = value_and_gradient(attend, qkv, slope)
  with jax.set_mesh(Executor("mesh", *mesh).mesh):
    close(value_and_gradient(attend, qkv, slope), expected)


def test_heads_of_a_device_of_the_tensor_axis_are_shared_by_those_of_its_row_alone():
  # Three heads on each of two devices along tensor, over two each along sequence: two and one.
  batch = jax.tree.map(np.asarray, batch_of("shared", 2))
  qkv, _ = rows_of(batch, heads=6, kv_heads=6)
  tokens = Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)

  def attend(q, k, v):
    q, k, v = map(sharding.by_heads, (q, k, v))
    return sharding.by_heads(attend_blocks(q, Keys.from_columns(k, v), tokens))

  with jax.set_mesh(Executor("mesh", 4, tensor=2, sequence=2).mesh):
    text = jax.jit(attend).lower(*qkv).compile().as_text()
  assert text.count(" all-to-all(") == 4
  assert not re.search(r" (all-gather|collective-permute|all-reduce)\(", text)


def test_heads_of_zeros_are_added_and_removed_run_by_run():
  x_NLHHd = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 6, 1)
  filled = head_shares._fill(x_NLHHd, runs=2, total=8)
  assert filled.ravel().tolist() == [1, 2, 3, 0, 4, 5, 6, 0]
  assert head_shares._cut(filled, runs=2, total=6).ravel().tolist() == [1, 2, 3, 4, 5, 6]
