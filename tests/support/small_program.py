"""An optimised program as XLA prints it, short enough to count by hand."""

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
