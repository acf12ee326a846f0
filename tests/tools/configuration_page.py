"""Writes the tables of docs/configuration.md from the fields and comments of dpo_jax/defaults.py.

  python -m tests.tools.configuration_page

The tables stand between two markers; the rest of the page is written by hand. A field without a
comment in defaults.py is an error, since its meaning would be missing from the page.
"""

from __future__ import annotations

import ast
import pathlib
import sys
import tokenize
from collections.abc import Mapping

from ml_collections import ConfigDict

from dpo_jax import defaults, losses
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- generated: fields -->\n", "<!-- end of generated: fields -->"


def comments() -> dict[int, tuple[str, bool]]:
  """Returns every comment of defaults.py by line, and whether it has the line to itself."""
  found = {}
  with tokenize.open(defaults.__file__) as file:
    for token in tokenize.generate_tokens(file.readline):
      if token.type == tokenize.COMMENT:
        alone = not token.line[: token.start[1]].strip()
        found[token.start[0]] = token.string.lstrip("# "), alone
  return found


def comment_of(node: ast.keyword | ast.expr, found: dict[int, tuple[str, bool]]) -> str:
  """Returns the comment behind a field, or else the lines of comment right above it."""
  behind = found.get(node.end_lineno or node.lineno)
  if behind and not behind[1]:
    return behind[0]
  lines, line = [], node.lineno - 1
  while line in found and found[line][1]:
    lines.insert(0, found[line][0])
    line -= 1
  return " ".join(lines)


def described() -> dict[str, str]:
  """Returns the description of every field written out in `get_config`, by dotted name."""
  tree = ast.parse(pathlib.Path(defaults.__file__).read_text(encoding="utf-8"))
  (function,) = (
    node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_config"
  )
  (config,) = (node for node in ast.walk(function) if isinstance(node, ast.Dict))
  found, texts = comments(), {}
  for key, value in zip(config.keys, config.values, strict=True):
    assert isinstance(key, ast.Constant)
    keywords = value.keywords if isinstance(value, ast.Call) else []
    for keyword in keywords:
      texts[f"{key.value}.{keyword.arg}"] = comment_of(keyword, found)
    if not keywords:
      texts[str(key.value)] = comment_of(value, found)
  return texts


def shown(value: object) -> str:
  """Formats a default as one would type it."""
  if value == "":
    return '`""`'
  is_empty = isinstance(value, Mapping | ConfigDict) and not value
  return "none" if value is None or is_empty else f"`{value}`"


def tables() -> str:
  """Returns the generated part of the page: a table per section, the losses' arguments last."""
  texts, lines = described(), []
  for name, section in defaults.get_config().items():
    if name == "loss":
      continue
    fields = section.items() if hasattr(section, "items") else [(None, section)]
    lines += ["", f"### {name}", "", "| field | default | meaning |", "|---|---|---|"]
    for field, default in fields:
      full = name if field is None else f"{name}.{field}"
      if full == "data.fields":
        default = "none"
      if not texts.get(full):
        sys.exit(f"error: {full} has no comment in dpo_jax/defaults.py")
      text = texts[full].replace("|", "\\|")
      lines.append(f"| `{full}` | {default if default == 'none' else shown(default)} | {text} |")
  return "\n".join([*lines, *loss_table(), ""])[1:] + "\n"


def loss_table() -> list[str]:
  """Returns the rows of the arguments of losses: which loss reads which, and its default there."""
  lines = [
    "",
    "### loss",
    "",
    "`loss.name` is `sigmoid`; [losses.md](losses.md) lists all names.",
    "",
  ]
  lines += ["| field | read by, with the default |", "|---|---|"]
  readers: dict[str, list[str]] = {}
  for name in losses.LOSSES:
    for argument, default in losses.arguments(name).items():
      readers.setdefault(argument, []).append(f"`{name}` {shown_default(default)}")
  for argument in sorted(readers):
    lines.append(f"| `loss.{argument}` | {', '.join(readers[argument])} |")
  for modifier in sorted(losses.modifiers()):
    lines.append(f"| `loss.{modifier}` | [modifier](losses.md#modifiers) |")
  return lines


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
