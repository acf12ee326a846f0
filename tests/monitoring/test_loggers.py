"""The log of a run: every step once, on disk at once, the same after a kill and a resume."""

import io
import json
import math
import resource
import struct

import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from dpo_jax.monitoring import alerts, loggers
from dpo_jax.monitoring.loggers import Loggers, read_metrics
from dpo_jax.structs import UserError
from dpo_jax.utils import progress


def plain() -> rich.console.Console:
  return rich.console.Console(file=io.StringIO(), width=200, force_terminal=False)


def lines(folder) -> list[str]:
  return (folder / "metrics.jsonl").read_text().splitlines()


def write_steps(folder, first, last, **options):
  with Loggers(folder, start_step=first - 1, total_steps=9, console=plain(), **options) as log:
    for step in range(first, last + 1):
      log.write(step, {"loss": 1 / step})


def events(folder) -> list:
  """Every TensorBoard event, read as the format is documented: length, crc, bytes, crc."""
  found = []
  for path in sorted(folder.glob("events.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
      at += 12 + length + 4
  return found


def test_a_line_a_step_in_order_with_numbers_of_every_kind(tmp_path):
  with Loggers(tmp_path / "new" / "run", total_steps=2, console=plain()) as log:
    log.write(1, {"loss": np.float32(0.5), "rewards/accuracies": 1})
    log.write(2, {"loss": 0.25})
  assert lines(tmp_path / "new" / "run") == [
    '{"step": 1, "loss": 0.5, "rewards/accuracies": 1.0}',
    '{"step": 2, "loss": 0.25}',
  ]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
  with Loggers(tmp_path, total_steps=2, console=plain()) as log:
    log.write(1, {"loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_evaluation_joins_the_line_of_its_step(tmp_path):
  with Loggers(tmp_path, total_steps=2, console=plain()) as log:
    log.write_eval(0, {"loss": 0.69})
    log.write(1, {"loss": 0.5})
    log.write(2, {"loss": 0.25})
    log.write_eval(2, {"loss": 0.3, "rewards/margins": 1.5})
  assert read_metrics(tmp_path / "metrics.jsonl") == [
    {"step": 0, "eval/loss": 0.69},
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 0.25, "eval/loss": 0.3, "eval/rewards/margins": 1.5},
  ]


def test_a_shorter_line_leaves_nothing_of_the_longer_one(tmp_path):
  with Loggers(tmp_path, total_steps=1, console=plain()) as log:
    log.write_eval(1, {"loss": 0.123456789})
    log.write_eval(1, {"loss": 0.5})
  assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "eval/loss": 0.5}]
  assert len(lines(tmp_path)) == 1


def test_what_is_not_finite_is_null(tmp_path):
  with Loggers(tmp_path, total_steps=1, console=plain()) as log:
    log.write(1, {"loss": math.nan, "grad_norm": math.inf, "logps/chosen": -3.0})
  refuse = lambda word: pytest.fail(f"{word} is not JSON")
  (line,) = lines(tmp_path)
  assert json.loads(line, parse_constant=refuse) == {
    "step": 1, "loss": None, "grad_norm": None, "logps/chosen": -3.0,
  }  # fmt: skip


def test_steps_are_written_in_order(tmp_path):
  with Loggers(tmp_path, total_steps=3, console=plain()) as log:
    log.write(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 1 after step 2"):
      log.write(1, {"loss": 1.0})


@pytest.mark.parametrize("resumed_from", [0, 1, 3, 5])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, resumed_from):
  write_steps(tmp_path / "straight", 1, 9)
  write_steps(tmp_path / "resumed", 1, 5)
  write_steps(tmp_path / "resumed", resumed_from + 1, 9)
  assert lines(tmp_path / "resumed") == lines(tmp_path / "straight")


def test_an_unfinished_last_line_is_passed_over_and_mended(tmp_path):
  write_steps(tmp_path, 1, 4)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')
  assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
  write_steps(tmp_path, 5, 6)
  assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', "\udcff"])
def test_a_broken_line_is_named_and_nothing_lost(tmp_path, line):
  write_steps(tmp_path, 1, 2)
  with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
    file.write(line + "\n")
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(UserError, match=r"metrics\.jsonl:3: not a JSON object .* delete that line"):
    Loggers(tmp_path, start_step=2, total_steps=4, console=plain())
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_evaluation_after_a_resume_joins_the_line_before_it(tmp_path):
  write_steps(tmp_path, 1, 4)
  with Loggers(tmp_path, start_step=3, total_steps=9, console=plain()) as log:
    log.write_eval(3, {"loss": 0.5})
  assert read_metrics(tmp_path / "metrics.jsonl")[2:] == [
    {"step": 3, "loss": 1 / 3, "eval/loss": 0.5}
  ]


def test_tensorboard_gets_the_finite_scalars(tmp_path):
  with Loggers(tmp_path, total_steps=2, console=plain()) as log:
    log.write(1, {"loss": 0.5, "grad_norm": math.nan})
    log.write_eval(1, {"loss": 0.75})
  scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
  assert scalars == [(1, "loss", 0.5), (1, "eval/loss", 0.75)]


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path):
  write_steps(tmp_path, 1, 5)
  write_steps(tmp_path, 4, 5)
  start = event_pb2.SessionLog.START
  marks = [e.step for e in events(tmp_path) if e.session_log.status == start]
  assert marks == [0, 4]


@pytest.mark.parametrize("room", [150, 3000])
def test_a_full_disk_is_one_line_and_no_end_of_waiting(tmp_path, room):
  """Files may not grow beyond so many bytes: the events meet it, and a line of the metrics."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  values = {f"metric/{i}": 0.5 for i in range(30)}
  log = Loggers(tmp_path, total_steps=100, console=plain())
  refused = pytest.raises(UserError, match=r"metrics could not be written in .*: file too large;")
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    with refused, log:
      for step in range(1, 100):
        log.write(step, values)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class Clock:
  """A clock that runs a second per reading."""

  now = 0.0

  def __call__(self) -> float:
    self.now += 1.0
    return self.now


@pytest.fixture
def a_second_per_step(monkeypatch):
  monkeypatch.setattr(progress.Pace.__init__, "__defaults__", (Clock(),))


@pytest.mark.usefixtures("a_second_per_step")
def test_plain_lines_name_step_time_left_and_numbers(tmp_path):
  console = plain()
  with Loggers(tmp_path, total_steps=20, every=10, console=console) as log:
    log.write_eval(0, {"loss": 0.6931, "rewards/accuracies": 0.5})
    for step in range(1, 21):
      values = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 1.25}
      log.write(step, values | {"pairs_per_second": 1234.4, "grad_norm": 3.0})
    log.say("done [with] it")
  assert console.file.getvalue().splitlines() == [
    "eval step 0  loss 0.6931  accuracy 0.500",
    # The first step compiles, and tells nothing about the others.
    "step 1/20  loss 0.5000  accuracy 0.750  margin 1.250  1,234 pairs/s",
    "step 10/20  0:10 left  loss 0.5000  accuracy 0.750  margin 1.250  1,234 pairs/s",
    "step 20/20  loss 0.5000  accuracy 0.750  margin 1.250  1,234 pairs/s",
    "done [with] it",
  ]


@pytest.mark.parametrize(
  ("metrics", "unit"),
  [
    (["loss", "logps/chosen"], "texts"),
    (["loss", "rewards/chosen", "rewards/margins"], "pairs"),
    (["loss", "kl", "rewards/desirable", "rewards/undesirable"], "completions"),
    (["loss", "rewards/best", "rewards/margins"], "rankings"),
    (["loss", "reward", "kl", "objective"], "prompts"),
    # Pairs that are made of samples have the mean reward of these.
    (["loss", "reward", "rewards/margins"], "pairs"),
  ],
)
def test_speed_is_in_what_a_row_of_the_data_is(metrics, unit):
  assert loggers.unit_of(metrics) == unit


def test_progress_of_samples_tells_their_reward_and_distance(tmp_path):
  console = plain()
  with Loggers(tmp_path, total_steps=2, console=console) as log:
    log.write(1, {"reward": 0.5, "kl": 1.234, "objective": -0.4})
    log.write_eval(1, {"loss": 0.5, "sampled/kl": 2.5, "sampled/repetition": math.nan})
  printed = console.file.getvalue().splitlines()
  assert printed[0].startswith("step 1/2  reward 0.500  kl 1.23")
  assert printed[1] == "eval step 1  loss 0.5000  sampled kl 2.50"


# --- alerts ---------------------------------------------------------------------------------------


def write_wrong(folder, first, last):
  """Steps whose chosen completions lose 0.3 nats per token, evaluated far away at every tenth."""
  console = plain()
  with Loggers(folder, start_step=first - 1, total_steps=60, console=console) as log:
    if first == 1:
      log.write_eval(0, {"sampled/kl": 0.0, "sampled/kl_per_token": 0.0})
    for step in range(first, last + 1):
      log.write(step, {"drift/chosen": -0.3, "drift/rejected": 0.0})
      if step % 10 == 0:
        log.write_eval(step, {"sampled/kl": float(step), "sampled/kl_per_token": math.nan})
      if step % 10 == 5:
        log.write_eval(step, {"sampled/kl": 40.0, "sampled/kl_per_token": 0.0})
  return [x for x in console.file.getvalue().splitlines() if x.startswith("warning:")]


def test_an_alert_is_a_line_of_the_log_on_its_step(tmp_path):
  far, falls = write_wrong(tmp_path, 1, 60)
  assert far.startswith("warning: alert at step 5: samples are 40.0 nats from the reference")
  assert falls.startswith("warning: alert at step 20: the model gives the chosen completions less")
  assert "(0.30 nats per token less)" in falls
  assert "--config.loss.sft_weight" in falls
  found = alerts.scan(read_metrics(tmp_path / "metrics.jsonl"))
  assert [f"warning: alert at step {a.step}: {a.text}" for a in found] == [far, falls]


@pytest.mark.parametrize("killed_at", [3, 12, 19, 20, 45])
def test_a_resumed_run_says_no_alert_again_and_misses_none(tmp_path, killed_at):
  whole = write_wrong(tmp_path / "whole", 1, 60)
  first = write_wrong(tmp_path / "cut", 1, killed_at)
  assert first + write_wrong(tmp_path / "cut", killed_at + 1, 60) == whole


def test_an_alert_of_steps_that_are_taken_again_is_said_again(tmp_path):
  assert len(write_wrong(tmp_path, 1, 30)) == 2
  (falls,) = write_wrong(tmp_path, 11, 60)
  assert falls.startswith("warning: alert at step 20")


def test_a_terminal_gets_one_line_that_moves(tmp_path):
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True, width=120, color_system=None)
  with Loggers(tmp_path, total_steps=20, console=console) as log:
    for step in range(1, 21):
      log.write(step, {"loss": 0.5, "rewards/margins": 1.25})
  shown = file.getvalue()
  assert "step 20/20" in shown
  assert "loss 0.5000  margin 1.250" in shown
  assert "step 7/20" not in shown.splitlines()[-1]


MANY = {
  "loss": 0.5,
  "rewards/accuracies": 0.75,
  "rewards/margins": 1.25,
  "reward": 0.5,
  "kl": 12.5,
  "sampled/kl": 2.5,
  "pairs_per_second": 1234.0,
}


@pytest.mark.usefixtures("a_second_per_step")
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_keeps_step_and_time_left(tmp_path, width):
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True, width=width, color_system=None)
  with Loggers(tmp_path, total_steps=20_000, console=console) as log:
    for step in range(1, 1001):
      log.write(step, MANY)
  (line,) = {
    x.split("\r")[-1].removeprefix("\x1b[2K")
    for x in file.getvalue().splitlines()
    if "step 1000/20000" in x
  }
  assert len(line) <= width and "5:16:40 left" in line  # 19,000 steps of a second
  assert ("loss 0.5000" in line) == (width >= 80) and "…" not in line
  assert ("1,234 pairs/s" in line) == (width >= 120)


def test_fields_go_in_the_order_of_their_importance():
  fields = {"loss": "loss 1", "rewards/margins": "margin 2", "pairs_per_second": "3 pairs/s"}
  assert loggers.fit(fields, 80) == "loss 1  margin 2  3 pairs/s"
  assert loggers.fit(fields, 20) == "loss 1  3 pairs/s"
  assert loggers.fit(fields, 8) == "loss 1"
  assert loggers.fit(fields, 3) == loggers.fit({}, 8) == ""


def test_the_bar_shows_what_is_done_between_two_steps(tmp_path):
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True, width=80, color_system=None)
  with Loggers(tmp_path, total_steps=20, console=console) as log:
    log.write(1, {"loss": 0.5})
    log._progress._show("evaluating 3/8")
    log._progress._progress.refresh()
    assert "evaluating 3/8" in file.getvalue() and "loss 0.5000" not in file.getvalue()
    log._progress._show("")
  assert "loss 0.5000" in file.getvalue()


def test_files_are_closed_when_training_fails(tmp_path):
  with pytest.raises(RuntimeError), Loggers(tmp_path, total_steps=2, console=plain()) as log:
    log.write(1, {"loss": 0.5})
    raise RuntimeError
  assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
  assert [v.tag for e in events(tmp_path) for v in e.summary.value] == ["loss"]


def test_evaluation_sets_have_a_line_each(tmp_path):
  console = plain()
  with Loggers(tmp_path, total_steps=2, console=console) as log:
    log.write_eval(
      0, {"loss": 0.5, "x/loss": 0.25, "x/rewards/accuracies": 1, "by_source/a/loss": 2}
    )
  shown = console.file.getvalue().splitlines()
  assert shown[:3] == [
    "eval step 0  loss 0.5000",
    "  x  loss 0.2500  accuracy 1.000",
    "  by_source/a  loss 2.0000",
  ]
  (line,) = read_metrics(tmp_path / "metrics.jsonl")
  assert line["eval/x/loss"] == 0.25 and line["eval/by_source/a/loss"] == 2


def test_an_accuracy_comes_with_its_number_of_pairs(tmp_path):
  """20 of 22 pairs: Wilson's interval is 72 to 97 per cent."""
  found = {"loss": 0.5, "rewards/accuracies": 20 / 22, "pairs": 22}
  interval = {"rewards/accuracies_low": 0.7222, "rewards/accuracies_high": 0.9747}
  out = io.StringIO()
  with Loggers(tmp_path, total_steps=2, console=rich.console.Console(file=out)) as log:
    log.write_eval(0, found | interval)
    # Rankings, whose comparisons are not independent.
    log.write_eval(1, found | {"rewards/best": 1.0})
  lines = out.getvalue().splitlines()
  assert lines[0] == "eval step 0  loss 0.5000  accuracy 0.909 (22 pairs, 95%: 72–97%)"
  assert len(lines[0] + "  margin 0.055") < 80  # one line of a terminal
  assert lines[1] == "eval step 1  loss 0.5000  accuracy 0.909 (22 rankings)"
