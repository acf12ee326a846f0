"""The axis key of `dpo_jax/structs.py` against the names of all arrays of the package."""

import ast
import re

import pytest

from dpo_jax import structs
from tests.support.paths import ROOT

# One axis per line of the key: its letters, at least two spaces, its meaning.
KEY_LINE = re.compile(r"^  ([A-Z][a-z]?|[a-z]) +(\S.*)$", re.MULTILINE)
ENTRIES = KEY_LINE.findall(structs.__doc__ or "")
KEY = {letters for letters, _ in ENTRIES}


def names_of(tree):
  """Yields (name, line) of all variables, attributes, parameters, keywords and functions."""
  for node in ast.walk(tree):
    match node:
      case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name):
        yield name, node.lineno
      case ast.arg(arg=name):
        yield name, node.lineno
      case ast.keyword(arg=str(name)):
        yield name, node.value.lineno


def suffix_of(name):
  """Returns the axes at the end of an array's name, such as NS of logps_NS; None if it has none."""
  stem, _, suffix = name.rpartition("_")
  # Constants are all capitals; a single word has no suffix.
  if not any(letter.islower() for letter in stem) or not any(map(str.isupper, suffix)):
    return None
  return suffix


def axes_of(suffix):
  """Splits a suffix into axes of the key and digits; what is in neither stays as it is.

  Two letters of the key come before one, so that `Hd` is one axis and not `H` and an unknown `d`.
  """
  longest_first = sorted(KEY, key=len, reverse=True)
  return re.findall("|".join((*longest_first, r"\d", ".")), suffix)


def unknown_axes(text):
  """Lists "line: name (unknown letters)" of a module's names that use letters outside the key."""
  found = []
  for name, line in names_of(ast.parse(text)):
    suffix = suffix_of(name)
    unknown = [a for a in axes_of(suffix or "") if a not in KEY and not a.isdigit()]
    if unknown:
      found.append(f"{line}: {name} ({', '.join(unknown)})")
  return found


MODULES = sorted((ROOT / "dpo_jax").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_array_is_named_by_the_key(path):
  assert unknown_axes(path.read_text()) == []


def test_every_letter_of_the_key_has_one_meaning():
  letters = [letters for letters, _ in ENTRIES]
  assert sorted(letters) == sorted(set(letters))
  meanings = [meaning for _, meaning in ENTRIES]
  assert len(set(meanings)) == len(meanings)


def test_every_letter_of_the_key_is_used():
  used = set()
  for path in MODULES:
    for name, _ in names_of(ast.parse(path.read_text())):
      used |= {*axes_of(suffix_of(name) or "")}
  assert KEY - used == set()


@pytest.mark.parametrize(
  ("name", "axes"),
  [
    ("logps_NS", ["N", "S"]),
    ("q_NLHHd", ["N", "L", "H", "Hd"]),
    ("logits_cGmV", ["c", "G", "m", "V"]),
    ("digest_Rc2", ["Rc", "2"]),
    ("hidden_xD", ["x", "D"]),
    ("_part_Rc", ["Rc"]),
    ("loss_Z", ["Z"]),
  ],
)
def test_suffixes_are_split_into_axes(name, axes):
  assert axes_of(suffix_of(name)) == axes


@pytest.mark.parametrize("name", ["MIN_EFFECTIVE", "_RANGES", "loss", "loss_fn", "PairLogps"])
def test_other_names_have_no_axes(name):
  assert suffix_of(name) is None


def test_a_letter_outside_the_key_is_found():
  assert unknown_axes("def f(loss_B, hidden_NZ):\n  return g(x.rows_Zd, mean_B=loss_B)\n") == [
    "1: hidden_NZ (Z)",
    "2: rows_Zd (Z, d)",
  ]
