"""Prints what a TPU's compiler makes of a small step in every mode, a JSON object a line.

python tests/tools/compiled_modes.py [MODE …]      needs libtpu and no TPU
"""

import json
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dpo_jax.utils import libtpu

libtpu.prepare()  # before jax is imported: the imports stand below it

import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from dpo_jax import defaults  # noqa: E402
from dpo_jax.benchmarking import hlo, planner, target_plan, targets  # noqa: E402

VOCAB, WIDTH = 2**17, 128  # a chunk has 2^27 logits: 1,024 tokens
LLAMA = {
  "model_type": "llama",
  "vocab_size": VOCAB,
  "hidden_size": WIDTH,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "intermediate_size": 384,
  "tie_word_embeddings": True,
}
EXPERTS = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MODES = {
  "mesh": {},
  "pmap, stored": {"parallel.mode": "pmap", "reference.store": "STORE"},
  "fsdp x tensor, lora": {"parallel.fsdp": 2, "parallel.tensor": 2, "lora.rank": 4},
  "sequence": {"parallel.sequence": 4, "data.row_length": 1024},
  "experts, stored": {"parallel.fsdp": 4, "model.scratch": EXPERTS, "reference.store": "STORE"},
}
LENGTHS = planner.Lengths(250)


def configured(changes):
  """The configuration of a mode: eight pairs on each of four devices."""
  config = defaults.get_config()
  config.model.scratch = ConfigDict(changes.get("model.scratch", LLAMA))
  config.model.compute_dtype = "bfloat16"
  config.data.max_length = 1024
  config.train.batch_size = 32
  with config.unlocked():
    others = {name: value for name, value in changes.items() if name != "model.scratch"}
    config.update_from_flattened_dict(others)
  return config


def describe(name, target):
  """What `target_plan.plan` says of a mode, with facts that only this test needs."""
  step = target_plan.compile_step(configured(MODES[name]), LENGTHS, target)
  program = hlo.parse(step.compiled.as_text())
  kernels = {one.target for some in program.computations.values() for one in some} - {""}
  rows = 0
  for some in program.computations.values():
    for one in some:
      for shape in one.shapes:
        # Arrays of logits; a table has the width of the model as its other axis.
        if VOCAB in _whole(shape.dims) and WIDTH not in _whole(shape.dims) and len(shape.dims) > 1:
          rows = max(rows, math.prod(shape.dims) // max(d for d in shape.dims if d >= VOCAB // 4))
  return target_plan.describe(step, target) | {"calls": sorted(kernels), "rows_of_logits": rows}


def _whole(dims):
  """Sizes of axes, and what they are if they are a half or a quarter of one that is divided."""
  return {d * parts for d in dims for parts in (1, 2, 4)}


def main(*names):
  jax.config.update("jax_platforms", "cpu")
  target = targets.find("v5e:2x2")
  for name in names or MODES:
    print(json.dumps({"mode": name} | describe(name, target)), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
