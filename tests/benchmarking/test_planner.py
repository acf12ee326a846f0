"""What a plan counts, by hand; and that a step for real takes what was planned."""

import json
import pathlib
import subprocess
import sys

import pytest

from dpo_jax.benchmarking import planner
from dpo_jax.distributed import memory
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.model import families, transformer
from tests.support.paths import ROOT
from tests.support.small_plan import configured

LENGTHS = planner.Lengths(60)
LORA = ["lora.rank=8", "data.max_length=1024"]
LLAMA = {
  "model_type": "llama",
  "vocab_size": 8192,
  "hidden_size": 256,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 768,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A folder of LLAMA."""
  folder = tmp_path_factory.mktemp("plan") / "base"
  config = families.from_hf(LLAMA)
  hf_checkpoint.save(folder, config, transformer.init_params(config, 0))
  return folder


@pytest.mark.slow
def test_what_is_held_by_hand():
  """4 bytes a parameter in policy and reference, 8 in AdamW's moments and its count."""
  found = planner.plan(configured(), LENGTHS)
  count, held = found["parameters"], found["bytes_per_device"]
  assert found["trained"] == count and found["devices"] == 1
  assert held["params"] == held["reference"] == 4 * count
  assert 8 * count <= held["optimizer"] <= 8 * count + 64
  assert held["step"] >= 4 * count  # a gradient at the least
  assert held["total"] == sum(held[name] for name in ("params", "reference", "optimizer", "step"))


def test_fsdp_divides_all_but_the_norms():
  held = lambda run: memory.device_bytes(run.state.params)
  whole, eighth = (
    planner.outline(configured(**{"parallel.devices": 8, "parallel.fsdp": size}), LENGTHS)
    for size in (1, 8)
  )
  norms = 4 * (2 * 7 + 1) * 128
  assert held(eighth) == (held(whole) - norms) // 8 + norms
  assert (
    memory.device_bytes(eighth.state.opt_state) < memory.device_bytes(whole.state.opt_state) // 7
  )


@pytest.mark.parametrize(
  ("changes", "share"),
  [
    ({"reference.param_dtype": "bfloat16"}, 2),
    ({"reference.store": "somewhere"}, 0),
    ({"loss.name": "simpo"}, 0),
  ],
)
def test_what_the_reference_takes(changes, share):
  run = planner.outline(configured(**changes), LENGTHS)
  count = memory.device_bytes(run.state.params) // 4
  assert (memory.device_bytes(run.reference) if run.reference else 0) == share * count
  assert (run.batch.reference_NL is not None) == ("reference.store" in changes)


def test_a_reference_that_follows_is_part_of_the_state():
  run = planner.outline(configured(**{"reference.sync_every": 4}), LENGTHS)
  assert run.reference is None
  assert memory.device_bytes(run.state.reference) == memory.device_bytes(run.state.params)


def test_an_average_takes_a_mean_and_the_policy_it_began_with():
  settings = {"reference.sync_every": 4, "reference.bema": True}
  run = planner.outline(configured(**settings), LENGTHS)
  params = memory.device_bytes(run.state.params)
  assert memory.device_bytes(run.reference) == params
  assert memory.device_bytes(run.state.reference) == 2 * params


def test_adapters_are_trained_and_their_base_is_the_reference(base):
  changes = {"model.path": str(base), "lora.rank": 4, "model.scratch": {}}
  run = planner.outline(configured(**changes), LENGTHS)
  assert memory.device_bytes(run.reference) == memory.device_bytes(run.policy)
  # a and b of every map: rank times its inputs and outputs.
  maps = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 768), (256, 768), (768, 256)]
  assert memory.device_bytes(run.state.params) == 4 * 4 * 4 * sum(a + b for a, b in maps)


def test_pmap_holds_what_a_mesh_of_copies_does():
  mesh, pmap = (
    planner.outline(configured(**{"parallel.mode": mode, "parallel.devices": 2}), LENGTHS)
    for mode in ("mesh", "pmap")
  )
  assert planner.held_bytes(pmap) == planner.held_bytes(mesh)
  assert pmap.trained == mesh.trained and pmap.flops == mesh.flops


def test_what_may_be_changed_is_what_is_not_so_already():
  named = [name for name, _ in planner.changes(configured(), 1)]
  assert named == [
    "--config.model.remat=full",
    "--config.train.accumulate=2",
    "--config.reference.param_dtype=bfloat16",
    "--config.reference.store=DIR",
    "--config.parallel.offload_optimizer=True",
    "--config.model.param_dtype=bfloat16 --config.reference.param_dtype=bfloat16",
  ]
  less = configured(**{"model.remat": "full", "reference.store": "x", "train.batch_size": 7})
  assert [name for name, _ in planner.changes(less, 1)] == [
    "--config.parallel.offload_optimizer=True",
    "--config.model.param_dtype=bfloat16 --config.reference.param_dtype=bfloat16",
  ]


def test_bfloat16_weights_are_not_advised_without_a_word():
  remarks = {name: planner.remark(name) for name, _ in planner.changes(configured(), 1)}
  (said,) = filter(None, remarks.values())
  assert "rounded stochastically to bfloat16" in said and said.startswith(" ")
  assert remarks["--config.reference.param_dtype=bfloat16"] == ""  # the reference is never updated


def test_the_command_says_whose_compiler_it_asked():
  command = [sys.executable, "scripts/plan.py", "--config=configs/benchmark.py:a"]
  more = ["--mean_length=60", "--device_memory=9"]
  done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
  assert "\non the device:\n" in done.stdout
  assert done.stdout.endswith(
    "fits a device of 9 GiB, by the compiler for CPUs; --topology asks that of an accelerator\n"
  )


def test_the_command_prints_one_object():
  command = [sys.executable, "scripts/plan.py", "--config=configs/benchmark.py:a", "--json"]
  more = ["--devices=4", "--config.parallel.fsdp=4", "--mean_length=60", "--device_memory=1"]
  done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
  found = json.loads(done.stdout)
  assert found["devices"] == 4 and found["fits"] is True
  assert found["bytes_per_device"]["total"] < 2**30


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="measured by Linux")
@pytest.mark.parametrize(
  ("config", "devices", "changes"),
  [
    # Two pairs: parameters, gradient and moments take nearly all, of eight pairs, too.
    ("configs/benchmark.py:b", 1, ["train.batch_size=2"]),
    ("configs/benchmark.py:b", 2, ["train.batch_size=2", "parallel.fsdp=2"]),
    ("configs/preferences.py:model={base}", 1, [*LORA, "train.batch_size=8"]),
  ],
)
def test_a_step_takes_what_was_planned(base, config, devices, changes):
  """To 15 in 100 of the most that the process holds beside what it held before."""
  given = [config.format(base=base), "250", str(devices), *changes]
  done = subprocess.run(
    [sys.executable, "tests/tools/measured_step.py", *given],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["planned"] == pytest.approx(found["measured"], rel=0.15)
