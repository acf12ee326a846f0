"""Set-up: what is wrong with a configuration alone is said before a file is opened."""

import pathlib

import pytest

from configs import preferences
from dpo_jax import losses, step
from dpo_jax.structs import UserError
from dpo_jax.training import setup
from dpo_jax.training.setup import checks
from dpo_jax.utils.following import Average


def configured(**changes):
  """A run of folders that do not exist."""
  config = preferences.get_config("model=nowhere,data=nowhere")
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"loss.beta": -1.0}, r"loss\.beta"),
    ({"train.batch_size": 0}, "train.batch_size is 0"),
    ({"train.accumulate": -1}, "train.accumulate is -1; it must be 1 or more, or 0 for as few"),
    ({"model.remat": "most"}, "remat is 'most'; known: auto, none, dots, narrow, full"),
    ({"checkpoint.keep": 0}, "checkpoint.keep is 0"),
    ({"model.compute_dtype": "bf16"}, r"compute_dtype is 'bf16'; did you mean bfloat16\?"),
    ({"model.param_dtype": "torch.float32"}, r"did you mean float32\?"),
    ({"model.compute_dtype": "half"}, "float16 is not supported; use bfloat16"),
    ({"reference.sync_every": -1}, "reference.sync_every is -1"),
    ({"reference.bema": True}, "reference.sync_every is 0, so that the reference never moves"),
    ({"reference.bema_lag": 3.0}, "bema_lag is 3.0, but reference.bema is False"),
    (
      {"reference.bema": True, "reference.sync_every": 2, "reference.sync_alpha": 1.0},
      "reference.sync_alpha is 1.0, but with reference.bema",
    ),
    (
      {"reference.bema": True, "reference.sync_every": 2, "reference.bema_power": -0.5},
      "reference.bema_power is -0.5; it must be a number of 0 or above",
    ),
    (
      {"reference.bema": True, "reference.sync_every": 2, "reference.path": "elsewhere"},
      "reference.path is 'elsewhere', but with reference.bema",
    ),
    ({"on_policy.reward": "controlled", "on_policy.num": 1}, "on_policy.num is 1"),
    ({"optimizer.b1": 1.5}, "optimizer.b1 is 1.5"),
    ({"optimizer.schedule": "steps"}, "optimizer.schedule is 'steps'"),
    ({"optimizer.warmup_steps": 9, "train.steps": 8}, "optimizer.warmup_steps is 9"),
    ({"lora.alpha": 8.0}, "lora.rank is 0, so nothing would be adapted"),
  ],
)
def test_a_configuration_is_refused_before_a_file_is_opened(changes, words):
  with pytest.raises(UserError, match=words):
    setup.build(configured(**changes), pathlib.Path("nowhere"))
  with pytest.raises(UserError, match=r"model\.path: there is no folder nowhere"):
    setup.build(configured(), pathlib.Path("nowhere"))


@pytest.mark.parametrize(
  ("sizes", "line"),
  [
    ((30, 0, 8), "30 is not divisible by 8 devices; try 24 or 32"),
    ((30, 1, 8), "30 is not divisible by 8 devices; try 24 or 32"),
    (
      (64, 8, 16),
      "64 is not divisible by 16 devices x 8 micro-batches; try 128, or --accumulate=4",
    ),
    ((9, 2, 1), "9 is not divisible by 1 device x 2 micro-batches; try 8 or 10, or --accumulate=1"),
  ],
)
def test_a_batch_that_does_not_divide_is_told_what_would(sizes, line):
  with pytest.raises(UserError) as error:
    checks._check_divides(*sizes)
  assert str(error.value) == f"train.batch_size {line}"
  checks._check_divides(64, 0, 16)


def test_a_store_and_a_model_are_looked_at_in_the_description(tmp_path):
  (tmp_path / "store").write_text("")
  config = configured(**{"reference.store": str(tmp_path / "store")})
  checked = setup.check(config)
  with pytest.raises(UserError, match="is a file; name a folder"):
    setup.describe(config, checked)


def test_a_run_without_names_is_refused():
  for name, words in (("model.path", "model.path is empty"), ("data.path", "data.path is empty")):
    with pytest.raises(UserError, match=words):
      setup.check_inputs(configured(**{name: ""}))


def test_a_reference_that_is_an_average():
  settings = {"reference.bema": True, "reference.sync_every": 4, "reference.bema_lag": 3.0}
  sync = setup.check(configured(**settings)).sync
  assert sync == step.Sync(4, 0.6, Average(power=0.5, bias_power=0.2, lag=3.0))


def test_a_reference_is_live_stored_or_absent():
  logps_fn = lambda params, batch: params + batch
  live = step.Objective(logps_fn, losses.resolve("sigmoid"))
  assert live.reference_kind == step.LiveReference() and live.sync is None
  assert live.reference_logps(1, 2) == 3
  stored = live._replace(reference=step.StoredReference(lambda batch: -batch))
  assert stored.reference_logps(None, 2) == -2 and stored.sync is None
  absent = step.Objective(logps_fn, losses.resolve("simpo"))
  assert absent.reference_kind == step.NoReference() and absent.reference_logps(1, 2) is None
  sync = step.Sync(4, 0.6)
  assert live._replace(reference=step.LiveReference(sync)).sync == sync
