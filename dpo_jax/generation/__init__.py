"""Sampling from a model: the sampler and its programs, stopping rules, rollouts, rewards."""
