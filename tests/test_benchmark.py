"""What the benchmark counts, by hand; and that it runs the step it claims to."""

import json
import pathlib
import runpy
import time

import numpy as np
import pytest

from dpo_jax import benchmark
from dpo_jax.build import build
from dpo_jax.lockstep import Pace
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
LENGTHS = {
  "pairs": 400, "mean_length": 100, "prompt_fraction": 0.6, "sigma": 0.5, "max_length": 400,
}  # fmt: skip


def test_pairs_have_the_lengths_asked_for():
  rows = list(benchmark.make_pairs(50, **LENGTHS))
  assert rows == list(benchmark.make_pairs(50, **LENGTHS))
  assert rows != list(benchmark.make_pairs(50, **LENGTHS, seed=1))
  length = lambda name: np.array([len(row[name]) for row in rows])
  np.testing.assert_allclose(length("prompt_ids").mean(), 60, rtol=0.1)
  np.testing.assert_allclose(length("chosen_ids").mean(), 40, rtol=0.1)
  for name in ("chosen_ids", "rejected_ids"):
    assert (length("prompt_ids") + length(name)).max() <= 400
    assert length(name).min() >= 8
    assert all(row[name][-1] == benchmark.END for row in rows)
    assert all(3 <= i < 50 for row in rows for i in row[name][:-1])


def test_pairs_are_those_that_a_peer_trains_on(monkeypatch):
  folder = CONFIGS.parent.parent / "shared" / "bench"
  if not folder.is_dir():
    pytest.skip("../shared/bench is not beside this checkout")
  monkeypatch.syspath_prepend(folder)
  import bench_common

  lengths = {"pairs": 512, "mean_length": 250, "prompt_fraction": 0.6, "sigma": 0.6}
  theirs = bench_common.make_pairs(bench_common.DataSpec(), 32000)
  ours = list(benchmark.make_pairs(32000, max_length=512, **lengths))
  assert [{k.removesuffix("_ids"): v for k, v in row.items()} for row in ours] == theirs


def test_flops_of_a_pair_by_hand():
  # Body: one stacked kernel of 2 layers, 3 by 4. Head: 5 words of width 3. Norms cost nothing.
  layers = {"kernel": np.zeros((2, 3, 4)), "norm": np.zeros((2, 3))}
  params = {"params": {"layers": layers, "embed": np.zeros((5, 3)), "norm": np.zeros(3)}}
  # 7 tokens, 4 of them scored; policy forward and backward (3 passes), and the reference's.
  assert benchmark.flops_counter(params, 5, True)(7, 4) == 2 * 4 * (24 * 7 + 15 * 4)
  assert benchmark.flops_counter(params, 5, False)(7, 4) == 2 * 3 * (24 * 7 + 15 * 4)


def test_words_of_the_tokenizer_differ():
  words = [benchmark._word(i) for i in range(2000)]
  assert len(set(words)) == 2000
  assert words[:2] == [" a", " b"] and words[26] == " ba"


def test_an_unknown_shape_is_refused():
  get_config = runpy.run_path(str(CONFIGS / "benchmark.py"))["get_config"]
  with pytest.raises(UserError, match="known: controlled, a, b, c"):
    get_config("d")


def test_the_step_is_measured(tmp_path):
  config = runpy.run_path(str(CONFIGS / "benchmark.py"))["get_config"]("controlled")
  config.synthetic.pairs = 8
  config.train.batch_size = 8
  config.parallel.devices = 1
  config.data.path, config.model.tokenizer = benchmark.write_task(
    tmp_path, config.model.scratch.vocab_size, max_length=64, **config.synthetic
  )
  run, params, reference, _ = build(config, tmp_path)
  result = benchmark.measure(run, params, reference, pace=Pace(2, 1), started=time.perf_counter())
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


def test_generation_is_measured():
  fields = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
  config = families.from_hf(fields | {"num_attention_heads": 2, "intermediate_size": 8})
  params = transformer.init_params(config, 0)
  asked = {"rows": 3, "prompt_tokens": 5, "new_tokens": 4}
  result = benchmark.measure_generation(config, params, blocks=2, **asked)
  assert {"rows": result["batch_size"]} | {k: result[k] for k in list(asked)[1:]} == asked
  rates = [value for name, value in result.items() if name.endswith("per_second")]
  assert len(rates) == 3 and all(rate > 0 for rate in rates)
  with pytest.raises(UserError, match="new_tokens is 1; the first is read off the prompt"):
    benchmark.measure_generation(config, params, blocks=1, **(asked | {"new_tokens": 1}))
