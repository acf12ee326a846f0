"""The model card of an export: `README.md`, which the Hugging Face hub shows above the files.

It is made from the files of the run: `config.json`, `data.json`, `metrics.jsonl` and `held_out/`.
Files and folders are named without the folders above them, since a card is published.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax import losses
from dpo_jax.data import formats
from dpo_jax.evaluation.estimates import Estimate, mean_estimate, share_estimate
from dpo_jax.monitoring import loggers
from dpo_jax.training import verdict
from dpo_jax.utils import workdir as workdirs

CARD = "README.md"
# Fields that the card lists, where they are set: (field, label).
_HYPERPARAMETERS = (
  ("optimizer.learning_rate", "learning rate"),
  ("optimizer.schedule", "schedule"),
  ("optimizer.warmup_steps", "warm-up steps"),
  ("optimizer.b1", "Adam's b1"),
  ("optimizer.b2", "Adam's b2"),
  ("optimizer.eps", "Adam's ε"),
  ("optimizer.weight_decay", "weight decay"),
  ("optimizer.clip_norm", "gradient clipping"),
  ("train.batch_size", "batch size"),
  ("train.epochs", "epochs"),
  ("data.max_length", "maximum tokens per sequence"),
  ("model.compute_dtype", "compute dtype"),
  ("model.param_dtype", "parameter dtype"),
  ("seed", "seed"),
)
_LORA = (
  ("lora.rank", "LoRA rank"),
  ("lora.alpha", "LoRA α"),
  ("lora.rs", "rank-stabilized"),
  ("lora.dropout", "LoRA dropout"),
  ("lora.target", "LoRA target"),
)
_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "PATH_OF_THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("TEXT", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```
"""
_LOAD_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "PATH_OF_THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained("PATH_OF_THE_BASE_MODEL")
model = PeftModel.from_pretrained(base, folder)
ids = tokenizer("TEXT", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```
"""


def text(workdir: pathlib.Path, step: int, *, adapter: bool = False) -> str:
  """Returns the card of the model, or of the adapter, that a run had after a step.

  Args:
    workdir: folder of the run.
    step: the step that is exported.
    adapter: whether the folder has adapters, not a whole model.
  """
  config = workdirs.stored_config(workdir) or {}
  section = config.get("model", {})
  base = name_of(section.get("path", "")) or None
  loss, beta = config.get("loss", {}).get("name", ""), _beta(config.get("loss", {}))
  with_beta = f"`{loss}`" + (f", β = {beta:g}" if beta is not None else "")
  # A workdir may be "." or end in "..".
  name = workdir.resolve().name
  origin = f"Trained from `{base}`" if base else "Trained from random weights"
  if adapter:
    origin = f"An adapter (LoRA) of `{base}`, trained"
  parts = [
    _front_matter(base, _tags(config, adapter), adapter=adapter),
    f"# {name}\n",
    f"{origin} with the loss {with_beta}, by dpo_jax.\n",
    _table(("", ""), _training(config, workdir, step, base, with_beta)),
    *_evaluation(workdir, step),
    "## Hyperparameters\n",
    _table(("field", "value"), _hyperparameters(config, adapter=adapter)),
    "## Use\n",
    "With transformers and peft:\n" if adapter else "With transformers:\n",
    _LOAD_ADAPTER if adapter else _LOAD,
    "With dpo_jax:\n",
    f'```\ndpo-jax sample --model=PATH_OF_THIS_FOLDER --prompt="TEXT"{sample_flag(workdir)}\n```\n',
    *_prompt_form(workdir),
  ]
  return "\n".join(parts)


def sample_flag(workdir: pathlib.Path) -> str:
  """Returns the flag with which `sample` writes a text as the prompts of the run's data; or ""."""
  form = _read(workdir / "data.json").get("format", "")
  if form == "instruction":
    return " --instruction"
  export = workdir / "export"
  if form in ("messages", "conversations", "shared messages", "chat") and (
    (export / "chat_template.jinja").is_file()
    or "chat_template" in _read(export / "tokenizer_config.json")
  ):
    return " --chat"
  return ""


def _prompt_form(workdir: pathlib.Path) -> Iterator[str]:
  """Yields how the prompts of the training data were written, if it was not as they stand."""
  if sample_flag(workdir) == " --instruction":
    form = formats.instruction_prompt("TEXT")
    yield f"In training, prompts were written as\n\n```\n{form}```\n"


def name_of(path: str) -> str:
  """Returns the name of a model's folder, without the folders above it; "" for no path.

  A folder of the Hugging Face hub's cache has the name of its repository, and the export of a run
  that of the run.
  """
  if not path:
    return ""
  # The path as it was given comes first: a link may lead to a folder that is named by a digest.
  for whole in (pathlib.Path(path).absolute(), pathlib.Path(path).resolve()):
    for part in whole.parts:
      if part.startswith("models--"):
        return part.removeprefix("models--").replace("--", "/")
  whole = pathlib.Path(path).resolve()
  return whole.parent.name if whole.name == "export" else whole.name


def _front_matter(base: str | None, tags: Sequence[str], *, adapter: bool) -> str:
  """Returns the fields that the hub reads, as YAML; texts in quotes, as JSON has them.

  Hugging Face Hub documentation, "Model Cards": base_model, library_name, pipeline_tag, tags.
  """
  lines = [f"base_model: {json.dumps(base, ensure_ascii=False)}"] if base else []
  lines += [
    f"library_name: {'peft' if adapter else 'transformers'}",
    "pipeline_tag: text-generation",
  ]
  lines += ["tags:", *(f"- {tag}" for tag in tags)]
  return "\n".join(["---", *lines, "---\n"])


def _tags(config: Mapping[str, Any], adapter: bool) -> list[str]:
  """Returns the tags: the program, the losses by the names that the hub knows, adapters."""
  name = config.get("loss", {}).get("name", "")
  parts = [part.rpartition("*")[2].strip() for part in name.split("+")]
  known = ["dpo" if part == "sigmoid" else part for part in parts if re.fullmatch(r"\w+", part)]
  return ["dpo_jax", *known, *(["lora"] if adapter else [])]


def _beta(section: Mapping[str, Any]) -> float | None:
  """Returns β of a loss; None for one that has none."""
  name, given = section.get("name", ""), section.get("beta")
  # A function of the user's own is not imported for a card.
  if given is not None or not name or ":" in name:
    return given
  names = [part.rpartition("*")[2].strip() for part in name.split("+")]
  defaults = {losses.arguments(part).get("beta") for part in names}
  return defaults.pop() if len(defaults) == 1 else None


def _training(
  config: Mapping[str, Any], workdir: pathlib.Path, step: int, base: str | None, loss: str
) -> Iterator[tuple[str, str]]:
  """Yields (label, value): models, loss, data with its counts, and the step."""
  if base:
    yield "base model", f"`{base}`"
  reference = name_of(config.get("reference", {}).get("path", ""))
  if reference:
    yield "reference", f"`{reference}`"
  yield "loss", loss
  if reward := config.get("on_policy", {}).get("reward"):
    yield "samples of the policy, reward", f"`{reward}`"
  data, ledger = config.get("data", {}), _read(workdir / "data.json")
  yield "data", f"{_files(data)}{_counts(ledger)}"
  before = verdict.read(workdir, verdict.BEFORE)
  if before is not None:
    held_out = data.get("eval_path", "")
    where = f"`{pathlib.PurePath(held_out).name}`" if held_out else "other prompts of the same data"
    leaked = ledger.get("leakage", {}).get("eval_path", {}) if held_out else {}
    where += f", where {leaked['prompts']:,} prompts are trained on too" if leaked else ""
    yield "held out", f"{len(before.loss_B):,}: {where}"
  yield "exported step", f"{step:,}"


def _files(data: Mapping[str, Any]) -> str:
  """Returns the names of the data files, without their folders."""
  paths = [data["path"]] if data.get("path") else []
  for source in data.get("mix", {}).values():
    paths += [source if isinstance(source, str) else source.get("path", "")]
  names = [pathlib.PurePath(one.strip()).name for path in paths for one in path.split(",")]
  return ", ".join(f"`{name}`" for name in names)


def _counts(ledger: Mapping[str, Any]) -> str:
  """Returns how many rows were read, kept and dropped."""
  if "rows" not in ledger:
    return ""
  line = f": {ledger['rows']:,} rows read, {ledger.get('pairs', 0):,} kept"
  cut, dropped = ledger.get("truncated", {}), ledger.get("dropped", {})
  line += "".join(f", {n:,} with a cut {kind}" for kind, n in cut.items())
  return line + "".join(f", {n:,} dropped ({reason})" for reason, n in dropped.items())


def _evaluation(workdir: pathlib.Path, step: int) -> Iterator[str]:
  """Yields the section on the held-out rows: before and after, with intervals; nothing if none."""
  before = verdict.read(workdir, verdict.BEFORE)
  rows = list(_compared(workdir, before, step)) if before is not None else []
  if before is None or not rows:
    return
  yield "## Evaluation\n"
  what = "pairs" if before.right_B is not None else "examples"
  title = f"held out ({len(before.loss_B):,} {what})"
  yield _table((title, "before", "after", "95% interval"), rows)


def _compared(
  workdir: pathlib.Path, before: verdict.HeldOut, step: int
) -> Iterator[tuple[str, ...]]:
  """Yields the rows of the table: accuracy, for pairs, and loss."""
  path = workdir / loggers.METRICS
  records = loggers.read_metrics(path) if path.is_file() else []
  found = next((r for r in records if r["step"] == step), {})
  last = records[-1]["step"] if records else step
  after = verdict.read(workdir, verdict.AFTER if step == last else str(step))
  # Single rows are kept of few steps; of the others there are the means of their evaluations. A
  # run that goes on for longer has, for a while, those of an earlier last step.
  if after is not None:
    mean = np.average(after.loss_B, weights=after.weight_B)
    same = len(after.loss_B) == len(before.loss_B)
    after = after if same and np.isclose(mean, found.get("eval/loss", mean), rtol=1e-3) else None
  if before.right_B is not None:
    was = float(np.average(before.right_B, weights=before.weight_B))
    share = found.get("eval/rewards/accuracies")
    # Wilson's interval needs the share and the weights alone.
    right_B = None if share is None else np.full(len(before.loss_B), share)
    right_B = after.right_B if after else right_B
    if right_B is not None:
      yield _row("accuracy", was, share_estimate(right_B, before.weight_B), ".1%")
  was = float(np.average(before.loss_B, weights=before.weight_B))
  if after:
    yield _row("loss", was, mean_estimate(after.loss_B, after.weight_B), ".4g")
  elif found.get("eval/loss") is not None:
    yield _row("loss", was, Estimate(found["eval/loss"], np.nan, np.nan), ".4g")


def _row(name: str, was: float, now: Estimate, form: str) -> tuple[str, ...]:
  interval = f"{now.low:{form}} to {now.high:{form}}" if np.isfinite(now.low) else ""
  return name, f"{was:{form}}", f"{now.mean:{form}}", interval


def _hyperparameters(config: Mapping[str, Any], *, adapter: bool) -> Iterator[tuple[str, str]]:
  """Yields (label, value) of the fields that decide what training does, where they are set."""
  steps = config.get("train", {}).get("steps")
  for field, label in (*_HYPERPARAMETERS, *(_LORA if adapter else ())):
    section, _, name = field.rpartition(".")
    value = (config.get(section, {}) if section else config).get(name)
    # `steps` replaces the epochs.
    if field == "train.epochs" and steps:
      label, value = "steps", steps
    if value is not None and value != "":
      yield label, f"{value:g}" if isinstance(value, float) else str(value)
  for name, value in config.get("loss", {}).items():
    if name not in ("name", "beta") and value is not None:
      yield f"loss.{name}", str(value)


def _table(
  head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]
) -> str:
  """Returns a table in Markdown."""
  lines = [head, ("---",) * len(head), *rows]
  # A bar in a text would end the cell.
  cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
  return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
