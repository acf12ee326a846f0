"""The report: made from the files of a run alone, standing alone, and telling what they hold."""

import html.parser
import io
import json
import os
import re

import numpy as np
import pytest
import rich.console

from dpo_jax.monitoring import plots, report
from dpo_jax.monitoring.loggers import Loggers
from dpo_jax.structs import UserError
from tests.support.one_picture import one_picture

PAIRS = {
  "loss": 0.5,
  "rewards/chosen": 0.4,
  "rewards/rejected": -0.6,
  "rewards/accuracies": 0.75,
  "rewards/margins": 1.0,
  "logps/chosen": -20.0,
  "logps/rejected": -22.0,
}
DRIFT = {
  "drift/chosen": -0.04,
  "drift/rejected": -0.11,
  "drift/both_fell": 0.5,
  "drift/pair_mass": -0.9,
  "margins/chosen_longer": 1.2,
  "margins/chosen_shorter": 0.8,
}
SAMPLED = {
  "sampled/kl": 2.0,
  "sampled/kl_per_token": 0.1,
  "sampled/entropy": 1.2,
  "sampled/distinct_2": 0.6,
  "sampled/repetition": 0.1,
  "sampled/tokens": 17.0,
  "sampled/ended": 0.9,
}
STEP = {"grad_norm": 1.0, "learning_rate": 1e-3, "pairs_per_second": 1234.0}
CONFIG = {"seed": 7, "loss": {"name": "robust", "beta": 0.25}, "data": {"path": "<pairs>.jsonl"}}
LEDGER = {
  "format": "prompt, chosen, rejected",
  "rows": 12345,
  "pairs": 12000,
  "dropped": {"equal completions": 345},
  "truncated": {"prompt": 6},
  "tokens": {"prompt": 1000, "answer": 2000, "scored": 1600, "padding": 500, "shared": 777},
}
SUMMARY = {
  "reward_reference": 0.1,
  "reward_policy": 1.6,
  "win_rate": 0.876,
  "kl": 2.3,
  "frontier": [
    {"beta": 4.0, "kl": 0.2, "reward": 0.5},
    {"beta": 1.0, "kl": 2.0, "reward": 1.7},
    {"beta": 0.5, "kl": 5.0, "reward": 2.2},
  ],
  "samples": [{"prompt": "the film", "reference": "was <bad>", "policy": "was good"}],
}


def make_run(
  folder, metrics, *, steps=30, evaluate=True, config=CONFIG, ledger=LEDGER, held_out=None
):
  """A run whose metrics do not change, but for the held-out loss; `held_out` has more of them."""
  console = rich.console.Console(file=io.StringIO())
  with Loggers(folder, total_steps=steps, console=console) as log:
    if evaluate:
      log.write_eval(0, metrics | {"loss": 0.6931} | (held_out or {}))
    for step in range(1, steps + 1):
      log.write(step, metrics | STEP)
    if evaluate:
      log.write_eval(steps, metrics | {"loss": 0.4321} | (held_out or {}))
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "data.json").write_text(json.dumps(ledger))


class Page(html.parser.HTMLParser):
  """What a page shows, and what it would fetch."""

  def __init__(self, path):
    super().__init__()
    self.words, self.fetched, self.open = [], [], []
    self.source = path.read_text(encoding="utf-8")
    self.feed(self.source)
    self.text = " ".join(" ".join(self.words).split())

  def handle_starttag(self, tag, attributes):
    self.open.append(tag)
    self.fetched += [v for k, v in attributes if k in ("src", "href") and not v.startswith("#")]

  def handle_endtag(self, tag):
    while self.open and self.open.pop() != tag:
      pass

  def handle_data(self, data):
    if not {"style", "script"} & set(self.open):
      self.words.append(data)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
  """The folder of a run of preferences, with its report."""
  folder = tmp_path_factory.mktemp("preferences")
  make_run(folder, PAIRS)
  report.write(folder)
  return folder


def test_a_run_of_preferences(preferences):
  page = Page(preferences / "report.html")
  for words in (
    "loss robust", "loss, held out 0.4321 training 0.5000", "accuracy, held out 75.0%",
    "pairs per second 1,234", "rows read 12,345", "dropped: equal completions 345", "cut: prompt 6",
    "completions 1,600", "context 400", "shared by both completions 777", "beta 0.25",
    "<pairs>.jsonl",
  ):  # fmt: skip
    assert words in page.text, words
  names = {path.stem for path in (preferences / "plots").glob("*.png")}
  assert names == {
    "loss", "accuracy", "rewards", "margin", "logps", "grad_norm", "learning_rate", "speed",
  }  # fmt: skip
  assert page.source.count("<svg") == len(names)


def test_where_probability_goes_has_its_pictures(tmp_path):
  make_run(tmp_path, PAIRS | DRIFT, held_out=SAMPLED)
  page = Page(report.write(tmp_path))
  names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
  assert names >= {
    "drift", "both_fell", "pair_mass", "margin_by_length", "kl", "entropy", "diversity", "length",
  }  # fmt: skip
  assert page.source.count("<svg") == len(names)
  assert "Alerts" not in page.text


@pytest.mark.parametrize(
  ("metrics", "expected"),
  [
    ({"rewards/desirable": 1.0, "rewards/undesirable": -1.0, "kl": 0.1}, {"rewards", "kl"}),
    ({"rewards/best": 1.0, "rewards/rest": -1.0, "logps/best": -3.0}, {"rewards", "logps"}),
    ({"reward": 1.0, "kl": 2.0, "objective": -0.8}, {"reward", "kl", "objective"}),
  ],
)
def test_every_kind_of_data_has_its_pictures(tmp_path, metrics, expected):
  make_run(tmp_path, {"loss": 0.5} | metrics)
  report.write(tmp_path)
  names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
  assert names - {"loss", "grad_norm", "learning_rate", "speed"} == expected


@one_picture()
def test_alerts_stand_above_all_else_with_run_step_and_remedy(tmp_path):
  make_run(tmp_path / "sft", {"loss": 2.0})
  make_run(tmp_path / "dpo", PAIRS | DRIFT | {"drift/chosen": -0.5, "drift/rejected": 0.0})
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  page = Page(report.write(tmp_path))
  assert page.text.index("Alerts") < page.text.index("Result")
  told = (
    "chosen falls dpo, step 20 the model gives the chosen completions less probability than the"
    " reference does (0.50 nats per token less)"
  )
  assert page.text.count(told) == 1
  assert "--config.loss.sft_weight" in page.text
  one = Page(report.write(tmp_path / "dpo"))
  assert "chosen falls step 20 the model gives the chosen completions" in one.text


def test_supervised_training_shows_only_what_it_has(tmp_path):
  make_run(tmp_path, {"loss": 2.0, "logps/chosen": -30.0})
  page = Page(report.write(tmp_path))
  assert "texts per second" in page.text
  names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
  assert names == {"loss", "logps", "grad_norm", "learning_rate", "speed"}


def test_the_page_stands_alone(preferences):
  page = Page(preferences / "report.html")
  assert page.fetched == []
  assert not re.search(r"@import|url\((?!#)", page.source)


@one_picture()
def test_text_of_a_run_is_never_markup(tmp_path):
  make_run(tmp_path, PAIRS, config={"loss": {"name": "<script>alert(1)</script>"}})
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  page = Page(report.write(tmp_path))
  assert "<script" not in page.source
  assert "was <bad>" in page.text


@one_picture()
def test_a_folder_of_runs_is_one_page_in_the_order_they_were_made(tmp_path):
  for age, name in ((100, "sft"), (50, "dpo")):
    make_run(tmp_path / name, PAIRS)
    os.utime(tmp_path / name / "metrics.jsonl", (1e9 - age, 1e9 - age))
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  page = Page(report.write(tmp_path))
  assert page.text.index("Result") < page.text.index("sft · loss") < page.text.index("dpo · loss")
  assert "win rate against the reference 87.6%" in page.text
  names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
  assert {"frontier", "sft_loss", "dpo_loss"} <= names


def test_the_same_run_gives_the_same_page(preferences):
  first = (preferences / "report.html").read_text()
  assert report.write(preferences).read_text() == first
  assert not list(preferences.glob("*.partial"))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun(tmp_path, steps):
  make_run(tmp_path, PAIRS, steps=steps, evaluate=False)
  assert f"steps {steps}" in Page(report.write(tmp_path)).text


def test_a_run_whose_loss_was_never_finite(tmp_path):
  make_run(tmp_path, {"loss": float("nan")}, evaluate=False)
  page = Page(report.write(tmp_path))
  assert "steps 30" in page.text
  assert not (tmp_path / "plots" / "loss.png").exists()


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"contains no metrics\.jsonl"):
    report.write(tmp_path)


def test_curves_hold_every_step_and_every_evaluation():
  records = [{"step": 0, "eval/loss": 0.7}]
  records += [{"step": i, "loss": 1 / i} for i in range(1, 101)]
  records[-1] = records[-1] | {"eval/loss": 0.2}
  (ax,) = plots.curves(records)["loss"].axes
  by_length = {len(line.get_xdata()): line for line in ax.lines}
  np.testing.assert_array_equal(by_length[100].get_xdata(), range(1, 101))
  np.testing.assert_allclose(by_length[2].get_ydata(), [0.7, 0.2])
  raw = min((line for line in ax.lines if len(line.get_xdata()) == 100), key=lambda x: x.get_lw())
  np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, 101))


def test_what_only_evaluation_has_is_drawn_alone():
  records = [{"step": i, "eval/sampled/kl": i / 100} for i in (0, 100, 200)]
  (ax,) = plots.curves(records)["kl"].axes
  (line,) = ax.lines
  np.testing.assert_array_equal(line.get_ydata(), [0, 1, 2])
  assert line.get_label() == "sampled" and ax.get_legend() is None


def test_smoothing_keeps_a_constant_and_has_no_lag():
  np.testing.assert_allclose(plots.smoothed(np.full(1000, 3.0)), 3.0)
  ramp = np.arange(1000.0)
  np.testing.assert_allclose(plots.smoothed(ramp)[100:-100], ramp[100:-100])
  noise = np.random.default_rng(0).normal(size=1000)
  assert plots.smoothed(noise).std() < 0.25 * noise.std()


def test_the_frontier_is_drawn_by_kl_whatever_the_order_of_beta():
  figure = plots.frontier(SUMMARY["frontier"][::-1], {"policy": {"kl": 2.3, "reward": 1.6}})
  (ax,) = figure.axes
  lines = {line.get_label(): line for line in ax.lines}
  np.testing.assert_array_equal(lines["exact frontier π*"].get_xdata(), [0.2, 2.0, 5.0])
  np.testing.assert_array_equal(lines["exact frontier π*"].get_ydata(), [0.5, 1.7, 2.2])
  points = {box.get_label(): box.lines[0] for box in ax.containers}
  assert (points["policy"].get_xdata(), points["policy"].get_ydata()) == ([2.3], [1.6])


def test_the_frontier_shows_intervals_and_what_is_left_to_gain():
  policy = {"kl": 3.5, "reward": 1.5, "kl_interval": [3.0, 4.5], "reward_interval": [1.4, 1.7]}
  (ax,) = plots.frontier(SUMMARY["frontier"], {"policy": policy}).axes
  bars = [bar.get_segments()[0] for bar in ax.containers[0].lines[2]]
  np.testing.assert_allclose(bars, [[[3.0, 1.5], [4.5, 1.5]], [[3.5, 1.4], [3.5, 1.7]]])
  # Half way between (2.0, 1.7) and (5.0, 2.2).
  gap = next(line for line in ax.lines if len(line.get_xdata()) == 2)
  np.testing.assert_allclose([gap.get_xdata(), gap.get_ydata()], [[3.5, 3.5], [1.5, 1.95]])


def test_nothing_is_claimed_beyond_where_the_frontier_is_known():
  (ax,) = plots.frontier(SUMMARY["frontier"], {"policy": {"kl": 9.0, "reward": 1.5}}).axes
  assert not [line for line in ax.lines if len(line.get_xdata()) == 2]


def test_an_accuracy_says_of_how_many_pairs(tmp_path):
  held_out = {"pairs": 22.0, "rewards/accuracies_low": 0.722, "rewards/accuracies_high": 0.974}
  ledger = LEDGER | {"held_out": {"examples": 40, "evaluated": 22}}
  with one_picture():
    make_run(tmp_path, PAIRS, steps=2, held_out=held_out, ledger=ledger)
    (tmp_path / "summary.json").write_text(
      json.dumps({"pairs": 40, "trained_on": 3, "eval_accuracy": 0.9})
    )
    page = report.write(tmp_path).read_text()
  assert "22 pairs, 95%: 72.2% to 97.4%; training 75.0%" in page
  assert "22 of 40 evaluated in training (data.eval_limit)" in page
  assert "accuracy on 40 pairs, 3 of them trained on" in page
