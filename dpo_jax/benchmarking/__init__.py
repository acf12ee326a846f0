"""Time, FLOPs and memory of the training step, measured or planned.

`timing` measures a step and generation, `flops` counts what they need, and `planner` estimates
memory from shapes alone; `scaling` varies one quantity. `comparison` runs the programs of `suites`
by the rules of `interleaved`, block by block in the protocol of `pacing`.
"""
