"""The house: imports point down, and each floor stays free of what it should not know."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests.support.paths import ROOT

# Packages from the ground up, and what each may import besides itself. A package has one floor; of
# `distributed`, `sharding` has its own, since the mathematics and the models name axes by it and
# know nothing else of devices.
FLOORS = {
  "structs": set(),
  "utils": {"structs"},
  "distributed.sharding": {"structs"},
  "derivation": {"structs"},
  "losses": {"structs", "utils"},
  "metrics": {"structs"},
  "head": {"structs", "utils"},
  "logprobs": {"structs", "utils", "distributed.sharding", "head"},
  "step": {"structs", "utils", "losses", "metrics", "logprobs"},
  "model": {"structs", "utils", "distributed.sharding"},
  "data": {"structs", "utils"},
  "controlled": {"structs"},
  "distributed": {"structs", "utils", "distributed.sharding"},
  "hf": {"structs", "utils", "model", "distributed"},
  "monitoring": {"structs", "utils"},
  "generation": {"structs", "utils", "logprobs", "model", "data", "controlled", "hf"},
  "evaluation": {
    "structs",
    "utils",
    "losses",
    "metrics",
    "logprobs",
    "model",
    "data",
    "generation",
  },
  "defaults": {"structs", "utils", "losses"},
  "training": {
    "structs",
    "utils",
    "losses",
    "metrics",
    "logprobs",
    "step",
    "model",
    "data",
    "distributed",
    "hf",
    "monitoring",
    "generation",
    "evaluation",
  },
  "experiments": {
    "structs",
    "utils",
    "losses",
    "logprobs",
    "step",
    "data",
    "monitoring",
    "generation",
    "evaluation",
    "training",
  },
  "benchmarking": {
    "structs",
    "utils",
    "losses",
    "logprobs",
    "step",
    "model",
    "data",
    "controlled",
    "distributed",
    "hf",
    "generation",
    "defaults",
    "training",
  },
  "configure": {"structs", "utils", "losses", "defaults"},
  "train": {
    "structs",
    "utils",
    "defaults",
    "distributed",
    "hf",
    "monitoring",
    "training",
  },
  "api": {"structs", "utils", "monitoring", "distributed", "configure", "train"},
  "commands": {
    "structs",
    "utils",
    "configure",
    "model",
    "data",
    "controlled",
    "distributed",
    "hf",
    "monitoring",
    "generation",
    "evaluation",
    "training",
    "experiments",
    "benchmarking",
  },
  "__main__": {"commands"},
}
# Libraries that a package must not know, or a module whose rule is another than its package's.
PLAIN = {"flax", "optax", "ml_collections", "orbax", "absl"}
NO_FLAGS = {"ml_collections", "absl", "torch"}
FORBIDDEN = {
  "structs": PLAIN,
  "utils": PLAIN,
  "utils.cli": {"flax", "optax", "orbax", "torch"},  # flags are what it is for
  "utils.config_flags": {"flax", "optax", "orbax", "torch"},
  "distributed.sharding": PLAIN,
  "distributed.local_launcher": PLAIN,
  "benchmarking.pacing": PLAIN,
  "derivation": PLAIN | {"grain", "transformers"},
  "losses": PLAIN | {"grain", "transformers"},
  "metrics": PLAIN | {"grain", "transformers"},
  "logprobs": PLAIN | {"grain", "transformers"},
  "model": NO_FLAGS | {"optax"},
  "hf": NO_FLAGS | {"optax"},
  "data": NO_FLAGS | {"jax", "flax", "optax"},
  "controlled": NO_FLAGS | {"jax", "flax", "optax"},
  "step": NO_FLAGS,
  "distributed": NO_FLAGS,
  "monitoring": NO_FLAGS,
  "generation": NO_FLAGS,
  "evaluation": NO_FLAGS,
  "experiments": NO_FLAGS,
  "benchmarking.flops": NO_FLAGS,
  "benchmarking.interleaved": NO_FLAGS,
  "benchmarking.timing": NO_FLAGS,
  "training": NO_FLAGS,
  "training.setup": {"absl", "torch"},  # config stops at this door: it reads a ConfigDict
  "commands": {"torch"},
}


# Configuration stops at these doors: no other module knows a `ConfigDict`.
DOORS = {
  "defaults",
  "train",
  "configure",
  "api",
  "commands",
  "training.setup",
  "benchmarking.planner",
  "benchmarking.scaling",
  "benchmarking.target_plan",
  "benchmarking.target_suites",
}


def modules() -> list[pathlib.Path]:
  return sorted(p for p in (ROOT / "dpo_jax").rglob("*.py") if p.name != "__init__.py")


def nearest(name: str, known: Iterable[str]) -> str | None:
  """The longest of the known names that is `name` or a package around it."""
  around = [one for one in known if name == one or name.startswith(one + ".")]
  return max(around, key=len, default=None)


def floor_of(name: str) -> str:
  """Floor of `dpo_jax.<name>`."""
  floor = nearest(name, FLOORS)
  assert floor is not None, f"{name} is on no floor: give it one, in FLOORS"
  return floor


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports anywhere, in functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: imports are absolute"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def own(names: set[str]) -> set[str]:
  """The parts of dpo_jax among imported names: `data.chat`, `step`."""
  inside = {n.removeprefix("dpo_jax.") for n in names if n.startswith("dpo_jax.")}
  files = {".".join(p.relative_to(ROOT / "dpo_jax").with_suffix("").parts) for p in modules()}
  longest = lambda name: max(
    (f for f in files if name == f or name.startswith(f + ".")), key=len, default=name
  )
  return {longest(name) for name in inside}


def name_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT / "dpo_jax").with_suffix("").parts)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_down(path):
  name = name_of(path)
  floor = floor_of(name)
  allowed = FLOORS[floor] | {floor}
  for other in own(imports(path)) - {"__version__"}:
    assert floor_of(other) in allowed, f"{name} ({floor}) imports {other} ({floor_of(other)})"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_each_floor_is_free_of_what_it_should_not_know(path):
  name = name_of(path)
  known = {library.split(".")[0] for library in imports(path)}
  assert not known & FORBIDDEN.get(nearest(name, FORBIDDEN), set())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_configuration_stops_at_the_doors(path):
  if nearest(name_of(path), DOORS) is None:
    assert "ml_collections" not in {library.split(".")[0] for library in imports(path)}
    assert "ConfigDict" not in path.read_text(encoding="utf-8")


def test_no_module_imports_itself_by_a_detour():
  graph = {name_of(path): own(imports(path)) - {name_of(path)} for path in modules()}
  while graph:
    leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
    assert leaves, f"these import each other: {sorted(graph)}"
    graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_configurations_know_only_their_defaults():
  for path in (ROOT / "configs").glob("*.py"):
    assert own(imports(path)) <= {"defaults", "structs", "losses"}, path.name


def test_every_floor_is_below_the_ones_above_it():
  order = list(FLOORS)
  for floor, below in FLOORS.items():
    assert all(order.index(other) < order.index(floor) for other in below)


def test_no_module_hides_a_library_when_run_as_a_file():
  names = {path.stem for path in modules()} | {p.stem for p in (ROOT / "scripts").rglob("*.py")}
  assert not names & set(sys.stdlib_module_names)
  assert not names & {"jax", "flax", "optax", "grain", "numpy", "tokenizers", "safetensors"}


def test_peers_without_jax_can_take_turns():
  """What scripts/benchmarks/peers/ imports of the package: the standard library alone."""
  for name in (
    "__init__",
    "utils/__init__",
    "utils/malloc",
    "benchmarking/__init__",
    "benchmarking/pacing",
  ):
    at_import = ast.parse((ROOT / "dpo_jax" / f"{name}.py").read_text(encoding="utf-8")).body
    nodes = [node for node in at_import if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [
      node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes
    ]
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_commands_answer_before_they_load_anything_heavy():
  show = (
    "import sys; from dpo_jax.utils import cli; print('jax' in sys.modules, 'numpy' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["False", "False"]
