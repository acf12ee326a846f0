"""What is read off an optimised program, counted by hand on a short one."""

import pytest

from dpo_jax.benchmarking import hlo, hlo_costs
from tests.support.small_program import PROGRAM


@pytest.fixture(scope="module")
def program():
  return hlo.parse(PROGRAM)


def test_turns_of_loops_are_multiplied_out(program):
  runs = hlo.count_runs(program, turns=2.5)
  # As annotated; from 0 to 6 in steps of 1 + 1; and the mean that the caller knows.
  assert runs.times["body.known"] == runs.times["fused"] == 3
  assert runs.times["splash_body"] == 3 + 2.5
  assert [loop.name for loop in runs.unknown] == ["loop.3"]
  assert program.source(runs.unknown[0]) == "layers.py:75"
  # Its own frame is in JAX, and the one around that in this package.
  assert program.source(program.table("body.known")["product"]) == "layers.py:75"
  assert "fused" in runs.fused and "body.known" not in runs.fused


def test_products_count_by_the_types_of_their_inputs(program):
  runs = hlo.count_runs(program)
  # Three times 2 · 4 · 8 · 16; the convolution has 4 rows of 8 numbers and 16 columns.
  assert hlo_costs.products(program, runs) == {"bf16": 3 * 2 * 4 * 8 * 16 + 2 * 4 * 8 * 16}


def test_a_batch_of_products_is_a_convolution_with_padding_around_its_window(program):
  # Three products of [4, 8] by [8, 16], as a TPU's compiler writes them.
  window = "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0oi->0bf"
  left = hlo.Instruction("l", "bf16[3,4,8]", "parameter", "(0)", False)
  right = hlo.Instruction("r", "bf16[3,16,8]", "parameter", "(1)", False)
  one = hlo.Instruction("c", "f32[3,4,16]", "convolution", f"(%l, %r), {window}", False)
  assert hlo_costs.product_flops(one, {"l": left, "r": right}) == 3 * 2 * 4 * 8 * 16


def test_collectives_count_once_with_the_bytes_that_a_device_sends(program):
  runs = hlo.count_runs(program, turns=0)
  assert hlo_costs.summary(hlo_costs.collectives(program, runs, 4)) == {
    # f32[8] in three turns; a ring of four sends 2 · 3 / 4 of it.
    "all-reduce": {"runs": 3, "bytes": 3 * 32, "sent_bytes": 3 * 48},
    # One gather of bf16[4,8], of which a device has half, although three computations name it.
    "all-gather": {"runs": 1, "bytes": 64, "sent_bytes": 32},
    # bf16[2,8] is what each of two devices keeps.
    "reduce-scatter": {"runs": 1, "bytes": 32, "sent_bytes": 32},
  }


def test_kernels_of_attention_have_no_cycles_but_shapes():
  named = hlo.parse(PROGRAM.replace("%kernel =", "%splash_mha_dkv.7 ="))
  runs = hlo.count_runs(named)
  assert hlo_costs.estimated_cycles(named, runs) == 3 * 100
  (kernel,) = hlo_costs.attention_kernels(named, runs)
  assert (kernel.runs, kernel.products, kernel.queries, kernel.keys) == (3, 4, 256, 512)
  assert kernel.rows == 2 * 4 and kernel.head == 64
  half = lambda queries, keys: 0.5
  assert kernel.flops(half) == 3 * 4 * 2 * 8 * 256 * 512 / 2 * 64
  assert kernel.flops(half, lanes=128) == 2 * kernel.flops(half)


def test_the_largest_arrays_have_their_padding_and_their_line(program):
  first, second, *_ = hlo_costs.largest_arrays(program, hlo.count_runs(program))
  assert (first.shape, first.bytes, first.source) == (
    "f32[2,4,256,128]",
    2 * 4 * 256 * 128 * 4,
    "layers.py:75",
  )
  assert (second.shape, second.bytes) == ("bf16[2,4,256,64]", 2 * 4 * 256 * 64 * 2)
  # f32[4,16] is padded to one tile of 8 x 128.
  (tiled,) = hlo.shapes_in("f32[4,16]{1,0:T(8,128)}")
  assert tiled.padded_bytes == 4 * 8 * 128 and tiled.bytes == 4 * 4 * 16
  assert not hlo.shapes_in("f32[4,16]{1,0:T(8,128)S(1)}")[0].in_main_memory


def test_a_roofline_takes_the_larger_of_bytes_and_flops(program):
  text = PROGRAM[: PROGRAM.index("ENTRY")].replace("bf16[2,8]", "bf16[2,8]")
  entry = (
    "ENTRY %main (x: bf16[4,8], y: bf16[8,16]) -> f32[4,16] {\n"
    "  %x = bf16[4,8]{1,0} parameter(0)\n"
    "  %y = bf16[8,16]{1,0} parameter(1)\n"
    "  ROOT %f = f32[4,16]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused\n"
    "}\n"
  )
  one = hlo.parse(text + entry)
  runs = hlo.count_runs(one)
  moved, flops = 4 * 8 * 2 + 8 * 16 * 2 + 4 * 16 * 4, 2 * 4 * 8 * 16
  assert hlo_costs.roofline(one, runs, flops=1e9, bandwidth=1.0) == moved
  assert hlo_costs.roofline(one, runs, flops=1.0, bandwidth=1e9) == flops


def test_a_kernel_that_reads_a_slice_moves_the_slice_alone():
  text = """HloModule jit_step

%sliced (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,8}
}

ENTRY %main (x: f32[100,8], i: s32[]) -> f32[1,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
}
"""
  one = hlo.parse(text)
  # A row of 32 bytes is read and written; the index has 4.
  moved = hlo_costs.roofline(one, hlo.count_runs(one), flops=1.0, bandwidth=1.0)
  assert moved == 32 + 32 + 4
