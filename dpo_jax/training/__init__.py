"""Training of a policy: from a configuration to checkpoints and metrics.

`setup` turns a configuration into a `run`, with the data of `datasets` (files) or `on_policy`
(samples), an `optimizer` and perhaps a `reference_cache`. `loop` takes the steps. It checks the
first one by `sanity`, and uses `evaluator`, `metrics_writer` and `checkpoint`.
"""
