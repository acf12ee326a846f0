"""How a benchmark takes its turn, and what it says of a block."""

import io
import json
import os
import subprocess
import sys
import time

import pytest

from dpo_jax.benchmarking import pacing
from dpo_jax.benchmarking.pacing import Pace
from dpo_jax.structs import UserError
from tests.support.paths import ROOT


def test_a_pace_is_read_over_the_usual_one():
  assert pacing.read('{"lockstep": true, "blocks": 9}', Pace(4, 3)) == Pace(9, 3, 0, True)
  assert Pace(blocks=9, block_steps=2, warmup=5).steps == 23


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("rows.jsonl", "'rows.jsonl'; beside --name=value only one JSON object of blocks, block_steps"),
    ("[1]", "only one JSON object"),
    ('{"block": 3}', "'block' in .* is not known; known are blocks"),
    ('{"blocks": 0}', "blocks is 0 in .* a whole number, 1 or more"),
    ('{"warmup": -1}', "warmup is -1 in .* a whole number, 0 or more"),
    ('{"block_steps": true}', "block_steps is True in .* a whole number"),
    ('{"lockstep": 1}', "lockstep is 1 in .* true or false"),
  ],
)
def test_a_wrong_pace_is_one_line(text, words):
  with pytest.raises(UserError, match=words):
    pacing.read(text, Pace(4, 3))


def run(pace, asked):
  """What is said by a program that calls every block by its number."""
  said = []
  for number, tell in enumerate(pacing.turns(pace, io.StringIO(asked), said.append)):
    tell({"number": number})
  return said


def test_blocks_run_when_they_are_asked_for():
  blocks = [{"block": {"number": i}} for i in range(3)]
  assert run(Pace(2, 1, lockstep=True), "go\ngo\ngo\n") == [{"ready": True}, *blocks[:2]]
  assert run(Pace(9, 1, lockstep=True), "go\ngo\ngo\n") == [{"ready": True}, *blocks]
  assert run(Pace(9, 1, lockstep=True), "go\nstop\n") == [{"ready": True}, *blocks[:1]]
  assert run(Pace(9, 1, lockstep=True), "") == [{"ready": True}]
  assert run(Pace(9, 1), "") == []  # alone: asks nobody, tells nobody
  assert len(list(pacing.turns(Pace(9, 1)))) == 9


def test_the_meter_tells_work_from_waiting():
  with pacing.Meter() as waiting:
    time.sleep(0.3)
  with pacing.Meter() as working:
    began = time.process_time()
    while time.process_time() - began < 0.3:
      pass
  assert waiting.wall_s >= 0.3 > 0.2 > waiting.cpu_s
  # Processor time is counted in ticks.
  assert working.wall_s >= 0.29 and working.cpu_s >= 0.3 - 2 / os.sysconf("SC_CLK_TCK")
  report = working.report()
  assert 0 <= report["other_cores"] <= (os.cpu_count() or 1)
  assert 0 < report["rss_mb"] <= report["peak_rss_mb"] + 1


@pytest.mark.slow
def test_the_benchmark_takes_its_turns():
  """Asked for one block of nine, it says so, runs it and ends with its line."""
  pace = json.dumps({"lockstep": True, "blocks": 9, "block_steps": 1, "warmup": 0})
  command = [sys.executable, "scripts/benchmark.py", "--config=configs/benchmark.py:controlled"]
  rows = ["--config.synthetic.pairs=16", "--config.train.batch_size=16"]
  done = subprocess.run(
    [*command, *rows, pace], cwd=ROOT, input="go\n", capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  ready, block, result = [json.loads(line.removeprefix("@")) for line in done.stdout.splitlines()]
  assert ready == {"ready": True}
  assert block["block"].keys() == {
    "wall_s", "cpu_s", "pairs", "tokens", "other_cores", "rss_mb", "peak_rss_mb",
    "peak_memory_mb",
  }  # fmt: skip
  assert block["block"]["pairs"] == 16
  assert result["steps"] == 1 and result["pairs_per_second"] > 0


def test_the_benchmark_takes_one_argument_at_most():
  command = [sys.executable, "scripts/benchmark.py", "{}", "{}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 1 and done.stderr.startswith("error: unexpected argument '{}'")
