"""Held-out evaluation: preference metrics with confidence intervals, samples along a run."""
