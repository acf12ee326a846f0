"""A TPU's own compiler makes of a small step, in every mode, what it should: without a TPU.

`bash scripts/test_targets.sh` installs the compiler and runs this.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

LIBTPU = importlib.util.find_spec("libtpu")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    LIBTPU is None or LIBTPU.origin is None,
    reason="libtpu, the compiler for TPUs, is not installed: bash scripts/test_targets.sh",
  ),
]
CHUNK = 2**27 // 2**17  # tokens whose logits exist at once: budget over vocabulary
MODES = ("mesh", "pmap, stored", "fsdp x tensor, lora", "experts, stored", "sequence")
# Devices with a part of the vocabulary each, whose chunks have as many more tokens.
PARTS = {"fsdp x tensor, lora": 4, "experts, stored": 4}


@pytest.fixture(scope="module")
def compiled():
  """Mode to what `tests/tools/compiled_modes.py` prints of it, or the line of its error."""
  # Flags of the tests are for CPUs; here the compiler is to do what it does for users.
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  found = {}
  for mode in MODES:
    done = subprocess.run(
      [sys.executable, "tests/tools/compiled_modes.py", mode],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
    last = done.stderr.strip().splitlines()[-1:]
    found[mode] = json.loads(done.stdout) if done.returncode == 0 else "".join(last)
  return found


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_compiles_and_takes_the_kernel(compiled, mode):
  found = compiled[mode]
  assert isinstance(found, dict), found
  assert found["fits"] and found["attention"] == "splash"
  assert "tpu_custom_call" in found["calls"]
  # In each of two layers: forward for the policy, once more where remat computes it again, and for
  # a live reference; backward once for queries and once for keys and values.
  assert 2 * 3 <= found["attention_kernels"] <= 2 * (4 if "stored" in mode else 5)


@pytest.mark.parametrize("mode", MODES)
def test_no_product_has_inputs_in_float32(compiled, mode):
  kinds = compiled[mode]["products_by_type"]
  assert kinds["bf16"] > 0.95 * compiled[mode]["products_done"]
  assert "f32" not in kinds
  # No more is computed than the head's recomputed logits and what remat computes again add.
  assert compiled[mode]["utilization_by_products"] > 0.6


@pytest.mark.parametrize("mode", MODES)
def test_no_logits_beyond_a_chunk_exist(compiled, mode):
  # Eight pairs on each device score about 2,000 tokens.
  assert 512 < compiled[mode]["rows_of_logits"] <= CHUNK * PARTS.get(mode, 1)


@pytest.mark.parametrize("mode", ["mesh", "pmap, stored", "sequence"])
def test_copies_exchange_their_gradients_once(compiled, mode):
  found = compiled[mode]
  reduced = found["collectives"]["all-reduce"]
  # One float32 of every parameter, and a few counts; a ring of four sends 1.5 times as many.
  assert 0 <= reduced["bytes"] - 4 * found["parameters"] < 1024
  assert reduced["sent_bytes"] == pytest.approx(1.5 * reduced["bytes"], abs=100)
  assert reduced["runs"] <= 8
  # Where rows are whole, nothing else is exchanged; where they are divided, activations alone.
  others = sum(sums["bytes"] for sums in found["collectives"].values()) - reduced["bytes"]
  assert others < (1024 if mode != "sequence" else 4 * found["parameters"])


def test_divided_parameters_are_gathered_in_bfloat16(compiled):
  found = compiled["fsdp x tensor, lora"]
  gathered = found["collectives"]["all-gather"]["bytes"]
  # Half of the table for embedding and head, in two passes and two bytes each, is most of it: no
  # pass gathers more than 2 of the 4 tables, and layers are small beside them.
  table = 2**17 * 128
  assert gathered <= 2 * 2 * table * 2
  assert found["trained"] < found["parameters"] / 100
  assert found["collectives"]["all-reduce"]["bytes"] < 4 * found["parameters"]


def test_experts_are_gathered_and_their_gradients_reduced(compiled):
  found = compiled["experts, stored"]
  kinds = found["collectives"]
  assert {"all-gather", "all-reduce"} <= kinds.keys()
  # The table, gathered in bfloat16 and reduced in float32, is most of what is exchanged.
  assert kinds["all-gather"]["bytes"] < 3 * 2 * found["parameters"]
  assert (
    kinds["all-reduce"]["bytes"] + kinds["reduce-scatter"]["bytes"] < 5 * 4 * found["parameters"]
  )
