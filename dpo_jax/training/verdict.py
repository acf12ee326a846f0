"""The verdict on a run: whether the held-out rows are better, no better or worse than before it.

A run keeps what it measured before its first step and after its last in the folder `held_out` of
its workdir, so that a run that was stopped in between is judged too.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.evaluation.estimates import Estimate, mean_estimate, share_estimate
from dpo_jax.monitoring import loggers
from dpo_jax.training import checkpoint
from dpo_jax.training.checkpoint import Best
from dpo_jax.utils import files

FOLDER = "held_out"
BEFORE, AFTER = "before", "after"
RESULT = "result.json"
# Held-out metrics that decide which checkpoint is the best: their names in a line, and formats.
_METRICS = {"eval/rewards/accuracies": ("accuracy", ".1%"), "eval/loss": ("loss", ".4g")}
ROSE = 0.05  # share of the loss before by which it must have risen to be spoken of
EDGE = 10  # steps at either end of a run whose rewards are compared, where no row is held out


class HeldOut(NamedTuple):
  """One evaluation of the held-out rows, example by example.

  Attributes:
    loss_B: loss of each example; of supervised texts, nats per token.
    weight_B: weight of each in the mean; of supervised texts, tokens.
    right_B: 1 where the chosen completion has the larger reward, 0 where it has the smaller, one
      half where both are equal; None for other data than pairs.
    margin_B: how much larger it is; None for other data than pairs.
    row_B: number of each example's row; None where it was not kept.
  """

  loss_B: np.ndarray
  weight_B: np.ndarray
  right_B: np.ndarray | None = None
  margin_B: np.ndarray | None = None
  row_B: np.ndarray | None = None

  def select(self, index_B: np.ndarray) -> HeldOut:
    """Returns some of the examples."""
    some = {name: None if x is None else x[index_B] for name, x in self._asdict().items()}
    return self._replace(**some)


def write(workdir: pathlib.Path, name: str, held_out: HeldOut) -> None:
  """Writes one evaluation to the workdir, as `BEFORE` or `AFTER`."""
  fields = {key: None if x is None else x.tolist() for key, x in held_out._asdict().items()}
  files.write_text(workdir / FOLDER / f"{name}.json", json.dumps(fields) + "\n")


def read(workdir: pathlib.Path, name: str) -> HeldOut | None:
  """Reads what `write` wrote; None where it is not there or cannot be read."""
  try:
    fields = json.loads((workdir / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    # Those that have a default came later than others.
    others = {name: fields.get(name) for name in HeldOut._field_defaults}
    given = {name: None if x is None else np.asarray(x) for name, x in others.items()}
    return HeldOut(np.asarray(fields["loss_B"]), np.asarray(fields["weight_B"]), **given)
  except (OSError, ValueError, TypeError, KeyError):  # of a run that began before there were any
    return None


def judge(before: HeldOut, after: HeldOut, held_out: int = 0) -> str:
  """Returns one line: accuracy and loss of the held-out rows before and after, and what they say.

  Args:
    before, after: the same examples.
    held_out: how many are held out, where some of them are not evaluated.

  Pairs are judged by the order of their completions, other data by their loss. Both evaluations are
  of the same examples, so what is tested is the change of each.
  """
  count, what = len(after.loss_B), "examples"
  parts, than = [], "before"
  loss = mean_estimate(after.loss_B, after.weight_B)
  change = mean_estimate(after.loss_B - before.loss_B, after.weight_B)
  better, worse = change.high < 0, change.low > 0
  if before.right_B is not None and after.right_B is not None:
    what = "pairs"
    # Before training policy and reference are mostly equal, every pair counts one half, and what
    # the run is compared with is chance.
    if np.all(before.right_B == 0.5):
      than = "chance"
    better, worse = _compare_orders(before.right_B, after.right_B)
    right = share_estimate(after.right_B, after.weight_B)
    was = np.average(before.right_B, weights=before.weight_B)
    parts.append(f"accuracy {was:.1%} → {right.mean:.1%}{_interval(right, '.1%')}")
  was = np.average(before.loss_B, weights=before.weight_B)
  parts.append(f"loss {was:.4g} → {loss.mean:.4g}{_interval(loss, '.4g')}")
  found = f"{'better' if better else 'worse' if worse else 'no better'} than {than}"
  if better and change.low > 0:
    found += ", but the loss rose (overconfident): try fewer --epochs or a lower --lr"
  elif worse:
    found += "; try a lower --lr"
  elif not better and change.mean > ROSE * abs(was):
    # More of the same would hardly help, also where the rows are too few to say so.
    found += ", and the loss rose; try a lower --lr, or more rows to tell"
  elif not better:
    found += "; try more --epochs, or more rows to tell"
  many = f"{count:,} of {held_out:,}" if held_out > count else f"{count:,}"
  return f"held out ({many} {what}): {', '.join(parts)}: {found}"


def judge_samples(records: Sequence[Mapping[str, Any]]) -> str | None:
  """Returns the line of a run on samples of the policy: their reward in its first and last steps.

  Args:
    records: lines of `metrics.jsonl`.

  Returns:
    None where the metrics have no rewards.
  """
  reward_T = np.array([r["reward"] for r in records if r.get("reward") is not None])
  edge = min(EDGE, len(reward_T) // 2)
  if edge < 2:
    return None
  first, last = mean_estimate(reward_T[:edge]), mean_estimate(reward_T[-edge:])
  # Steps have prompts of their own, so the two ends are independent.
  half = float(np.hypot(first.high - first.mean, last.high - last.mean))
  gain = last.mean - first.mean
  found = "better" if gain > half else "worse" if gain < -half else "no better"
  return (
    f"samples: reward {first.mean:.4g} → {last.mean:.4g}{_interval(last, '.4g')} in the first and"
    f" last {edge} steps: {found} than before"
  )


def of_run(
  workdir: pathlib.Path, records: Sequence[Mapping[str, Any]], best: int | None = None
) -> str:
  """Returns the line that a run ends with.

  Args:
    workdir: its folder.
    records: lines of its `metrics.jsonl`.
    best: the step that is judged, if that is not the last one.
  """
  before, after = read(workdir, BEFORE), read(workdir, AFTER if best is None else str(best))
  if before is not None and after is not None and len(before.loss_B) == len(after.loss_B):
    return judge(before, after, _held_out(workdir))
  line = judge_samples(records)
  if line:
    return line
  if any("eval/loss" in record for record in records):
    found = [record for record in records if record.get("eval/loss") is not None]
    return (
      f"held-out loss {found[0]['eval/loss']:.4g} → {found[-1]['eval/loss']:.4g}; this run has no"
      " values of single rows to judge by"
    )
  return (
    "no rows are held out, so whether the model is better on unseen rows is not known; hold some"
    " out by --config.data.eval_fraction or --eval_data"
  )


def _held_out(workdir: pathlib.Path) -> int:
  """Returns how many examples a run held out; 0 where that is not known."""
  try:
    ledger = json.loads((workdir / "data.json").read_text(encoding="utf-8"))
    return int(ledger["held_out"]["examples"])
  except (OSError, ValueError, TypeError, KeyError):  # of a run that began before it was counted
    return 0


def write_result(
  workdir: pathlib.Path,
  step: int,
  line: str,
  *,
  exported: int | None = None,
  best: Best | None = None,
) -> None:
  """Marks the run as finished.

  Args:
    workdir: its folder.
    step: its last step.
    line: the verdict.
    exported: the step that `export/` is of; None for the last.
    best: the best checkpoint.
  """
  record: dict[str, Any] = {"step": step, "result": line}
  record["exported"] = step if exported is None else exported
  if best:
    record["best"] = best._asdict() | {"metric": f"eval/{best.metric}"}
  text = json.dumps(record, ensure_ascii=False, indent=2)
  files.write_text(workdir / RESULT, text + "\n")


def read_result(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads what `write_result` wrote; {} where it is not there or cannot be read."""
  try:
    found = json.loads((workdir / RESULT).read_text(encoding="utf-8"))
  except (OSError, ValueError):  # of a run that has not ended, or began before there was one
    return {}
  return found if isinstance(found, dict) else {}


def describe(best: Best) -> str:
  """Returns the metric by which a checkpoint is the best, with its value."""
  name, form = _METRICS[f"eval/{best.metric}"]
  return f"held-out {name} ({best.value:{form}})"


class Found(NamedTuple):
  """The best checkpoint of a finished run.

  Attributes:
    line: says which it is, and by which metric.
    exported: whether the export is of it.
  """

  line: str
  exported: bool


def read_best(workdir: pathlib.Path) -> Found | None:
  """Reads which checkpoint of a finished run is the best; None where that is not known."""
  record = read_result(workdir)
  try:
    last, exported, metric = record["step"], record["exported"], record["best"]["metric"]
    best = Best(record["best"]["step"], metric.removeprefix("eval/"), record["best"]["value"])
    line = f", by {describe(best)}"
  except (KeyError, TypeError, ValueError):  # of a run that has no held-out rows
    return None
  which = (
    f"step {best.step:,}, the last" if best.step == last else f"step {best.step:,} of {last:,}"
  )
  line = f"best checkpoint: {which}{line}"
  path = workdir / loggers.METRICS
  records = loggers.read_metrics(path) if path.is_file() else []
  # Not step 0: it is the model that the run began with.
  evaluated = [r for r in records if r["step"] and r.get(metric) is not None]
  top = checkpoint.best_of((r["step"], {best.metric: r[metric]}) for r in evaluated)
  if top and top.value != best.value:
    line += (
      f"; step {top.step:,} had {top.value:{_METRICS[metric][1]}} and has no checkpoint"
      " (--config.export.best=True would have kept it)"
    )
  if exported == best.step != last:
    line += ", exported; it was chosen by these rows, so expect a little less on others"
  return Found(line, exported == best.step)


def finished(workdir: pathlib.Path, step: int) -> str | None:
  """Returns the verdict on a run that was exported after `step`; None if that is still to do."""
  found = read_result(workdir)
  done = found.get("step") == step and (workdir / "export").is_dir()
  return found.get("result") if done else None


def _compare_orders(before_B: np.ndarray, after_B: np.ndarray) -> tuple[bool, bool]:
  """Returns whether pairs are ordered better, and whether worse, than before.

  Only pairs whose order has changed say anything (McNemar 1947): among them the share that became
  right is compared with one half, by Wilson's interval, which is not empty at shares of 0 and 1.
  """
  change_B = np.sign(after_B - before_B)
  changed_B = change_B[change_B != 0]
  if not len(changed_B):
    return False, False
  share = share_estimate((changed_B + 1) / 2)
  return share.low > 0.5, share.high < 0.5


def _interval(estimate: Estimate, form: str) -> str:
  """Formats an interval; nothing for one that is not known."""
  if not np.isfinite(estimate.low):
    return ""
  between = " to " if estimate.low < 0 else "–"  # a dash before or behind a minus is misread
  return f" (95%: {estimate.low:{form}}{between}{estimate.high:{form}})"
