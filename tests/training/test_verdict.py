"""The verdict on a run: better, no better or worse, by the change of every held-out example."""

import json

import numpy as np
import pytest

from dpo_jax.training import verdict
from dpo_jax.training.checkpoint import Best
from dpo_jax.training.verdict import HeldOut


def pairs(right, wrong, loss=0.5, ties=0):
  orders = np.array([1.0] * right + [0.0] * wrong + [0.5] * ties)
  return HeldOut(np.full(len(orders), loss), np.ones(len(orders)), orders)


def texts(losses, tokens=None):
  losses = np.asarray(losses, float)
  return HeldOut(losses, np.ones(len(losses)) if tokens is None else np.asarray(tokens, float))


@pytest.mark.parametrize(
  ("right", "wrong", "found"),
  [
    # Wilson's interval of 20 of 22 is 72 to 97 per cent; of 14 of 22, 43 to 80.
    (20, 2, "accuracy 50.0% → 90.9% (95%: 72.2%–97.5%), loss 0.693 → 0.5: better than chance"),
    (14, 8, "accuracy 50.0% → 63.6% (95%: 43.0%–80.3%), loss 0.693 → 0.5: no better than chance"),
    (2, 20, "worse than chance; try a lower --lr"),
    # All of two are right, which two tosses of a coin are in a quarter of cases.
    (2, 0, "no better than chance"),
  ],
)
def test_pairs_are_compared_with_chance_after_equal_margins(right, wrong, found):
  count = right + wrong
  line = verdict.judge(pairs(0, 0, loss=0.693, ties=count), pairs(right, wrong))
  line = line.replace(" (95%: 0.5–0.5)", "")  # every pair has the same loss here
  assert line.startswith(f"held out ({count} pairs): ") and found in line


def test_pairs_that_were_ordered_before_are_compared_one_by_one():
  """McNemar: of 100 pairs, 9 of 10 that change become right; that 80 were right does not count."""
  before = HeldOut(np.ones(100), np.ones(100), np.array([1.0] * 80 + [0.0] * 20))
  after = np.array([0.0] + [1.0] * 79 + [1.0] * 9 + [0.0] * 11)
  line = verdict.judge(before, before._replace(right_B=after))
  assert "accuracy 80.0% → 88.0%" in line and ": better than before" in line
  assert ": worse than before" in verdict.judge(before._replace(right_B=after), before)
  assert ": no better than before" in verdict.judge(before, before)


def test_an_order_that_improves_while_the_loss_rises_is_overconfident():
  line = verdict.judge(
    pairs(0, 0, ties=100)._replace(loss_B=np.full(100, 0.69)),
    pairs(80, 20)._replace(loss_B=np.linspace(0.7, 0.9, 100)),
  )
  assert "better than chance, but the loss rose (overconfident): try fewer" in line


@pytest.mark.parametrize(
  ("loss", "advice"),
  [(2.2, ", and the loss rose; try a lower --lr"), (0.7, "; try more --epochs")],
)
def test_a_loss_that_rose_is_no_reason_to_train_for_longer(loss, advice):
  before = pairs(0, 0, ties=6, loss=0.69)
  line = verdict.judge(before, pairs(2, 4, loss=loss))
  assert f"no better than chance{advice}" in line


def test_an_interval_below_zero_has_no_dash_beside_its_minus():
  before = texts([1.0, 1.0])
  # The mean of 0 and 1 is 0.5 and its standard error 0.5, of which 1.96 make the interval.
  assert "(95%: -0.48 to 1.48)" in verdict.judge(before, texts([0.0, 1.0]))


def test_texts_are_judged_by_the_change_of_each_weighted_by_tokens():
  before = texts([5.0, 1.0, 3.0, 2.0], tokens=[1, 1, 1, 97])
  # Texts differ by nats, and every one of them improves by about a tenth.
  after = before._replace(loss_B=before.loss_B - [0.09, 0.1, 0.11, 0.1])
  line = verdict.judge(before, after)
  # (5 + 1 + 3 + 194) / 100 = 2.03
  assert line.startswith("held out (4 examples): loss 2.03 → 1.93 (95%: ")
  assert line.endswith(": better than before")
  assert "worse than before" in verdict.judge(after, before)
  one = texts([2.0])
  assert "no better" in verdict.judge(one, one._replace(loss_B=np.array([1.0])))


def test_samples_are_judged_by_their_reward():
  rewards = [*np.linspace(0.0, 0.2, 10), *np.ones(30), *np.linspace(0.9, 1.1, 10)]
  records = [{"step": 0}] + [{"step": i, "reward": x} for i, x in enumerate(rewards, 1)]
  line = verdict.judge_samples(records)
  assert "reward 0.1 → 1 (95%: " in line and "last 10 steps: better than before" in line
  assert verdict.judge_samples(records[:3]) is None


def test_what_was_measured_is_read_from_the_workdir(tmp_path):
  for name, held_out in ((verdict.BEFORE, pairs(0, 0, ties=40)), (verdict.AFTER, pairs(38, 2))):
    verdict.write(tmp_path, name, held_out)
  assert "better than chance" in verdict.of_run(tmp_path, [])
  assert verdict.of_run(tmp_path / "none", []).startswith("no rows are held out")
  # Where more are held out than evaluated, both numbers are said.
  (tmp_path / "data.json").write_text('{"held_out": {"examples": 1024, "evaluated": 40}}')
  assert verdict.of_run(tmp_path, []).startswith("held out (40 of 1,024 pairs): accuracy 50.0%")
  # What was written before margins and rows were is read too.
  path = tmp_path / verdict.FOLDER / "after.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({k: fields[k] for k in ("loss_B", "weight_B", "right_B")}))
  assert verdict.read(tmp_path, verdict.AFTER).row_B is None


def test_a_run_is_finished_once_the_export_is_that_of_its_last_step(tmp_path):
  assert verdict.finished(tmp_path, 6) is None
  verdict.write_result(tmp_path, 6, "better")
  assert verdict.finished(tmp_path, 6) is None  # the export was removed
  (tmp_path / "export").mkdir()
  assert verdict.finished(tmp_path, 6) == "better"
  assert verdict.finished(tmp_path, 12) is None  # it is to train longer
  (tmp_path / "result.json").write_text(json.dumps([]))
  assert verdict.finished(tmp_path, 6) is None


@pytest.mark.parametrize(
  ("best", "exported", "line"),
  [
    (Best(60, "loss", 0.25), 60, "step 60, the last, by held-out loss (0.25)"),
    (
      Best(40, "rewards/accuracies", 0.9),
      60,
      "step 40 of 60, by held-out accuracy (90.0%)",
    ),
    (
      Best(40, "rewards/accuracies", 0.9),
      40,
      "step 40 of 60, by held-out accuracy (90.0%), exported; it was chosen by these rows, so"
      " expect a little less on others",
    ),
    # Step 20 was better, and step 0 is the model that the run began with.
    (
      Best(40, "rewards/accuracies", 0.8),
      60,
      "step 40 of 60, by held-out accuracy (80.0%); step 20 had 90.0% and has no checkpoint"
      " (--config.export.best=True would have kept it)",
    ),
  ],
)
def test_which_checkpoint_is_best_and_by_what(tmp_path, best, exported, line):
  name = f"eval/{best.metric}"
  records = [{"step": 0, name: 0.95}, {"step": 20, name: 0.9}, {"step": 30, "loss": 0.0}]
  if best.metric == "rewards/accuracies":
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  verdict.write_result(tmp_path, 60, "better", exported=exported, best=best)
  found = verdict.read_best(tmp_path)
  assert found == (f"best checkpoint: {line}", exported == best.step)
  record = json.loads((tmp_path / "result.json").read_text())
  assert record["best"] == {"step": best.step, "metric": name, "value": best.value}


def test_a_run_without_held_out_rows_has_no_best(tmp_path):
  assert verdict.read_best(tmp_path) is None
  verdict.write_result(tmp_path, 60, "no rows")
  assert verdict.read_best(tmp_path) is None


def test_the_best_step_is_judged_where_it_is_exported(tmp_path):
  for name, right in ((verdict.BEFORE, 20), (verdict.AFTER, 10), ("40", 38)):
    verdict.write(tmp_path, name, pairs(right, 40 - right))
  assert "accuracy 50.0% → 95.0%" in verdict.of_run(tmp_path, [], best=40)
  assert "accuracy 50.0% → 25.0%" in verdict.of_run(tmp_path, [])
