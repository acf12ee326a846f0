"""Devices and processes of a run.

`executor` places arrays by the rules of `sharding` and compiles the step; `gather` brings arrays
back to the host; `memory` counts their bytes. `processes` connects processes, `heartbeat` ends them
together, `preemption` stops them in time, `local_launcher` starts several on one machine.
"""
