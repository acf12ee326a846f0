"""Local launcher: several processes of one command on this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.distributed import local_launcher
from dpo_jax.structs import UserError
from tests.support.paths import ROOT

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
TWO = pytest.mark.skipif(CORES < 2, reason="needs two processors")


def start(*words, **how):
  return subprocess.Popen(
    [sys.executable, "scripts/launch/local.py", *words],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **how,
  )


def test_processors_are_shared_out_evenly():
  assert local_launcher.divide_cores(2, range(5)) == [[0, 1], [2, 3, 4]]
  assert local_launcher.divide_cores(3, [4, 6, 8]) == [[4], [6], [8]]
  with pytest.raises(UserError, match="3 processes: this machine lends 2 processors; give 1 to 2"):
    local_launcher.divide_cores(3, [0, 1])


def test_every_process_gets_its_index_before_a_pace():
  first, second = local_launcher.commands(
    ["python", "train.py", "--config=x", '{"blocks": 1}'], 2, 4321
  )
  place = ["--config.parallel.coordinator=127.0.0.1:4321", "--config.parallel.processes=2"]
  assert second == [
    *["python", "train.py", "--config=x", *place, "--config.parallel.process=1"],
    '{"blocks": 1}',
  ]
  assert first[:-2] == second[:-2]
  assert first[-2] == "--config.parallel.process=0"


@pytest.mark.parametrize(
  ("words", "line"),
  [
    ([], "usage: python scripts/launch/local.py PROCESSES COMMAND"),
    (["two", "true"], "usage: python scripts/launch/local.py PROCESSES COMMAND"),
    (["9999", "true"], "9999 processes: this machine lends"),
    (["1", "no-such-command"], "no-such-command"),
    (["1", "./README.md"], "./README.md: permission denied; COMMAND is a program"),
    (["²", "true"], "usage: python scripts/launch/local.py PROCESSES COMMAND"),
  ],
)
def test_what_cannot_be_started_is_one_line(words, line):
  process = start(*words)
  output, errors = process.communicate(timeout=60)
  assert (process.returncode, output) == (1, "")
  assert errors.startswith("error: ")
  assert line in errors
  assert errors.count("\n") == 1


def test_a_process_that_a_signal_ended_is_reported_with_the_status_of_shells():
  process = start("1", "sh", "-c", "kill -9 $$")
  _, errors = process.communicate(timeout=60)
  assert (process.returncode, errors) == (137, "error: signal 9 ended process 0\n")


WHO = """
import os, sys
number = sys.argv[-1].partition("=")[2]
print(number, len(os.sched_getaffinity(0)), os.environ["NPROC"], sys.stdin.read().split())
sys.exit(int(number))
"""


@TWO
def test_all_read_process_0_prints_and_a_failure_is_the_status():
  process = start("2", sys.executable, "-c", WHO)
  output, errors = process.communicate("go\nstop\n", timeout=60)
  share = CORES // 2
  assert (process.returncode, output, errors) == (1, f"0 {share} {share} ['go', 'stop']\n", "")


@TWO
@pytest.mark.parametrize(
  ("last", "both"),
  [("sys.exit(1)", False), ("sys.exit(3 * number)", True), ("1 / 0", True), ("pass", False)],
)
def test_an_error_of_all_is_printed_once(last, both):
  """An error that only one of the other processes has is printed, too."""
  say = f"print('first' if number == 0 else 'second', file=sys.stderr); {last}"
  program = "import sys; number = int(sys.argv[-1].partition('=')[2]); " + say
  _, errors = start("2", sys.executable, "-c", program).communicate(timeout=60)
  assert errors.startswith("first\n")
  assert ("second\n" in errors) == both


@TWO
def test_sigterm_reaches_all_processes():
  waits = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("up", flush=True)
time.sleep(60)
"""
  with start("2", sys.executable, "-c", waits) as process:
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5)  # the second, which does not say so, is up too
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert process.stderr.read() == ""


@TWO
@pytest.mark.slow
def test_the_benchmark_counts_the_rows_of_all():
  """Two processes with half a batch each report the counts of one process with all of it."""
  config = ["scripts/benchmark.py", "--config=configs/benchmark.py:controlled"]
  small = ["--config.train.batch_size=8", "--config.synthetic.pairs=32"]
  pace = '{"lockstep": true, "blocks": 1, "block_steps": 2}'
  command = [sys.executable, *config, *small, pace]
  blocks = []
  for words in ([sys.executable, "scripts/launch/local.py", "2", *command], command):
    process = subprocess.run(
      words, cwd=ROOT, input="go\n", capture_output=True, text=True, timeout=300, check=True
    )
    ready, block, last = process.stdout.splitlines()[-3:]
    assert ready == '@{"ready": true}'
    blocks.append((json.loads(block[1:])["block"], json.loads(last)))
  (two, two_last), (one, one_last) = blocks
  assert (two["pairs"], two["tokens"]) == (one["pairs"], one["tokens"]) == (16, one["tokens"])
  assert two_last["gflops_per_pair"] == pytest.approx(one_last["gflops_per_pair"], rel=1e-6)
  assert (two_last["processes"], one_last["processes"]) == (2, 1)
  assert two["rss_mb"] > 1.5 * one["rss_mb"]  # both are counted


@TWO
@pytest.mark.slow
def test_a_benchmark_ends_at_sigterm():
  """A benchmark has nothing to save, so SIGTERM ends it at once; only training finishes a step."""
  small = ["--config.train.batch_size=8", "--config.synthetic.pairs=32"]
  command = ["scripts/benchmark.py", "--config=configs/benchmark.py:controlled", *small]
  with start("2", sys.executable, *command, '{"lockstep": true}') as process:
    while process.stdout.readline() != '@{"ready": true}\n':
      assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert process.stderr.read().endswith(
      "error: signal 15 ended process 0, signal 15 ended process 1\n"
    )
