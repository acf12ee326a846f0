"""Eight CPU devices for every test, and the paths of material that may be absent."""

import pathlib

import jax
import pytest

from tests.support.paths import ROOT

pytest_plugins = ["tests.support.small_rows"]

jax.config.update("jax_num_cpu_devices", 8)

SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real preferences, tokenizers and models beside the project, where they exist."""
  if not SHARED_DATA.is_dir():
    pytest.skip("../shared/data is not beside this checkout")
  return SHARED_DATA
