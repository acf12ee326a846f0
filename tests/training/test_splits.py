"""Which rows a run holds out and trains on: written, found again, and recognized by digest."""

import json
import sys

import numpy as np
import pytest

from dpo_jax.data import digest
from dpo_jax.data.examples import Example
from dpo_jax.data.ledger import Ledger
from dpo_jax.data.mixture import Source
from dpo_jax.structs import UserError
from dpo_jax.training import splits
from dpo_jax.training.sources import Part


def example(row, prompt, chosen=(7,), rejected=(8,), **rest):
  ids = (np.array(chosen, np.int32), np.array(rejected, np.int32))
  return Example(np.array(prompt, np.int32), ids, row=row, **rest)


def part(examples, name="", path="rows.jsonl", start=0):
  rows = range(start, start + max(e.row for e in examples) + 1)
  return Part(Source(name, path), list(examples), Ledger(), rows)


ALL = [example(row, (1, 2, row)) for row in range(8)]
HELD_OUT = [ALL[2], ALL[5]]
TRAINED = [e for e in ALL if e.row not in (2, 5)]


@pytest.fixture
def rows():
  return splits.describe("rows.jsonl", [part(ALL)], TRAINED, HELD_OUT, [])


def test_a_digest_is_of_tokens_alone():
  plain = digest.of_rows([example(3, (1, 2))])
  assert plain == digest.of_rows([example(3, (1, 2), weight=0.5, scores=(2.0, 1.0))])
  # Absent completions fill up rankings; a token may not move to the neighboring completion.
  whole = example(3, (1, 2))
  filled = whole._replace(completions=(*whole.completions, np.zeros(0, np.int32)))
  assert plain == digest.of_rows([filled])
  assert plain != digest.of_rows([example(3, (1, 2, 7), ())])
  # Two examples of one row, as rows of single completions give them.
  assert digest.of_rows([whole, whole]) != plain


def test_rows_are_read_as_they_were_written(tmp_path, rows):
  assert splits.read(tmp_path) is None and splits.read_trained(tmp_path) is None
  splits.write(tmp_path, rows)
  lines = (tmp_path / "held_out" / "rows.jsonl").read_text().splitlines()
  assert [json.loads(line)["row"] for line in lines] == [2, 5]
  assert json.loads(lines[0]) == {
    "source": "",
    "file": "rows.jsonl",
    "row": 2,
    "digest": f"{digest.of_rows([ALL[2]])[2]:016x}",
  }
  assert splits.read(tmp_path) == list(rows.held_out)
  trained = splits.read_trained(tmp_path)
  assert set(trained.tolist()) == set(digest.of_rows(TRAINED).values())
  assert not list((tmp_path / "held_out").glob(".*"))


def test_a_run_that_goes_on_with_other_rows_keeps_what_was_there(tmp_path, rows):
  splits.write(tmp_path, rows)
  splits.write(tmp_path, rows, step=10)
  assert len(list((tmp_path / "held_out").iterdir())) == 2
  other = splits.describe("rows.jsonl", [part(ALL)], HELD_OUT, TRAINED, [])
  splits.write(tmp_path, other, step=10)
  assert (tmp_path / "held_out" / "rows-until-step-10.jsonl").read_text().count("\n") == 2
  assert len(splits.read(tmp_path)) == 6 and len(splits.read_trained(tmp_path)) == 8


def test_rows_of_sources_are_counted_within_each():
  a, b = part(ALL[:4], "a", "a.jsonl"), part(ALL[4:], "b", "b.jsonl", start=4)
  found = splits.describe("", [a, b], TRAINED, HELD_OUT, []).held_out
  assert [row[:3] for row in found] == [("a", "a.jsonl", 2), ("b", "b.jsonl", 1)]
  assert splits.find(found, b) == {5}
  # Of evaluation sets, all rows.
  found = splits.describe("rows.jsonl", [part(ALL)], ALL, [], [a, b]).held_out
  assert [row.row for row in found] == [0, 1, 2, 3] * 2


def test_held_out_rows_are_found_in_a_file_that_has_changed(rows):
  moved = [e._replace(row=9 - e.row) for e in reversed(ALL)]
  assert splits.find(rows.held_out, part(ALL)) == {2, 5}
  assert splits.find(rows.held_out, part(moved)) == {4, 7}
  assert [e.row for e in splits.select(rows.held_out, part(moved)).examples] == [4, 7]
  # Equal rows: the one that was held out where nothing moved, or else as many as were.
  twice = [*ALL, ALL[2]._replace(row=8)]
  assert splits.find(rows.held_out, part(twice)) == {2, 5}
  assert splits.find(rows.held_out, part([e._replace(row=e.row + 1) for e in twice])) == {3, 6}
  gone = [e for e in ALL if e.row != 5]
  with pytest.raises(UserError, match=r"rows.jsonl has changed: 1 of the 2 held-out rows .*--data"):
    splits.find(rows.held_out, part(gone))


def test_a_broken_list_of_rows_is_one_line(tmp_path, rows):
  splits.write(tmp_path, rows)
  (tmp_path / "held_out" / "rows.jsonl").write_text("{}\n")
  with pytest.raises(UserError, match=r"rows.jsonl cannot be read; delete it to find the rows by"):
    splits.read(tmp_path)
  (tmp_path / "held_out" / "trained_on.npy").write_bytes(b"")
  assert splits.read_trained(tmp_path) is None


def run_of(folder, rows, **config):
  """Writes the folder of a run that has exported a model; returns that model's folder."""
  splits.write(folder, rows)
  (folder / "config.json").write_text(json.dumps({"model": {"path": ""}} | config))
  (folder / "metrics.jsonl").touch()
  (folder / "export").mkdir()
  return folder / "export"


def test_rows_that_a_model_was_trained_on_are_recognized(tmp_path, rows):
  model = run_of(tmp_path / "one", rows)
  run, found = splits.trained_on(model, [*ALL, example(8, (1, 1))], None)
  assert run == tmp_path / "one" and found == {0, 1, 3, 4, 6, 7}
  # So is another checkpoint that `convert` wrote into the folder of the run.
  assert splits.trained_on(tmp_path / "one" / "best", ALL, None) == (run, found)
  # A model that was copied says nothing of its run.
  assert splits.trained_on(tmp_path / "elsewhere", ALL, None) is None
  # One that started from another run's was trained on that run's rows too.
  none = rows._replace(trained=np.zeros(0, np.uint64))
  second = run_of(tmp_path / "two", none, model={"path": str(model)})
  run, found = splits.trained_on(second, ALL, None)
  assert run == tmp_path / "two" and len(found) == 6


def test_rows_that_the_run_cut_are_recognized_whole(tmp_path):
  """A prompt is cut from the left: of 5 tokens and a window of 4, the last 3 stay."""
  cut, whole = example(0, (3, 4, 5)), example(4, (1, 2, 3, 4, 5))
  rows = splits.Rows((), np.array([*digest.of_rows([cut]).values()], np.uint64))
  window = {"max_length": 4, "prompt_floor": 1, "truncation": "drop"}
  model = run_of(tmp_path / "run", rows, data=window)
  assert splits.trained_on(model, [whole], None)[1] == {4}
  assert splits.trained_on(model, [whole], 1)[1] == set()  # 1 would be kept: 1, 4, 5
  too_long = example(5, (1,), (1, 2, 3, 4), (5,))
  assert splits.trained_on(model, [whole, too_long], None)[1] == {4}


def test_what_the_limit_leaves_out_is_said(capsys):
  limited = splits.limit([ALL, ALL[:3]], 4, eval_samples=0)
  assert [len(some) for some in limited] == [4, 3]
  # All sets have the metrics without a name, unless the first set has none.
  named = [part(ALL, "x"), part(ALL, "y")]
  found = splits.count(named, [ALL, ALL[:3]], limited, {})
  assert found == {"held_out": {"examples": 11, "evaluated": 7}}
  line = capsys.readouterr().err
  assert line.startswith("data.eval_limit: training evaluates the first 7 of 11 held-out examples;")
  assert "--config.data.eval_limit=11" in line
  found = splits.count([part(ALL), named[1]], [ALL, ALL[:3]], limited, {})
  assert found == {"held_out": {"examples": 8, "evaluated": 4}}
  splits.count([], [ALL], [ALL], {})
  assert capsys.readouterr().err.count("\n") == 1
  assert splits.count([], [[]], [[]], {}) == {}


def test_the_line_about_the_limit_wraps_between_words(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  monkeypatch.setenv("COLUMNS", "80")
  splits.count([part(ALL, "x")], [ALL], [ALL[:3]], {})
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) >= 2 and max(map(len, lines)) <= 80 and lines[1].startswith("  ")
