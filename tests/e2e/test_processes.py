"""Several processes over loopback: the run of one device, agreed on at step 0, ended together."""

import json
import multiprocessing
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpo_jax import train
from dpo_jax.distributed import executor, heartbeat, preemption, processes
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.structs import UserError
from dpo_jax.training.checkpoint import latest_step
from tests.support import small_task

pytestmark = pytest.mark.usefixtures("one_picture")

GENTLE, TWENTY = small_task.GENTLE, small_task.TWENTY
ONE = {"parallel.devices": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  folder = small_task.write(tmp_path_factory.mktemp("task"))
  rows = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
  prompts = [json.dumps({"prompt": row["prompt"]}) for row in rows]
  (folder / "prompts.jsonl").write_text("\n".join(prompts))
  return folder


def alone(task, name, **changes):
  """The same run on one device of this process; once for all that are compared with it."""
  if not (task / name / "result.json").is_file():  # a run that was stopped has a report too
    train.execute(small_task.configured(task, **ONE, **changes), task / name)
  return small_task.outcome(task / name)


def together(task, name, count, **changes):
  for status, said in small_task.end(small_task.start(task, name, count, **changes)):
    assert status == 0, said
  return small_task.outcome(task / name)


def reached(task, name, lines):
  """Waits until a run has written so many lines."""
  file = task / name / "metrics.jsonl"
  while not (file.is_file() and file.read_text().count("\n") >= lines):
    time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_are_the_run_of_one_device(task):
  """Parameters divided among the devices of both, by the command as users have it."""
  whole = {
    "program": ("-m", "dpo_jax.train"),
    "begin": small_task.from_nothing,
    "parallel.fsdp": 4,
  }
  found = together(task, "two", 2, **GENTLE, **whole)
  small_task.assert_close(found, alone(task, "alone", **GENTLE))


@pytest.mark.slow
def test_processes_that_differ_stop_before_the_first_step(task):
  each = {1: {"seed": 3}}
  ended = small_task.end(small_task.start(task, "unlike", 2, each=each))
  for status, said in ended:
    assert status == 1
    assert "config.seed of process 1 differs from that of process 0" in said
  assert not (task / "unlike").exists()


def test_one_that_fails_ends_the_others_and_says_why(task):
  each = {1: {"data.path": "/nowhere.jsonl"}}
  env = small_task.own_programs(task)
  first, second = small_task.end(small_task.start(task, "failing", 2, each=each, env=env))
  assert first[0] == second[0] == 1
  assert "stopped: data.path: no data file /nowhere.jsonl" in first[1]
  assert "error: data.path: no data file /nowhere.jsonl" in second[1]
  assert "Traceback" not in first[1] + second[1]


GONE = "is gone without a word"
# Training that counts another as lost sooner.
IMPATIENT = """
import runpy
from dpo_jax.distributed import heartbeat
heartbeat.INTERVAL, heartbeat.TIMEOUT = 0.5, 6.0
runpy.run_module("dpo_jax.train", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("lost", "sent", "words"),
  [
    (0, signal.SIGKILL, GONE),
    (0, signal.SIGSTOP, "gave no sign of life for 6 seconds"),
    (1, signal.SIGSTOP, "gave no sign of life for 6 seconds"),
  ],
)
def test_one_that_is_lost_ends_the_others_who_say_which(task, lost, sent, words):
  name = f"lost{lost}_{sent.name}"
  given = {"program": ("-c", IMPATIENT), "train.steps": 4000, "eval.every": 0}
  started = small_task.start(task, name, 2, env=small_task.own_programs(task), **given)
  reached(task, name, 3)
  started[lost].send_signal(sent)
  since = time.monotonic()
  try:
    other = started[1 - lost]
    (status, said) = small_task.end([other], timeout=60)[0]
    assert time.monotonic() - since < 30
    assert f"error: process {lost} " in said and words in said
    assert status == preemption.AGAIN
    if sent == signal.SIGSTOP:  # one that wakes up again finds itself lost
      started[lost].send_signal(signal.SIGCONT)
      assert small_task.end([started[lost]], timeout=60)[0][0] == preemption.AGAIN
  finally:
    for process in started:
      process.kill()
      process.communicate()


@pytest.mark.parametrize(
  ("word", "status", "waited"),
  [
    ("1 process 1 (there) stopped: no such file", 1, [1.0]),
    ("75 process 0 gave no sign of life for 60 seconds", 75, []),
  ],
)
def test_the_first_waits_for_others_to_speak_unless_it_was_lost(monkeypatch, word, status, waited):
  ended, slept = [], []
  monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
  monkeypatch.setattr(heartbeat.time, "sleep", slept.append)
  ours, theirs = multiprocessing.Pipe()
  theirs.send_bytes(word.encode())
  with heartbeat.Heartbeat() as beat:
    beat._listen("process 1 (there)", ours)
  assert (ended, slept) == ([status], waited)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    (("", 2, 0), "parallel.coordinator is empty"),
    (("somewhere", 2, 0), "must be HOST:PORT or auto"),
    (("127.0.0.1:1", 2, 2), "parallel.process is 2 of parallel.processes 2"),
    (("127.0.0.1:1", 0, 0), "parallel.process is 0 of parallel.processes 0"),
  ],
)
def test_settings_that_name_no_run_are_refused(settings, words):
  with pytest.raises(UserError, match=words):
    processes.start(*settings)


@pytest.mark.slow
def test_one_that_is_waited_for_in_vain_is_said_to_be():
  program = (
    "from dpo_jax.distributed import processes; processes.START_TIMEOUT = 1.0;"
    " processes.start('127.0.0.1:{port}', 2, {index})"
  )
  for index in (0, 1):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      given = program.format(port=probe.getsockname()[1], index=index)
    done = subprocess.run(
      [sys.executable, "-c", given], cwd=small_task.ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "error: parallel.coordinator=127.0.0.1:" in done.stderr
    assert "not all processes of this run came within 1 seconds" in done.stderr


def test_one_process_makes_every_row():
  for mode in executor.MODES:
    assert executor.Executor(mode, 8).share == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "changes"),
  [
    (2, {"parallel.mode": "pmap"}),
    (2, {"parallel.sequence": 4, "loss.name": "kto"}),
    (4, {"parallel.fsdp": 2, "parallel.tensor": 2}),
    (2, {"train.accumulate": 2, "loss.name": "aot", "data.layout": "packed"}),
  ],
  ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_steps_of_several_processes_are_those_of_one_device(task, count, changes):
  name = f"{count}_{'_'.join(map(str, changes.values()))}"
  found = together(task, name, count, **(TWENTY | changes))
  same = {key: value for key, value in changes.items() if not key.startswith("parallel")}
  one = "_".join(["one", *map(str, same.values())])
  small_task.assert_close(found, alone(task, one, **(TWENTY | same)))


SAMPLED = {"on_policy.reward": "controlled", "on_policy.max_tokens": 12, "data.row_length": 0}


@pytest.mark.slow
def test_samples_of_several_processes_are_those_of_one(task):
  """The policy is divided among both, and each samples from a copy of its own."""
  given = GENTLE | SAMPLED | {"data.path": str(task / "prompts.jsonl"), "eval.samples": 8}
  found = together(task, "sampled", 2, **given, **{"parallel.fsdp": 4})
  small_task.assert_close(found, alone(task, "sampled_one", **given))


@pytest.mark.slow
def test_a_store_filled_by_several_serves_one(task):
  store = {"reference.store": str(task / "store")}
  found = together(task, "filling", 2, **GENTLE, **store)
  parts = sorted((task / "store").rglob("*.safetensors"))
  again = alone(task, "served", **GENTLE, **store)
  assert sorted((task / "store").rglob("*.safetensors")) == parts
  small_task.assert_close(found, again)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_asked_to_stop_one_all_leave_at_one_step_and_go_on(task):
  """One of two by SIGTERM; then all of four by Ctrl-C; then by one; the same as undisturbed."""
  given = TWENTY | {"train.steps": 60}
  straight = alone(task, "one_process", **given)
  started = small_task.start(task, "told", 2, **given)
  reached(task, "told", 4)
  started[1].send_signal(signal.SIGTERM)
  assert [status for status, _ in small_task.end(started)] == [preemption.AGAIN] * 2
  step = latest_step(task / "told" / "checkpoints")
  assert step == read_metrics(task / "told" / "metrics.jsonl")[-1]["step"] < 60
  started = small_task.start(task, "told", 4, **given, **{"parallel.fsdp": 4})
  reached(task, "told", step + 3)
  for process in started:
    process.send_signal(signal.SIGINT)
  assert [status for status, _ in small_task.end(started)] == [130] * 4
  found = alone(task, "told", **given)
  assert [line["step"] for line in found[0]] == list(range(61))
  small_task.assert_close(found, straight)


@pytest.mark.slow
def test_a_lost_process_costs_what_was_not_saved_and_no_more(task):
  given = {"train.steps": 30, "checkpoint.every": 5, "eval.every": 10}
  straight = together(task, "whole", 2, **given)
  started = small_task.start(task, "broken", 2, env=small_task.own_programs(task), **given)
  reached(task, "broken", 12)
  started[1].kill()
  status, said = small_task.end(started)[0]
  assert status == preemption.AGAIN and "error: process 1 " in said and GONE in said
  found = together(task, "broken", 2, **given)
  assert [line["step"] for line in found[0]] == list(range(31))
  files = [task / name / "export" / "model.safetensors" for name in ("whole", "broken")]
  assert files[0].read_bytes() == files[1].read_bytes()
  small_task.assert_close(found, straight)
  shutil.rmtree(task / "broken")
