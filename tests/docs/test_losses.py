"""Every loss is in the tables of the documentation, and the loss of one's own there is one."""

import re
import sys
import types

import numpy as np
import pytest

from dpo_jax.losses import LOSSES, arguments, resolve
from dpo_jax.losses.declaration import declaration_of
from tests.support.paths import ROOT
from tests.support.small_logps import random_logps


def rows(page):
  """Returns the rows of a page's first table with a name by that name, in their first cell."""
  text = (ROOT / "docs" / page).read_text("utf-8")
  # Later tables compare some of the losses with others; the first row of a name is the one.
  return dict(reversed(re.findall(r"^\| `(\w+)` \|(.*)$", text, re.M)))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_row(name):
  declared = declaration_of(LOSSES[name])
  assert declared is not None
  equal = "value where π = π_ref" if declared.reference else "no reference"
  if name not in rows("losses.md"):
    own = ", ".join(f"`{key}` ({value})" for key, value in arguments(name).items()) or "–"
    pytest.fail(
      f"loss {name} has no row in docs/losses.md; write in the table of all losses"
      f" | `{name}` | FORMULA | {own} | {equal} | SOURCE |"
    )
  if name not in rows("optimum.md"):
    pytest.fail(
      f"loss {name} has no row in docs/optimum.md; write in the table of every loss"
      f" | `{name}` | ✓ | ✓ | {equal} | TRAINED ON | ENDS AT | KL |"
    )
  for page in ("losses.md", "optimum.md"):
    assert ("no reference" in rows(page)[name]) == (not declared.reference), page


@pytest.mark.parametrize("name", LOSSES)
def test_every_argument_of_a_loss_is_in_its_row(name):
  missing = arguments(name).keys() - {"beta", *re.findall(r"`(\w+)`", rows("losses.md")[name])}
  if missing - {"margin_scale"}:
    pytest.fail(f"docs/losses.md does not name {', '.join(missing)} in the row of {name}")


def test_the_number_of_losses():
  assert f"[{len(LOSSES)} losses](docs/losses.md)" in (ROOT / "README.md").read_text("utf-8")


def test_the_loss_of_ones_own_on_the_page_is_one(monkeypatch):
  programs = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text("utf-8"), re.DOTALL
  )
  (program,) = [program for program in programs if "@declare" in program]
  module = types.ModuleType("mine_of_the_page")
  exec(compile(program, "docs/losses.md", "exec"), module.__dict__)
  monkeypatch.setitem(sys.modules, "mine_of_the_page", module)
  policy, reference = random_logps()
  found = resolve("mine_of_the_page:capped", beta=0.3, clip=1e9)(policy, reference)
  np.testing.assert_allclose(found, resolve("sigmoid", beta=0.3)(policy, reference), rtol=1e-6)
