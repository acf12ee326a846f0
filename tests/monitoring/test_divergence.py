"""Divergence: most of ten steps have broken weights, and no healthy run is taken for one."""

import math

import pytest

from dpo_jax.monitoring import divergence
from dpo_jax.monitoring.divergence import Divergence


def watch(values, key="logps/chosen", **first):
  found = Divergence(**first)
  for value in values:
    found.add({"loss": 0.7, key: value})
  return found


@pytest.mark.parametrize("key", divergence.WATCHED)
def test_a_log_prob_of_five_times_the_first_is_broken(key):
  # 5 x -40 = -200, and 30 nats below -40 is -70: the lower of both is the limit.
  assert not watch([-40] + [-199.0] * 20, key).has_diverged()
  assert watch([-40] + [-201.0] * 6, key).has_diverged()


def test_completions_of_a_few_tokens_may_become_many_times_less_likely():
  # 5 x -0.5 = -2.5, but 30 nats below is -30.5.
  assert not watch([-0.5] + [-30.0] * 20).has_diverged()
  assert watch([-0.5] + [-31.0] * 20).has_diverged()


def test_most_of_ten_steps_decide():
  bad, good = -500.0, -40.0
  assert not watch([good] * 10 + [bad] * 5 + [good] * 10).has_diverged()
  assert not watch([good, bad] * 10).has_diverged()
  found = watch([good] * 10 + [bad] * 6)
  assert found.has_diverged() and found.suspect
  assert not watch([good] * 10 + [bad, good]).suspect


def test_one_step_far_beyond_the_limits_decides_alone():
  """At a learning rate of 1,000, weights break in a step or two, and then look harmless."""
  # 1,000 x 5 x -40 = -200,000, which is also 30,000 nats below -40.
  assert watch([-40, -201_000.0, -45.0]).has_diverged()
  assert not watch([-40, -199_000.0, -45.0]).has_diverged()
  # A first completion of one token, and then one of 20,000: 5,000 x -1 = -5,000.
  assert not watch([-1, -29_000.0, -1.0]).has_diverged()
  found = Divergence(first_loss=0.7, first_logp=-1.0)
  found.add({"loss": 0.7, "logps/chosen": -90_000.0, "drift/chosen": 0.0})
  assert not found.has_diverged()


@pytest.mark.parametrize(("values", "diverged"), [([-40, -500], False), ([-40, -500, -500], True)])
def test_a_short_run_is_judged_by_its_last_three_steps(values, diverged):
  found = watch(values)
  assert not found.has_diverged()
  assert found.has_diverged(at_end=True) == diverged


def test_losses_that_grow_in_runs_that_end_well_stop_nothing():
  """`ipo` at β = 0.1 starts at (1 / 2β)² = 25; samples of the policy have no such log-prob."""
  ipo, samples = Divergence(), Divergence()
  for step in range(40):
    ipo.add({"loss": 25.0 * (1 + step), "logps/chosen": -178 - step})
    samples.add({"loss": -0.05 * 2**step, "reward": 1.0})
  for found in (ipo, samples):
    assert not found.has_diverged() and not found.has_diverged(at_end=True)


def test_a_batch_without_desirable_completions_is_as_the_one_before():
  values = [math.nan, -40, *[-500, math.nan] * 4]
  found = watch(values, "logps/desirable")
  assert found.first_logp == -40 and found.has_diverged()


def test_held_out_rows_show_what_one_short_completion_cannot():
  """Batches of one completion: the first is short, those of most steps are long."""
  alone, beside = Divergence(), Divergence()
  beside.add_held_out({"logps/chosen": -180.0})
  for logp in (-20.0, *[-250.0] * 12):
    for found in (alone, beside):
      found.add({"loss": 0.7, "logps/chosen": logp})
  assert beside.first_logp == -180 and not beside.has_diverged()
  assert alone.first_logp == -20 and alone.has_diverged()
  for _ in range(6):
    beside.add({"loss": 0.7, "logps/chosen": -1000.0})
  assert beside.has_diverged()


def test_held_out_rows_that_are_more_likely_change_nothing():
  found = Divergence()
  found.add_held_out({"logps/chosen": -4.0})
  found.add({"loss": 0.7, "logps/chosen": -20.0})
  assert found.first_logp == -20
  found.add_held_out({"loss": 0.7})
  assert found.first_logp == -20


@pytest.mark.parametrize(("drift", "diverged"), [(0.05, False), (-0.05, False), (-2.0, True)])
def test_completions_as_likely_as_under_the_reference_are_not_broken(drift, diverged):
  found = Divergence()
  for logp in (-20.0, *[-250.0] * 8):
    found.add({"loss": 0.7, "logps/chosen": logp, "drift/chosen": drift})
  assert found.has_diverged() == diverged


def test_a_resumed_run_has_what_the_first_step_had():
  records = [
    {"step": 0, "eval/loss": 0.69},
    {"step": 1, "loss": 0.7, "logps/chosen": -40.0},
    {"step": 2, "loss": 9.0, "logps/chosen": -400.0},
  ]
  first = divergence.first_of(records)
  assert (first.first_loss, first.first_logp) == (0.7, -40)
  assert watch([-500.0] * 6, first_loss=0.7, first_logp=-40.0).has_diverged()
  assert math.isnan(divergence.first_of([]).first_loss)
  records[0]["eval/logps/chosen"] = -55.0
  assert divergence.first_of(records).first_logp == -55


def test_usual_rates_are_those_of_the_kind_of_run():
  usual = divergence.usual_rates
  assert usual("pairs", adapters=False, weights=8_000_000_000) == "5e-7 to 1e-5"
  assert "adapters" in usual("pairs", adapters=True, weights=8_000_000_000)
  assert "1e-3" in usual("text", adapters=False, weights=260_000)
