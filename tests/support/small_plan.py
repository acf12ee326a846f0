"""A small run to plan."""

import runpy

from tests.support.paths import ROOT


def configured(**changes):
  """The benchmark's shape a, untied: 1.5M parameters."""
  config = runpy.run_path(str(ROOT / "configs" / "benchmark.py"))["get_config"]("a")
  with config.unlocked():
    config.parallel.devices = 1
    config.update_from_flattened_dict(changes)
  return config
