"""Time, FLOPs and memory of the training step, measured or planned.

`timing` measures a step and generation, `flops` counts what they need, and `planner` estimates
memory from shapes alone. `target_plan` asks the compilers of accelerators that are not here
(`targets`) for the same, and reads what their programs do (`hlo`, `hlo_costs`); `target_suites`
makes tables of it. `scaling` varies one quantity. `comparison` runs the programs of `suites` by the
rules of `interleaved`, block by block in the protocol of `pacing`.
"""
