"""Times the training step of a run, built and fed as `train` does it, and generation."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax import step
from dpo_jax.benchmarking import pacing
from dpo_jax.benchmarking.flops import product_rate, step_flops
from dpo_jax.benchmarking.pacing import Pace
from dpo_jax.controlled import word_tokenizer
from dpo_jax.data.examples import Example, weights_of
from dpo_jax.distributed import processes
from dpo_jax.generation import sampler
from dpo_jax.model import transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, TokenBatch, UserError
from dpo_jax.training import datasets
from dpo_jax.training.loop import fill_store
from dpo_jax.training.run import Run

FIRST_WORD, END = 3, 2  # ids below 3 are special; a completion ends in 2
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
  """Yields preference rows of random token ids with log-normal lengths.

  All lengths are sampled first, those of prompts before those of completions, then the ids row by
  row: a program of another library that does so too trains on the very same rows.

  Args:
    vocab: number of ids.
    pairs: rows.
    mean_length: mean tokens of a prompt and one completion.
    prompt_fraction: the prompt's share of them.
    sigma: standard deviation of the logarithm of each length.
    max_length: most tokens of a prompt and one completion.
    shortest: fewest tokens of a completion.
    seed: of lengths and ids.
  """
  rng = np.random.default_rng(seed)

  def draw(mean: float, *shape: int) -> np.ndarray:
    # The mean of a log-normal is that of its median times exp(sigma^2 / 2).
    return np.exp(np.log(mean) - sigma**2 / 2 + sigma * rng.standard_normal(shape))

  prompts = draw(mean_length * prompt_fraction, pairs)
  completions = draw(mean_length * (1 - prompt_fraction), pairs, 2)

  def words(count: int) -> list[int]:
    return rng.integers(FIRST_WORD, vocab, count).tolist()

  for drawn, both in zip(prompts, completions, strict=True):
    # The prompt leaves room for the shortest completion: no row is over `max_length`, where
    # programs would drop or cut it each in its own way.
    prompt = int(np.clip(drawn, 4, max_length - shortest))
    chosen, rejected = np.clip(both, shortest, max_length - prompt).astype(int).tolist()
    yield {
      "prompt_ids": words(prompt),
      "chosen_ids": [*words(chosen - 1), END],
      "rejected_ids": [*words(rejected - 1), END],
    }


def write_task(folder: pathlib.Path, vocab: int, **lengths: Any) -> tuple[str, str]:
  """Writes synthetic pairs and a tokenizer of their ids; returns the paths of both."""
  # Set-up needs a tokenizer, and refuses one whose ids go beyond the model's.
  word_tokenizer.write(folder / "tokenizer", [_word(i) for i in range(vocab - FIRST_WORD)])
  with (folder / "pairs.jsonl").open("w") as file:
    for row in make_pairs(vocab, **lengths):
      file.write(json.dumps(row) + "\n")
  return str(folder / "pairs.jsonl"), str(folder / "tokenizer")


def _word(number: int) -> str:
  """Returns a different word for every number: " a", …, " z", " ba", …"""
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
  pace: Pace,
  started: float,
) -> dict[str, Any]:
  """Measures rates, memory, compile time and utilisation of the run's step.

  Every shape of batch that occurs is compiled before the clock starts; batches are made while it
  runs, as in training. In lockstep each block is reported as it ends; its `tokens` are counted as
  trainers of padded rows do, the prompt once with every completion, while rates count it once.

  Args:
    run: the run, as `setup.build` returns it.
    params, reference: the initial parameters, as `setup.build` returns them.
    pace: steps and blocks; rates are medians over blocks.
    started: `time.perf_counter()` when the command began.
  """
  compiled = _listen_to_compiler()
  live = run.objective.loss.needs_reference and not run.store
  trained = _count(params)
  flops = step_flops(run.model_config, reference=live, adapters=trained if run.adapter else 0)
  steps = _Steps(run, params, reference)
  del params, reference  # their memory is part of what is measured

  # A pass of its own over the stream. It may be repeated, since batch k depends on data, seed and k
  # alone.
  shapes = {
    tuple(x.shape for x in jax.tree.leaves(batch)): batch for batch in _stream(run, pace.steps)
  }
  # Each shape once, before the clock: a compilation within a block would be timed as a step.
  first, *others = shapes.values()
  steps.take(first)
  steps.wait()
  first_step = time.perf_counter() - started
  for batch in others:
    steps.take(batch)
  steps.wait()
  # Read here: the product that is timed further down is compiled too.
  compile_seconds = sum(compiled)

  # Blocks, for their median: other programs of the machine disturb some and not all.
  results = _time_blocks(run, steps, pace, flops)
  if not results:
    return {"steps": 0}
  ceiling, product = product_rate(run.settings.compute_dtype)
  # Of all processes together, as the counts of the blocks are.
  (ceiling,) = _of_all([ceiling])

  def rate(unit: str) -> float:
    return statistics.median(block[unit] / block["seconds"] for block in results)

  # A ratio of sums: blocks differ in length, and a mean of ratios would favour the short ones.
  per_pair = sum(block["flops"] for block in results) / sum(block["pairs"] for block in results)
  pairs = sorted(block["pairs"] / block["seconds"] for block in results)
  return {
    "pairs_per_second": round(rate("pairs"), 3),
    "pairs_per_second_range": [round(pairs[0], 3), round(pairs[-1], 3)],
    "tokens_per_second": round(rate("tokens"), 1),
    "peak_memory_mb": round(_of_all([peak_memory_mb()])[0]),
    "compile_seconds": round(compile_seconds, 2),
    "seconds_to_first_step": round(first_step, 2),
    "data_wait_share": round(rate("waited"), 5),
    "padding_share": round(statistics.median(block["padding"] for block in results), 4),
    "gflops_per_pair": round(per_pair / 1e9, 4),
    "bound_pairs_per_second": round(ceiling / per_pair, 3),
    "model_flop_utilisation": round(rate("flops") / ceiling, 4),
    "product_gflops": round(ceiling / 1e9, 1),
    "product": product,
    "parameters": _count(transformer.param_shapes(run.model_config)),
    "trained": trained,
    "batch_size": run.data.settings.batch_size,
    "layout": run.data.batching.layout,
    "attention": run.attention,
    "compute_dtype": run.settings.compute_dtype,
    "compiled_shapes": len(shapes),
    "reference": "computed" if live else "stored" if run.store else "none",
    "steps": len(results) * pace.block_steps,
    "devices": len(run.executor.devices),
    "processes": jax.process_count(),
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
  """Measures the rates of prefill and decoding, for completions that never end early.

  A completion of one token takes the prefill alone: its time is subtracted from that of longer
  ones.

  Args:
    config, params: the model, its parameters placed where rows are to be generated.
    rows: prompts, one completion each, all in one batch.
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
    # Returns lists on host, so it has waited for the device.
    sampler.generate(config, params, prompts, max_tokens=tokens, **settings)
    return time.perf_counter() - before

  for tokens in (1, new_tokens):
    seconds(tokens)  # compiles
  # In turns, so that a slow moment of the machine meets both alike.
  times = [(seconds(1), seconds(new_tokens)) for _ in range(blocks)]

  def median(rates: Iterator[float]) -> float:
    return round(statistics.median(rates), 1)

  # With a small model, a hiccup during prefill can last longer than all of the decoding.
  decoding = [max(whole - prefill, 1e-9) for prefill, whole in times]
  return {
    "prefill_tokens_per_second": median(rows * prompt_tokens / prefill for prefill, _ in times),
    "decode_tokens_per_second": median(rows * (new_tokens - 1) / each for each in decoding),
    "tokens_per_second": median(rows * new_tokens / whole for _, whole in times),
    "batch_size": rows,
    "prompt_tokens": prompt_tokens,
    "new_tokens": new_tokens,
    "peak_memory_mb": round(peak_memory_mb()),
    "parameters": _count(params),
    "compute_dtype": dtype,
    "devices": len(jax.tree.leaves(params)[0].devices()),
    "device": jax.local_devices()[0].device_kind,
    "jax": jax.__version__,
  }


def _count(params: PyTree) -> int:
  """Counts parameters, of arrays or of shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _listen_to_compiler() -> list[float]:
  """Returns a list that grows by the seconds of every compilation from here on."""
  seconds: list[float] = []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    if event == _COMPILED:
      seconds.append(duration_secs)

  # Compilations are reported to listeners alone.
  jax.monitoring.register_event_duration_secs_listener(listen)
  return seconds


class _Steps:
  """Takes one training step after another, as the training loop does."""

  def __init__(self, run: Run, params: PyTree, reference: PyTree | None):
    self._executor = run.executor
    init = functools.partial(step.init_state, tx=run.tx, loss=run.objective.loss)
    self._state = run.executor.compile_init(init)(run.executor.place(params))
    placed = None if reference is None else run.executor.place(reference)
    self._reference_params = fill_store(run, placed)
    self._compiled = run.executor.compile_step(
      functools.partial(step.train_step, objective=run.objective, tx=run.tx)
    )
    self._means: dict[str, Any] = {}

  def take(self, batch: TokenBatch) -> None:
    """Starts a step, then reads the metrics of the one before."""
    # The step donates its state, so only the newest one is valid.
    self._state, means = self._compiled(
      self._state, self._reference_params, self._executor.place_batch(batch)
    )
    self.wait()
    self._means = means

  def wait(self) -> None:
    """Waits for the step whose metrics are not read yet, by reading them."""
    if self._means:
      self._executor.metrics_to_host(self._means)
    self._means = {}


def _stream(run: Run, steps: int) -> Iterator[TokenBatch]:
  """Yields the batches of the first steps, as training makes them."""
  feed = datasets.make_feed(run.data, None, 0, share=run.executor.share)
  return (feed(k, None)[0] for k in range(1, steps + 1))


def _time_blocks(run: Run, steps: _Steps, pace: Pace, flops) -> list[dict[str, float]]:
  """Runs and measures the blocks; returns the counts and seconds of each, in order."""
  stream, results = _stream(run, pace.steps), []
  by_row = {example.row: example for example in run.data.examples}
  for _ in range(pace.warmup):
    steps.take(next(stream))
  steps.wait()
  for tell in pacing.turns(pace):
    seen: list[int] = []
    waited, real, room = 0.0, 0, 0
    with pacing.Meter() as meter:
      for _ in range(pace.block_steps):
        before = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - before
        steps.take(batch)
        seen += batch.row_NS[batch.row_NS >= 0].tolist()
        real, room = real + (batch.pair_NL >= 0).sum(), room + batch.pair_NL.size
      steps.wait()
    # Counted after the clock has stopped: counting is no part of training.
    completions = len(run.data.examples[0].completions)
    # Every completion of a row is a slot of its own, so each row is seen once per completion.
    counts = np.sum([_tokens(by_row[row]) for row in seen], axis=0) / completions
    counts = [len(seen) / completions, *counts, real, room]
    pairs, distinct, scored, repeated, real, room = _of_all(counts)
    results.append(
      {
        "seconds": meter.wall_s,
        "pairs": pairs,
        "tokens": distinct,
        "flops": flops(distinct, scored),
        "waited": waited,
        "padding": 1 - real / room,
      }
    )
    report = meter.report() | {"peak_memory_mb": round(peak_memory_mb())}
    mine = report["cpu_s"]
    added = ("cpu_s", "rss_mb", "peak_rss_mb", "peak_memory_mb")
    report |= dict(zip(added, _of_all([report[name] for name in added]), strict=True))
    # The other processes of this run are not other programs.
    others = report["other_cores"] - (report["cpu_s"] - mine) / meter.wall_s
    report["other_cores"] = max(0.0, round(others, 3))
    tell({"pairs": pairs, "tokens": repeated} | report)
  return results


def _of_all(counts: Sequence[float]) -> list[float]:
  """Adds counts up over the processes of this run."""
  if not processes.is_multiprocess():
    return list(map(float, counts))
  return multihost_utils.process_allgather(np.asarray(counts, np.float32)).sum(axis=0).tolist()


def _tokens(example: Example) -> tuple[int, int, int]:
  """Counts tokens of an example: distinct inputs, scored ones, and all with the prompt repeated."""
  completions = sum(map(len, example.completions))
  scored = sum(map(np.count_nonzero, weights_of(example)))
  prompt = len(example.prompt)
  # The prompt's last token is an input of every completion, in place of the completion's own last.
  return prompt - 1 + completions, scored, len(example.completions) * prompt + completions


def peak_memory_mb() -> float:
  """Returns the peak of memory so far, of the accelerator or on a CPU of this process, in MiB."""
  # A CPU device reports nothing.
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats["peak_bytes_in_use"] / 2**20
  return pacing.most_held_mb()
