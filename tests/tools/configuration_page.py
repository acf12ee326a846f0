"""Writes the tables of docs/configuration.md from the fields and comments of dpo_jax/defaults.py.

  python -m tests.tools.configuration_page

The tables stand between two markers; the rest of the page is written by hand. A field without a
comment in defaults.py is an error, since its meaning would be missing from the page.
"""

from __future__ import annotations

from dpo_jax import defaults, losses
from dpo_jax.utils import field_docs, field_names
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- generated: fields -->\n", "<!-- end of generated: fields -->"


def shown(default: str) -> str:
  """Formats a default as code, or as words where a field is not set."""
  return default if default == "none" else f"`{default}`"


def tables() -> str:
  """Returns the generated part of the page: short flags, a table per section, the losses last."""
  texts, lines = field_docs.read(), [*short_table()]
  for name, section in defaults.get_config().items():
    if name == "loss":
      continue
    fields = section.items() if hasattr(section, "items") else [(None, section)]
    lines += ["", f"### {name}", "", "| field | default | meaning |", "|---|---|---|"]
    for field, _ in fields:
      full = name if field is None else f"{name}.{field}"
      text = texts[full].meaning.replace("|", "\\|")
      lines.append(f"| `{full}` | {shown(texts[full].default)} | {text} |")
  return "\n".join([*lines, *loss_table(), ""])[1:] + "\n"


def short_table() -> list[str]:
  """Returns the rows of the fields that have short flags."""
  lines = ["", "### Short flags", "", "| flag | field | default |", "|---|---|---|"]
  for short, field in field_names.SHORT.items():
    default = shown(field_docs.read()[field].default)
    if field == "loss.beta":
      default = "that of the loss"
    lines.append(f"| `--{short}` | `{field}` | {default} |")
  return lines


def loss_table() -> list[str]:
  """Returns the rows of the arguments of losses: which loss reads which, and its default there."""
  lines = [
    "",
    "### loss",
    "",
    "`loss.name` is `sigmoid`; [losses.md](losses.md) lists all names.",
    "",
  ]
  lines += ["| field | meaning | read by, with the default |", "|---|---|---|"]
  readers: dict[str, list[str]] = {}
  for name in losses.LOSSES:
    for argument, default in losses.arguments(name).items():
      readers.setdefault(argument, []).append(f"`{name}` {shown_default(default)}")
  for argument in sorted(readers):
    lines.append(f"| `loss.{argument}` | {meaning(argument)} | {', '.join(readers[argument])} |")
  for modifier in sorted(losses.modifiers()):
    lines.append(f"| `loss.{modifier}` | {meaning(modifier)} | [modifier](losses.md#modifiers) |")
  return lines


def meaning(argument: str) -> str:
  """Returns what an argument of a loss means, if it is explained."""
  return defaults.LOSS_FIELDS.get(argument, "")


def shown_default(default: float | str) -> str:
  """Writes the default of a loss's argument, which is a number or a text."""
  return f"`{default}`" if isinstance(default, str) else f"{default:g}"


def page() -> str:
  """Returns the page with its generated part renewed."""
  text = PAGE.read_text(encoding="utf-8")
  before, rest = text.split(BEGIN)
  return before + BEGIN + tables() + END + rest.split(END)[1]


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
