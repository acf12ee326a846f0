"""What is read off an optimised program, counted by hand on a short one."""

import pytest

from dpo_jax.benchmarking import hlo, hlo_costs

# A loop of 3 turns around a product, a loop in steps of 2 up to 6, and one whose end is data.
# ruff: noqa: E501 (an instruction is one line)
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/jax/_src/lax.py"
2 "/somewhere/dpo_jax/model/layers.py"

FunctionNames
1 "apply"

FileLocations
1 {file_name_id=2 function_name_id=1 line=75 end_line=75 column=3 end_column=9}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=3 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (p0: bf16[4,8], p1: bf16[8,16]) -> f32[4,16] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[8,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body.known (carried: (s32[], bf16[4,8], bf16[8,16])) -> (s32[], bf16[4,8], bf16[8,16]) {
  %carried = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %a = bf16[4,8]{1,0} get-tuple-element(%carried), index=1
  %b = bf16[8,16]{1,0} get-tuple-element(%carried), index=2
  %product = f32[4,16]{1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/dot" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %kernel = (bf16[2,4,256,64]{3,2,1,0}, f32[2,4,256,128]{3,2,1,0}) custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1]{1,0}, bf16[2,4,256,64]{3,2,1,0}, bf16[2,2,512,64]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash" stack_frame_id=1}
  %n = s32[] get-tuple-element(%carried), index=0
  ROOT %next = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%n, %a, %b)
}

%splash_body (carried: (s32[], s32[])) -> (s32[], s32[]) {
  %carried = (s32[], s32[]) parameter(0)
  %n = s32[] get-tuple-element(%carried), index=0
  %one = s32[] constant(1)
  %more = s32[] add(%n, %one)
  %even.more = s32[] add(%more, %one)
  %end = s32[] get-tuple-element(%carried), index=1
  %x = f32[8]{0} all-reduce(%end), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %next = (s32[], s32[]) tuple(%even.more, %end)
}

%below (carried: (s32[], s32[])) -> pred[] {
  %carried = (s32[], s32[]) parameter(0)
  %n = s32[] get-tuple-element(%carried), index=0
  %end = s32[] get-tuple-element(%carried), index=1
  ROOT %lt = pred[] compare(%n, %end), direction=LT
}

%always (carried: (s32[], bf16[4,8], bf16[8,16])) -> pred[] {
  %carried = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%start (p: bf16[2,8]) -> (bf16[2,8], bf16[4,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %gather = bf16[4,8]{1,0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %begun = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[2,8]) -> bf16[4,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %gather = bf16[4,8]{1,0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}
}

%done (p: bf16[2,8]) -> bf16[4,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %gather = bf16[4,8]{1,0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %ended = bf16[4,8]{1,0} custom-call(%gather), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,8], y: bf16[8,16], z: bf16[2,8], e: s32[]) -> f32[4,16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[8,16]{1,0} parameter(1)
  %z = bf16[2,8]{1,0} parameter(2)
  %e = s32[] parameter(3)
  %zero = s32[] constant(0)
  %six = s32[] constant(6)
  %first = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%zero, %x, %y)
  %loop.1 = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) while(%first), condition=%always, body=%body.known, backend_config={"known_trip_count":{"n":"3"}}
  %second = (s32[], s32[]) tuple(%zero, %six)
  %loop.2 = (s32[], s32[]) while(%second), condition=%below, body=%splash_body
  %third = (s32[], s32[]) tuple(%zero, %e)
  %loop.3 = (s32[], s32[]) while(%third), condition=%below, body=%splash_body, metadata={op_name="jit(step)/while" stack_frame_id=1}
  %begin = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) fusion(%z), kind=kCustom, calls=%start
  %between = bf16[4,8]{1,0} fusion(%z), kind=kCustom, calls=%async_collective_fusion.1
  %end = bf16[4,8]{1,0} fusion(%z), kind=kCustom, calls=%done
  %exchanged = ((bf16[4,8]{1,0}), (bf16[2,8]{1,0})) reduce-scatter-start(%end), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}
  %wide = f32[8,100]{1,0:T(8,128)} convolution(%x, %y), dim_labels=bf_io->bf
  ROOT %answer = (f32[4,16]{1,0}) tuple(%wide)
}
"""


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
