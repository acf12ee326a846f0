"""The house: imports point down, and each floor stays free of what it should not know."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Floors from the ground up. A module may import its own floor and what is named as below it.
FLOORS = {
  "structs": ({"structs", "folders", "partition", "products", "heap", "lockstep", "local"}, set()),
  "mathematics": ({"derivation", "losses", "logprobs", "metrics"}, {"structs"}),
  "model": ({"model"}, {"structs"}),
  "data": ({"data"}, {"structs"}),
  "machinery": (
    {
      "step",
      "decoding",
      "sampling",
      "optim",
      "parallel",
      "checkpoint",
      "alerts",
      "loggers",
      "plots",
      "report",
      "workdirs",
      "memory",
      "preemption",
      "processes",
      "arithmetic",
      "contest",
    },
    {"structs", "mathematics", "model", "data"},
  ),
  "measures": (
    {
      "rewards",
      "draws",
      "measures",
      "evaluate",
      "on_policy",
      "probes",
      "reference",
      "frontier",
      "worlds",
    },
    {"structs", "mathematics", "model", "data", "machinery"},
  ),
  "build": (
    {"build", "feeds"},
    {"structs", "mathematics", "model", "data", "machinery", "measures"},
  ),
  "door": ({"cli", "defaults"}, {"structs", "mathematics"}),
  "commands": (
    {"train", "benchmark", "plan", "growth"},
    {"structs", "mathematics", "model", "data", "machinery", "measures", "build", "door"},
  ),
}
# Libraries that a floor must not know.
FORBIDDEN = {
  "structs": {"flax", "optax", "ml_collections", "orbax", "absl"},
  "mathematics": {"flax", "optax", "ml_collections", "orbax", "absl", "grain", "transformers"},
  "model": {"optax", "ml_collections", "absl", "torch"},
  "data": {"jax", "flax", "optax", "ml_collections", "absl", "torch"},
  "machinery": {"ml_collections", "absl", "torch"},
  "measures": {"ml_collections", "absl", "torch"},
}


def modules() -> list[pathlib.Path]:
  return sorted(p for p in (ROOT / "dpo_jax").rglob("*.py") if p.name != "__init__.py")


def floor_of(name: str) -> str:
  """Floor of `dpo_jax.<name>`; packages are one floor."""
  (floor,) = [floor for floor, (held, _) in FLOORS.items() if name.split(".")[0] in held]
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
  floor = floor_of(name)  # a module that is on no floor fails here: give it one, above
  allowed = FLOORS[floor][1] | {floor}
  for other in own(imports(path)) - {"__version__"}:
    assert floor_of(other) in allowed, f"{name} ({floor}) imports {other} ({floor_of(other)})"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_each_floor_is_free_of_what_it_should_not_know(path):
  name = name_of(path)
  known = {library.split(".")[0] for library in imports(path)}
  assert not known & FORBIDDEN.get(floor_of(name), set())


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
  for floor, (_, below) in FLOORS.items():
    assert all(order.index(other) < order.index(floor) for other in below)


def test_no_module_hides_a_library_when_run_as_a_file():
  names = {path.stem for path in modules()} | {p.stem for p in (ROOT / "scripts").glob("*.py")}
  assert not names & set(sys.stdlib_module_names)
  assert not names & {"jax", "flax", "optax", "grain", "numpy", "tokenizers", "safetensors"}


def test_peers_without_jax_can_take_turns():
  """What scripts/peers/ imports of the package: the standard library alone."""
  for name in ("heap", "lockstep"):
    at_import = ast.parse((ROOT / "dpo_jax" / f"{name}.py").read_text(encoding="utf-8")).body
    nodes = [node for node in at_import if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [
      node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes
    ]
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_commands_answer_before_they_load_anything_heavy():
  show = "import sys; from dpo_jax import cli; print('jax' in sys.modules, 'numpy' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["False", "False"]
