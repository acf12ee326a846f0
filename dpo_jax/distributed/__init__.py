"""Devices and processes: shardings, the executor, memory, heartbeat, preemption."""
