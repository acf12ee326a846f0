"""Targets: what is known of them, what is refused, and what a plan for one says."""

import importlib.util
import json

import jax
import pytest

from dpo_jax.benchmarking import planner, target_plan, targets
from dpo_jax.structs import UserError
from tests.support import in_process
from tests.support.paths import ROOT
from tests.support.small_plan import configured
from tests.support.small_program import PROGRAM

GIB = 2**30


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v9e:2x2", "known: v5e:1x1, v5e:2x2"),
    ("cpu", "known: .*v5p:2x2x2.*h100:8"),
    ("v5e", "write it as v5e:1x1"),
    ("v5e:4", "write it as v5e:1x1"),
    ("v5e-16", "the shape of the slice; write it as v5e:1x1, .*v5e:4x4"),
    ("v5e:0x2", "write it as v5e:1x1"),
    ("h100:2x2", "the number of GPUs; write it as h100:1, h100:2, h100:8"),
    ("h100:-8", "write it as h100:1"),
  ],
)
def test_an_unknown_target_lists_the_known(name, words):
  with pytest.raises(UserError, match=f"--topology={name} .*{words}"):
    targets.find(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "aot-tpu"), ("h100:8", "aot-cuda")])
def test_a_compiler_that_is_not_there_names_its_extra(name, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=rf'pip install "\.\[{extra}\]"'):
    targets.find(name)
  assert f"\n{extra} = " in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_says_so_in_one_line(monkeypatch, tmp_path):
  ended = in_process.run("dpo-jax plan --config=benchmark:a --topology=v7x:2x2", tmp_path)
  assert ended.status == 1 and ended.stdout == ""
  assert ended.stderr.startswith("error: --topology=v7x:2x2 is not known; known: v5e:1x1")
  assert ended.stderr.count("\n") == 1
  monkeypatch.setattr(targets, "find", cpus)
  line = "dpo-jax plan --config=benchmark:a --topology=v5e:2x2 --devices=8"
  assert "--devices=8, but --topology=v5e:2x2 has 4" in in_process.run(line, tmp_path).stderr


def cpus(name="v5e:2x2"):
  """A target whose devices are four of JAX's CPU devices, which every machine can compile for."""
  return targets.Target(name, "v5e", targets.CHIPS["v5e"], jax.devices()[:4])


@pytest.mark.parametrize(
  ("message", "needs"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
      " (596.05G) exceeds available HBM (15.75G).",
      596.05 * GIB,
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm."
      " Used 16.71G of 15.75G hbm. Exceeded hbm capacity by 986.40M.",
      16.71 * GIB,
    ),
    ("Ran out of memory in memory space hbm. Used 512.5M of 100.00M hbm.", 512.5 * 2**20),
    ("INTERNAL: Mosaic failed to compile TPU kernel: Invalid vector type for load", None),
  ],
)
def test_what_a_compiler_says_of_a_program_that_is_too_large(message, needs):
  assert target_plan._needed(message) == (None if needs is None else int(needs))


KEYS = {
  "fits",
  "held_bytes",
  "temporary_bytes",
  "peak_bytes",
  "products_done",
  "products_needed",
  "utilization_by_products",
  "utilization_by_cycles",
  "attention",
  "collectives",
  "compile_seconds",
}


class Compiled:
  """What a compiler gives back, without one."""

  argument_size_in_bytes, peak_memory_in_bytes = 5 * GIB, 9 * GIB

  def memory_analysis(self):
    return self

  def as_text(self):
    return PROGRAM


class Lowered:
  """A program that compiles to `Compiled`, or does not for want of memory."""

  def __init__(self, error=""):
    self.error = error

  def compile(self):
    if self.error:
      raise jax.errors.JaxRuntimeError(self.error)
    return Compiled()


ONE = {"devices": 1, "topology": "v5e:1x1"}
CONFIG = {"parallel.devices": 0, "parallel.fsdp": 4, "model.compute_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def outline():
  return planner.outline(configured(**CONFIG), planner.Lengths(60), cpus().devices)


@pytest.fixture
def planned(outline, monkeypatch):
  """Plans one run with a compiler that gives one program, or an error."""

  def plan(error="", **given):
    monkeypatch.setattr(planner, "outline", lambda *given: outline)
    monkeypatch.setattr(planner.Outline, "lower", lambda self: Lowered(error))
    return target_plan.plan(configured(**CONFIG), planner.Lengths(60), cpus(), **given)

  return plan


def test_a_plan_has_its_keys_and_figures(planned):
  found = planned()
  assert found.keys() >= KEYS
  # Nine of 15.75 GiB, five of them arguments.
  assert found["fits"] and found["peak_bytes"] == 9 * GIB and found["temporary_bytes"] == 4 * GIB
  assert found["held_bytes"] == sum(found["held"].values())
  # Of one device: 3 x 1,024 in a loop and 1,024 beside it, on each of four devices.
  assert found["products_done"] == 4 * 4096
  assert found["utilization_by_products"] == pytest.approx(found["products_needed"] / 4 / 4096)
  assert found["utilization_by_roofline"] is None
  assert json.loads(json.dumps(found)) == found
  assert not planned(limit=8 * GIB)["fits"]
  lines = "\n".join(target_plan.show(found))
  assert "fits in 15.75 GiB" in lines and "4 devices of v5e:2x2" in lines
  assert "all-reduce" in lines and "layers.py:75" in lines
  assert "on the device of v5e:1x1:" in target_plan.show(found | ONE)


def test_a_step_that_does_not_fit_is_an_answer_and_not_an_error(planned):
  found = planned("RESOURCE_EXHAUSTED: Used 16.50G of 15.75G hbm.")
  assert found.keys() >= KEYS
  assert not found["fits"] and found["peak_bytes"] == 16.5 * GIB
  assert found["products_done"] is None and found["utilization_by_cycles"] is None
  assert found["temporary_bytes"] == found["peak_bytes"] - found["held_bytes"]
  assert "does not fit in 15.75 GiB" in "\n".join(target_plan.show(found))
  with pytest.raises(
    UserError, match="the compiler for v5e:2x2 refuses the step: INTERNAL: Mosaic"
  ):
    planned("INTERNAL: Mosaic failed\nto compile")


def test_devices_of_the_configuration_are_those_of_the_target():
  with pytest.raises(UserError, match=r"parallel\.devices is 8, but --topology=v5e:2x2 has 4"):
    target_plan.plan(configured(**{"parallel.devices": 8}), planner.Lengths(60), cpus())


def test_lengths_are_those_of_the_configuration_unless_they_are_given():
  config = configured()
  own = config.synthetic
  assert planner.lengths_of(config) == (own.mean_length, own.prompt_fraction, own.sigma)
  assert planner.lengths_of(config, mean=90, sigma=0.0) == (90, own.prompt_fraction, 0.0)
  with config.unlocked():
    del config.synthetic
  assert planner.lengths_of(config) == (250, 0.5, 0.5)
