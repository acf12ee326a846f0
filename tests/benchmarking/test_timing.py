"""What the benchmark counts, by hand; and that it runs the step it claims to."""

import json
import math
import runpy
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax import train
from dpo_jax.benchmarking import flops, timing
from dpo_jax.benchmarking.pacing import Pace
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError
from dpo_jax.training.setup import build
from tests.support.paths import CONFIGS

LENGTHS = {
  "pairs": 400, "mean_length": 100, "prompt_fraction": 0.6, "sigma": 0.5, "max_length": 400,
}  # fmt: skip


def test_pairs_have_the_lengths_asked_for():
  rows = list(timing.make_pairs(50, **LENGTHS))
  assert rows == list(timing.make_pairs(50, **LENGTHS))
  assert rows != list(timing.make_pairs(50, **LENGTHS, seed=1))
  length = lambda name: np.array([len(row[name]) for row in rows])
  np.testing.assert_allclose(length("prompt_ids").mean(), 60, rtol=0.1)
  np.testing.assert_allclose(length("chosen_ids").mean(), 40, rtol=0.1)
  for name in ("chosen_ids", "rejected_ids"):
    assert (length("prompt_ids") + length(name)).max() <= 400
    assert length(name).min() >= 8
    assert all(row[name][-1] == timing.END for row in rows)
    assert all(3 <= i < 50 for row in rows for i in row[name][:-1])


def test_pairs_are_those_that_a_peer_trains_on(monkeypatch):
  folder = CONFIGS.parent.parent / "shared" / "bench"
  if not folder.is_dir():
    pytest.skip("../shared/bench is not beside this checkout")
  monkeypatch.syspath_prepend(folder)
  import bench_common

  lengths = {"pairs": 512, "mean_length": 250, "prompt_fraction": 0.6, "sigma": 0.6}
  theirs = bench_common.make_pairs(bench_common.DataSpec(), 32000)
  ours = list(timing.make_pairs(32000, max_length=512, **lengths))
  assert [{k.removesuffix("_ids"): v for k, v in row.items()} for row in ours] == theirs


def shape_fields():
  """Two layers of width 8, two heads of which one has keys, 6 wide inside."""
  fields = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}
  heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6}
  return fields | heads


def shaped(**more):
  """A model of 2 layers of width 4, two heads of which one has keys, 3 wide inside, 5 words."""
  smaller = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 3}
  return families.from_hf(shape_fields() | smaller | more)


def test_flops_of_a_pair_by_hand():
  # A layer: query and output 4 by 4, key and value 4 by 2, gate, up and down 4 by 3. Norms and the
  # table of the input cost nothing; the head is 5 by 4.
  body, head = 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 3), 5 * 4
  count = lambda **how: flops.step_flops(shaped(), **how)(7, 4)
  # 7 tokens, 4 of them scored; policy forward and backward (3 passes), and the reference's.
  assert count(reference=True) == 2 * 4 * (body * 7 + head * 4)
  assert count(reference=False) == 2 * 3 * (body * 7 + head * 4)
  # Beneath adapters of 11 numbers no gradient of parameters is taken, of the adapters' it is.
  assert count(reference=True, adapters=11) == 2 * 3 * (body * 7 + head * 4) + 6 * 11 * 7
  assert count(reference=False, adapters=11) == 2 * 2 * (body * 7 + head * 4) + 6 * 11 * 7


def test_flops_of_experts_are_those_of_the_chosen():
  sizes = {"num_local_experts": 8, "num_experts_per_tok": 2}
  config = shaped(model_type="mixtral", **sizes)
  body = 2 * (2 * 4 * 4 + 2 * 4 * 2 + 4 * 8 + 2 * 3 * 4 * 3)  # with the router
  assert flops.step_flops(config, reference=False)(7, 0) == 2 * 3 * body * 7


def test_the_ceiling_is_the_best_product_tried(monkeypatch):
  rates = {(1024, "bfloat16", "bfloat16"): 3.0, (2048, "float32", "float32"): 5.0}
  monkeypatch.setattr(flops, "_rate", lambda *tried: rates.get(tried, 1.0))
  assert flops.product_rate("bfloat16") == (5.0, "2048 float32 to float32")
  del rates[2048, "float32", "float32"]
  assert flops.product_rate("bfloat16") == (3.0, "1024 bfloat16 to bfloat16")


def test_words_of_the_tokenizer_differ():
  words = [timing._word(i) for i in range(2000)]
  assert len(set(words)) == 2000
  assert words[:2] == [" a", " b"] and words[26] == " ba"


def get_config(arg):
  return runpy.run_path(str(CONFIGS / "benchmark.py"))["get_config"](arg)


def test_an_unknown_shape_is_refused():
  with pytest.raises(UserError, match="known: controlled, a, b, c"):
    get_config("d")
  with pytest.raises(UserError, match="lengths=none is not known; known: controlled, short"):
    get_config("a,lengths=none")
  with pytest.raises(UserError, match="'width=3' is not one of lengths="):
    get_config("a,width=3")


@pytest.mark.parametrize(
  ("arg", "parameters", "window"),
  [
    ("a", 1_509_248, 512),
    ("qwen_0_5b", 494_032_768, 2048),
    ("llama_1b,lengths=hh", 1_235_814_400, 512),
    ("llama_8b", 8_030_261_248, 2048),
    ("long", 494_032_768, 32768),
  ],
)
def test_shapes_are_those_of_the_models_named(arg, parameters, window):
  """As their own folders have them; a by hand, with 7 layers of 196,608 + 256 and two tables."""
  config = get_config(arg)
  model = families.from_hf(config.model.scratch.to_dict())
  shapes = jax.tree.leaves(transformer.param_shapes(model))
  assert sum(math.prod(leaf.shape) for leaf in shapes) == parameters
  assert config.data.max_length == window <= model.max_positions
  assert config.model.compute_dtype == ("float32" if arg == "a" else "bfloat16")


def test_a_long_pair_fills_its_window():
  config = get_config("long")
  rows = list(timing.make_pairs(100, max_length=config.data.max_length, **config.synthetic))
  assert len(rows) == 2
  for row in rows:
    for answer in ("chosen_ids", "rejected_ids"):
      assert 32766 <= len(row["prompt_ids"]) + len(row[answer]) <= 32768


def test_the_step_is_measured(tmp_path):
  config = get_config("controlled")
  config.synthetic.pairs = 8
  config.train.batch_size = 8
  config.parallel.devices = 1
  config.data.path, config.model.tokenizer = timing.write_task(
    tmp_path, config.model.scratch.vocab_size, max_length=64, **config.synthetic
  )
  run, params, reference, _ = build(config, tmp_path)
  result = timing.measure(run, params, reference, pace=Pace(2, 1), started=time.perf_counter())
  rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
  # Every batch is the whole set: its tokens are known, each prompt counted once. The first token of
  # a text is predicted by nobody, so a prompt of P tokens costs P - 1.
  tokens = sum(
    len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows
  )
  ratio = result["tokens_per_second"] / result["pairs_per_second"]
  np.testing.assert_allclose(ratio, tokens / 8, rtol=0.01)
  low, high = result["pairs_per_second_range"]
  assert 0 < low <= result["pairs_per_second"] <= high
  assert result["compile_seconds"] > 0 and result["seconds_to_first_step"] > 0
  assert result["compiled_shapes"] == 1
  assert result["peak_memory_mb"] > 100
  assert 0 < result["model_flop_utilisation"] < 1
  # The bound is what the step would do at the rate of the product.
  bound = result["model_flop_utilisation"] * result["bound_pairs_per_second"]
  np.testing.assert_allclose(bound, result["pairs_per_second"], rtol=0.01)


def configured(folder, **changes):
  """A run of a small model from random init, and its data in a folder."""
  config = get_config("controlled")
  with config.unlocked():
    config.model.scratch = ConfigDict(shape_fields() | {"vocab_size": 50})
    config.synthetic.pairs = config.train.batch_size = 8
    config.update_from_flattened_dict(changes)
  config.data.path, config.model.tokenizer = timing.write_task(
    folder, 50, max_length=64, **config.synthetic
  )
  return config


def built(folder, **changes):
  return build(configured(folder, **changes), folder)


@pytest.mark.slow
def test_random_weights_are_made_where_and_as_they_are_held(tmp_path):
  """In float32 they are those of `init_params`; divided among devices, the same numbers."""
  run, plain, reference, _ = built(tmp_path)
  expected = transformer.init_params(run.model_config, 0)
  jax.tree.map(np.testing.assert_array_equal, plain, expected)
  jax.tree.map(np.testing.assert_array_equal, reference, expected)
  run, divided, _, _ = built(tmp_path, **{"parallel.fsdp": 2})
  jax.tree.map(np.testing.assert_array_equal, divided, expected)
  places = jax.tree.leaves(run.executor.shardings(divided))
  assert [leaf.sharding for leaf in jax.tree.leaves(divided)] == places
  _, half, _, _ = built(tmp_path, **{"model.param_dtype": "bfloat16"})
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


@pytest.mark.slow
def test_adapters_of_a_random_base_are_measured_and_not_trained(tmp_path, monkeypatch):
  monkeypatch.setattr(flops, "_rate", lambda *tried: 1e12)  # large products take seconds
  changes = {"lora.rank": 2, "parallel.devices": 1}
  run, params, reference, _ = built(tmp_path, **changes)
  pace = Pace(blocks=1, block_steps=1)
  result = timing.measure(run, params, reference, pace=pace, started=time.perf_counter())
  base = sum(leaf.size for leaf in jax.tree.leaves(transformer.init_params(run.model_config, 0)))
  # Of every map [D, F], 2 (D + F): in a layer 8 + 8, 8 + 4, 8 + 4, 8 + 8 and three of 8 + 6.
  assert result["trained"] == 2 * 2 * (16 + 12 + 12 + 16 + 3 * 14)
  assert result["parameters"] == base
  with pytest.raises(UserError, match=r"a model made from nothing .* which is kept nowhere"):
    train.execute(configured(tmp_path, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_generation_is_measured():
  fields = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
  config = families.from_hf(fields | {"num_attention_heads": 2, "intermediate_size": 8})
  params = transformer.init_params(config, 0)
  asked = {"rows": 3, "prompt_tokens": 5, "new_tokens": 4}
  result = timing.measure_generation(config, params, blocks=2, **asked)
  assert {"rows": result["batch_size"]} | {k: result[k] for k in list(asked)[1:]} == asked
  rates = [value for name, value in result.items() if name.endswith("per_second")]
  assert len(rates) == 3 and all(rate > 0 for rate in rates)
  with pytest.raises(UserError, match="new_tokens is 1; the first is read off the prompt"):
    timing.measure_generation(config, params, blocks=1, **(asked | {"new_tokens": 1}))
