"""`report.html`: what a run did, on one page that stands alone; `plots/*.png`: its pictures.

Everything is read back from the files of the run, so a report can be made again at any time.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.monitoring import alerts, loggers, plots
from dpo_jax.structs import UserError
from dpo_jax.utils import files

_STYLE = pathlib.Path(__file__).with_name("report.css")


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` and `plots/*.png` into the folder of a run, or of several runs.

  A run is a folder with `metrics.jsonl`; `config.json` and `data.json` are shown where present. A
  folder that holds runs (`sft/`, `dpo/`) gives one page on all of them, in the order they were
  made. A `summary.json` in the folder, as scripts/evaluate.py writes it, opens the page.

  Returns:
    The path of the page.

  Raises:
    UserError: there is neither a run nor a summary in the folder.
  """
  folder = pathlib.Path(folder)
  runs = _runs(folder)
  summary = _read_json(folder / "summary.json")
  if not runs and summary is None:
    raise UserError(f"{folder} holds no metrics.jsonl and no summary.json; name a --workdir")
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
  if (folder / loggers.METRICS).is_file():
    return [folder]
  found = [path.parent for path in folder.glob(f"*/{loggers.METRICS}")]
  return sorted(found, key=lambda run: (run / loggers.METRICS).stat().st_mtime)


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---------------------------------------------------------------------------- alerts


def _alerts_section(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
  """What went wrong in any of the runs, when, and what helps."""
  found = [(run, alert) for run, lines in records.items() for alert in alerts.scan(lines)]
  if not found:
    return
  yield '<section class="alerts"><h2>Alerts</h2><ul>'
  for run, (step, name, text) in found:
    where = f"{run}, step {step:,}" if run else f"step {step:,}"
    marked = re.sub(r"--config[\w.=]*\w", r"<code>\g<0></code>", _e(text))
    yield f"<li><b>{_e(name)}</b> <em>{_e(where)}</em><p>{marked}</p></li>"
  yield "</ul></section>"


# ---------------------------------------------------------------------------- one run


def _run_section(
  run: pathlib.Path,
  records: Sequence[Mapping[str, Any]],
  plots_folder: pathlib.Path,
  name: str,
) -> Iterator[str]:
  """Numbers, curves, ledger and configuration of one run; its plots are named after it."""
  config, ledger = _read_json(run / "config.json"), _read_json(run / "data.json")
  loss = (config or {}).get("loss", {}).get("name")
  title = " · ".join(filter(None, [name or "Training", f"loss {loss}" if loss else ""]))
  yield f"<section><h2>{_e(title)}</h2>"
  yield _tiles(_run_numbers(records))
  yield '<div class="grid">'
  for key, figure in plots.curves(records).items():
    plots.save_png(figure, plots_folder / f"{name + '_' if name else ''}{key}.png")
    yield f"<figure>{plots.to_svg(figure)}</figure>"
  yield "</div>"
  if ledger:
    yield f"<h3>Data</h3>{_ledger(ledger)}"
  if config:
    yield f"<details><summary>Configuration</summary>{_config(config)}</details>"
  yield "</section>"


def _run_numbers(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
  """Label, value and note of what a reader wants first."""
  last = lambda name: next((r[name] for r in reversed(records) if r.get(name) is not None), None)
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
      tiles.append((f"{label}, held out", form.format(held_out), note))
    elif training is not None:
      tiles.append((label, form.format(training), "last training step"))
  if (kl := last("eval/sampled/kl")) is not None:
    tiles.append(("KL(π ‖ π_ref) of samples", f"{kl:.2f}", "nats an answer"))
  if speeds:
    unit = "pairs" if last("rewards/margins") is not None else "texts"
    tiles.append((f"{unit} a second", f"{speeds[len(speeds) // 2]:,.0f}", "median step"))
  return tiles


def _ledger(ledger: Mapping[str, Any]) -> str:
  """Rows read, kept and dropped, and what the tokens of the rows are."""
  rows = [("format", ledger.get("format", "")), ("rows read", ledger.get("rows", ""))]
  rows.append(("pairs kept", ledger.get("pairs", "")))
  rows += [(f"dropped: {reason}", n) for reason, n in ledger.get("dropped", {}).items()]
  rows += [(f"cut: {kind}", n) for kind, n in ledger.get("truncated", {}).items()]
  tokens = dict(ledger.get("tokens", {}))
  saved = tokens.pop("shared", 0)
  if saved:
    rows.append(("prompt tokens not computed twice", saved))
  if "eval" in ledger:
    rows.append(("held-out pairs", ledger["eval"].get("pairs", "")))
  shares = "".join(
    f'<span class="{_e(kind)}" style="flex:{n} 0 auto"><i>{_e(kind)} {n:,}</i></span>'
    for kind, n in tokens.items()
    if n
  )
  bar = f'<p class="note">tokens</p><div class="bar">{shares}</div>' if shares else ""
  return _table(rows) + bar


def _config(config: Mapping[str, Any]) -> str:
  """Every field, by section."""
  blocks = {"": {k: v for k, v in config.items() if not isinstance(v, Mapping)}}
  blocks |= {k: v for k, v in config.items() if isinstance(v, Mapping)}
  return '<div class="config">' + "".join(
    f"<div><h4>{_e(name or 'run')}</h4>{_table(list(_leaves(block)))}</div>"
    for name, block in blocks.items()
    if any(True for _ in _leaves(block))
  ) + "</div>"  # fmt: skip


def _leaves(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in block.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{key}.")
    elif value is not None and value != "":
      yield prefix + key, value


# ---------------------------------------------------------------------------- the summary


def _summary_section(summary: Mapping[str, Any], plots_folder: pathlib.Path) -> Iterator[str]:
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
  """The two models of a summary, as points of the frontier's plot."""
  intervals = lambda who: {"reward_interval": summary.get(f"reward_{who}_interval")}
  reference = {"kl": 0.0, "reward": summary["reward_reference"]} | intervals("reference")
  policy = {"kl": summary["kl"], "reward": summary["reward_policy"]} | intervals("policy")
  policy["kl_interval"] = summary.get("kl_interval")
  return {"reference": reference, "trained policy": policy}


def _summary_numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
  """Tiles of whatever the summary holds of these."""
  for key, label, form in (
    ("reward_reference", "reward of the reference", "{:.2f}"),
    ("reward_policy", "reward of the policy", "{:.2f}"),
    ("win_rate", "win rate against the reference", "{:.1%}"),
    ("kl", "KL(π ‖ π_ref), nats", "{:.2f}"),
    ("fraction_of_frontier_gain", "of the best gain at this KL", "{:.1%}"),
    ("eval_accuracy", "accuracy on held-out pairs", "{:.1%}"),
    ("seconds", "seconds in all", "{:,.0f}"),
  ):
    value, interval = summary.get(key), summary.get(f"{key}_interval")
    if value is not None and math.isfinite(value):
      note = f"{form.format(interval[0])} to {form.format(interval[1])}" if interval else ""
      yield label, form.format(value), note


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
  """Prompt, the reference's answer and the policy's, each with its reward where known."""

  def answer(sample: Mapping[str, Any], who: str) -> str:
    reward = sample.get(f"{who}_reward")
    badge = ""
    if reward is not None:
      kind = "good" if reward > 0 else "bad" if reward < 0 else "even"
      badge = f'<b class="{kind}">{reward:+.2f}</b> '
    return f"<td>{badge}{_e(sample[who])}</td>"

  body = "".join(
    f"<tr><td>{_e(s['prompt'])}</td>{answer(s, 'reference')}{answer(s, 'policy')}</tr>"
    for s in samples
  )
  head = "<tr><th>prompt</th><th>reference</th><th>policy</th></tr>"
  return f'<table class="samples">{head}{body}</table>'


# ---------------------------------------------------------------------------- html


def _page(title: str, parts: Sequence[str]) -> str:
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{_e(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
    f"<body><main>{''.join(parts)}</main></body></html>\n"
  )


def _tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
  return '<div class="tiles">' + "".join(
    f"<div><span>{_e(label)}</span><strong>{_e(value)}</strong><em>{_e(note)}</em></div>"
    for label, value, note in tiles
  ) + "</div>"  # fmt: skip


def _table(rows: Sequence[tuple[str, Any]]) -> str:
  return "<table>" + "".join(
    f"<tr><th>{_e(name)}</th><td>{_e(f'{value:,}' if _is_count(value) else value)}</td></tr>"
    for name, value in rows
  ) + "</table>"  # fmt: skip


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _e(value: Any) -> str:
  return html.escape(str(value))
