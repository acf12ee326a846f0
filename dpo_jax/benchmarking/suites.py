"""Groups of programs that `comparison` times: each trains one shape on the same rows.

A group of the suite "cpu" is named by its shape, perhaps with more after a dash; a group of "gpu"
by the shape and the lengths of configs/benchmark.py.
"""

from typing import Any, NamedTuple


class Program(NamedTuple):
  """A program of a group.

  Attributes:
    name: in tables.
    options: those of scripts/benchmarks/peers/trl_step.py, for a peer; None for ours.
    changes: fields of our configuration.
    store: whether our reference is computed beforehand.
    processes: how many of ours run, each on its share of the processors.
    best: whether ratios may be taken to this peer; not where it trains in lower precision.
  """

  name: str
  options: dict[str, Any] | None = None
  changes: dict[str, Any] | None = None
  store: bool = False
  best: bool = True
  processes: int = 1


def trl(name: str, *, best: bool = True, **options: Any) -> Program:
  return Program(f"TRL {name}".strip(), options=options, best=best)


def ours(name: str, changes: dict[str, Any] | None = None, **more: Any) -> Program:
  return Program(f"ours {name}", changes=changes or {}, **more)


PACKED = {"data.layout": "packed"}
PADDED = {"data.layout": "padded"}
BFLOAT16 = {"model.compute_dtype": "bfloat16"}
LORA = {"lora.rank": 16, "lora.alpha": 32.0}
AGAIN: dict[str, Any] = {"checkpointing": True}  # activations are recomputed in the backward pass
# float32 weights with bfloat16 products, as ours have them; weights in bfloat16 are another
# training.
LOW: dict[str, Any] = {"dtype": "autocast"}

CPU = {
  "a": [
    trl(""),
    trl("sequential", sampling="sequential"),
    ours("shared"),
    ours("shared, two processes", {"parallel.mode": "pmap"}, processes=2),
    ours("packed", PACKED),
  ],
  "b": [trl(""), ours("shared"), ours("packed", PACKED)],
  "c": [trl(""), ours("shared"), ours("packed", PACKED)],
  "b-bfloat16": [
    trl("autocast", **LOW),
    trl("autocast, checkpointing", **LOW, **AGAIN),
    ours("shared, bfloat16", BFLOAT16),
    ours("packed, bfloat16", BFLOAT16 | PACKED),
  ],
  "b-stored": [trl("precomputed", precompute=True), ours("shared, stored", store=True)],
  "b-lora": [trl("LoRA", lora_rank=16), ours("shared, LoRA", LORA)],
  # Which of TRL's settings is its best: together they would not fit in memory.
  "b-peers": [
    trl(""),
    trl("sequential", sampling="sequential"),
    trl("checkpointing", **AGAIN),
    trl("autocast", **LOW),
    trl("autocast, checkpointing", **LOW, **AGAIN),
    trl("bfloat16 weights", dtype="bfloat16", best=False),
  ],
}
# Groups whose programs run one at a time.
APART = ("b-peers",)


def _whole() -> list[Program]:
  """Lists programs that train the model itself, in bfloat16 products, or adapters of it."""
  lora = {**LOW, "lora_rank": 16}
  return [
    trl("", **LOW),
    trl("checkpointing", **LOW, **AGAIN),
    # Rows of an update are sorted by length, so micro-batches have less padding.
    trl("2 micro-batches", **LOW, accumulate=2),
    trl("4 micro-batches", **LOW, accumulate=4),
    trl("precomputed", **LOW, precompute=True),
    trl("precomputed, checkpointing", **LOW, **AGAIN, precompute=True),
    trl("bfloat16 weights", dtype="bfloat16", best=False),
    # Every layout, which separates what the layout gains from what the rest of the step does.
    ours("padded", PADDED),
    ours("packed", PACKED),
    ours("shared"),
    ours("shared, remat full", {"model.remat": "full"}),
    ours("shared, stored", store=True),
    trl("LoRA", **lora),
    trl("LoRA, checkpointing", **lora, **AGAIN),
    ours("shared, LoRA", LORA),
    ours("shared, LoRA, stored", LORA, store=True),
  ]


def _adapted() -> list[Program]:
  """Lists programs that train adapters of a bfloat16 model, as its configuration has it."""
  lora = {"dtype": "bfloat16", "lora_rank": 16}
  return [
    trl("LoRA", **lora),
    trl("LoRA, checkpointing", **lora, **AGAIN),
    trl("LoRA, 4 micro-batches", **lora, accumulate=4),
    trl("LoRA, precomputed", **lora, precompute=True),
    trl("LoRA, precomputed, checkpointing", **lora, **AGAIN, precompute=True),
    ours("padded, LoRA", PADDED),
    ours("packed, LoRA", PACKED),
    ours("shared, LoRA"),
    ours("shared, LoRA, remat dots", {"model.remat": "dots"}),
    ours("shared, LoRA, stored", store=True),
  ]


# A model of 8B in float32, with gradient and moments, needs 128 GB: on one GPU only adapters fit.
GPU = {
  f"{shape}-{lengths}": make()
  for shape, make in (("qwen_0_5b", _whole), ("llama_1b", _whole), ("llama_8b", _adapted))
  for lengths in ("ultrafeedback", "hh")
} | {"long-long": [trl("checkpointing", **LOW, **AGAIN), ours("shared")]}
