"""Several sources: what a run reads of each, what they have in common, and their metrics."""

import dataclasses
import json

import numpy as np
import optax
import pytest

from configs import preferences
from dpo_jax import losses, metrics, step
from dpo_jax.data import batches
from dpo_jax.data.batches import Batching
from dpo_jax.data.ledger import count_tokens
from dpo_jax.distributed.executor import Executor
from dpo_jax.structs import UserError
from dpo_jax.training import datasets, setup
from dpo_jax.training.evaluator import Evaluator
from tests.support import tiny
from tests.support.small_rows import pair, rows_file, tokenizer  # noqa: F401
from tests.support.small_steps import objective
from tests.training.test_datasets import MODEL


def prompts(name, count):
  return [pair(f"{name} {i}") for i in range(count)]


def load(tokenizer, loss="sigmoid", model=MODEL, **data):  # noqa: F811
  config = preferences.get_config(f"loss={loss}")
  for name, value in {"max_length": 64, "eval_fraction": 0.0, **data}.items():
    config.data[name] = value
  settings = datasets.BatchSettings(batch_size=4, accumulate=1, seed=0, balance=True)
  rows = setup.data_settings(config)
  return datasets.load(rows, settings, Batching(), losses.resolve(loss), tokenizer, model)


@pytest.fixture
def write(rows_file):  # noqa: F811
  return lambda name, rows: str(rows_file(rows, f"{name}.jsonl"))


def test_a_mix_has_the_rows_of_its_sources_each_read_in_its_own_way(tokenizer, write, capsys):  # noqa: F811
  asked = [{"question": f"b {i}", "better": " good", "worse": " bad"} for i in range(20)]
  fields = {"prompt": "question", "chosen": "better", "rejected": "worse"}
  mix = {
    "a": write("a", prompts("a", 10)),
    "b": {"path": write("b", asked), "fields": fields, "count": 5},
    "c": {"path": write("c", [*prompts("c", 8), pair(chosen="", rejected="")]), "fraction": 0.5},
  }
  data, ledger = load(tokenizer, mix=mix)
  assert data.mixture == (("a", "b", "c"), (0, 10, 30), (10, 5, 4), (10, 5, 4))
  rows = [example.row for example in data.examples]
  assert rows[:10] == [*range(10)] and all(10 <= row < 30 for row in rows[10:15])
  assert all(30 <= row < 39 for row in rows[15:])
  # The same rows as by themselves, and no row of the total is counted twice.
  a, b, c = (ledger["sources"][name] for name in "abc")
  assert (a["rows"], a["pairs"], a["dropped"]) == (10, 10, {})
  assert (b["rows"], b["pairs"], b["dropped"]) == (20, 5, {"not drawn": 15})
  assert (c["rows"], c["pairs"]) == (9, 4)
  assert c["dropped"] == {"empty completion": 1, "not drawn": 4}
  assert ledger["rows"] == 39 and ledger["pairs"] == 19
  assert ledger["dropped"]["not drawn"] == 19
  assert ledger["tokens"] == count_tokens(data.examples)
  assert a["per_epoch"] == 10 and a["path"] == mix["a"]
  err = capsys.readouterr().err
  assert f"data.mix.a ({mix['a']}): 10 rows (strings), 10 kept" in err
  assert "data.mix: an epoch has 19 examples: a 10 (1 passes over 10), b 5" in err
  # One source alone has the ledger that it always had.
  _, alone = load(tokenizer, path=mix["a"])
  assert alone == {key: a[key] for key in alone} and "sources" not in alone


def test_weights_are_shares_of_what_is_left_to_train_on(tokenizer, write):  # noqa: F811
  mix = {
    "a": {"path": write("a", prompts("a", 30)), "weight": 3.0},
    "b": {"path": write("b", prompts("b", 10)), "weight": 1},
  }
  data, _ = load(tokenizer, mix=mix, eval_fraction=0.2)
  assert len(data.held_out) == 8 and len(data.examples) == 32
  assert data.mixture.per_epoch == (24, 8) and sum(data.mixture.sizes) == 32
  # Held-out rows have metrics by source, and all of them together the usual names.
  assert data.groups == {"": range(40), "by_source/a": range(30), "by_source/b": range(30, 40)}
  assert not {e.row for e in data.examples} & {e.row for e in data.held_out}
  # Batches hold the shares, and a resumed run seeks.
  feed = datasets.make_feed(data, None, 0)
  steps = [feed(k, None)[0] for k in range(1, 17)]
  rows = np.concatenate([batch.row_NS[..., ::2].ravel() for batch in steps])
  rows = rows[rows >= 0]
  assert len(rows) == 64 and sum(rows < 30) == 48  # two epochs of 32
  late, _ = datasets.make_feed(data, None, 11)(12, None)
  np.testing.assert_equal(late._asdict(), steps[11]._asdict())


def test_evaluation_sets_have_groups_of_their_own(tokenizer, write):  # noqa: F811
  paths = {name: write(name, prompts(name, 6)) for name in ("a", "main", "x", "y")}
  sets = {"x": paths["x"], "y": {"path": paths["y"]}}
  # Alone they replace the held-out share, and are what has no name too.
  data, ledger = load(tokenizer, path=paths["a"], eval_sets=sets, eval_fraction=0.5, eval_limit=4)
  assert len(data.examples) == 6 and len(data.held_out) == 8
  assert data.groups == {"": range(12), "x": range(6), "y": range(6, 12)}
  assert ledger["eval_sets"]["y"] == {"path": paths["y"]} | ledger["eval_sets"]["y"]
  assert ledger["eval_sets"]["y"]["pairs"] == 6
  # Beside eval_path, what has no name is what eval_path names.
  data, ledger = load(tokenizer, path=paths["a"], eval_sets=sets, eval_path=paths["main"])
  assert data.groups == {"": range(6), "x": range(6, 12), "y": range(12, 18)}
  assert len(data.held_out) == 18 and ledger["eval"]["pairs"] == 6
  # As ever.
  data, _ = load(tokenizer, path=paths["a"], eval_path=paths["main"])
  assert data.groups == {} and len(data.held_out) == 6
  data, _ = load(tokenizer, path=paths["a"], eval_fraction=0.3)
  assert data.groups == {} and data.mixture is None


def test_prompts_that_are_trained_on_and_evaluated_on_are_named(tokenizer, write, capsys):  # noqa: F811
  a = write("a", prompts("a", 10))
  other = [pair("a 3", " fine", " poor"), pair("a 3", " well", " poor"), *prompts("x", 3)]
  sets = {"x": write("x", other), "y": write("y", prompts("y", 2))}
  _, ledger = load(tokenizer, path=a, eval_sets=sets)
  err = capsys.readouterr().err
  assert "warning: data.eval_sets.x: 1 of its 4 prompts are trained on too" in err
  assert "data.eval_sets.y:" not in err
  assert ledger["leakage"] == {"x": {"prompts": 1, "of": 4}}
  _, ledger = load(tokenizer, path=a, eval_path=a)
  assert "data.eval_path: 10 of its 10 prompts are trained on too" in capsys.readouterr().err
  assert ledger["leakage"] == {"eval_path": {"prompts": 10, "of": 10}}


def test_rows_of_two_sources_are_named_or_dropped(tokenizer, write, capsys):  # noqa: F811
  a = [*prompts("a", 5), *prompts("a", 2)]  # two rows twice
  b = [*prompts("b", 4), *prompts("a", 3)]  # three of a
  mix = {"a": write("a", a), "b": write("b", b)}
  data, ledger = load(tokenizer, mix=mix)
  assert len(data.examples) == 14 and ledger["repeated"] == {"a, b": 3}
  line = "warning: data.mix: 3 rows of b are in a too; --config.data.drop_duplicates=True"
  assert line in capsys.readouterr().err
  data, ledger = load(tokenizer, mix=mix, drop_duplicates=True)
  assert [ledger["sources"][name]["dropped"] for name in "ab"] == [
    {"duplicate": 2},
    {"duplicate": 3},
  ]
  assert len(data.examples) == 9 == ledger["pairs"] and ledger["rows"] == 14
  assert "repeated" not in ledger and "too;" not in capsys.readouterr().err
  # Also of one file, and as many rows are drawn as were asked for.
  assert load(tokenizer, path=mix["a"], drop_duplicates=True)[1]["dropped"] == {"duplicate": 2}
  drawn = {"a": {"path": mix["a"], "count": 5}}
  assert load(tokenizer, mix=drawn, drop_duplicates=True)[1]["pairs"] == 5
  with pytest.raises(UserError, match=r"data\.mix\.b has no row left to train on"):
    load(tokenizer, mix={"a": mix["a"], "b": mix["a"]}, drop_duplicates=True)


def test_labels_are_counted_of_the_rows_that_are_used(tokenizer, write):  # noqa: F811
  judged = [{"prompt": f"p {i}", "completion": f" {i}", "label": i % 4 == 0} for i in range(40)]
  mix = {"a": {"path": write("a", judged), "count": 10}, "b": write("b", prompts("b", 3))}
  data, ledger = load(tokenizer, "kto", mix=mix)
  # A pair is two completions, one desirable.
  assert data.mixture.sizes == (10, 6)
  good = sum(e.scores[0] == 1 for e in data.examples)
  assert ledger["labels"] == {"desirable": good, "undesirable": 16 - good}
  assert ledger["sources"]["b"]["labels"] == {"desirable": 3, "undesirable": 3}


def test_ranked_sources_have_one_number_of_completions(tokenizer, write):  # noqa: F811
  three = [{"prompt": f"p {i}", "answers": [" a", " b", " c"]} for i in range(4)]
  mix = {"a": write("a", prompts("a", 4)), "b": write("b", three)}
  data, _ = load(tokenizer, "plackett_luce", mix=mix)
  assert {len(example.completions) for example in data.examples} == {3} and data.completions == 3


@pytest.mark.parametrize(
  ("mix", "loss", "words"),
  [
    ({"a": "nowhere.jsonl"}, "sigmoid", r"data\.mix\.a\.path: no data file nowhere"),
    ({"a": "A", "b": "B"}, "odpo", r"odpo.* and the rows of .*b\.jsonl do not say"),
    ({"b": {"path": "B", "count": 4}}, "sigmoid", r"data\.mix\.b\.count is 4 and .* has 3 rows"),
    ({"b": {"path": "B", "fields": {"prompt": "no"}}}, "sigmoid", r"data\.mix\.b: .*b\.jsonl:1"),
  ],
)
def test_a_source_that_does_not_serve_is_named(tokenizer, write, mix, loss, words):  # noqa: F811
  scored = [pair(f"a {i}", margin=1.0) for i in range(3)]
  paths = {"A": write("a", scored), "B": write("b", prompts("b", 3))}
  given = json.loads(json.dumps(mix))
  for name, source in given.items():
    if isinstance(source, dict):
      source["path"] = paths[source["path"]]
    else:
      given[name] = paths.get(source, source)
  with pytest.raises(UserError, match=words):
    load(tokenizer, loss, mix=given)


def test_a_row_of_a_mix_is_named_with_the_first_rows_of_its_sources(tokenizer, write):  # noqa: F811
  mix = {"a": write("a", prompts("a", 5)), "b": write("b", [pair("b " * 20)])}
  short = dataclasses.replace(MODEL, positions="learned", max_positions=16)
  with pytest.raises(UserError, match=r"data row 5 has .*\(rows are counted.*: a from 0, b from 5"):
    load(tokenizer, mix=mix, model=short)


def test_a_prepared_set_is_no_source(tokenizer, write, tmp_path):  # noqa: F811
  (tmp_path / "set").mkdir()
  np.savez(tmp_path / "set" / "lengths.npz")
  prepared = {"a": str(tmp_path / "set")}
  with pytest.raises(UserError, match="is a prepared set, which is trained on by itself"):
    load(tokenizer, mix=prepared)
  with pytest.raises(UserError, match="is a prepared set, which is trained on by itself"):
    load(tokenizer, path=write("a", prompts("a", 3)), eval_sets=prepared)


@pytest.mark.parametrize(
  ("data", "reward", "words"),
  [
    ({"mix": {"a": 3}}, "", r"data\.mix\.a is 3"),
    ({"eval_sets": {"a": {"path": "x", "weight": 1}}}, "", r"data\.eval_sets\.a has no option"),
    ({"mix": {"a": "x"}, "path": ""}, "controlled", r"data\.mix is of rows with completions"),
    ({"drop_duplicates": True}, "controlled", r"data\.drop_duplicates is of rows"),
  ],
)
def test_a_mix_is_checked_before_a_file_is_opened(tmp_path, data, reward, words):
  config = preferences.get_config("model=nowhere,data=nowhere")
  for name, value in data.items():
    config.data[name] = value
  config.on_policy.reward = reward
  with pytest.raises(UserError, match=words):
    setup.build(config, tmp_path)


def test_a_run_has_a_path_or_a_mix():
  config = preferences.get_config("model=nowhere,data=nowhere")
  config.data.mix = {"a": "a.jsonl"}
  with pytest.raises(UserError, match=r"data\.path=nowhere and data\.mix are both given; keep one"):
    setup.check_inputs(config)
  config.data.path = ""
  setup.check_inputs(config)


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_evaluation_by_group_is_that_of_the_group_alone(name):
  some = tiny.labelled(8, seed=0)
  executor = Executor("mesh", 1)
  layout = Batching(row_length=48)
  rows = list(batches.eval_batches(some, batch_size=8, batching=layout))
  state = step.init_state(tiny.init(1), optax.sgd(1.0))
  about, reference = objective(name), executor.place(tiny.init())
  groups = {"": range(8), "x": range(3), "by_source/y": range(3, 8)}
  found = Evaluator(executor, about, reference, rows, groups=groups)(state)
  # Every slot of the others is emptied by hand; the batch keeps its shape.
  for prefix, span in (("", range(8)), ("x/", range(3)), ("by_source/y/", range(3, 8))):
    alone = [
      example._replace(weight=0.0) if example.row not in span else example for example in some
    ]
    rows = list(batches.eval_batches(alone, batch_size=8, batching=layout))
    expected = Evaluator(executor, about, reference, rows)(state)
    for key, value in expected.items():
      np.testing.assert_allclose(found[prefix + key], value, rtol=1e-6, err_msg=prefix + key)
  # A group of few examples has no standard error of each metric.
  means = [name for name in found if not name.endswith("_error")]
  assert len(means) == 3 * sum(not name.endswith("_error") for name in expected)
  assert {"loss_error", "x/loss_error", "by_source/y/loss_error"} <= set(found)
  assert found["loss"] != found["x/loss"] != found["by_source/y/loss"]


def test_metrics_by_source_leave_out_what_is_no_loss_or_reward():
  one = np.ones(())
  sums: metrics.Sums = dict.fromkeys(("loss", "rewards/margins", "drift/chosen"), (one, one))
  found = metrics.by_source(lambda _: sums, np.ones(2), np.array([0, 1]), ("a", "b"))
  assert sorted(found) == [
    f"by_source/{name}/{key}" for name in "ab" for key in ("loss", "rewards/margins")
  ]


def test_every_source_and_set_has_a_digest_of_its_own(tokenizer, write):  # noqa: F811
  paths = {name: write(name, prompts(name, 6)) for name in "abxy"}
  mix, sets = {name: paths[name] for name in "ab"}, {"x": paths["x"]}

  def digests(**more):
    return load(tokenizer, mix=mix, eval_sets=sets, **more)[0].digests

  before = digests(eval_path=paths["y"])
  assert set(before) == {
    f"the rows of data.mix.a ({paths['a']})",
    f"the rows of data.mix.b ({paths['b']})",
    f"the rows of data.eval_sets.x ({paths['x']})",
    f"the held-out rows ({paths['y']})",
  }
  write("b", [*prompts("b", 5), pair("b 5", " better", " worse")])
  after = digests(eval_path=paths["y"])
  assert [name for name in before if before[name] != after[name]] == [
    f"the rows of data.mix.b ({paths['b']})"
  ]
