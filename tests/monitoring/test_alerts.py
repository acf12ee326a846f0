"""Alerts: told once, with value and remedy, on what is wrong; silent on what is well or noise."""

import re

import numpy as np
import pytest

from dpo_jax import defaults, losses
from dpo_jax.monitoring import alerts
from dpo_jax.monitoring.alerts import Alert, Watch
from dpo_jax.utils import field_names

STEPS, EVERY = 200, 50

# Training losses of the first 90 steps of the quickstart's second round (32,000 pairs, batches of
# 64). The policy of the first round starts it, so that even first batches have losses of their own.
SECOND_ROUND = [
  0.47, 0.85, 0.72, 0.70, 0.77, 1.16, 0.90, 0.46, 0.89, 0.61, 0.56, 0.59, 0.61, 0.42, 0.50,
  0.49, 0.37, 0.67, 0.62, 0.73, 0.32, 0.91, 0.54, 0.61, 0.68, 1.15, 0.74, 0.78, 0.59, 0.71,
  0.62, 0.69, 0.95, 0.55, 1.08, 0.66, 1.26, 0.92, 1.26, 1.32, 1.16, 0.32, 0.99, 1.01, 1.19,
  1.18, 0.91, 0.94, 0.52, 0.66, 0.77, 1.18, 0.93, 0.88, 0.71, 0.82, 0.59, 0.74, 1.11, 1.53,
  0.89, 0.72, 0.53, 0.54, 0.51, 0.55, 0.83, 0.86, 0.36, 0.60, 0.87, 1.23, 0.58, 0.59, 0.82,
  0.77, 0.37, 1.03, 0.94, 0.70, 0.72, 1.02, 1.04, 0.62, 0.68, 0.63, 1.01, 0.51, 0.57, 0.43,
]  # fmt: skip

# Metrics of training and of held-out data as functions of the share of the run that is done: a run
# that ends well.
HEALTHY = {
  "loss": lambda t: 0.69 - 0.37 * t,
  "rewards/accuracies": lambda t: 0.5 + 0.39 * t,
  "rewards/margins": lambda t: 5 * t,
  "drift/chosen": lambda t: -0.08 * t,
  "drift/rejected": lambda t: -0.22 * t,
  "drift/both_fell": lambda t: 0.5 * t,
  "drift/pair_mass": lambda t: -1.5 * t,
  "margins/chosen_longer": lambda t: 5.5 * t,
  "margins/chosen_shorter": lambda t: 4.5 * t,
}
SAMPLED = {
  "sampled/kl": lambda t: 2 * t,
  "sampled/kl_per_token": lambda t: 0.12 * t,
  "sampled/entropy": lambda t: 1.0 - 0.2 * t,
  "sampled/repetition": lambda t: 0.02 + 0.01 * t,
}
# What is otherwise in a run that goes wrong, and what its alert says of it.
WRONG = {
  "chosen falls": (
    {"drift/chosen": lambda t: -0.3 * t, "drift/rejected": lambda t: 0.0},
    ["(0.2", "nats per token less)", "sft_weight", "--loss=dpop", "--beta"],
  ),
  "both fall": (
    {
      "drift/chosen": lambda t: -0.19 * t,
      "drift/rejected": lambda t: -0.25 * t,
      "drift/both_fell": lambda t: 0.2 + 0.7 * t,
    },
    ["% of pairs", "1.2 nats per pair", "sft_weight", "--epochs"],
  ),
  "overfitting": (
    {"eval/loss": lambda t: 0.69 - t if t < 0.3 else 0.39 + 0.5 * (t - 0.3)},
    ["from 0.44 to", "training margin grew", "--epochs", "--beta"],
  ),
  "length bias": (
    {"margins/chosen_longer": lambda t: 9 * t, "margins/chosen_shorter": lambda t: -t},
    ["shorter", "ld_alpha", "simpo"],
  ),
  "far from the reference": (
    {"eval/sampled/kl": lambda t: 60 * t},
    ["nats from the reference", "--beta", "--lr"],
  ),
  "entropy falls": (
    {"eval/sampled/entropy": lambda t: 1.0 - 0.9 * t},
    ["from 1.00 to", "--beta"],
  ),
  "repetition": (
    {"eval/sampled/repetition": lambda t: 0.05 + 0.6 * t},
    ["5% at first", "sft_weight"],
  ),
  "memorized": (
    {"loss": lambda t: 0.69 * np.exp(-9 * t), "rewards/accuracies": lambda t: min(1, 0.5 + 2 * t)},
    ["accuracy is 0.99", "--epochs"],
  ),
  "loss rises": (
    {"loss": lambda t: 0.69 - t if t < 0.3 else 0.39 + 4 * (t - 0.3)},
    ["training loss rose from", "--lr", "warmup_steps"],
  ),
  "updates are lost": (
    {"update/kept": lambda t: 0.04, "update/changed": lambda t: 0.0031},
    ["only 4% of the updates", "0.31%", "model.param_dtype=float32", "--lr"],
  ),
}


def run(changed=None, *, steps=STEPS, noise=0.0, seed=0):
  """Records of a run as `metrics.jsonl` holds them."""
  changed, rng = changed or {}, np.random.default_rng(seed)
  training = HEALTHY | {k: v for k, v in changed.items() if not k.startswith("eval/")}
  held_out = {f"eval/{k}": v for k, v in (training | SAMPLED).items()} | {
    k: v for k, v in changed.items() if k.startswith("eval/")
  }
  at = lambda curves, t, sd: {k: float(v(t) + sd * rng.normal()) for k, v in curves.items()}
  records = [{"step": 0} | at(held_out, 0.0, 0.0)]
  for step in range(1, steps + 1):
    record = {"step": step} | at(training, step / steps, noise)
    if step % EVERY == 0:
      record |= at(held_out, step / steps, 0.0)
    records.append(record)
  return records


def steps_of(losses):
  """Records of steps with these losses, from step 1."""
  return [{"step": i + 1, "loss": float(x)} for i, x in enumerate(losses)]


def names(records):
  return [alert.name for alert in alerts.scan(records)]


def live(records, watch=None):
  """The same records as a training loop hands them in: a step, then its evaluation."""
  watch, found = watch or Watch(), []
  for record in records:
    held_out = {k: v for k, v in record.items() if k.startswith("eval/")}
    rest = {k: v for k, v in record.items() if k not in held_out and k != "step"}
    for part in (rest, held_out):
      found += watch.see(record["step"], part)
  return found


# --- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_run_that_ends_well_is_quiet(noise):
  assert names(run(noise=noise)) == []


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_is_told_once_by_its_name_with_value_and_remedy(name):
  changed, words = WRONG[name]
  found = alerts.scan(run(changed))
  assert [alert.name for alert in found] == [name]
  assert all(word in found[0].text for word in words), found[0].text
  assert "\n" not in found[0].text
  assert 0 < found[0].step <= STEPS


@pytest.mark.parametrize(
  "changed",
  [
    # Both lose, but in few pairs; a small loss that is not sure of its pairs; sure, not small.
    WRONG["both fall"][0] | {"drift/both_fell": lambda t: 0.4},
    WRONG["memorized"][0] | {"rewards/accuracies": lambda t: 0.5 + 0.45 * t},
    WRONG["memorized"][0] | {"loss": lambda t: 0.69 - 0.5 * t},
    # Length decides, but nothing is told apart yet.
    WRONG["length bias"][0] | {"rewards/accuracies": lambda t: 0.5},
  ],
)
def test_half_of_what_is_wrong_is_not_enough(changed):
  assert names(run(changed)) == []


@pytest.mark.parametrize("name", ["chosen falls", "both fall"])
def test_a_fall_by_a_nat_per_token_names_the_learning_rate_first(name):
  fast = {"drift/chosen": lambda t: -40 * t, "drift/rejected": lambda t: -40 * t}
  (found,) = [x for x in alerts.scan(run(WRONG[name][0] | fast)) if x.name == name]
  assert "; try a lower --lr, --config.loss.sft_weight=1" in found.text


def test_a_loss_that_rises_everywhere_is_not_overfitting():
  falls_and_rises = lambda t: 0.5 - t * (0.8 - t)
  assert names(run({"loss": falls_and_rises, "eval/loss": falls_and_rises})) == ["loss rises"]


def test_a_loss_that_blows_up_at_once_rises_too():
  blown = lambda t: 0.69 if t < 0.01 else 18 + 100 * t
  assert "loss rises" in names(run({"loss": blown}))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.18])
def test_a_loss_that_jumps_after_the_first_step_and_stays_there_rises(known, noise):
  rng = np.random.default_rng(0)
  # Rewards that are far apart: a batch of 64 then has a deviation of about 18% of its mean.
  losses = [0.69, *(18 * (1 + noise * rng.normal(size=59)))]
  records = [{"step": 0, "eval/loss": 0.69}] * known + steps_of(losses)
  (found,) = alerts.scan(records)
  assert found.name == "loss rises" and "rose from 0.69 to 1" in found.text
  # Where the held-out rows had the same loss, it was that of every batch, without noise.
  assert found.step == alerts.WARM if known else alerts.WARM <= found.step < 40


def test_a_loss_that_grows_by_half_at_every_step_rises_at_the_first_average():
  growing = [0.69 * 1.5**i for i in range(30)]
  records = [{"step": 0, "eval/loss": 0.69}, *steps_of(growing)]
  assert [(alert.name, alert.step) for alert in alerts.scan(records)] == [
    ("loss rises", alerts.WARM)
  ]


def test_there_is_a_case_for_every_rule():
  assert set(WRONG) == {rule.name for rule in alerts.RULES}


def test_what_a_remedy_names_exists():
  config = defaults.get_config()
  named = set()
  for changed, _ in WRONG.values():
    (alert,) = alerts.scan(run(changed))
    found = re.findall(r"--([a-z_.]+\w)(?:=(\w[\w.]*))?", alert.text)
    named |= {(field_names.SHORT.get(n, n.removeprefix("config.")), value) for n, value in found}
  assert len(named) >= 9
  for path, value in named:
    section, field = path.split(".")
    assert field in config[section], path
    if section == "loss" and value:
      name = value if field == "name" else "sigmoid"
      losses.resolve(name, **({} if field == "name" else {field: float(value)}))


def test_the_first_line_that_says_so_is_the_one_named():
  # Each step 0.4 nats a token beyond the last: the average passes the limit as soon as it is read.
  found = alerts.scan(run({"drift/chosen": lambda t: -0.4, "drift/rejected": lambda t: 0.0}))
  assert [(alert.step, alert.name) for alert in found] == [(alerts.WARM, "chosen falls")]


def test_texts_that_are_trained_on_can_overfit_too():
  records = [{"step": 0, "eval/loss": 6.0}]
  for step in range(1, 201):
    records.append({"step": step, "loss": 6.0 - step / 50})
    if step % 50 == 0:
      records[-1]["eval/loss"] = 3.0 if step == 50 else 3.0 + step / 100
  (alert,) = alerts.scan(records)
  assert (alert.name, alert.step) == ("overfitting", 100)
  assert "rose from 3 to 4 while the training loss fell" in alert.text


def test_on_policy_the_objective_is_what_may_rise():
  steps = np.arange(1, 201)
  noise = np.random.default_rng(0).normal(0, 1, 200)
  fine = [
    {"step": int(s), "loss": 0.05 * s + z, "objective": -s / 50}
    for s, z in zip(steps, noise, strict=True)
  ]
  assert names(fine) == []
  assert names([r | {"objective": -r["objective"]} for r in fine]) == ["loss rises"]


# --- noise, episodes ------------------------------------------------------------------------------


def test_the_second_round_of_the_quickstart_is_quiet():
  """Its first batch has by luck half the loss of the steps that follow."""
  early = SECOND_ROUND[:40]
  assert SECOND_ROUND[0] < 0.65 * np.mean(early) and np.std(early) > 0.2
  before = [{"step": 0, "eval/loss": 0.4013}]
  assert names(before + steps_of(SECOND_ROUND)) == []
  # The same steps, and after them a loss that really rises.
  assert names(before + steps_of([*SECOND_ROUND, *([2.5] * 40)])) == ["loss rises"]


@pytest.mark.parametrize("skewed", [False, True])
def test_a_flat_mean_with_batches_that_differ_by_half_raises_nothing(skewed):
  mean, deviation = 0.77, 0.355
  shape = (mean / deviation) ** 2
  for seed in range(60):
    rng = np.random.default_rng(seed)
    normal = rng.normal(mean, deviation, 250)
    loss = rng.gamma(shape, mean / shape, 250) if skewed else normal
    assert names(steps_of(loss)) == []
    assert names(steps_of([0.1, *loss])) == []


def test_a_first_batch_by_luck_changes_no_text():
  """Overfitting from the start: what the training loss fell from is an average."""
  noise = np.random.default_rng(0).normal(0, 0.25, 99)
  losses = [0.2, *(np.linspace(1.0, 0.3, 99) + noise)]
  held_out = [{"step": 0, "eval/loss": 0.5}, {"step": 50, "eval/loss": 0.9}]
  held_out.append({"step": 100, "eval/loss": 1.2})
  records = sorted([*steps_of(losses), *held_out], key=lambda record: record["step"])
  (alert,) = alerts.scan(records)
  assert alert.name == "overfitting" and "while the training loss fell from 0.8" in alert.text


@pytest.mark.parametrize(
  ("name", "metric", "error"),
  [
    ("overfitting", "eval/loss", 0.2),
    ("length bias", "eval/margins/chosen_shorter", 5.0),
    ("far from the reference", "eval/sampled/kl", 25.0),
    ("entropy falls", "eval/sampled/entropy", 0.3),
    ("repetition", "eval/sampled/repetition", 0.3),
  ],
)
def test_what_few_held_out_rows_or_samples_show_may_be_chance(name, metric, error):
  records = run(WRONG[name][0])
  for wide, expected in ((0.01, [name]), (error, [])):
    with_error = [r | ({f"{metric}_error": wide} if metric in r else {}) for r in records]
    assert names(with_error) == expected


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_no_rise(seed):
  loss = np.random.default_rng(seed).normal(0.69, 0.5, 2000)
  assert names([{"step": i + 1, "loss": x} for i, x in enumerate(loss)]) == []


@pytest.mark.parametrize(
  ("metric", "value"),
  [("loss", 3.0), ("drift/chosen", -2.0), ("rewards/accuracies", 1.0), ("loss", float("nan"))],
)
def test_one_wild_step_is_passed_over(metric, value):
  records = run()
  records[120][metric] = value
  assert names(records) == []


def test_one_evaluation_beyond_the_limit_is_passed_over_but_two_and_one_far_beyond_are_not():
  def found(*kls):
    held_out = [{"eval/sampled/kl": kl, "eval/sampled/kl_per_token": 0.0} for kl in kls]
    return [alert.step for alert in alerts.scan([{"step": i} | m for i, m in enumerate(held_out)])]

  limit = alerts.KL
  assert found(0, 1.1 * limit, 0.9 * limit, 1.1 * limit, 0) == []
  assert found(0, 1.1 * limit, 1.1 * limit, 0) == [2]
  assert found(0, alerts.SURE * limit, 0) == [1]


def test_an_episode_is_told_once_and_the_next_one_again():
  wave = lambda low: [-0.3] * 100 + [low] * 100 + [-0.3] * 100
  records = lambda low: [{"step": i, "drift/chosen": x} for i, x in enumerate(wave(low))]
  assert len(alerts.scan(records(-0.17))) == 1  # below the limit, but not over
  assert len(alerts.scan(records(-0.05))) == 2


def test_what_is_not_a_number_is_not_there():
  records = run({"drift/chosen": lambda t: -0.3 * t, "drift/rejected": lambda t: 0.0})
  without, *others = (
    alerts.scan([r | ({"drift/chosen": hole} if i % 2 else {}) for i, r in enumerate(records)])
    for hole in (None, float("nan"), float("inf"))
  )
  assert [alert.name for alert in without] == ["chosen falls"]
  assert others == [without, without]
  assert names([{"step": 1}, {"step": 2, "loss": None, "eval/loss": float("inf")}]) == []


def test_averages_over_steps_by_hand():
  series = alerts._Series("loss")
  series.add(3.0)
  assert series.now == pytest.approx(3.0)
  for _ in range(1000):
    series.add(3.0)
  for _ in range(alerts.HALF_LIFE):
    series.add(5.0)
  assert series.now == pytest.approx(4.0)
  held_out = alerts._Series("eval/loss")
  for value in (3.0, 5.0):
    held_out.add(value)
    assert held_out.now == value


@pytest.mark.parametrize("steps", [alerts.WARM, 300])
def test_the_error_of_an_average_is_what_it_varies_by(steps):
  rng = np.random.default_rng(0)
  ends, errors = [], []
  for _ in range(400):
    series = alerts._Series("loss")
    for value in rng.normal(0, 2.0, steps):
      series.add(value)
    ends.append(series.now)
    errors.append(series.error)
  assert np.std(ends) == pytest.approx(np.mean(errors), rel=0.15)


# --- live, from the file, after a kill ------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_the_report_finds_what_the_log_told(name):
  records = run(WRONG[name][0], noise=0.01)
  assert alerts.scan(records) == live(records) != []


@pytest.mark.parametrize("cut", [1, 60, 100, 150, 200])
def test_a_resumed_watch_says_what_is_new_and_nothing_else(cut):
  records = run(WRONG["both fall"][0] | WRONG["overfitting"][0])
  watch = Watch()
  before = [alert for record in records[:cut] for alert in watch.see_record(record)]
  assert before + live(records[cut:], watch) == alerts.scan(records)
  assert all(isinstance(alert, Alert) for alert in before)
