"""The check at step 0: the loss has the value that it declares, not the one that it computes."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from dpo_jax import losses, step
from dpo_jax.data.collate import collate
from dpo_jax.structs import UserError
from dpo_jax.training.sanity import check_step_zero
from tests.support import tiny
from tests.support.small_steps import objective


class Executor:
  """Computes the first micro-batch on one device."""

  def compile_forward(self, fn):
    compiled = jax.jit(lambda params, batch: fn(params, jax.tree.map(lambda x: x[0], batch)))
    return lambda params, batch: np.asarray(compiled(params, batch))


def checked(loss, *, starts_as_reference=True, **changes):
  """Checks step 0 of a run of the tiny model, whose reference has the same weights."""
  run = types.SimpleNamespace(
    objective=objective("ipo", beta=0.5)._replace(loss=loss, **changes),
    executor=Executor(),
    data=types.SimpleNamespace(sampler=True),
    settings=types.SimpleNamespace(starts_as_reference=starts_as_reference),
  )
  batch = jax.tree.map(lambda x: x[None], collate(tiny.pairs(4), layout="padded", row_length=48))
  check_step_zero(run, tiny.init(), tiny.init(), batch)  # pyright: ignore[reportArgumentType]


def test_step_zero_compares_a_loss_with_its_declaration(capsys):
  loss = objective("ipo", beta=0.5).loss
  checked(loss)
  # 1/(4 β²)
  assert capsys.readouterr().out == (
    "check passed: loss at the start is 1.000000 (policy equals reference; the value that loss ipo"
    " declares there)\n"
  )

  def mistaken(policy, reference, *, beta):
    return losses.LOSSES["ipo"](policy, reference, beta=beta) + 0.25

  wrong = dataclasses.replace(loss, terms=((1.0, "ipo", functools.partial(mistaken, beta=0.5)),))
  # A formula compared with itself would agree.
  with pytest.raises(UserError, match=r"the loss is 1\.250000 and not 1\.000000"):
    checked(wrong)


def test_the_line_names_what_was_compared(capsys):
  sigmoid = objective("sigmoid").loss
  checked(sigmoid)
  line = "check passed: loss at the start is log 2 = 0.693147 (policy equals reference)\n"
  assert capsys.readouterr().out == line
  # Numbers for the log-probs of the same model, as a store has them.
  logps = functools.partial(jax.jit(objective("sigmoid").logps), tiny.init())
  checked(sigmoid, reference=step.StoredReference(logps))
  assert "= 0.693147 (policy equals the stored log-probs of the ref" in capsys.readouterr().out


@losses.declare(reference=True, at_reference=None)
def undeclared(policy, reference, *, beta=0.1):
  return losses.LOSSES["sigmoid"](policy, reference, beta=beta) + 1


def test_a_loss_without_a_declared_value_is_compared_with_its_own_formula(capsys):
  checked(losses.resolve("tests.training.test_sanity:undeclared"))
  printed = capsys.readouterr().out
  assert "1.693147 (policy equals reference; loss tests.training.test_sanity:undec" in printed
  assert "declares no value there, so its own formula was compared" in printed


def test_a_loss_that_cannot_be_checked_is_shown(capsys):
  checked(objective("sigmoid").loss, starts_as_reference=False)
  line = (
    "loss on the first batch 0.693147 (not checked: policy and reference differ; equal ones would"
    " give 0.693147)\n"
  )
  assert capsys.readouterr().out == line
  checked(objective("simpo").loss)
  assert "(not checked: loss simpo reads no reference)" in capsys.readouterr().out
  checked(objective("sigmoid", reference_free=True).loss)
  assert "(not checked: loss sigmoid reads no reference)" in capsys.readouterr().out
