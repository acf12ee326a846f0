"""The programs in the documentation run as they stand."""

import math
import re

from tests.support.paths import ROOT


def programs(page: str) -> list[str]:
  """Returns the Python blocks of a page."""
  return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def test_the_readmes_program_computes_the_dpo_loss(capsys):
  (program,) = programs("README.md")
  exec(compile(program, "README.md", "exec"), {})
  # Margins of 2 and 0 nats at β = 0.1: the mean of log(1 + e^-0.2) and log 2.
  expected = (math.log1p(math.exp(-0.2)) + math.log(2)) / 2
  assert math.isclose(float(capsys.readouterr().out), expected, rel_tol=1e-6)
  assert f"{expected:.6f}"[:7] in program


def test_models_of_ones_own_train_with_the_same_step(capsys):
  names: dict = {}
  for program in programs("docs/models.md"):
    exec(compile(program, "docs/models.md", "exec"), names)
    losses = [float(x) for x in capsys.readouterr().out.strip("[]\n").split(", ")]
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-6)
    assert losses[-1] < 0.1 < losses[0]
  assert len(programs("docs/models.md")) == 2
