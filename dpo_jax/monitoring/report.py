"""The report of a run: `report.html`, one page without other files, and `plots/*.png`.

Everything is read from the files of the run, so a report can be made again at any time.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.monitoring import alerts, loggers, plots
from dpo_jax.structs import UserError
from dpo_jax.utils import files, progress

_STYLE = pathlib.Path(__file__).with_name("report.css")


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` and `plots/*.png` into the folder of a run, or of several runs.

  A run is a folder with `metrics.jsonl`; `config.json` and `data.json` are shown if present. A
  folder of runs (`sft/`, `dpo/`) gives one page on all of them, in the order in which they were
  written. A `summary.json` in the folder, as scripts/evaluate.py writes it, comes first.

  Returns:
    The path of the page.

  Raises:
    UserError: there is neither a run nor a summary in the folder.
  """
  with progress.Progress("writing the report"):
    return _write(pathlib.Path(folder))


def _write(folder: pathlib.Path) -> pathlib.Path:
  """Writes the page of a folder, as `write` says."""
  runs = _runs(folder)
  summary = _read_json(folder / "summary.json")
  if not runs and summary is None:
    raise UserError(f"{folder} contains no metrics.jsonl and no summary.json; name a --workdir")
  (folder / "plots").mkdir(exist_ok=True)
  name = folder.resolve().name
  named = {"" if run == folder else run.name: run for run in runs}
  records = {key: loggers.read_metrics(run / loggers.METRICS) for key, run in named.items()}
  parts = [f"<header><h1>{_e(name)}</h1><p>a run of dpo_jax</p></header>"]
  parts += _alerts_section(records)
  if summary is not None:
    parts += _summary_section(summary, folder / "plots")
  for key, run in named.items():
    parts += _run_section(run, records[key], folder / "plots", key)
  files.write_text(folder / "report.html", _page(name, parts))
  return folder / "report.html"


def _runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folder if it is a run, else the runs in it, oldest metrics first."""
  if (folder / loggers.METRICS).is_file():
    return [folder]
  found = [path.parent for path in folder.glob(f"*/{loggers.METRICS}")]
  # A supervised run comes before the preference run that starts from it.
  return sorted(found, key=lambda run: (run / loggers.METRICS).stat().st_mtime)


def _read_json(path: pathlib.Path) -> Any:
  """Returns the contents of a JSON file, None if it does not exist."""
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---------------------------------------------------------------------------- alerts


def _alerts_section(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
  """Yields the alerts of all runs with their steps, in HTML; nothing if there are none."""
  found = [(run, alert) for run, lines in records.items() for alert in alerts.scan(lines)]
  if not found:
    return
  yield '<section class="alerts"><h2>Alerts</h2><ul>'
  for run, (step, name, text) in found:
    where = f"{run}, step {step:,}" if run else f"step {step:,}"
    # Flags become code only after escaping: the text of an alert may contain < and &.
    marked = re.sub(r"--\w[\w.=]*\w", r"<code>\g<0></code>", _e(text))
    yield f"<li><b>{_e(name)}</b> <em>{_e(where)}</em><p>{marked}</p></li>"
  yield "</ul></section>"


# ---------------------------------------------------------------------------- one run


def _run_section(
  run: pathlib.Path,
  records: Sequence[Mapping[str, Any]],
  plots_folder: pathlib.Path,
  name: str,
) -> Iterator[str]:
  """Yields numbers, curves, ledger and configuration of one run; saves its plots under its name."""
  config, ledger = _read_json(run / "config.json"), _read_json(run / "data.json")
  loss = (config or {}).get("loss", {}).get("name")
  title = " · ".join(filter(None, [name or "Training", f"loss {loss}" if loss else ""]))
  yield f"<section><h2>{_e(title)}</h2>"
  yield _tiles(_run_numbers(records))
  yield '<div class="grid">'
  for key, figure in plots.curves(records).items():
    # The plots of several runs share a folder, so their names begin with the run's.
    plots.save_png(figure, plots_folder / f"{name + '_' if name else ''}{key}.png")
    yield f"<figure>{plots.to_svg(figure)}</figure>"
  yield "</div>"
  if ledger:
    yield f"<h3>Data</h3>{_ledger(ledger)}"
  if config:
    yield f"<details><summary>Configuration</summary>{_config(config)}</details>"
  yield "</section>"


def _run_numbers(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
  """Returns the main numbers of a run as (label, value, note)."""

  def last(name: str) -> Any:
    return next((r[name] for r in reversed(records) if r.get(name) is not None), None)

  # For the median: steps that compile would spoil a mean.
  speeds = sorted(r["pairs_per_second"] for r in records if r.get("pairs_per_second"))
  tiles = [("steps", f"{records[-1]['step']:,}" if records else "0", "")]
  for name, label, form in (
    ("loss", "loss", "{:.4f}"),
    ("rewards/accuracies", "accuracy", "{:.1%}"),
    ("rewards/margins", "margin of rewards", "{:.3f}"),
  ):
    held_out, training = last(f"eval/{name}"), last(name)
    if held_out is not None:
      note = f"training {form.format(training)}" if training is not None else ""
      if name == "rewards/accuracies":
        note = "; ".join(filter(None, [_certainty(last, form), note]))
      tiles.append((f"{label}, held out", form.format(held_out), note))
    elif training is not None:
      tiles.append((label, form.format(training), "last training step"))
  if (kl := last("eval/sampled/kl")) is not None:
    tiles.append(("KL(π ‖ π_ref) of samples", f"{kl:.2f}", "nats per completion"))
  if speeds:
    unit = loggers.unit_of({name for record in records for name in record})
    tiles.append((f"{unit} per second", f"{speeds[len(speeds) // 2]:,.0f}", "median step"))
  return tiles


def _certainty(last: Callable[[str], Any], form: str) -> str:
  """Returns how many pairs a held-out accuracy is of, with its interval; "" where none is known."""
  names = ("pairs", "rewards/accuracies_low", "rewards/accuracies_high")
  count, low, high = (last(f"eval/{name}") for name in names)
  interval = f", 95%: {form.format(low)} to {form.format(high)}" if low is not None else ""
  return f"{count:,.0f} pairs{interval}" if count is not None else ""


def _ledger(ledger: Mapping[str, Any]) -> str:
  """Returns the ledger in HTML: rows read, kept, dropped and cut, and a bar of token counts."""
  rows = [("format", ledger.get("format", "")), ("rows read", ledger.get("rows", ""))]
  rows.append(("pairs kept", ledger.get("pairs", "")))
  rows += [(f"dropped: {reason}", n) for reason, n in ledger.get("dropped", {}).items()]
  rows += [(f"cut: {kind}", n) for kind, n in ledger.get("truncated", {}).items()]
  tokens = dict(ledger.get("tokens", {}))
  # Tokens that are not computed, and so no part of the bar.
  saved = tokens.pop("shared", 0)
  if saved:
    rows.append(("prompt tokens shared by both completions", saved))
  # Runs of before have no such count: they scored all tokens of their completions.
  context = tokens.get("answer", 0) - tokens.pop("scored", tokens.get("answer", 0))
  if context:
    tokens |= {"answer": tokens["answer"] - context, "context": context}
  held_out = ledger.get("held_out")
  if held_out:
    count, used = held_out["examples"], held_out["evaluated"]
    limit = f"{used:,} of {count:,} evaluated in training (data.eval_limit)"
    rows.append(("held-out examples", count if used == count else limit))
  elif "eval" in ledger:  # of a run that began before all of them were counted
    rows.append(("held-out pairs", ledger["eval"].get("pairs", "")))
  shown = {"answer": "completions"}  # the key of `data.json`, and the word of all pages
  # Widths grow with the counts, from that of the label: a small count keeps a readable one.
  shares = "".join(
    f'<span class="{_e(kind)}" style="flex:{n} 0 auto">'
    f"<i>{_e(shown.get(kind, kind))} {n:,}</i></span>"
    for kind, n in tokens.items()
    if n
  )
  bar = f'<p class="note">tokens</p><div class="bar">{shares}</div>' if shares else ""
  return _table(rows) + bar


def _config(config: Mapping[str, Any]) -> str:
  """Returns every field of a configuration that is set, by section, in HTML."""
  blocks = {"": {k: v for k, v in config.items() if not isinstance(v, Mapping)}}
  blocks |= {k: v for k, v in config.items() if isinstance(v, Mapping)}
  return '<div class="config">' + "".join(
    f"<div><h4>{_e(name or 'run')}</h4>{_table(list(_leaves(block)))}</div>"
    for name, block in blocks.items()
    if any(True for _ in _leaves(block))
  ) + "</div>"  # fmt: skip


def _leaves(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields dotted names and values of the fields that are set."""
  for key, value in block.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{key}.")
    elif value is not None and value != "":
      yield prefix + key, value


# ---------------------------------------------------------------------------- the summary


def _summary_section(summary: Mapping[str, Any], plots_folder: pathlib.Path) -> Iterator[str]:
  """Yields the numbers of an evaluation, the plot of the frontier and samples; saves the plot."""
  yield "<section><h2>Result</h2>"
  yield _tiles(list(_summary_numbers(summary)))
  if summary.get("frontier"):
    figure = plots.frontier(summary["frontier"], _points(summary))
    plots.save_png(figure, plots_folder / "frontier.png")
    yield f'<figure class="wide">{plots.to_svg(figure)}</figure>'
  if summary.get("samples"):
    yield "<h3>The same prompts, before and after</h3>" + _samples(summary["samples"])
  yield "</section>"


def _points(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the two models of a summary as points of the frontier's plot."""

  def point(who: str, kl: float) -> dict[str, Any]:
    interval = summary.get(f"reward_{who}_interval")
    return {"kl": kl, "reward": summary[f"reward_{who}"], "reward_interval": interval}

  # The reference is at KL 0 by definition, so it has no interval.
  policy = point("policy", summary["kl"]) | {"kl_interval": summary.get("kl_interval")}
  return {"reference": point("reference", 0.0), "trained policy": policy}


def _summary_numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
  """Yields (label, value, note) of the numbers that the summary has."""
  for key, label, form in (
    ("reward_reference", "reward of the reference", "{:.2f}"),
    ("reward_policy", "reward of the policy", "{:.2f}"),
    ("win_rate", "win rate against the reference", "{:.1%}"),
    ("kl", "KL(π ‖ π_ref), nats", "{:.2f}"),
    ("fraction_of_frontier_gain", "of the best gain at this KL", "{:.1%}"),
    ("eval_accuracy", _of_pairs(summary), "{:.1%}"),
    ("seconds", "seconds in all", "{:,.0f}"),
  ):
    value, interval = summary.get(key), summary.get(f"{key}_interval")
    # An unknown share is NaN, and gets no box.
    if value is not None and math.isfinite(value):
      note = f"{form.format(interval[0])} to {form.format(interval[1])}" if interval else ""
      yield label, form.format(value), note


def _of_pairs(summary: Mapping[str, Any]) -> str:
  """Returns the label of a summary's accuracy: which pairs it is of."""
  count = f"{summary['pairs']:,} pairs" if "pairs" in summary else "pairs"
  trained = summary.get("trained_on")
  return f"accuracy on {count}" + (f", {trained:,} of them trained on" if trained else "")


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table of prompts with completions of both models, and their rewards if known."""

  def cell(sample: Mapping[str, Any], who: str) -> str:
    reward = sample.get(f"{who}_reward")
    badge = ""
    if reward is not None:
      kind = "good" if reward > 0 else "bad" if reward < 0 else "even"
      badge = f'<b class="{kind}">{reward:+.2f}</b> '
    return f"<td>{badge}{_e(sample[who])}</td>"

  body = "".join(
    f"<tr><td>{_e(s['prompt'])}</td>{cell(s, 'reference')}{cell(s, 'policy')}</tr>" for s in samples
  )
  head = "<tr><th>prompt</th><th>reference</th><th>policy</th></tr>"
  return f'<table class="samples">{head}{body}</table>'


# ---------------------------------------------------------------------------- html


def _page(title: str, parts: Sequence[str]) -> str:
  """Returns the whole page, its style sheet inside it."""
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{_e(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
    f"<body><main>{''.join(parts)}</main></body></html>\n"
  )


def _tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
  """Returns (label, value, note) as a row of boxes, in HTML."""
  return '<div class="tiles">' + "".join(
    f"<div><span>{_e(label)}</span><strong>{_e(value)}</strong><em>{_e(note)}</em></div>"
    for label, value, note in tiles
  ) + "</div>"  # fmt: skip


def _table(rows: Sequence[tuple[str, Any]]) -> str:
  """Returns names and values as a table, in HTML."""
  return "<table>" + "".join(
    f"<tr><th>{_e(name)}</th><td>{_e(f'{value:,}' if _is_count(value) else value)}</td></tr>"
    for name, value in rows
  ) + "</table>"  # fmt: skip


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)  # a bool is an int in Python


def _e(value: Any) -> str:
  # Prompts and completions come from files and models: they are text, whatever they contain.
  return html.escape(str(value))
