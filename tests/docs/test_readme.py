"""The README's programs run as they stand."""

import math
import re

from tests.support.paths import ROOT

README = ROOT / "README.md"


def test_models_of_ones_own_train_with_the_same_step(capsys):
  text = README.read_text(encoding="utf-8")
  section = text.split("## A model of your own")[1].split("\n## ")[0]
  nnx_program, linen_program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
  names: dict = {}
  for program in (nnx_program, linen_program):
    exec(compile(program, str(README), "exec"), names)
    losses = [float(x) for x in capsys.readouterr().out.strip("[]\n").split(", ")]
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-6)
    assert losses[-1] < 0.1 < losses[0]
