"""Model folders: what is written reads back bit for bit, and what is broken is refused by name."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.model import config as configs
from dpo_jax.model import families, hf, transformer
from dpo_jax.structs import UserError

LLAMA = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
  }
)
GPT2 = families.from_hf(
  {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 16,
    "eos_token_id": 10,
  }
)
VARIANTS = {
  "llama": LLAMA,
  "llama untied": dataclasses.replace(LLAMA, tied=False, bos_id=1, pad_id=0),
  "llama biases": dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True),
  "llama wide heads": dataclasses.replace(LLAMA, head_width=6, eos_ids=(2, 9)),
  "llama stretched": dataclasses.replace(
    LLAMA, rope_theta=5e5, rope_scaling=configs.RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
  ),
  "llama linear": dataclasses.replace(LLAMA, rope_scaling=configs.RopeScaling("linear", 2.0)),
  "gpt2": GPT2,
  "gpt2 untied": dataclasses.replace(GPT2, tied=False, mlp_width=12, activation="gelu"),
}


def random_params(config, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda leaf: rng.normal(size=leaf.shape).astype(dtype)
  return jax.tree.map(draw, transformer.param_shapes(config))


def assert_bitwise_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


@pytest.fixture
def folder(tmp_path):
  """A small Llama folder to be broken."""
  hf.save(tmp_path / "model", LLAMA, random_params(LLAMA))
  return tmp_path / "model"


def edit_config(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, edit):
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")


def refused(folder, message):
  with pytest.raises(UserError, match=message) as caught:
    hf.load(folder)
  assert "\n" not in str(caught.value)


# --- in and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_what_is_saved_reads_back_bit_for_bit(config, tmp_path):
  params = random_params(config)
  hf.save(tmp_path / "model", config, params)
  loaded, found = hf.load(tmp_path / "model")
  assert loaded == config
  assert_bitwise_equal(found, params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_dtypes_are_kept_on_disk_and_widened_exactly(dtype, tmp_path):
  params = random_params(LLAMA, dtype)
  hf.save(tmp_path / "model", LLAMA, params)
  assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == str(
    np.dtype(dtype)
  )
  assert_bitwise_equal(hf.load(tmp_path / "model", dtype=np.dtype(dtype).name)[1], params)
  widened = jax.tree.map(lambda x: x.astype(np.float32), params)
  assert_bitwise_equal(hf.load(tmp_path / "model")[1], widened)


@pytest.mark.parametrize("name", ["stories260k", "gpt-nano-sort"])
def test_real_folders_come_back_as_they_were(name, shared_data, tmp_path):
  source = shared_data / "models" / name
  hf.save(tmp_path / "copy", *hf.load(source), source=source)
  before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "copy"))
  assert set(before) == set(after)
  for tensor in before:
    assert before[tensor].dtype == after[tensor].dtype
    assert before[tensor].tobytes() == after[tensor].tobytes()
  copied = {path.name for path in (tmp_path / "copy").iterdir()}
  expected = {"config.json", "model.safetensors"} | set(hf.COMPANIONS) & {
    path.name for path in source.iterdir()
  }
  assert copied == expected
  for file in copied - {"config.json", "model.safetensors"}:
    assert (source / file).read_bytes() == (tmp_path / "copy" / file).read_bytes()
  was, now = (
    json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "copy")
  )
  changed = {field for field in now if field in was and was[field] != now[field]}
  # An absent inner width means four times the width; it is written out.
  assert changed <= {"n_inner"}


def test_kernels_lie_as_documented(tmp_path):
  for config, name, leaf in (
    (LLAMA, "model.layers.1.mlp.down_proj.weight", "down"),
    (GPT2, "transformer.h.1.mlp.c_proj.weight", "down"),
  ):
    params = random_params(config)
    hf.save(tmp_path / config.family, config, params)
    stored = load_file(tmp_path / config.family / "model.safetensors")[name]
    kernel = params["params"]["layers"][leaf]["kernel"][1]
    # Llama stores [out, in]; GPT-2, like this tree, [in, out].
    np.testing.assert_array_equal(stored, kernel.T if config is LLAMA else kernel)


def test_shards_and_their_index_read_as_one(folder):
  expected = hf.load(folder)[1]
  tensors = load_file(folder / "model.safetensors")
  halves = sorted(tensors)[::2], sorted(tensors)[1::2]
  shards = {f"model-0000{i + 1}-of-00002.safetensors": half for i, half in enumerate(halves)}
  for shard, names in shards.items():
    save_file({name: tensors[name] for name in names}, folder / shard)
  index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  (folder / "model.safetensors").unlink()
  assert_bitwise_equal(hf.load(folder)[1], expected)

  (folder / "model-00002-of-00002.safetensors").unlink()
  refused(folder, "lacks model-00002-of-00002.safetensors, which its index names")
  index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  refused(folder, "'../elsewhere.safetensors', which is not a file of the folder")


def test_bare_names_buffers_and_a_copied_head_are_understood(tmp_path):
  params = random_params(GPT2)
  hf.save(tmp_path / "model", GPT2, params)

  def as_on_the_hub(tensors):
    for name in list(tensors):
      tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    tensors["lm_head.weight"] = tensors["wte.weight"]

  edit_tensors(tmp_path / "model", as_on_the_hub)
  assert_bitwise_equal(hf.load(tmp_path / "model")[1], params)


def test_an_interrupted_export_leaves_the_older_model(folder, monkeypatch):
  expected = hf.load(folder)[1]

  def full_disk(arrays, path, metadata):
    path.write_bytes(b"half of a")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(hf, "save_file", full_disk)
  for path in (folder, folder.parent / "fresh"):
    with pytest.raises(OSError, match="No space left"):
      hf.save(path, LLAMA, random_params(LLAMA, seed=1))
  assert_bitwise_equal(hf.load(folder)[1], expected)
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_export_replaces_the_older_model_whole(folder):
  (folder / "of_the_old_model.txt").touch()
  newer = random_params(GPT2)
  hf.save(folder, GPT2, newer)
  assert_bitwise_equal(hf.load(folder)[1], newer)
  assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


# --- config.json ----------------------------------------------------------------------------------


def test_older_and_newer_spellings_of_rotary_settings_agree():
  fields = families.to_hf(LLAMA)
  scaling = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  older = fields | {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}}
  newer = {name: value for name, value in fields.items() if not name.startswith("rope")}
  newer["rope_parameters"] = scaling | {"rope_type": "llama3", "rope_theta": 5e5}
  assert families.from_hf(older) == families.from_hf(newer)
  assert families.from_hf(older).rope_theta == 5e5
  assert families.from_hf(older).rope_scaling == configs.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_left_out_fields_have_the_values_of_the_family():
  llama = families.from_hf(
    {
      "model_type": "llama",
      "vocab_size": 10,
      "hidden_size": 8,
      "num_attention_heads": 2,
      "num_hidden_layers": 1,
      "intermediate_size": 16,
    }
  )
  assert (llama.kv_heads, llama.head_width, llama.norm_eps) == (2, 4, 1e-6)
  assert (llama.tied, llama.rope_theta, llama.max_positions) == (False, 10000.0, 2048)
  assert (GPT2.mlp_width, GPT2.norm_eps, GPT2.activation) == (32, 1e-5, "gelu_tanh")
  assert GPT2.tied and GPT2.eos_ids == (10,)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "mamba"}, "model_type 'mamba' is not known; known are gpt2, llama"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn' is not known"),
    ({"rope_scaling": {"type": "linear"}}, r"'linear' takes \['factor'\], but \[\] are given"),
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not known; known are gelu"),
    ({"sliding_window": 4096}, "sliding_window = 4096 is not honoured for llama"),
    ({"pretraining_tp": 2}, "pretraining_tp = 2 is not supported; only 1 is"),
    ({"hidden_size": None}, "has no 'hidden_size'"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'; it must be a whole number"),
    ({"num_key_value_heads": 3}, "4 heads and 3 key/value heads"),
    ({"rope_theta": 0}, "model rope_theta is 0.0; it must be a finite number above 0"),
    ({"rope_theta": float("inf")}, "model rope_theta is inf"),
    ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a number"),
    ({"rope_parameters": {"rope_theta": 0}}, "model rope_theta is 0;"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "model factor is 0; it must be"),
    ({"rope_scaling": [2]}, r"rope_scaling is \[2\]; it must be an object"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not honoured"),
  ],
)
def test_what_would_not_be_honoured_is_refused(fields, message, folder):
  edit_config(folder, **fields)
  refused(folder, message)


# --- broken folders -------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_not_a_model(folder, tmp_path):
  refused(tmp_path / "nowhere", "nowhere does not exist")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "empty has no config.json")
  (folder / "config.json").write_text("{")
  refused(folder, "config.json is not JSON")
  (folder / "config.json").write_text("[]")
  refused(folder, "config.json holds a list, not an object")


def test_a_folder_without_weights_or_with_pickled_ones(folder):
  (folder / "model.safetensors").unlink()
  refused(folder, "has no model.safetensors")
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
  refused(folder, r"pickled weights only \(pytorch_model.bin\).*safe_serialization=True")


def test_weights_cut_short(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  refused(folder, "model.safetensors is broken or cut short")


def test_tensors_missing_unexpected_or_of_another_shape(folder):
  taken = {}
  name = "model.layers.1.mlp.up_proj.weight"
  edit_tensors(folder, lambda tensors: taken.update({name: tensors.pop(name)}))
  refused(folder, f"lacks tensor {name}; the weights are incomplete")
  edit_tensors(folder, lambda tensors: tensors.update({name: taken[name][:, 1:].copy()}))
  refused(folder, rf"tensor {name} has shape \[12, 7\], but config.json asks for \[12, 8\]")
  edit_tensors(folder, lambda tensors: tensors.update({name: taken[name].astype(np.int8)}))
  refused(folder, f"tensor {name} is int8; quantised weights are not supported")
  bad = np.where(np.arange(8) == 3, np.nan, taken[name])
  edit_tensors(folder, lambda tensors: tensors.update({name: bad.astype(np.float32)}))
  refused(folder, f"tensor {name} holds numbers that are not finite")
  edit_tensors(folder, lambda tensors: tensors.update({name: taken[name], "a.b": np.ones(3)}))
  refused(folder, "holds tensor a.b, which config.json does not account for")
  edit_config(folder, num_hidden_layers=1)
  refused(folder, "holds tensor a.b and 9 more")
