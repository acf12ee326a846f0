"""Measuring and planning: times and FLOPs of a step, plans, scaling, runs that take turns."""
