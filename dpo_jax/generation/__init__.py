"""Sampling from a model: the sampler, its decoding loop, rollouts, rewards."""
