"""Digests of weights: whatever training or merging changes is found, and little is read."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.hf import safetensors_files


def weights(folder, changed=None, **changes):
  """Writes two tensors of a MB, one of them changed."""
  rng = np.random.default_rng(0)
  tensors = {name: rng.normal(size=2**18).astype(np.float32) for name in ("a", "b")}
  if changed:
    tensors[changed] = tensors[changed] + np.float32(1e-3)
  folder.mkdir()
  save_file(tensors | changes, folder / safetensors_files.WEIGHTS)
  return safetensors_files.sampled_digest(folder)


@pytest.mark.parametrize("whole", [2**26, 0])
def test_every_tensor_counts(tmp_path, monkeypatch, whole):
  monkeypatch.setattr(safetensors_files, "WHOLE", whole)
  found = [
    weights(tmp_path / "first"),
    weights(tmp_path / "a", "a"),
    weights(tmp_path / "b", "b"),
    weights(tmp_path / "name", c=np.zeros(0, np.float32)),
  ]
  assert len(set(found)) == 4
  assert weights(tmp_path / "again") == found[0]


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors_files, "WHOLE", 0)
  before = weights(tmp_path / "model")
  file = tmp_path / "model" / safetensors_files.WEIGHTS
  data = bytearray(file.read_bytes())
  data[-1] ^= 1  # the last number of the last tensor is always read
  file.write_bytes(data)
  assert safetensors_files.sampled_digest(tmp_path / "model") != before
  data[-1] ^= 1
  data[len(data) // 4 + 9000] ^= 1  # between two pieces: what a sample can miss
  file.write_bytes(data)
  assert safetensors_files.sampled_digest(tmp_path / "model") == before
