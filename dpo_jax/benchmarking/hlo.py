"""Reads the text of an optimised program (HLO): its instructions, and how often each of them runs.

XLA prints a program as computations, each a list of instructions. A loop runs its body as often as
its condition allows, and a fusion runs the computation that it calls as one kernel. The compilers'
own cost analysis counts the body of a loop once, so the numbers of turns are worked out here.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "bf16": 2}
_SHAPE = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CONTINUED = ('"', "}}", "},")  # how lines begin that go on with the metadata of the one before


class Shape(NamedTuple):
  """The shape of an array.

  Attributes:
    dtype: in HLO's words, such as "bf16".
    dims: sizes of its axes.
    layout: order of the axes in memory, tiles and memory space, as HLO writes them.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""

  @property
  def bytes(self) -> float:
    """Bytes of the numbers themselves."""
    return _item(self.dtype) * math.prod(self.dims)

  @property
  def padded_bytes(self) -> float:
    """Bytes in memory, where a TPU pads the last axes to whole tiles."""
    found = re.match(r"\{([\d,]*):T\(([\d,]+)\)", self.layout)
    if not found or not self.dims:
      return self.bytes
    order, tile = (list(map(int, text.split(","))) for text in found.groups())
    dims = list(self.dims)
    for axis, size in zip(order, reversed(tile), strict=False):
      dims[axis] += -dims[axis] % size
    return _item(self.dtype) * math.prod(dims)

  @property
  def in_main_memory(self) -> bool:
    """Whether it is in the device's main memory, not in a small fast one or on the host."""
    return "S(" not in self.layout

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _item(dtype: str) -> float:
  """Returns the bytes of one number."""
  if dtype in _BYTES:
    return _BYTES[dtype]
  bits = re.match(r"[a-z]+(\d+)", dtype)
  return int(bits[1]) / 8 if bits else 4


def shapes_in(text: str) -> list[Shape]:
  """Returns all shapes of a text, such as the type of an instruction, in their order."""
  return [
    Shape(dtype, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip("<= ")), layout)
    for dtype, dims, layout in _SHAPE.findall(text)
  ]


class Instruction:
  """An instruction: `%name = type opcode(operands), attributes`.

  Attributes:
    name: unique in its computation.
    type: shape of the result, or shapes in parentheses.
    opcode: what it does, such as "dot".
    rest: operands and attributes, from the parenthesis on.
    is_root: whether it gives the result of its computation.
  """

  __slots__ = ("__dict__", "is_root", "name", "opcode", "rest", "type")

  def __init__(self, name: str, type: str, opcode: str, rest: str, is_root: bool):
    self.name, self.type, self.opcode, self.rest, self.is_root = name, type, opcode, rest, is_root

  @functools.cached_property
  def shapes(self) -> list[Shape]:
    """Shapes of the result, one for an array."""
    return shapes_in(self.type)

  @functools.cached_property
  def operands(self) -> list[str]:
    """Names of the operands."""
    return re.findall(r"%([\w.\-]+)", _balanced(self.rest))

  def attribute(self, name: str) -> str:
    """Returns the name that an attribute has as its value, "" without it."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else ""

  @property
  def target(self) -> str:
    """What a custom call calls, "" for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return found[1] if found else ""

  @property
  def scope(self) -> str:
    """Path of the operation of JAX that it comes from, "" where it is not known."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""


class Program(NamedTuple):
  """A program.

  Attributes:
    computations: name to instructions.
    entry: name of the computation that the program starts with.
    lines: number of a stack frame to the innermost line of this package, "file:line".
  """

  computations: dict[str, list[Instruction]]
  entry: str
  lines: dict[int, str]

  def table(self, computation: str) -> dict[str, Instruction]:
    """Returns the instructions of a computation by their names."""
    return {one.name: one for one in self.computations.get(computation, ())}

  def source(self, instruction: Instruction) -> str:
    """Returns the line that an instruction comes from, "file:line", "" where it is not known."""
    found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    if found:
      return self.lines.get(int(found[1]), "")
    found = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', instruction.rest)
    return f"{found[1].rpartition('/')[2]}:{found[2]}" if found else ""


def parse(text: str) -> Program:
  """Reads the text of a program."""
  computations: dict[str, list[Instruction]] = {}
  entry, inside = "", None
  for line in _joined(text):
    if not line.startswith(" "):
      head = _HEAD.match(line)
      inside = head[2] if head and " = " not in line.partition("(")[0] else None
      if head and inside is not None:
        computations[inside] = []
        entry = inside if head[1] else entry
      continue
    found = _LINE.match(line) if inside is not None else None
    if not found or inside is None:
      continue
    type, rest = _split_type(found[3])
    opcode = re.match(r"([\w\-]+)\(", rest)
    if opcode:
      one = Instruction(found[2], type, opcode[1], rest[opcode.end() - 1 :], bool(found[1]))
      computations[inside].append(one)
  return Program(computations, entry, _source_lines(text))


def _joined(text: str) -> Iterator[str]:
  """Yields the lines of a program, those put together that metadata breaks."""
  held = ""
  for line in text.splitlines():
    if held and line.startswith(_CONTINUED):
      held += line
      continue
    if held:
      yield held
    held = line
  yield held


def _brackets(text: str) -> Iterator[tuple[int, str, int]]:
  """Yields place and letter, and how many brackets are open behind it."""
  depth = 0
  for at, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    yield at, letter, depth


def _split_type(text: str) -> tuple[str, str]:
  """Splits `type opcode(…` at the first space outside brackets."""
  for at, letter, depth in _brackets(text):
    if letter == " " and depth == 0:
      return text[:at], text[at + 1 :]
  return text, ""


def _balanced(text: str) -> str:
  """Returns a text up to the bracket that closes its first one."""
  for at, letter, depth in _brackets(text):
    if letter in ")]}" and depth == 0:
      return text[: at + 1]
  return text


def elements(type: str) -> list[str]:
  """Returns the types of the elements of a tuple; a type that is no tuple is its only element."""
  if not type.startswith("("):
    return [type]
  parts, depth, start = [], 0, 1
  for at, letter in enumerate(type):
    if letter in "([{":
      depth += 1
    elif letter in ")]}":
      depth -= 1
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      parts.append(type[start:at].strip())
      start = at + 1
  return [re.sub(r"/\*.*?\*/", "", part) for part in parts]


# --- how often instructions run -------------------------------------------------------------------


class Runs(NamedTuple):
  """How often computations run in one step.

  Attributes:
    times: computation to the number of its runs.
    fused: computations that run inside a kernel alone.
    unknown: loops whose number of turns depends on data.
  """

  times: dict[str, float]
  fused: set[str]
  unknown: list[Instruction]


def count_runs(program: Program, turns: float = 1) -> Runs:
  """Counts how often every computation runs.

  Args:
    program: the program.
    turns: taken for every loop whose number of turns depends on data.
  """
  times: collections.Counter[str] = collections.Counter()
  alone: set[str] = set()
  unknown: dict[str, Instruction] = {}

  def visit(name: str, count: float, inside: bool) -> None:
    times[name] += count  # pyright: ignore[reportArgumentType] (a mean of counts)
    if not inside:
      alone.add(name)
    table = program.table(name)
    for one in table.values():
      if one.opcode == "while":
        known = trip_count(program, one, table)
        if known is None:
          unknown[one.name] = one
        for part in ("body", "condition"):
          visit(one.attribute(part), count * (turns if known is None else known), inside)
      elif one.opcode in ("fusion", "fusion-start"):
        visit(one.attribute("calls"), count, True)
      elif one.opcode in ("call", "async-start"):
        visit(one.attribute("to_apply") or one.attribute("calls"), count, inside)
      elif one.opcode == "conditional":
        for branch in _branches(one):
          visit(branch, count, inside)

  visit(program.entry, 1, False)
  return Runs(dict(times), set(times) - alone, list(unknown.values()))


def _branches(one: Instruction) -> list[str]:
  """Returns the computations among which a conditional chooses."""
  several = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
  if several:
    return re.findall(r"%?([\w.\-]+)", several[1])
  return [one.attribute("true_computation"), one.attribute("false_computation")]


def trip_count(program: Program, loop: Instruction, around: dict[str, Instruction]) -> int | None:
  """Returns how often a loop runs its body; None if that depends on data.

  Args:
    program: the program.
    loop: an instruction `while`.
    around: the instructions beside it in its computation, by name.
  """
  stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if stated:
    return int(stated[1])
  condition = program.table(loop.attribute("condition"))
  root = next((one for one in condition.values() if one.is_root), None)
  if root is None:
    return None
  # The condition compares the counter, an element of what the loop carries, with its end, a
  # constant or an element that never changes.
  index, end = None, None
  for name in root.operands:
    one = condition.get(name)
    if one is not None and one.opcode == "constant":
      end = _constant(one)
    elif one is not None and one.opcode == "get-tuple-element":
      at = _index(one)
      carried = _initial(loop, around, at)
      if _grows(program, loop, at):
        index = at
      elif carried is not None:
        end = carried
  if end is None:
    return None
  start = _initial(loop, around, index) if index is not None else 0
  step = _grows(program, loop, index) if index is not None else 1
  return max(0, -(-(end - (start or 0)) // (step or 1)))


def _constant(one: Instruction) -> int | None:
  found = re.match(r"\((-?\d+)\)", one.rest)
  return int(found[1]) if found else None


def _index(one: Instruction) -> int:
  found = re.search(r"index=(\d+)", one.rest)
  return int(found[1]) if found else 0


def _initial(loop: Instruction, around: dict[str, Instruction], index: int) -> int | None:
  """Returns the constant that an element of what a loop carries begins with, or None."""
  carried = around.get(loop.operands[0]) if loop.operands else None
  if carried is None or carried.opcode != "tuple" or index >= len(carried.operands):
    return None
  one = around.get(carried.operands[index])
  while one is not None and one.opcode in ("copy", "bitcast") and one.operands:
    one = around.get(one.operands[0])
  return _constant(one) if one is not None and one.opcode == "constant" else None


def _grows(program: Program, loop: Instruction, index: int) -> int:
  """Returns by how much a turn of a loop increases an element of what it carries; 0 if it does not.

  A compiler that unrolls a loop adds more than 1, perhaps in several additions.
  """
  body = program.table(loop.attribute("body"))
  root = next((one for one in body.values() if one.is_root), None)
  if root is None or root.opcode != "tuple" or index >= len(root.operands):
    return 0
  total, one = 0, body.get(root.operands[index])
  for _ in range(len(body)):
    if one is None or one.opcode == "get-tuple-element":
      break
    parts = [body.get(name) for name in one.operands]
    if one.opcode in ("copy", "bitcast") and parts:
      one = parts[0]
      continue
    added = next((x for x in parts if x is not None and x.opcode == "constant"), None)
    value = _constant(added) if added is not None else None
    if one.opcode != "add" or value is None:
      # A fusion, perhaps: it counts in steps of 1 unless it is written out.
      return max(total, 1)
    total += value
    one = next((x for x in parts if x is not added), None)
  return total


# --- source lines ---------------------------------------------------------------------------------


def _source_lines(text: str, package: str = "dpo_jax") -> dict[int, str]:
  """Reads the table of stack frames: number to the innermost line in a package, "file:line"."""
  tables: dict[str, dict[int, str]] = {}
  now = None
  for line in text.splitlines():
    if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      now = tables.setdefault(line, {})
    elif now is not None and (found := re.match(r"(\d+) (.*)", line)):
      now[int(found[1])] = found[2]
    elif now is not None and line.strip():
      break  # the program begins
  frames, places = tables.get("StackFrames", {}), tables.get("FileLocations", {})
  files = tables.get("FileNames", {})

  def number(name: str, text: str) -> int:
    found = re.search(rf"{name}=(\d+)", text)
    return int(found[1]) if found else 0

  def line_of(frame: int) -> str:
    seen: set[int] = set()
    while frame in frames and frame not in seen:
      seen.add(frame)
      place = places.get(number("file_location_id", frames[frame]), "")
      file = files.get(number("file_name_id", place), "").strip('"')
      if f"{package}/" in file:
        return f"{file.rpartition('/')[2]}:{number('line', place)}"
      # Frame n names n + 1 as the number of its parent, 0 and 1 for none.
      frame = number("parent_frame_id", frames[frame]) - 1
    return ""

  return {frame: line_of(frame) for frame in frames}
