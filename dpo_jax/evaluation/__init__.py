"""Evaluation: preference metrics with 95% intervals, and measures of samples.

`evaluate` measures a trained model, `sample_probe` a policy while it trains; `estimates` has the
intervals and the reward-KL frontier.
"""
