"""The meanings of all fields, read from the comments of `defaults.py` without importing it.

The help of commands and docs/configuration.md both show these texts.
"""

from __future__ import annotations

import ast
import functools
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

# An installed package has its source too: the comments are in it.
DEFAULTS = pathlib.Path(__file__).parents[1] / "defaults.py"


class Field(NamedTuple):
  """A field as it is declared.

  Attributes:
    meaning: its comment.
    default: its default as one would type it; "none" if the field is not set.
  """

  meaning: str
  default: str

  @property
  def phrase(self) -> str:
    """The meaning without what follows a semicolon, which is for those who look the field up."""
    return self.meaning.split("; ")[0]

  @property
  def kind(self) -> str:
    """The kind of its value, as help shows it: `--lr=X`."""
    words = self.meaning.split()
    if words[0] == "file":
      return "FILE"
    if "folder" in words[:3]:
      return "DIR"
    if self.default in ("True", "False") or words[0] == "True":
      return "BOOL"
    if re.fullmatch(r"-?\d+", self.default):
      return "N"
    return "X" if re.fullmatch(r"-?[\d.]+(e-?\d+)?", self.default) else "VALUE"


@functools.cache
def read(path: pathlib.Path = DEFAULTS) -> dict[str, Field]:
  """Reads all fields by dotted name, in the order in which they are declared.

  The arguments of losses are in it as far as `LOSS_FIELDS` explains them.

  Raises:
    ValueError: a field has no comment.
  """
  source = path.read_text(encoding="utf-8")
  tree, comments, found = ast.parse(source), _comments(source), {}
  for name, value in _items(_returned(tree)):
    if isinstance(value, ast.Call) and value.keywords:
      nodes = {f"{name}.{keyword.arg}": keyword for keyword in value.keywords}
    elif name == "loss":  # `loss(NAME)`: a field for every argument of any loss
      found |= _loss_fields(tree, value)
      continue
    else:
      nodes = {name: value}
    for field, node in nodes.items():
      meaning = _comment_of(node, comments)
      if not meaning:
        raise ValueError(f"{field} has no comment in {path}")
      found[field] = Field(meaning, _default(node.value if isinstance(node, ast.keyword) else node))
  return found


def shown(value: object) -> str:
  """Formats a default as one would type it."""
  return "none" if value is None else '""' if value == "" else str(value)


def _returned(tree: ast.Module) -> ast.Dict:
  """Returns the dictionary that `get_config` makes a configuration of."""
  functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
  (function,) = (node for node in functions if node.name == "get_config")
  return next(node for node in ast.walk(function) if isinstance(node, ast.Dict))


def _items(node: ast.Dict) -> Iterator[tuple[str, ast.expr]]:
  for key, value in zip(node.keys, node.values, strict=True):
    assert isinstance(key, ast.Constant)
    yield str(key.value), value


def _loss_fields(tree: ast.Module, call: ast.expr) -> dict[str, Field]:
  """Returns the fields of the section `loss`: its name, and the arguments that are explained."""
  assert isinstance(call, ast.Call)
  texts = next(
    node.value
    for node in tree.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LOSS_FIELDS"
  )
  fields = {f"loss.{name}": Field(text, "none") for name, text in ast.literal_eval(texts).items()}
  return fields | {"loss.name": fields["loss.name"]._replace(default=_default(call.args[0]))}


def _default(node: ast.expr) -> str:
  """Formats a default; a placeholder and a section without fields of its own are not set."""
  return shown(node.value) if isinstance(node, ast.Constant) else "none"


def _comments(source: str) -> dict[int, tuple[str, bool]]:
  """Returns every comment by its line, and whether it has the line to itself."""
  found = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      alone = not token.line[: token.start[1]].strip()
      found[token.start[0]] = token.string.lstrip("# "), alone
  return found


def _comment_of(node: ast.keyword | ast.expr, found: dict[int, tuple[str, bool]]) -> str:
  """Returns the comment behind a field, or else the lines of comment right above it."""
  behind = found.get(node.end_lineno or node.lineno)
  if behind and not behind[1]:
    return behind[0]
  lines, line = [], node.lineno - 1
  while line in found and found[line][1]:
    lines.insert(0, found[line][0])
    line -= 1
  return " ".join(lines)
