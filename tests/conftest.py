"""Eight CPU devices for every test, programs compiled once, and material that may be absent."""

import os
import pathlib
import shutil
import signal

import jax
import pytest

from dpo_jax.utils import cli
from tests.support.paths import ROOT

# Most of the suite's time would be compilation, of programs that run for a moment. So XLA's
# compiler for CPUs optimizes as little as it can: a program compiles in a seventh of the time, and
# runs at half the speed. Commands that tests start inherit this; flags of the caller win.
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "")
QUICK = {  # the value here, and XLA's own
  "xla_backend_optimization_level": (0, 3),
  "xla_llvm_disable_expensive_passes": (True, False),
  "xla_cpu_use_fusion_emitters": (False, True),
  "xla_cpu_parallel_codegen_split_count": (1, 32),
}
FLAGS = [f"--{name}={str(quick).lower()}" for name, (quick, _) in QUICK.items()]
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, GIVEN_FLAGS))

pytest_plugins = ["tests.support.small_rows"]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a twentieth of the time of a program

SHARED_DATA = ROOT.parent / "shared" / "data"
MOST_PROGRAMS = 10_000  # kept between sessions; one session has about 3,000, of 20 kB each


def pytest_configure(config):
  """Removes the oldest of too many programs, before a worker reads them."""
  kept = kept_programs(config)
  if kept is not None and not hasattr(config, "workerinput"):
    newest_first = sorted(kept.iterdir(), key=lambda path: -path.stat().st_mtime)
    for path in newest_first[MOST_PROGRAMS:]:
      path.unlink()


def kept_programs(config) -> pathlib.Path | None:
  """The folder of programs of earlier sessions, or None where pytest keeps no cache."""
  cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
  # A program compiled for one processor need not run on another that mounts the same folder.
  return None if cache is None else cache.mkdir(f"programs-{cli._processor()}")


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory, pytestconfig):
  """Yields a folder of compiled programs, shared by this worker and the commands that it runs.

  A worker compiles a program once. Where pytest keeps a cache, the next session has the programs
  of all workers, and `--cache-clear` starts anew. The key of a program is the program itself, so a
  change of the code compiles anew whatever it changes. Warnings come from tracing and lowering,
  which happen every time.
  """
  # Every worker has a folder of its own: JAX writes a program in place, and another worker that
  # reads it at that moment would find half of it.
  own, kept = tmp_path_factory.mktemp("programs"), kept_programs(pytestconfig)
  if kept is not None:
    copy_programs(kept, own)
  settings = {
    "jax_compilation_cache_dir": str(own),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    # These are caches for GPUs, and the folder's name would become a part of every key.
    "jax_persistent_cache_enable_xla_caches": "none",
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    yield own
  if kept is not None:
    copy_programs(own, kept)


def copy_programs(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the programs that `target` lacks, each of them whole from the moment it is there."""
  for path in source.glob("*-cache"):
    if not (target / path.name).exists():
      part = target / f"{path.name}.{os.getpid()}"
      shutil.copy2(path, part)
      part.replace(target / path.name)


@pytest.fixture
def ctrl_c():
  """Gives programs that a test starts a Ctrl-C that arrives: in a background job it is ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real preferences, tokenizers and models beside the project, where they exist."""
  if not SHARED_DATA.is_dir():
    pytest.skip("../shared/data is not beside this checkout")
  return SHARED_DATA


@pytest.fixture
def optimized(monkeypatch):
  """Lets XLA optimize as it does for users: for tests that compute for longer than they compile."""
  from jax._src import compiler  # options of a program, which jax.jit takes from its caller alone

  get_compile_options = compiler.get_compile_options

  def with_xlas_own(*args, env_options_overrides=None, **given):
    own = {name: own for name, (_, own) in QUICK.items() if name not in GIVEN_FLAGS}
    overrides = own | (env_options_overrides or {})
    return get_compile_options(*args, env_options_overrides=overrides, **given)

  monkeypatch.setattr(compiler, "get_compile_options", with_xlas_own)
  monkeypatch.setenv("XLA_FLAGS", GIVEN_FLAGS)  # of commands


@pytest.fixture(scope="module")
def one_picture():
  """Lets the runs of a module draw one picture each."""
  from tests.support import one_picture as support  # loads all that trains

  with support.one_picture():
    yield
