"""Bytes on a device, counted by hand, and a real out-of-memory error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.distributed import executor, memory
from dpo_jax.structs import UserError

TREE = {
  "head": {"embedding": np.zeros((16, 8), np.float32)},
  "norm": {"scale": np.zeros(8, np.float32)},
}


def test_device_bytes_by_hand():
  assert memory.device_bytes(TREE) == 4 * (16 * 8 + 8)
  divided = executor.Executor("mesh", 8, fsdp=8).place(TREE)
  assert memory.device_bytes(divided) == 4 * (16 * 8 // 8 + 8)  # the norm stays whole
  assert memory.device_bytes(executor.Executor("pmap", 8).place(TREE)) == 4 * (16 * 8 + 8)
  shapes = executor.Executor("mesh", 8, fsdp=2, tensor=2).abstract(TREE)
  assert memory.device_bytes(shapes) == 4 * (16 * 8 // 4 + 8)


def test_running_out_is_one_line_that_names_the_largest():
  with (
    pytest.raises(UserError) as raised,
    memory.explain_out_of_memory({"policy": TREE, "reference": {}}, 2**34),
  ):
    jax.block_until_ready(jnp.zeros(2**46, jnp.float32))
  line = str(raised.value)
  assert line.startswith("out of memory of 16.00 GiB per device. Stored on each: policy 0.00 GiB")
  assert "the largest buffers: policy.head.embedding 0.00 GiB, policy.norm.scale" in line
  assert "train.accumulate" in line and "\n" not in line


def test_other_errors_pass():
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
    memory.explain_out_of_memory({}),
  ):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize(
  ("stats", "free"),
  [(None, None), ({"bytes_limit": 100, "bytes_in_use": 30}, 70), ({"bytes_in_use": 30}, None)],
)
def test_what_a_device_has_left(monkeypatch, stats, free):
  class Device:
    def memory_stats(self):
      return stats

  monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device()])
  assert memory.device_free() == free
