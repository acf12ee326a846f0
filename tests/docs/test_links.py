"""Links, file paths and module names in the documentation lead somewhere."""

import functools
import importlib
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]) + sorted(
  (ROOT / "docs").glob("*.md")
)
# The log keeps the names of its day.
CURRENT = [page for page in PAGES if page.name != "log.md"]
FOLDERS = "dpo_jax|scripts|configs|docs|tests|notebooks|[.]ci"


def name_of(page: pathlib.Path) -> str:
  """A page's path from the root, as the id of a test."""
  return str(page.relative_to(ROOT))


def without_programs(text: str) -> str:
  """Returns a page without its fenced blocks, whose `#` and `[…](…)` mean something else."""
  return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors that GitHub gives a page's headings."""
  found: set[str] = set()
  for heading in re.findall(
    r"^#+ +(.+)$", without_programs(page.read_text("utf-8")), flags=re.MULTILINE
  ):
    words = re.sub(r"[^\w\- ]", "", heading.lower())
    found.add(words.replace(" ", "-"))
  return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(page):
  broken = []
  for link in re.findall(r"\]\(([^)\s]+)\)", without_programs(page.read_text("utf-8"))):
    if "://" in link:
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or (anchor and anchor not in anchors(target)):
      broken.append(link)
  assert not broken


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_paths_named_exist(page):
  text = re.sub(r"https?://\S+", "", page.read_text("utf-8"))
  named = set(re.findall(rf"(?<![\w/.$-])((?:{FOLDERS})/[\w./*-]*)", text))
  missing = []
  for path in sorted(named):
    if re.search(r"(^|/)[A-Z]+(\.py)?$", path):  # configs/NAME.py stands for any of them
      continue
    if not list(ROOT.glob(path.rstrip("./"))):
      missing.append(path)
  assert not missing


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_modules_named_exist(page):
  """`dpo_jax.x.y` is a module, or a name in one."""
  missing = []
  for dotted in sorted(set(re.findall(r"\bdpo_jax(?:\.[a-zA-Z_]\w*)+", page.read_text("utf-8")))):
    name, *rest = dotted.split(".")
    module = importlib.import_module(name)
    while rest and hasattr(module, "__path__") and importlib.util.find_spec(f"{name}.{rest[0]}"):
      name = f"{name}.{rest.pop(0)}"
      module = importlib.import_module(name)
    if rest and not hasattr(module, rest[0]):
      missing.append(dotted)
  assert not missing


def test_every_page_is_in_the_indexes():
  index = (ROOT / "docs" / "README.md").read_text("utf-8")
  readme = (ROOT / "README.md").read_text("utf-8")
  for page in (ROOT / "docs").glob("*.md"):
    if page.name != "README.md":
      assert f"]({page.name})" in index, page.name
      assert f"](docs/{page.name})" in readme, page.name
