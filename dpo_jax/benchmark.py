"""Times the training step of a run, built and fed as `train` does it, and generation."""

from __future__ import annotations

import functools
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import feeds, sampling, step
from dpo_jax.build import Run, fill_store
from dpo_jax.data import word_level
from dpo_jax.data.tokenized import Example
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, TokenBatch, UserError

FIRST_WORD, END = 3, 2  # ids below 3 are special; an answer ends in 2
_COMPILED = "/jax/core/compile/backend_compile_duration"


def make_pairs(
  vocab: int,
  *,
  pairs: int,
  mean_length: float,
  prompt_fraction: float,
  sigma: float,
  max_length: int,
  shortest: int = 8,
  seed: int = 0,
) -> Iterator[dict[str, list[int]]]:
  """Preference rows of random token ids with log-normal lengths.

  Args:
    vocab: number of ids.
    pairs: rows.
    mean_length: mean tokens of a prompt and one answer.
    prompt_fraction: the prompt's share of them.
    sigma: standard deviation of the logarithm of each length.
    max_length: most tokens of a prompt and one answer.
    shortest: fewest tokens of an answer.
    seed: of lengths and ids.
  """
  rng = np.random.default_rng(seed)
  draw = lambda mean: mean * np.exp(sigma * rng.standard_normal() - sigma**2 / 2)
  words = lambda count: rng.integers(FIRST_WORD, vocab, count).tolist()
  for _ in range(pairs):
    prompt = int(np.clip(draw(mean_length * prompt_fraction), 4, max_length - shortest))
    chosen, rejected = (
      int(np.clip(draw(mean_length * (1 - prompt_fraction)), shortest, max_length - prompt))
      for _ in range(2)
    )
    yield {
      "prompt_ids": words(prompt),
      "chosen_ids": [*words(chosen - 1), END],
      "rejected_ids": [*words(rejected - 1), END],
    }


def write_task(folder: pathlib.Path, vocab: int, **lengths: Any) -> tuple[str, str]:
  """Writes synthetic pairs and a tokenizer of their ids; returns the paths of both."""
  word_level.write(folder / "tokenizer", [_word(i) for i in range(vocab - FIRST_WORD)])
  with (folder / "pairs.jsonl").open("w") as file:
    for row in make_pairs(vocab, **lengths):
      file.write(json.dumps(row) + "\n")
  return str(folder / "pairs.jsonl"), str(folder / "tokenizer")


def _word(number: int) -> str:
  """A different word for every number: " a", …, " z", " ba", …"""
  letters = ""
  while number or not letters:
    number, digit = divmod(number, 26)
    letters = chr(ord("a") + digit) + letters
  return " " + letters


def measure(
  run: Run,
  params: PyTree,
  reference: PyTree | None,
  *,
  blocks: int,
  block_steps: int,
  started: float,
) -> dict[str, Any]:
  """Rates, memory, compile time and utilisation of the run's step.

  Every shape of batch that occurs is compiled before the clock starts; batches are made while it
  runs, as in training.

  Args:
    run: what `build` made of a configuration.
    params, reference: the initial parameters, on host.
    blocks: timed blocks; rates are medians over them.
    block_steps: steps of a block.
    started: `time.perf_counter()` when the command began.
  """
  compiled = _listen_to_compiler()
  live = reference is not None and not run.store
  flops = flops_counter(params, run.model.vocab, live and run.objective.loss.needs_reference)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  take = _stepper(run, params, reference)
  del params, reference

  shape = lambda batch: tuple(x.shape for x in jax.tree.leaves(batch))
  shapes = {shape(batch): batch for batch in _stream(run, blocks * block_steps)}
  first, *others = shapes.values()
  take(first)
  first_step = time.perf_counter() - started
  for batch in others:
    take(batch)
  compile_seconds = sum(compiled)

  results = _time_blocks(run, take, blocks, block_steps, flops)
  ceiling = product_rate(run.config.model.compute_dtype)
  rate = lambda unit: statistics.median(block[unit] / block["seconds"] for block in results)
  pairs = sorted(block["pairs"] / block["seconds"] for block in results)
  return {
    "pairs_per_second": round(rate("pairs"), 3),
    "pairs_per_second_range": [round(pairs[0], 3), round(pairs[-1], 3)],
    "tokens_per_second": round(rate("tokens"), 1),
    "peak_memory_mb": round(peak_memory_mb()),
    "compile_seconds": round(compile_seconds, 2),
    "seconds_to_first_step": round(first_step, 2),
    "data_wait_share": round(rate("waited"), 5),
    "padding_share": round(statistics.median(block["padding"] for block in results), 4),
    "model_flop_utilisation": round(rate("flops") / ceiling, 4),
    "product_gflops": round(ceiling / 1e9, 1),
    "parameters": count,
    "batch_size": run.config.train.batch_size,
    "layout": run.config.data.layout,
    "compute_dtype": run.config.model.compute_dtype,
    "compiled_shapes": len(shapes),
    "reference": "computed" if live else "stored" if run.store else "none",
    "steps": blocks * block_steps,
    "devices": len(run.executor.devices),
    "device": run.executor.devices[0].device_kind,
    "jax": jax.__version__,
  }


def measure_generation(
  config: ModelConfig,
  params: PyTree,
  *,
  rows: int,
  prompt_tokens: int,
  new_tokens: int,
  blocks: int,
  dtype: str = "float32",
  seed: int = 0,
) -> dict[str, Any]:
  """Rates of reading prompts and of writing answers, none of which ends before its last token.

  Answers of one token take reading alone, and are taken off what longer ones take.

  Args:
    config, params: the model, its parameters placed where rows are to be generated.
    rows: prompts, each answered once, all in one batch.
    prompt_tokens, new_tokens: of every row.
    blocks: repetitions; rates are medians over them.
    dtype: of activations and cache.
    seed: of prompts and samples.
  """
  if new_tokens < 2:
    raise UserError(f"new_tokens is {new_tokens}; the first is read off the prompt: give 2 or more")
  rng = np.random.default_rng(seed)
  prompts = rng.integers(0, config.vocab, (rows, prompt_tokens)).tolist()
  settings = {"seed": seed, "batch_size": rows, "width": prompt_tokens, "dtype": dtype}

  def seconds(tokens: int) -> float:
    before = time.perf_counter()
    sampling.generate(config, params, prompts, max_tokens=tokens, **settings)
    return time.perf_counter() - before

  seconds(1), seconds(new_tokens)  # compiles
  times = [(seconds(1), seconds(new_tokens)) for _ in range(blocks)]
  median = lambda rates: round(statistics.median(rates), 1)
  # Of a small model, a hiccup while reading can outlast the writing.
  writing = [max(whole - reading, 1e-9) for reading, whole in times]
  return {
    "prefill_tokens_per_second": median(rows * prompt_tokens / reading for reading, _ in times),
    "decode_tokens_per_second": median(rows * (new_tokens - 1) / each for each in writing),
    "tokens_per_second": median(rows * new_tokens / whole for _, whole in times),
    "batch_size": rows,
    "prompt_tokens": prompt_tokens,
    "new_tokens": new_tokens,
    "peak_memory_mb": round(peak_memory_mb()),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "compute_dtype": dtype,
    "devices": len(jax.tree.leaves(params)[0].devices()),
    "device": jax.local_devices()[0].device_kind,
    "jax": jax.__version__,
  }


def _listen_to_compiler() -> list[float]:
  """A list that grows by the seconds of every compilation from here on."""
  seconds: list[float] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: seconds.append(duration) if event == _COMPILED else None
  )
  return seconds


def _stepper(
  run: Run, params: PyTree, reference: PyTree | None
) -> Callable[[TokenBatch], dict[str, Any]]:
  """One training step after another, each waited for."""
  executor = run.executor
  init = functools.partial(step.init_state, tx=run.tx, loss=run.objective.loss)
  state = executor.compile_init(init)(executor.place(params))
  placed = None if reference is None else executor.place(reference)
  placed = fill_store(run, placed)
  compiled = executor.compile_step(
    functools.partial(step.train_step, objective=run.objective, tx=run.tx)
  )

  def take(batch: TokenBatch) -> dict[str, Any]:
    nonlocal state
    state, means = compiled(state, placed, executor.place_batch(batch))
    return executor.metrics_to_host(means)

  return take


def _stream(run: Run, steps: int) -> Iterator[TokenBatch]:
  feed = feeds.make_feed(run.config, run.material, None, 0)
  return (feed(k, None)[0] for k in range(1, steps + 1))


def _time_blocks(run: Run, take, blocks: int, block_steps: int, flops) -> list[dict[str, float]]:
  by_row = {example.row: example for example in run.material.examples}
  stream, results = _stream(run, blocks * block_steps), []
  for _ in range(blocks):
    seen: list[int] = []
    waited, real, room = 0.0, 0, 0
    before = time.perf_counter()
    for _ in range(block_steps):
      asked = time.perf_counter()
      batch = next(stream)
      waited += time.perf_counter() - asked
      take(batch)
      seen += batch.row_NS[batch.row_NS >= 0].tolist()
      real, room = real + (batch.pair_NL >= 0).sum(), room + batch.pair_NL.size
    seconds = time.perf_counter() - before
    answers = len(run.material.examples[0].answers)
    # Every answer of a row is a slot of its own: each row is seen once an answer.
    sizes = [_tokens(by_row[row]) for row in seen]
    distinct, scored = (sum(column) / answers for column in zip(*sizes, strict=True))
    results.append(
      {
        "seconds": seconds,
        "pairs": len(seen) / answers,
        "tokens": distinct,
        "flops": flops(distinct, scored),
        "waited": waited,
        "padding": 1 - real / room,
      }
    )
  return results


def _tokens(example: Example) -> tuple[int, int]:
  """Distinct input tokens of a pair, and how many are scored."""
  scored = sum(len(answer) for answer in example.answers)
  return len(example.prompt) - 1 + scored, scored


def flops_counter(
  params: PyTree, vocab: int, with_reference: bool
) -> Callable[[float, float], float]:
  """(tokens, scored tokens) -> FLOPs of the matrix products; attention scores are left out."""
  tree = params["params"]
  body = sum(leaf.size for leaf in jax.tree.leaves(tree["layers"]) if leaf.ndim >= 3)
  head = next(leaf.size for leaf in jax.tree.leaves(tree) if leaf.shape[:1] == (vocab,))
  passes = 3 + with_reference  # a backward pass costs two forward ones
  return lambda tokens, scored: 2 * passes * (body * tokens + head * scored)


def product_rate(dtype: str) -> float:
  """FLOPs a second of one large matrix product, the best of several: what this device can do."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a, b: a @ b)
  product(x, x).block_until_ready()
  times = []
  for _ in range(8):
    before = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - before)
  return 2 * size**3 / min(times) * len(jax.local_devices())


def peak_memory_mb() -> float:
  """Most memory held so far: of the accelerator, or of this process on a CPU. MB are 2^20 bytes."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats["peak_bytes_in_use"] / 2**20
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
