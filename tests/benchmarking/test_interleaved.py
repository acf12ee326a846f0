"""Programs in turns: stand-ins that speak the protocol, and what is made of what they say."""

import dataclasses
import importlib
import io
import json
import runpy
import subprocess
import sys

import pytest

from dpo_jax.benchmarking import interleaved, pacing, suites
from dpo_jax.benchmarking.interleaved import Contestant, Rules
from dpo_jax.benchmarking.pacing import Pace
from tests.support.paths import ROOT

# Takes seconds a block, and blocks after which it fails, and how; notes its turns in a file.
STAND_IN = """
import json, os, signal, sys
name, seconds, last, how, notes = sys.argv[1:6]
pace = json.loads(sys.argv[6])
note = lambda word: open(notes, "a").write(f"{name} {word}\\n")
def fail():
  if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  print("warning: much\\n" + how, file=sys.stderr)
  sys.exit(1)
note("start")
if not pace["lockstep"]:
  sys.exit(0)
if last == "0":
  fail()
print("noise")
print("@" + json.dumps({"ready": True}), flush=True)
for number in range(1, pace["blocks"] + 1):
  if sys.stdin.readline().strip() != "go":
    break
  note("block")
  # The rows of every other block are twice as long, and take twice the time.
  size = 1 + number % 2
  block = {"wall_s": float(seconds) * size, "tokens": 100 * size, "pairs": 4, "cpu_s": 1,
           "other_cores": float(os.environ.get("OTHERS", 0)), "peak_memory_mb": 10 * number}
  print("@" + json.dumps({"block": block}), flush=True)
  if str(number) == last:
    fail()
print(json.dumps({"steps": pace["block_steps"]}))
note("end")
"""


@pytest.fixture
def stage(tmp_path):
  """Makes contestants, and reads what they noted."""
  script, notes = tmp_path / "stand_in.py", tmp_path / "notes"
  script.write_text(STAND_IN)
  notes.touch()

  class Stage:
    logs = tmp_path / "logs"

    def make(self, name, seconds, last="-", how="", **more):
      command = (sys.executable, str(script), name, str(seconds), str(last), how, str(notes))
      return Contestant(name, command, **more)

    def noted(self):
      return [tuple(line.split()) for line in notes.read_text().splitlines()]

    def run(self, contestants, **rules):
      usual = {"rounds": 3, "pace": Pace(1, 2, 1), "quiet_s": 0.0}
      return interleaved.compete(
        contestants, Rules(**(usual | rules)), self.logs, say=lambda line: None
      )

  return Stage()


def test_loaded_programs_alternate_and_the_first_turn_goes_round(stage):
  found = stage.run([stage.make("x", 1), stage.make("y", 2)])
  noted = stage.noted()
  assert noted[:2] == [("x", "start"), ("y", "start")]
  assert [name for name, what in noted if what == "block"] == list("xyyxxy")
  assert sorted(noted[8:]) == [("x", "end"), ("y", "end")]
  assert len(found["rounds"]) == 3 and not found["failed"]
  assert found["results"] == {"x": {"steps": 2}, "y": {"steps": 2}}


def test_programs_apart_start_anew_in_every_round(stage):
  stage.run([stage.make("x", 1), stage.make("y", 2)], rounds=2, loaded=False, pace=Pace(2, 2))
  one = lambda name: [(name, what) for what in ("start", "block", "block", "end")]
  assert stage.noted() == one("x") + one("y") + one("y") + one("x")


def test_ratios_by_hand(stage):
  """Of 100 tokens in 1, 2 and 0.5 s: the quickest peer is y, whose memory rises by the block."""
  contestants = [
    stage.make("x", 2, peer=True),
    stage.make("y", 1, peer=True),
    stage.make("z", 0.5),
    stage.make("low", 0.25),
  ]
  found = stage.run(contestants)
  base, rows = interleaved.summary(contestants, found, tokens_per_pair=50)
  assert base == "y"
  assert [rows[name]["ratio"] for name in ("x", "y", "z", "low")] == [0.5, 1, 2, 4]
  assert rows["z"]["tokens_per_s"] == 200 and rows["z"]["pairs_per_s"] == 4
  assert rows["z"]["peak_memory_mb"] == 30 and rows["z"]["rounds"] == 3
  text = interleaved.table(base, rows)
  assert "| program | pairs/s | times y (least to most) | peak MB | rounds |" in text
  assert "| z | 4 | 2.00 (2.00–2.00) | 30 | 3 |" in text


@pytest.mark.parametrize(
  ("how", "words"),
  [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "out of memory"),
    ("RESOURCE_EXHAUSTED: while allocating", "out of memory"),
    ("killed", "out of memory"),
    ("KeyError: 'x'", "failed (1): KeyError: 'x'"),
  ],
)
@pytest.mark.parametrize("last", [0, 1])
def test_a_contestant_that_fails_is_a_row(stage, how, words, last):
  """Before it is ready, or after a block; the others go on."""
  contestants = [stage.make("x", 1, last, how, peer=True), stage.make("y", 1)]
  found = stage.run(contestants)
  assert found["failed"] == {"x": words}
  base, rows = interleaved.summary(contestants, found, 50)
  assert rows["y"]["rounds"] == 3
  # A block that it had is compared by; without any there is no ratio, but a rate.
  assert base == ("x" if last else None)
  assert rows["y"]["ratio"] == (1 if last else None)
  text = interleaved.table(base, rows)
  assert (f"1; then {words} |" if last else f"| x | {words} | – | – | – |") in text


def test_rounds_beside_others_are_run_again_and_told(stage):
  busy = stage.make("x", 1, environment={"OTHERS": "0.5"})
  found = stage.run([busy], rounds=2, spare=3)
  assert len(found["rounds"]) == 5 and not any(one["clean"] for one in found["rounds"])
  _, rows = interleaved.summary([busy], found, 50)
  assert rows["x"]["rounds"] == 5 and rows["x"]["clean"] == 0


def test_what_is_to_be_prepared_runs_once_before(stage):
  stage.run([stage.make("x", 1, prepare=True)], rounds=1)
  assert [what for _, what in stage.noted()] == ["start", "start", "block", "end"]


# -- the peers -------------------------------------------------------------------------------------


@pytest.fixture
def trl_step(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks" / "peers")
  return importlib.import_module("trl_step")


def rows_of(lengths):
  ids = lambda count: list(range(count))
  return [
    {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in lengths
  ]


def test_rows_by_length_are_all_there_in_batches_of_like_length(trl_step, tmp_path):
  path = tmp_path / "pairs.jsonl"
  rows = rows_of([(i, 1, 1) for i in range(1, 11)])
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  options = trl_step.Options(str(path), {}, batch_size=4)
  found = [len(row["prompt_ids"]) for row in trl_step.read_pairs(options)]
  batches = [found[:4], found[4:8], found[8:]]
  assert sorted(batches[:2]) == [[1, 2, 3, 4], [5, 6, 7, 8]] and batches[2] == [9, 10]
  options = dataclasses.replace(options, sampling="sequential")
  assert trl_step.read_pairs(options) == rows


def test_a_trainers_steps_become_blocks(trl_step, monkeypatch, capsys):
  """After 2 steps to warm up, blocks of 2; of rows that come round again, by hand."""
  monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))

  class Memory:
    wait = staticmethod(lambda: None)
    peak_mb = staticmethod(lambda: 7.4)

  rows = rows_of([(3, 1, 2), (5, 1, 1), (1, 1, 1)])
  pace = Pace(blocks=9, block_steps=2, warmup=2, lockstep=True)
  blocks = trl_step.Blocks(pace, rows, 1, Memory)
  assert [blocks.step_done() for _ in range(6)] == [False] * 5 + [True]
  said = [json.loads(line.removeprefix("@")) for line in capsys.readouterr().out.splitlines()]
  assert said[0] == {"ready": True} and len(said) == 3
  # Steps 3 and 4 see the third row and the first: 2 + 2 and 6 + 3; then the second and the third.
  assert [one["block"]["tokens"] for one in said[1:]] == [13, 16]
  assert [one["block"]["pairs"] for one in said[1:]] == [2, 2]
  assert blocks.result()["steps"] == 4 and blocks.result()["peak_memory_mb"] == 7


def test_every_program_of_the_suites_can_be_asked_for(trl_step):
  """Shapes, fields and options that exist; names that tell programs apart."""
  get_config = runpy.run_path(str(ROOT / "configs" / "benchmark.py"))["get_config"]
  known = {field.name for field in dataclasses.fields(trl_step.Options)}
  for suite, join in ((suites.CPU, None), (suites.GPU, ",lengths=")):
    for group, programs in suite.items():
      names = [one.name for one in programs]
      assert len(set(names)) == len(names)
      assert any(one.options is not None and one.best for one in programs)
      config = get_config(group.replace("-", join) if join else group.partition("-")[0])
      for one in programs:
        assert (one.options or {}).keys() <= known
        config.update_from_flattened_dict(one.changes or {})  # locked: refuses what there is not
  assert set(suites.APART) <= suites.CPU.keys()


def compare(*arguments, program=("scripts/benchmarks/compare.py",)):
  command = [sys.executable, *program, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--only=z"], "error: --only: cpu has no group 'z'; there are a, b"),
    (["--peers_python=none"], "error: --peers_python=none: no such file"),
    (["--peers_python=README.md"], "error: --peers_python=README.md may not be run"),
    ([f"--peers_python={sys.executable}", "--out="], "error: --out= is empty; name a folder"),
    ([f"--peers_python={sys.executable}", "--out=LICENSE"], "error: --out=LICENSE is a file"),
  ],
)
def test_a_comparison_that_cannot_be_is_one_line(tmp_path, arguments, words):
  done = compare(f"--out={tmp_path / 'out'}", *arguments)
  assert done.returncode == 1 and done.stderr.startswith(words)
  assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


# The command, with two programs of group a: each takes seconds to start.
FEWER = """
import runpy, sys
from dpo_jax.benchmarking import suites
suites.CPU["a"] = [one for one in suites.CPU["a"] if one.name in ("TRL", "ours shared")]
sys.argv[0] = "scripts/benchmarks/compare.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_comparison_from_end_to_end(tmp_path):
  """With a stand-in for TRL that runs out of memory, beside our own step."""
  python = tmp_path / "python"
  python.write_text("#!/bin/sh\necho 'CUDA out of memory' >&2\nexit 1\n")
  python.chmod(0o755)
  small = ["--rounds=1", "--block_steps=1", "--warmup=1", "--pairs=16", "--quiet=0"]
  given = [f"--out={tmp_path / 'out'}", "--only=a", f"--peers_python={python}", *small]
  done = compare(*given, program=("-c", FEWER))
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "out" / "comparison.json").read_text())
  rows = found["groups"]["a"]["rows"]
  assert rows["TRL"]["failed"] == "out of memory" and rows["ours shared"]["pairs_per_s"] > 0
  assert "| TRL | out of memory | – | – | – |" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_pace_of_a_program_is_one_that_it_understands():
  pace = Pace(3, 2, 1, True)
  assert pacing.read(json.dumps(pace._asdict()), Pace(1, 1)) == pace
