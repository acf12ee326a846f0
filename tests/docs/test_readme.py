"""The programs in the documentation run as they stand."""

import math
import pathlib
import re

from dpo_jax import train
from dpo_jax.monitoring import loggers
from tests.support.paths import ROOT


def programs(page: str) -> list[str]:
  """Returns the Python blocks of a page."""
  return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def test_the_readmes_program_trains_with_arguments_that_exist(monkeypatch, capsys):
  """Everything but the training itself, which tests/e2e does from Python."""
  trained = []

  def execute(config, workdir, *, accept_changes, overwrite, callbacks):
    for callback in callbacks:
      callback(1, {"loss": 0.5})
    trained.append(config)
    return workdir or pathlib.Path("runs/mine")

  monkeypatch.setattr(train, "execute", execute)
  monkeypatch.setattr(loggers, "read_metrics", lambda path: [{"step": 1}])
  (program,) = programs("README.md")
  exec(compile(program, "README.md", "exec"), {})
  assert (trained[0].loss.beta, trained[0].optimizer.learning_rate) == (0.1, 1e-6)
  assert capsys.readouterr().out == "1 0.5 None\nruns/mine/export {'step': 1}\n"


def test_the_program_of_the_losses_computes_the_dpo_loss(capsys):
  program, _ = programs("docs/losses.md")
  exec(compile(program, "docs/losses.md", "exec"), {})
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
