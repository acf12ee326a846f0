"""The check at step 0: the loss has the value that it declares, not the one that it computes."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from dpo_jax import losses
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


def checked(loss):
  """Checks step 0 of a run of the tiny model, where the policy is the reference."""
  run = types.SimpleNamespace(
    objective=objective("ipo", beta=0.5)._replace(loss=loss),
    executor=Executor(),
    data=types.SimpleNamespace(sampler=True),
    settings=types.SimpleNamespace(starts_as_reference=True),
  )
  batch = jax.tree.map(lambda x: x[None], collate(tiny.pairs(4), layout="padded", row_length=48))
  check_step_zero(run, tiny.init(), tiny.init(), batch)  # pyright: ignore[reportArgumentType]


def test_step_zero_compares_a_loss_with_its_declaration(capsys):
  loss = objective("ipo", beta=0.5).loss
  checked(loss)
  assert "step 0: loss 1.000000, as it must be" in capsys.readouterr().out  # 1/(4 β²)

  def mistaken(policy, reference, *, beta):
    return losses.LOSSES["ipo"](policy, reference, beta=beta) + 0.25

  wrong = dataclasses.replace(loss, terms=((1.0, "ipo", functools.partial(mistaken, beta=0.5)),))
  # A formula compared with itself would agree.
  with pytest.raises(UserError, match=r"the loss is 1\.250000 and not 1\.000000"):
    checked(wrong)
