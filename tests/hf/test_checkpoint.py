"""Model folders read back bit for bit what was written, and broken ones are refused by name."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import safetensors_files
from dpo_jax.hf.loading import Leaf, distribute
from dpo_jax.model import config as configs
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError
from tests.support.paths import ROOT

GENERATION = "generation_config.json"
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
  shapes = transformer.param_shapes(config)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)


def assert_bitwise_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


@pytest.fixture
def folder(tmp_path):
  """A small Llama folder, for a test to break."""
  hf_checkpoint.save(tmp_path / "model", LLAMA, random_params(LLAMA))
  return tmp_path / "model"


def edit_config(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, edit):
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")


def refused(folder, message, **given):
  with pytest.raises(UserError, match=message) as caught:
    hf_checkpoint.load(folder, **given)
  assert "\n" not in str(caught.value)


def shard(folder, count=2):
  """Divides the tensors of a folder, in turn, among `count` files with an index."""
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  shard_of = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
  for file in files:
    save_file({name: tensors[name] for name in tensors if shard_of[name] == file}, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
  return shard_of


def spread(*spec):
  """Makes a sharding over 2 x 4 devices with axes a and b."""
  mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
  return NamedSharding(mesh, PartitionSpec(*spec))


# --- in and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_what_is_saved_reads_back_bit_for_bit(config, tmp_path):
  params = random_params(config)
  hf_checkpoint.save(tmp_path / "model", config, params)
  loaded, found = hf_checkpoint.load(tmp_path / "model")
  assert loaded == config
  assert_bitwise_equal(found, params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_dtypes_are_kept_on_disk_and_widened_exactly(dtype, tmp_path):
  params = random_params(LLAMA, dtype)
  hf_checkpoint.save(tmp_path / "model", LLAMA, params)
  assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == str(
    np.dtype(dtype)
  )
  assert_bitwise_equal(
    hf_checkpoint.load(tmp_path / "model", dtype=np.dtype(dtype).name)[1], params
  )
  widened = jax.tree.map(lambda x: x.astype(np.float32), params)
  assert_bitwise_equal(hf_checkpoint.load(tmp_path / "model")[1], widened)


@pytest.mark.parametrize("name", ["stories260k", "gpt-nano-sort"])
def test_real_folders_come_back_as_they_were(name, shared_data, tmp_path):
  source = shared_data / "models" / name
  hf_checkpoint.save(tmp_path / "copy", *hf_checkpoint.load(source), source=source)
  before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "copy"))
  assert set(before) == set(after)
  for tensor in before:
    assert before[tensor].dtype == after[tensor].dtype
    assert before[tensor].tobytes() == after[tensor].tobytes()
  copied = {path.name for path in (tmp_path / "copy").iterdir()}
  written = {"config.json", "model.safetensors", "generation_config.json"}
  assert copied == written | set(hf_checkpoint.COMPANIONS) & {
    path.name for path in source.iterdir()
  }
  for file in copied - {"config.json", "model.safetensors"}:
    if (source / file).exists():
      assert (source / file).read_bytes() == (tmp_path / "copy" / file).read_bytes()
  was, now = (
    json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "copy")
  )
  assert now == was | {"dtype": "float32"}


def test_kernels_lie_as_documented(tmp_path):
  for config, name, leaf in (
    (LLAMA, "model.layers.1.mlp.down_proj.weight", "down"),
    (GPT2, "transformer.h.1.mlp.c_proj.weight", "down"),
  ):
    params = random_params(config)
    hf_checkpoint.save(tmp_path / config.family, config, params)
    stored = load_file(tmp_path / config.family / "model.safetensors")[name]
    kernel = params["params"]["layers"][leaf]["kernel"][1]
    # Llama stores [out, in]; GPT-2, like this tree, [in, out].
    np.testing.assert_array_equal(stored, kernel.T if config is LLAMA else kernel)


def test_shards_and_their_index_read_as_one(folder):
  expected = hf_checkpoint.load(folder)[1]
  shard_of = shard(folder)
  assert_bitwise_equal(hf_checkpoint.load(folder)[1], expected)

  (folder / "model-00002-of-00002.safetensors").unlink()
  refused(folder, "lacks model-00002-of-00002.safetensors, which its index names")
  index = {"weight_map": shard_of | {"lm_head.weight": "../elsewhere.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  refused(folder, "'../elsewhere.safetensors', which is not a file of the folder")


def test_shards_that_disagree_with_their_index(folder):
  shard_of = shard(folder)
  index, name = folder / "model.safetensors.index.json", "model.norm.weight"
  (other,) = set(shard_of.values()) - {shard_of[name]}
  index.write_text(json.dumps({"weight_map": shard_of | {name: other}}))
  refused(folder, f"{shard_of[name]} contains tensor {name}, which the index puts in {other}")
  unnamed = {k: v for k, v in shard_of.items() if k != name}
  index.write_text(json.dumps({"weight_map": unnamed}))
  refused(folder, f"{shard_of[name]} contains tensor {name}, which the index does not name")
  index.write_text(json.dumps({"weight_map": shard_of | {"a.b": other}}))
  refused(folder, f"{other} lacks tensor a.b, which the index puts there")

  index.write_text(json.dumps({"weight_map": shard_of}))
  tensors = load_file(folder / other)
  save_file(tensors | load_file(folder / shard_of[name]), folder / other)
  refused(folder, "is in both model-00001-of-00002.safetensors and model-00002-of-00002.s")


# Shardings that together divide every axis of these models: layers, inputs, outputs, vocabulary.
SPREADS = {
  "whole": lambda leaf: spread(),
  "one device": lambda leaf: SingleDeviceSharding(jax.devices()[3]),
  "last axis": lambda leaf: spread(*[None] * (len(leaf.shape) - 1), "b"),
  "layers and last axis": lambda leaf: spread(*["a", None, "b"][-len(leaf.shape) :]),
  "layers, in": lambda leaf: spread("a", "b") if len(leaf.shape) == 3 else spread(),
  "in and out": lambda leaf: spread(None, "a", "b") if len(leaf.shape) == 3 else spread(),
}


@pytest.mark.parametrize("places", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_model_is_loaded_straight_into_its_shardings(config, places, tmp_path):
  params = random_params(config)
  hf_checkpoint.save(tmp_path / "model", config, params)

  def divides(leaf):
    return all(size % 8 == 0 or size == config.layers for size in leaf.shape)

  shardings = jax.tree.map(
    lambda leaf: places(leaf) if divides(leaf) else spread(), transformer.param_shapes(config)
  )
  _, found = hf_checkpoint.load(tmp_path / "model", shardings=shardings)
  jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding or pytest.fail(), found, shardings)
  assert_bitwise_equal(jax.tree.map(np.asarray, found), params)
  # Arrays on devices are written to the very same files.
  hf_checkpoint.save(tmp_path / "again", config, found)
  for file in (tmp_path / "model").iterdir():
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_process_takes_only_its_part_of_what_a_tensor_joins():
  class Elsewhere:  # half of every leaf's columns, and of the second leaf's layers, lie elsewhere
    def __init__(self, *index):
      self.index = index

    def addressable_devices_indices_map(self, shape):
      return {"mine": self.index}

  every, left, right = slice(None), slice(0, 2), slice(2, 4)
  leaves = [
    Leaf((2, 3, 4), Elsewhere(every, every, left), np.dtype(np.float32)),
    Leaf((2, 3, 4), Elsewhere(slice(1, 2), every, right), np.dtype(np.float32)),
  ]
  assert [leaf.needs((0,)) for leaf in leaves] == [True, False]
  stored = np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3)
  for layer in (0, 1):
    distribute(stored[layer], (layer,), leaves, True, "tensor")
  (first,), (second,) = (leaf.parts.values() for leaf in leaves)
  np.testing.assert_array_equal(first, stored[:, 0:2].transpose(0, 2, 1))
  np.testing.assert_array_equal(second, stored[1:, 6:8].transpose(0, 2, 1))


def test_one_sharding_serves_all_leaves(folder):
  _, found = hf_checkpoint.load(folder, dtype="bfloat16", shardings=spread())
  assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {spread()}
  assert_bitwise_equal(
    jax.tree.map(np.asarray, found), hf_checkpoint.load(folder, dtype="bfloat16")[1]
  )


def test_every_tensor_is_read_once(folder, monkeypatch):
  read, whole = [], safetensors_files.Weights.read
  monkeypatch.setattr(
    safetensors_files.Weights, "read", lambda self, name: read.append(name) or whole(self, name)
  )
  places = SPREADS["in and out"]
  hf_checkpoint.load(folder, shardings=jax.tree.map(places, transformer.param_shapes(LLAMA)))
  assert sorted(read) == sorted(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
def test_numbers_are_rounded_once_on_their_way_in(stored, wanted, tmp_path):
  params = random_params(LLAMA, stored)
  hf_checkpoint.save(tmp_path / "model", LLAMA, params)
  expected = jax.tree.map(lambda x: x.astype(wanted), params)
  for shardings in (None, spread()):
    _, found = hf_checkpoint.load(tmp_path / "model", dtype=wanted, shardings=shardings)
    assert_bitwise_equal(jax.tree.map(np.asarray, found), expected)


def test_experts_are_two_axes_of_a_leaf_and_two_numbers_of_a_name(tmp_path, monkeypatch):
  shapes = {"embed": {"embedding": (11, 8)}, "layers": {"up": {"kernel": (2, 4, 8, 12)}}}
  shapes["layers"]["router"] = {"kernel": (2, 8, 4)}
  shapes = {
    "params": jax.tree.map(
      lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )
  }
  listed = [
    families.Tensor("model.embed.weight", ("embed.embedding",)),
    families.Tensor("model.layers.{}.mlp.experts.{}.up.weight", ("layers.up.kernel",), True),
    families.Tensor("model.layers.{}.mlp.gate.weight", ("layers.router.kernel",), True),
  ]
  monkeypatch.setattr(families, "tensors", lambda config: listed)
  monkeypatch.setattr(hf_checkpoint, "param_shapes", lambda config: shapes)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  hf_checkpoint.save(tmp_path / "model", LLAMA, params, max_shard_size=1000)
  assert_bitwise_equal(hf_checkpoint.load(tmp_path / "model")[1], params)

  stored = {}
  for file in (tmp_path / "model").glob("*.safetensors"):
    stored |= load_file(file)
  assert len(stored) == 1 + 2 * 4 + 2
  np.testing.assert_array_equal(
    stored["model.layers.1.mlp.experts.3.up.weight"],
    params["params"]["layers"]["up"]["kernel"][1, 3].T,
  )
  by_expert = jax.tree.map(lambda x: spread(None, "b") if x.ndim == 4 else spread(), params)
  _, found = hf_checkpoint.load(tmp_path / "model", shardings=by_expert)
  assert_bitwise_equal(jax.tree.map(np.asarray, found), params)
  hf_checkpoint.save(tmp_path / "again", LLAMA, found, max_shard_size=1000)
  for file in (tmp_path / "model").iterdir():
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_large_export_is_divided_into_shards(tmp_path):
  config, params = GPT2, random_params(GPT2)
  for limit in (1, 2000):
    hf_checkpoint.save(tmp_path / "model", config, params, max_shard_size=limit)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    tensors = {file: load_file(tmp_path / "model" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in tensors[file]}
    sizes = [sum(array.nbytes for array in shard.values()) for shard in tensors.values()]
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in jax.tree.leaves(params))}
    assert sum(sizes) == index["metadata"]["total_size"]
    for size, shard in zip(sizes, tensors.values(), strict=True):
      assert 0 < size <= limit or len(shard) == 1
    # The first tensor of a shard would not have fitted into the one before.
    assert all(a + b > limit for a, b in itertools.pairwise(sizes))
    assert_bitwise_equal(hf_checkpoint.load(tmp_path / "model")[1], params)
  hf_checkpoint.save(
    tmp_path / "model", config, params, max_shard_size=index["metadata"]["total_size"]
  )
  assert not list((tmp_path / "model").glob("model*index.json"))


def test_tensors_of_several_dtypes_lie_aligned(tmp_path):
  arrays = {"a": np.ones(3, ml_dtypes.bfloat16), "b": np.arange(2.0), "c": np.ones(5, np.float32)}
  entries = [
    safetensors_files.Entry(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()
  ]
  safetensors_files.write_weights(tmp_path, entries, 10**9)
  with (tmp_path / "model.safetensors").open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
  for name, array in arrays.items():
    assert (8 + size + header[name]["data_offsets"][0]) % array.itemsize == 0
  with safe_open(tmp_path / "model.safetensors", framework="np") as file:
    assert file.metadata() == {"format": "pt"}
    for name, array in arrays.items():
      np.testing.assert_array_equal(file.get_tensor(name), array)


# Prints the peaks of a process's memory, in bytes, beyond what it uses once all is imported.
MEASURE = """
import sys
import jax, numpy as np
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.model import transformer
jax.config.update("jax_num_cpu_devices", 2)
config = hf_checkpoint.check(sys.argv[1])
shapes = transformer.param_shapes(config)
mesh = jax.sharding.Mesh(jax.devices(), "a")
place = lambda leaf: jax.sharding.NamedSharding(
  mesh, jax.sharding.PartitionSpec(*[None] * (len(leaf.shape) - 1), "a")
)
places = jax.tree.map(place, shapes)
jax.device_put(np.zeros(2), place(np.zeros(2))).block_until_ready()

def memory(name):
  with open("/proc/self/status") as file:
    return 1024 * int(file.read().split(name + ":")[1].split()[0])

def peak(act):
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again at the present use
  before = memory("VmRSS")
  result = act()
  return result, memory("VmHWM") - before

(_, params), loading = peak(lambda: hf_checkpoint.load(sys.argv[1], shardings=places))
_, saving = peak(lambda: hf_checkpoint.save(sys.argv[2], config, params))
print(loading, saving)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_holds_the_parameters_and_one_tensor(tmp_path):
  sizes = {"vocab": 32000, "width": 512, "layers": 8, "mlp_width": 1536, "tied": False}
  config = dataclasses.replace(LLAMA, **sizes, heads=8, kv_heads=8, head_width=64)
  params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), transformer.param_shapes(config))
  hf_checkpoint.save(tmp_path / "model", config, params)
  share = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  largest = params["params"]["embed"]["embedding"].nbytes
  assert largest == 32000 * 512 * 4 and share > 3 * largest
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path / "again"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  loading, saving = map(int, done.stdout.split())
  slack = 32 * 2**20  # compiled functions, thread stacks
  assert share < loading < share + 1.3 * largest + slack
  assert saving < 1.3 * largest + slack


def test_bare_names_buffers_and_a_copied_head_are_understood(tmp_path):
  params = random_params(GPT2)
  hf_checkpoint.save(tmp_path / "model", GPT2, params)

  def as_on_the_hub(tensors):
    for name in list(tensors):
      tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    tensors["lm_head.weight"] = tensors["wte.weight"]

  edit_tensors(tmp_path / "model", as_on_the_hub)
  assert_bitwise_equal(hf_checkpoint.load(tmp_path / "model")[1], params)


def test_a_tied_model_with_another_head_is_refused(folder):
  """Transformers 5 takes such a head, older releases pass it over."""
  expected = hf_checkpoint.load(folder)[1]
  head = {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]}
  edit_tensors(folder, lambda tensors: tensors.update(head))
  assert_bitwise_equal(hf_checkpoint.load(folder)[1], expected)
  # In another type it is still the same head, if it holds the same numbers.
  wide = {"lm_head.weight": head["lm_head.weight"].astype(np.float64)}
  edit_tensors(folder, lambda tensors: tensors.update(wide))
  assert_bitwise_equal(hf_checkpoint.load(folder)[1], expected)
  other = head["lm_head.weight"].copy()
  other[3, 1] += 1
  for wrong in (other, other[:-1]):
    edit_tensors(folder, lambda tensors, wrong=wrong: tensors.update({"lm_head.weight": wrong}))
    line = "says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight"
    refused(folder, line)
    with pytest.raises(UserError, match=line):
      hf_checkpoint.check(folder)
  edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": other}))
  edit_config(folder, tie_word_embeddings=False)
  np.testing.assert_array_equal(hf_checkpoint.load(folder)[1]["params"]["head"]["embedding"], other)


@pytest.mark.parametrize("files", [1, 3])
def test_an_interrupted_export_leaves_the_older_model(files, folder, monkeypatch):
  expected = hf_checkpoint.load(folder)[1]
  written = []

  def full_disk(file):
    written.append(file)
    if len(written) % files == 0:
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors_files.os, "fsync", full_disk)
  for path in (folder, folder.parent / "fresh"):
    with pytest.raises(OSError, match="No space left"):
      hf_checkpoint.save(
        path, LLAMA, random_params(LLAMA, seed=1), max_shard_size=10**9 if files == 1 else 1000
      )
  assert len(written) == 2 * files
  assert_bitwise_equal(hf_checkpoint.load(folder)[1], expected)
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_export_that_cannot_take_its_place_gives_it_back(folder, monkeypatch):
  expected = hf_checkpoint.load(folder)[1]
  rename = pathlib.Path.rename

  def interrupted(self, target):
    if self.name == "new":
      raise KeyboardInterrupt
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", interrupted)
  with pytest.raises(KeyboardInterrupt):
    hf_checkpoint.save(folder, LLAMA, random_params(LLAMA, seed=1))
  assert_bitwise_equal(hf_checkpoint.load(folder)[1], expected)
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_export_replaces_the_older_model_whole(folder):
  (folder / "of_the_old_model.txt").touch()
  newer = random_params(GPT2)
  hf_checkpoint.save(folder, GPT2, newer)
  assert_bitwise_equal(hf_checkpoint.load(folder)[1], newer)
  assert {path.name for path in folder.iterdir()} == {
    "config.json",
    "generation_config.json",
    "model.safetensors",
  }
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


# --- what lies beside the weights -----------------------------------------------------------------


def test_companions_are_copied_untouched(folder, tmp_path):
  (folder / "generation_config.json").write_text('{"temperature":  0.6}')
  (folder / "chat_template.jinja").write_text("{{ messages }}\r\n", newline="")
  (folder / "additional_chat_templates").mkdir()
  (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
  hf_checkpoint.save(tmp_path / "out", LLAMA, random_params(LLAMA), source=folder)
  for name in (
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
  ):
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_generation_settings_are_written_where_the_source_has_none(tmp_path):
  config = dataclasses.replace(LLAMA, bos_id=1, eos_ids=(2, 9))
  hf_checkpoint.save(tmp_path / "out", config, random_params(config))
  written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert written == {"bos_token_id": 1, "eos_token_id": [2, 9]}


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ('{"eos_token_id": 2}', {"eos_token_id": [2, 7]}),
    ('{"eos_token_id": [9, 2], "top_p": 0.5}', {"eos_token_id": [9, 2, 7], "top_p": 0.5}),
    ('{"top_p": 0.5}', {"top_p": 0.5, "eos_token_id": [2, 7]}),
    (None, {"eos_token_id": [2, 7]}),
  ],
)
def test_exports_stop_where_training_ended_completions(given, expected, folder, tmp_path):
  if given is None:
    (folder / "generation_config.json").unlink()
  else:
    (folder / "generation_config.json").write_text(given)
  # 11 has no row in the embedding, so it is never generated.
  ends = {"source": folder, "end_ids": (2, 7, 11)}
  hf_checkpoint.save(tmp_path / "out", LLAMA, random_params(LLAMA), **ends)
  read = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", GENERATION)]
  assert read[0] == json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 7]}
  assert read[1] == expected
  # Nothing to add: the file is copied as it is.
  (folder / "generation_config.json").write_text('{"eos_token_id":   [7, 2]}')
  hf_checkpoint.save(tmp_path / "out", LLAMA, random_params(LLAMA), source=folder, end_ids=(2, 7))
  assert (tmp_path / "out" / GENERATION).read_text() == '{"eos_token_id":   [7, 2]}'


def test_the_sources_configuration_is_kept_where_it_is_of_this_model(folder, tmp_path):
  own = {"use_cache": False, "rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}}
  edit_config(folder, **own, architectures=["LlamaModel"], torch_dtype="bfloat16")
  source = json.loads((folder / "config.json").read_text())
  hf_checkpoint.save(tmp_path / "out", LLAMA, random_params(LLAMA, np.float16), source=folder)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written == source | {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float16",
    "dtype": "float16",
  }
  # Of another shape, another family, not understood, or not JSON: ours.
  for change in ({"num_hidden_layers": 9}, {"model_type": "gpt2"}, {"hidden_act": "mish"}, None):
    if change is None:
      (folder / "config.json").write_text("{")
    else:
      edit_config(folder, **change)
    hf_checkpoint.save(tmp_path / "out", LLAMA, random_params(LLAMA), source=folder)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == families.to_hf(LLAMA) | {"torch_dtype": "float32", "dtype": "float32"}


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
    ({"model_type": "mamba"}, "model_type 'mamba' is not known; known are gemma, "),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope type 'dynamic' is not supp"),
    ({"rope_scaling": {"type": "linear"}}, r"'linear' takes \['factor'\], but \[\] are given"),
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not known; known are gelu"),
    ({"sliding_window": 4096}, "sliding_window = 4096 is not supported for llama; only null is"),
    ({"hidden_size": None}, "has no 'hidden_size'"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'; it must be a whole number"),
    ({"num_key_value_heads": 3}, "4 heads and 3 key/value heads"),
    ({"rope_theta": 0}, "model rope_theta is 0.0; it must be a finite number above 0"),
    ({"rope_theta": float("inf")}, "model rope_theta is inf"),
    ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a number"),
    ({"rope_parameters": {"rope_theta": 0}}, "model rope_theta is 0;"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "model factor is 0; it must be"),
    ({"rope_scaling": [2]}, r"rope_scaling is \[2\]; it must be an object"),
    ({"quantization_config": {"bits": 4}}, "has quantization_config: quantised weights are not"),
  ],
)
def test_what_would_not_be_honoured_is_refused(fields, message, folder):
  edit_config(folder, **fields)
  refused(folder, message)


def test_a_field_that_nobody_knows_is_reported_once(folder, capsys):
  edit_config(folder, some_note="x", other_note=[1], is_llama_config=True)
  for _ in range(2):
    assert hf_checkpoint.read_config(folder) == LLAMA
  expected = "passed over, as transformers does for llama: some_note, other_note"
  assert capsys.readouterr().err == f"warning: {folder / 'config.json'}: {expected}\n"


# --- broken folders -------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_not_a_model(folder, tmp_path):
  refused(tmp_path / "nowhere", "there is no folder .*nowhere")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "empty has no config.json")
  (folder / "config.json").write_text("{")
  refused(folder, "config.json is not JSON")
  (folder / "config.json").write_text("[]")
  refused(folder, "config.json contains a list, not an object")


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
  refused(folder, f"tensor {name} is I8; quantised weights are not supported")
  # Scales beside them would be unexpected tensors, which is not what is the matter.
  edit_tensors(folder, lambda tensors: tensors.update({f"{name}_scale": np.ones(3, np.float32)}))
  refused(folder, f"tensor {name} is I8; quantised weights are not supported")
  edit_tensors(folder, lambda tensors: tensors.pop(f"{name}_scale"))
  bad = np.where(np.arange(8) == 3, np.nan, taken[name])
  edit_tensors(folder, lambda tensors: tensors.update({name: bad.astype(np.float32)}))
  refused(folder, f"tensor {name} holds numbers that are not finite in float32")
  big = np.where(np.arange(8) == 3, 1e5, taken[name])
  edit_tensors(folder, lambda tensors: tensors.update({name: big.astype(np.float32)}))
  refused(folder, f"tensor {name} holds numbers that are not finite in float16", dtype="float16")
  edit_tensors(folder, lambda tensors: tensors.update({name: taken[name], "a.b": np.ones(3)}))
  refused(folder, "contains tensor a.b, which config.json does not account for")
  edit_config(folder, num_hidden_layers=1)
  refused(folder, "contains tensor a.b and 9 more")


def test_headers_tell_what_is_wrong_before_any_tensor_is_read(folder, monkeypatch):
  monkeypatch.setattr(safetensors_files.Weights, "read", lambda self, name: pytest.fail("read"))
  assert hf_checkpoint.check(folder) == LLAMA
  name = "model.norm.weight"  # the last there is
  for wrong in (np.ones(7, np.float32), np.ones(8, np.int8)):
    edit_tensors(folder, lambda tensors, wrong=wrong: tensors.update({name: wrong}))
    for read in (hf_checkpoint.check, hf_checkpoint.load):
      with pytest.raises(UserError, match=f"tensor {name}"):
        read(folder)
