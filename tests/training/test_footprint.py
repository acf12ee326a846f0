"""What a run stores at the least, by hand, and the line that refuses what cannot fit."""

import json
import time

import pytest

from configs import preferences
from dpo_jax import train
from dpo_jax.model import families, lora
from dpo_jax.structs import UserError
from dpo_jax.training import setup
from dpo_jax.training.setup import footprint
from tests.support import small_tokenizers

# Llama 3 70B: https://arxiv.org/abs/2407.21783, table 3.
LARGE = {
  "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 80,
  "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
}  # fmt: skip
SMALL = LARGE | {
  "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 4, "intermediate_size": 128,
}  # fmt: skip
# Two embeddings, and in each of 2 layers 4 D x D and 3 D x 128 and two norms; the last norm.
COUNT = 2 * 500 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def configured(**changes):
  config = preferences.get_config("model=nowhere,data=nowhere")
  config.parallel.devices = 1
  config.update_from_flattened_dict(changes)
  return config


def needed(fields=SMALL, **changes):
  config = configured(**changes)
  adapters = lora.LoRA(rank=config.lora.rank) if config.lora.rank else None
  return footprint.needed(config, setup.check(config), families.from_hf(fields), adapters)


def test_a_whole_model_by_hand():
  parts, on_host = needed()
  # 4 bytes each in weights, gradients and reference, 8 in two moments, and AdamW's counts.
  assert parts["weights"] == parts["gradients"] == parts["reference"] == 4 * COUNT
  assert 8 * COUNT <= parts["optimizer"] <= 8 * COUNT + 64 and on_host == 0


@pytest.mark.parametrize(
  ("changes", "share"),
  [
    ({"reference.param_dtype": "bfloat16"}, {"reference": 2}),
    ({"reference.store": "somewhere"}, {"reference": 0}),
    ({"loss.name": "simpo"}, {"reference": 0}),
    ({"reference.sync_every": 4}, {"reference": 4}),
    # The average, and the policy that it began with, beside the reference.
    ({"reference.sync_every": 4, "reference.bema": True}, {"reference": 12}),
    ({"model.param_dtype": "bfloat16"}, {"weights": 2, "gradients": 2, "reference": 4}),
    # Each gradient may be gone before the next one is there, but not where they are summed.
    ({"optimizer.clip_norm": 0.0}, {"gradients": 0}),
    ({"optimizer.clip_norm": 0.0, "train.accumulate": 2}, {"gradients": 4}),
  ],
)
def test_what_changes_it(changes, share):
  parts, _ = needed(**changes)
  assert {name: parts[name] for name in share} == {n: b * COUNT for n, b in share.items()}


def test_bfloat16_moments_are_half():
  parts, _ = needed(**{"model.param_dtype": "bfloat16"})
  assert 4 * COUNT <= parts["optimizer"] <= 4 * COUNT + 64


def test_adapters_are_all_that_is_trained():
  parts, _ = needed(**{"lora.rank": 4})
  maps = 4 * [(64, 64)] + 2 * [(64, 128)] + [(128, 64)]
  adapters = 2 * sum(4 * (a + b) for a, b in maps)
  assert parts["base"] == 4 * COUNT
  assert parts["adapters"] == parts["gradients"] == 4 * adapters


@pytest.mark.parametrize(("fsdp", "mode"), [(1, "mesh"), (8, "mesh"), (1, "pmap")])
def test_cpu_devices_share_one_memory(fsdp, mode):
  changes = {"parallel.devices": 8, "parallel.fsdp": fsdp, "parallel.mode": mode}
  parts, _ = needed(**changes)
  norms = 4 * (2 * 2 + 1) * 64  # whole on every device
  once = 4 * COUNT - norms
  assert parts["weights"] == (once if fsdp == 8 else 8 * once) + 8 * norms


def test_an_optimizer_in_host_memory_saves_nothing_on_a_cpu(monkeypatch):
  changes = {"parallel.offload_optimizer": True}
  whole, on_host = needed(**changes)
  assert (whole, on_host) == needed()
  monkeypatch.setattr(footprint, "_is_cpu", lambda executor: False)
  parts, on_host = needed(**changes)
  assert parts["optimizer"] <= 64 and on_host + parts["optimizer"] >= 8 * COUNT


def test_an_accelerator_is_counted_for_each_device(monkeypatch):
  monkeypatch.setattr(footprint, "_is_cpu", lambda executor: False)
  parts, _ = needed(**{"parallel.devices": 8, "parallel.fsdp": 8})
  assert parts["weights"] < 4 * COUNT / 7


# --- the line -------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
  """A folder with a tokenizer and the config.json of a large model, and no weights."""
  folder = small_tokenizers.byte_fallback(tmp_path / "large")
  (folder / "config.json").write_text(json.dumps(LARGE))
  return folder


def refusal(large, free_gb, monkeypatch, **changes):
  monkeypatch.setattr(footprint.host_memory, "available", lambda: int(free_gb * 1e9))
  config = configured(**{"model.path": str(large), "data.path": str(large / "config.json")})
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError) as raised:
    train.execute(config, large.parent / "run")
  assert "\n" not in str(raised.value) and not (large.parent / "run").exists()
  return str(raised.value)


def test_a_model_that_cannot_fit_is_refused_in_seconds(large, monkeypatch):
  started = time.perf_counter()
  line = refusal(large, 16, monkeypatch)
  assert time.perf_counter() - started < 10
  # 70.55e9 weights of 4 bytes are 282.2 GB.
  assert line.startswith(
    "training needs at least 1411.1 GB (weights 282.2, gradients 282.2, optimizer 564.4, reference"
    " 282.2), and this machine has 16.0 GB free; it takes a smaller model or a machine with more"
    " memory; what saves most is --lora_rank=16 --config.model.param_dtype=bfloat16"
  )


def test_changes_that_are_enough_are_named_by_what_they_save(large, monkeypatch):
  line = refusal(large, 800, monkeypatch)
  flags = "--config.model.param_dtype=bfloat16 --config.reference.param_dtype=bfloat16"
  # Both together save more, and are not needed.
  assert line.endswith(f"; use --lora_rank=16 (285.5 GB) or {flags} (705.5 GB)")


def test_what_is_so_already_is_not_suggested(large, monkeypatch):
  line = refusal(large, 100, monkeypatch, **{"lora.rank": 8})
  assert "(adapters 0.4, gradients 0.4, optimizer 0.8, base 282.2)" in line
  assert "--lora_rank" not in line and "reference.store" not in line
  flags = "--config.model.param_dtype=bfloat16 --config.reference.param_dtype=bfloat16"
  assert line.endswith(f"what saves most is {flags} (142.8 GB)")


def test_what_fits_goes_on_to_the_next_check(large, monkeypatch):
  line = refusal(large, 1500, monkeypatch)
  assert "GB" not in line and "safetensors" in line


def test_no_run_stores_more_than_what_spares_the_count():
  for changes in (
    {"reference.sync_every": 4, "reference.bema": True},
    {"lora.rank": 64, "parallel.devices": 8},
  ):
    parts, _ = needed(**changes)
    assert sum(parts.values()) < footprint.MOST_BYTES * COUNT * changes.get("parallel.devices", 1)


def test_memory_that_is_not_known_refuses_nothing(large, monkeypatch):
  monkeypatch.setattr(footprint.host_memory, "available", lambda: None)
  config = configured(**{"model.path": str(large)})
  footprint.check(config, setup.check(config), families.from_hf(LARGE), None)


def test_an_accelerator_that_is_too_small_is_named(large, monkeypatch):
  monkeypatch.setattr(footprint, "_is_cpu", lambda executor: False)
  monkeypatch.setattr(footprint.memory, "device_free", lambda: int(80e9))
  line = refusal(large, 2000, monkeypatch, **{"parallel.devices": 8})
  assert "and each device has 80.0 GB free; use " in line
  # 8 devices share the weights: 1411 / 8 = 176 GB on each are too many, with adapters 38 are not.
  assert line.endswith("; use --lora_rank=16 --config.parallel.fsdp=8 (37.6 GB)")


def test_the_optimizer_may_not_fit_in_the_hosts_memory(large, monkeypatch):
  monkeypatch.setattr(footprint, "_is_cpu", lambda executor: False)
  monkeypatch.setattr(footprint.memory, "device_free", lambda: int(2000e9))
  line = refusal(large, 100, monkeypatch, **{"parallel.offload_optimizer": True})
  assert line.startswith(
    "parallel.offload_optimizer needs 564.4 GB of this machine's memory, which"
  )
