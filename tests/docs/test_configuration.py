"""docs/configuration.md has every field of a run, with the default that the code has."""

import importlib.util

from tests.support.paths import ROOT


def test_the_page_is_what_defaults_py_says():
  path = ROOT / "scripts" / "maintenance" / "configuration_page.py"
  spec = importlib.util.spec_from_file_location("configuration_page", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run python {path}"
