"""Training: set-up, data, loop, evaluator, optimizer, checkpoints, the reference's cache."""
