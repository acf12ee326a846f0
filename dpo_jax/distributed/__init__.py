"""Devices and processes: shardings, the executor that compiles a step, memory, preemption."""
