"""Micro-batches and remat by the memory of a device: the choice, and what a resumed run keeps."""

import json

import numpy as np
import pytest

from configs import preferences
from dpo_jax.data.examples import Measured
from dpo_jax.logprobs import LogitBudget
from dpo_jax.model import families
from dpo_jax.training import setup
from dpo_jax.training.setup import automatic
from dpo_jax.training.setup.automatic import Choice, Micro
from dpo_jax.utils import workdir as workdirs

GIB = 2**30
MODEL = families.from_hf(
  {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
  }
)  # fmt: skip


# --- the choice -----------------------------------------------------------------------------------


def estimate(accumulate, remat):
  """64 GiB for a whole batch, of which `full` needs a quarter."""
  return 64 * GIB // accumulate // {"dots": 1, "full": 4}[remat]


@pytest.mark.parametrize(
  ("tokens", "room", "chosen"),
  [
    (100_000, 80, Choice(1, "dots", 64 * GIB)),
    # Two micro-batches of 50,000 tokens keep a device busy, so nothing more is recomputed.
    (100_000, 40, Choice(2, "dots", 32 * GIB)),
    (100_000, 10, Choice(8, "dots", 8 * GIB)),
    # An eighth of 40,000 tokens would not: less is kept, by fewer micro-batches.
    (40_000, 10, Choice(2, "full", 8 * GIB)),
    (4_000, 16, Choice(1, "full", 16 * GIB)),
    (4_000, 3, Choice(8, "full", 2 * GIB)),
    # Where nothing fits, what needs least.
    (4_000, 1, Choice(8, "full", 2 * GIB)),
  ],
)
def test_the_first_that_fits_is_chosen(tokens, room, chosen):
  options = automatic.in_order([1, 2, 4, 8], ["dots", "full"], lambda count: tokens // count)
  assert automatic.choose(options, estimate, room * GIB) == chosen


def test_micro_batches_divide_the_pairs_of_a_device():
  assert automatic.divisors(8) == [1, 2, 4, 8]
  assert automatic.divisors(6) == [1, 2, 3, 6]
  assert automatic.divisors(1) == [1]


def test_what_a_step_needs_by_hand():
  # For each of 100 tokens, in 2 bytes: 64 + 2 (queries 64 + keys 32) + 64 + 2 x 128 = 512 outputs,
  # and 4 x 64 + 64 + 32 + 2 x 128 = 608 numbers between them. 64 more are a layer's input.
  def needed(remat, **changes):
    return automatic.working_bytes(MODEL, Micro(100, 0), remat, itemsize=2, **changes)

  layer = 2 * 100 * 2 * (512 + 608)
  assert needed("full") == 2 * 2 * 100 * 64 + layer
  assert needed("narrow") == 2 * 2 * 100 * (64 + 512 - 2 * 128) + layer
  assert needed("dots") == 2 * 2 * 100 * (64 + 512) + layer
  assert needed("none") == 2 * 2 * 100 * (64 + 512 + 608) + layer


def test_a_chunk_of_logits_counts_where_it_is_more_than_a_layer():
  # 1,000 logits of 4 bytes and their slopes of 2, the table of 64 in 2 bytes, and 64 numbers of
  # the hidden state and its gradient. Slopes may be stored besides.
  def needed(kept, **changes):
    budget = LogitBudget(2**27, kept)
    return automatic.working_bytes(
      MODEL, Micro(8, 5000), "full", itemsize=2, budget=budget, **changes
    )

  layers = 2 * 2 * 8 * 64
  head = 5000 * 1000 * 6 + 1000 * 64 * 2 + 2 * 5000 * 64 * 2
  assert needed(0) == layers + head
  assert needed(5000 * 1000 // 2) == layers + head + 5000 * 1000 * 2
  # Four devices have a quarter of the vocabulary each, and all of the tokens.
  gathered = needed(0, fsdp=4) - layers - (20_000 * 250 * 6 + 250 * 64 * 2 + 2 * 20_000 * 64 * 2)
  layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128
  assert gathered == 2 * 2 * layer + 4 * layer


# --- a configuration ------------------------------------------------------------------------------


def configured(**changes):
  config = preferences.get_config("model=nowhere,data=nowhere")
  config.update_from_flattened_dict({"parallel.devices": 1, "train.batch_size": 16} | changes)
  return config


def settled(room, size=256, **changes):
  config = configured(**changes)
  rng = np.random.default_rng(0)
  tokens = rng.integers(20, 200, (size, 2))
  examples = Measured(rng.integers(5, 100, size), tokens, tokens)
  checked = setup.check(config)
  automatic.settle(config, checked, MODEL, None, "blocked", examples, room=room)
  return config.train.accumulate, config.model.remat


def test_a_cpu_takes_what_it_took_before(capsys):
  assert settled(None) == (1, "dots")
  assert capsys.readouterr().err == "", "nothing was chosen, so nothing is said"


def test_the_choice_is_reported_with_what_it_needs(capsys):
  assert settled(GIB) == (1, "dots")
  line = capsys.readouterr().err
  assert "train.accumulate auto: 1, model.remat auto: dots (0.1 of 1.0 GiB by estimate)" in line


def test_less_memory_takes_more_micro_batches(capsys):
  # The tokens are few, so all is recomputed before the batch is divided.
  seen = [settled(int(room)) for room in (95e6, 82e6, 72e6, 50e6, 30e6)]
  assert seen == [(1, "dots"), (1, "narrow"), (1, "full"), (2, "full"), (4, "full")]
  assert "it may run out of memory" not in capsys.readouterr().err
  assert settled(1) == (16, "full")
  assert "it may run out of memory" in capsys.readouterr().err


def test_what_is_set_stays():
  assert settled(1, **{"train.accumulate": 2, "model.remat": "none"}) == (2, "none")
  assert settled(GIB, **{"train.accumulate": 4}) == (4, "dots")
  assert settled(1, **{"train.accumulate": 4}) == (4, "full")
  assert settled(1, **{"model.remat": "dots"}) == (16, "dots")


# --- a run that is resumed ------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
  """Returns a function that writes the config.json of a run."""

  def write(**changes):
    fields = json.loads(configured(**changes).to_json_best_effort())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path

  return write


@pytest.mark.parametrize(
  ("began", "now", "taken"),
  [
    ((4, "full"), (0, "auto"), (4, "full")),
    ((1, "dots"), (0, "auto"), (1, "dots")),  # the defaults of an earlier version
    ((1, "dots"), (8, "auto"), (8, "dots")),
    ((1, "dots"), (0, "full"), (1, "full")),
  ],
)
def test_a_resumed_run_goes_on_as_it_began(begun, began, now, taken):
  names = ("train.accumulate", "model.remat")
  folder = begun(**dict(zip(names, began, strict=True)))
  config = configured(**dict(zip(names, now, strict=True)))
  # Neither changes what is learned, so both may be set anew.
  workdirs.check(folder, config.to_json_best_effort(), configured().to_json_best_effort())
  automatic.take_stored(config, folder)
  assert (config.train.accumulate, config.model.remat) == taken


def test_another_way_of_computing_is_a_run_of_its_own_unless_it_is_named(begun, tmp_path):
  parent = begun().parent

  def chosen(**changes):
    fields = configured(**changes).to_json_best_effort()
    return workdirs.choose(str(parent / "m"), "l", fields, parent=parent).name

  (parent / "m-l").mkdir()
  stored = configured(**{"train.accumulate": 1, "model.remat": "dots"}).to_json_best_effort()
  (parent / "m-l" / "config.json").write_text(stored)
  assert chosen() == chosen(**{"train.accumulate": 1}) == "m-l"
  assert chosen(**{"train.accumulate": 2}) == chosen(**{"model.remat": "full"}) == "m-l-2"
