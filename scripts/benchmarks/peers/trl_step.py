"""Times TRL's DPOTrainer on rows of token ids, as scripts/benchmark.py does this project's step.

  python scripts/benchmarks/peers/trl_step.py '{"pairs": "pairs.jsonl", "model": {…}}' \\
    '{"blocks": 4, …}'

The first object contains the fields of `Options`, the second those of
`dpo_jax.benchmarking.pacing.Pace`, which also describes turns in lockstep. Weights are random
and nothing is downloaded. Runs where torch, trl, transformers, datasets, peft and accelerate are,
and without JAX.
"""
# pyright: reportMissingImports=false
# Those libraries have an environment of their own, which the type checker does not see.

from __future__ import annotations

import time

STARTED = time.perf_counter()

import copy  # noqa: E402 (the clock starts first)
import dataclasses  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

if __name__ == "__main__":
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[3])
  os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
  warnings.filterwarnings("ignore")

from dpo_jax.benchmarking import pacing  # noqa: E402
from dpo_jax.utils import malloc  # noqa: E402

PAD, END = 0, 2
CHUNK = 50  # batches among which rows are sorted by length, as transformers does


@dataclasses.dataclass
class Options:
  """The training that is timed.

  Attributes:
    pairs: file of rows, each with `prompt_ids`, `chosen_ids` and `rejected_ids`.
    model: fields of a config.json.
    batch_size: pairs of an update.
    accumulate: micro-batches of an update, which divide its pairs.
    max_length: tokens of a prompt and one completion.
    dtype: "float32"; "autocast", of float32 weights to bfloat16; "bfloat16", weights too.
    checkpointing: whether activations are computed again on the way back.
    attention: "sdpa", "flash_attention_2", …; "best" is flash attention where installed, else sdpa.
    liger: whether Liger's fused layers are used where installed.
    precompute: whether the reference's log-probs are computed before training.
    padding_free: whether the trainer is set to rows without padding.
    lora_rank: of adapters on all linear maps; 0 trains the model.
    sampling: "sequential", or "by_length": batches of rows of similar length.
    device: "cpu" or "cuda".
    learning_rate: constant.
    seed: of weights and order.
  """

  pairs: str
  model: dict[str, Any]
  batch_size: int = 8
  accumulate: int = 1
  max_length: int = 512
  dtype: str = "float32"
  checkpointing: bool = False
  attention: str = "best"
  liger: bool = True
  precompute: bool = False
  padding_free: bool = False
  lora_rank: int = 0
  sampling: str = "by_length"
  device: str = "cpu"
  learning_rate: float = 1e-5
  seed: int = 0


def read_pairs(options: Options) -> list[dict[str, Any]]:
  """Returns the rows in the order in which they are trained on.

  By length: the batches that transformers' `group_by_length` makes, in shuffled order. It would
  begin with the longest, and a run shorter than an epoch would see little else.
  """
  lines = pathlib.Path(options.pairs).read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  if options.sampling == "sequential":
    return rows
  size, order = options.batch_size, random.Random(options.seed)
  order.shuffle(rows)
  longest = lambda row: len(row["prompt_ids"]) + max(len(row[f"{x}_ids"]) for x in _ANSWERS)
  batches = []
  for start in range(0, len(rows), CHUNK * size):
    some = sorted(rows[start : start + CHUNK * size], key=longest)
    batches += [some[i : i + size] for i in range(0, len(some), size)]
  order.shuffle(batches)
  batches.sort(key=lambda batch: len(batch) < size)  # one that is not full goes last
  return [row for batch in batches for row in batch]


_ANSWERS = ("chosen", "rejected")


def installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def make_model(options: Options, attention: str) -> Any:
  """Makes a model of random weights, on its device and in the type that it keeps them in."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  torch.manual_seed(options.seed)
  special: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}
  config = AutoConfig.for_model(**options.model, **special)
  dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
  with torch.device(options.device):
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def make_tokenizer(vocab: int) -> Any:
  """Makes a tokenizer of special ids alone: rows are ids, and the trainer needs no others of it."""
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  words = {"<pad>": PAD, "<s>": 1, "</s>": END, "word": min(3, vocab - 1)}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
  )


def settings(options: Options, steps: int, folder: str) -> Any:
  """Returns the trainer's settings, as near to this project's own as it has them."""
  from trl import DPOConfig

  return DPOConfig(
    output_dir=folder,
    per_device_train_batch_size=options.batch_size // options.accumulate,
    gradient_accumulation_steps=options.accumulate,
    max_steps=steps,
    max_length=options.max_length,
    learning_rate=options.learning_rate,
    lr_scheduler_type="constant",
    warmup_steps=0,
    weight_decay=0.0,
    optim="adamw_torch_fused",
    beta=0.1,
    bf16=options.dtype != "float32",
    use_cpu=options.device == "cpu",
    gradient_checkpointing=options.checkpointing,
    precompute_ref_log_probs=options.precompute,
    padding_free=options.padding_free,
    use_liger_kernel=options.liger and options.device != "cpu" and installed("liger_kernel"),
    train_sampling_strategy="sequential",
    dataloader_pin_memory=options.device != "cpu",
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=options.seed,
  )


class Memory:
  """The peak of the device's memory, in MB of 2^20 bytes."""

  def __init__(self, device: str):
    self.device = device

  def wait(self) -> None:
    import torch

    if self.device != "cpu":
      torch.cuda.synchronize()

  def peak_mb(self) -> float:
    import torch

    if self.device == "cpu":
      return pacing.most_held_mb()
    return torch.cuda.max_memory_allocated() / 2**20


class Blocks:
  """Counts the trainer's steps, and times those that belong to a block."""

  def __init__(self, pace: pacing.Pace, rows: list[dict], size: int, memory: Memory):
    self.pace, self.rows, self.size, self.memory = pace, rows, size, memory
    self.turns = pacing.turns(pace)
    self.done, self.found, self.first_step = 0, [], 0.0
    self.tell: Callable[[dict[str, Any]], None] | None = None  # of the block that is under way
    self.meter: pacing.Meter | None = None

  def step_done(self) -> bool:
    """Is called after each step; returns True once the run is to stop."""
    self.memory.wait()
    self.done += 1
    self.first_step = self.first_step or time.perf_counter() - STARTED
    if self.done < self.pace.warmup or (self.done - self.pace.warmup) % self.pace.block_steps:
      return False
    if self.meter is not None and self.tell is not None:
      self.meter.__exit__()
      block = self.counts() | self.meter.report() | {"peak_memory_mb": round(self.memory.peak_mb())}
      self.found.append(block)
      self.tell(block)
    self.tell = next(self.turns, None)
    if self.tell is None:
      return True
    self.meter = pacing.Meter().__enter__()
    return False

  def counts(self) -> dict[str, int]:
    """Counts the pairs of the block and their tokens; a prompt counts with each completion."""
    first, last = (self.done - i for i in (self.pace.block_steps, 0))
    seen = [self.rows[i % len(self.rows)] for i in range(first * self.size, last * self.size)]
    length = lambda row: 2 * len(row["prompt_ids"]) + sum(len(row[f"{x}_ids"]) for x in _ANSWERS)
    return {"pairs": len(seen), "tokens": sum(map(length, seen))}

  def result(self) -> dict[str, Any]:
    if not self.found:
      return {"steps": 0}
    rate = lambda unit: statistics.median(block[unit] / block["wall_s"] for block in self.found)
    return {
      "pairs_per_second": round(rate("pairs"), 3),
      "tokens_per_second": round(rate("tokens"), 1),
      "peak_memory_mb": max(block["peak_memory_mb"] for block in self.found),
      "seconds_to_first_step": round(self.first_step, 2),
      "steps": len(self.found) * self.pace.block_steps,
    }


def main(options: Options, pace: pacing.Pace) -> dict[str, Any]:
  malloc.keep_freed_memory()
  import logging

  import torch
  import transformers
  import trl
  from datasets import Dataset

  logging.disable(logging.WARNING)

  class Trainer(trl.DPOTrainer):
    """Takes rows of ids as they stand."""

    def _prepare_dataset(self, dataset, *_, **__):
      return dataset

  class Steps(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
      control.should_training_stop = blocks.step_done()
      return control

  attention = options.attention
  if attention == "best":
    attention = "flash_attention_2" if installed("flash_attn") else "sdpa"
  rows = read_pairs(options)
  memory = Memory(options.device)
  blocks = Blocks(pace, rows, options.batch_size, memory)
  model = make_model(options, attention)
  adapters, reference = None, None
  if options.lora_rank:
    from peft import LoraConfig

    rank = options.lora_rank
    adapters = LoraConfig(
      r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
  elif not options.precompute:
    reference = copy.deepcopy(model)
  with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
      model=model,
      ref_model=reference,
      args=settings(options, pace.steps + 1, folder),
      train_dataset=Dataset.from_list(rows),
      processing_class=make_tokenizer(options.model["vocab_size"]),
      peft_config=adapters,
      callbacks=[Steps()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
  return blocks.result() | {
    "parameters": sum(x.numel() for x in model.parameters()),
    "attention": attention,
    "liger": bool(trainer.args.use_liger_kernel),
    "padding_free": bool(getattr(trainer, "padding_free", False)),
    "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
    "versions": f"trl {trl.__version__}, torch {torch.__version__},"
    f" transformers {transformers.__version__}",
  }


if __name__ == "__main__":
  steps = pacing.Pace(blocks=4, block_steps=2, warmup=2)
  steps = steps._replace(**(json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}))
  steps = steps._replace(warmup=max(1, steps.warmup))  # the clock starts at the end of a step
  print(json.dumps(main(Options(**json.loads(sys.argv[1])), steps)), flush=True)
