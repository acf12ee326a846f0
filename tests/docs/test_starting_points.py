"""Configurations of well-known models: what their docstrings say of memory follows from shapes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from configs import llama_1b, llama_8b, qwen_0_5b
from dpo_jax import losses, step
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import families, lora, transformer
from dpo_jax.structs import UserError
from dpo_jax.training import optimizer

# The public config.json of each, as far as shapes go by it.
LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0}
SHAPES = {
  "qwen_0_5b": {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
  },
  "llama_1b": LLAMA
  | {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
  },
  "llama_8b": LLAMA
  | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
  },
}
MODULES = {"qwen_0_5b": qwen_0_5b, "llama_1b": llama_1b, "llama_8b": llama_8b}
WAYS = [("qwen_0_5b", ""), ("llama_1b", ""), ("llama_8b", "lora"), ("llama_8b", "fsdp")]


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def gigabytes(tree, shardings):
  """What one device holds of it."""
  held = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(jax.tree.leaves(jax.tree.map(held, tree, shardings))) / 1e9


def model_of(shape):
  """Parameters of the model as abstract arrays of a dtype."""
  return lambda dtype: jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), transformer.param_shapes(shape)
  )


def adapters_of(settings, shape):
  """Adapters as abstract arrays, with the names that `lora.init` gives them."""
  tree = {}
  for path, (layers, inputs, outputs) in lora.select_maps(shape, settings.target).items():
    array = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    a, b = array(layers, inputs, settings.rank), array(layers, settings.rank, outputs)
    lora.set_at(tree, path, {"lora_a": a, "lora_b": b})
  return tree


@pytest.mark.parametrize(("name", "arg"), WAYS)
def test_memory_is_what_the_docstring_says(name, arg):
  """Of one device, as `executor` would divide it."""
  config = MODULES[name].get_config(*filter(None, [arg]))
  # The table of fsdp is the second one.
  tables = MODULES[name].__doc__.split("With `configs/")
  text = tables[1] if arg == "fsdp" else tables[0]
  shape = families.from_hf(SHAPES[name])
  model = model_of(shape)
  reference = model(config.reference.param_dtype)
  trained = model(config.model.param_dtype)
  if config.lora.rank:
    settings = lora.LoRA(**{k: v for k, v in config.lora.items() if k != "path"})
    trained = adapters_of(settings, shape)
    assert f"R = {size(trained):,}" in text
  given = {k: v for k, v in config.loss.items() if k != "name" and v is not None}
  steps = ("learning_rate", "schedule", "warmup_steps", "final_fraction")
  schedule = {k: v for k, v in config.optimizer.items() if k in steps}
  tx = optimizer.make_optimizer(
    optimizer.make_schedule(total_steps=100, **schedule),
    **{k: v for k, v in config.optimizer.items() if k not in steps},
  )
  loss = losses.resolve(config.loss.name, **given)
  state = jax.eval_shape(functools.partial(step.init_state, tx=tx, loss=loss), trained)

  executor = Executor("mesh", fsdp=config.parallel.fsdp, tensor=config.parallel.tensor)
  held = lambda tree: gigabytes(tree, executor.shardings(tree))
  parts = {
    "policy": held(state.params),
    "reference": held(reference),
    "AdamW": held(state.opt_state),
    "gradients": 2 * held(state.params),
  }
  parts["in all"] = sum(parts.values())
  said = dict(
    re.findall(r"^  (policy|reference|AdamW|gradients|in all) .* ([\d.]+) GB$", text, re.M)
  )
  assert said == {part: f"{value:.3f}" for part, value in parts.items()}
  assert f"P = {size(reference):,}" in tables[0]


@pytest.mark.parametrize(("name", "arg"), WAYS)
def test_batches_divide_among_the_devices_named(name, arg):
  config = MODULES[name].get_config(*filter(None, [arg]))
  for devices in (1, 2, 4, 8):
    # 0 micro-batches: as many as divide the pairs of a device.
    assert config.train.batch_size % (max(1, config.train.accumulate) * devices) == 0


def test_a_way_of_training_that_there_is_not_is_refused():
  with pytest.raises(UserError, match=r"llama_8b.py:zero is not known; known are lora and fsdp"):
    llama_8b.get_config("zero")
