"""Reads damaged data files for some minutes and counts what happens; a traceback is a failure.

python -m tests.tools.fuzz_readers [--minutes 10] [--seed 0]

Every kind of file that `readers` accepts is damaged (bits flipped; bytes cut, inserted, repeated,
exchanged; a word of the format written somewhere) and read, and its rows are converted as training
would. A row may be refused or dropped with a reason (UserError, RowError). Anything else is
printed, with the damaged file kept. A worker process reads, so that a crash is counted, too.
"""

import argparse
import bz2
import collections
import contextlib
import csv
import gzip
import io
import json
import lzma
import multiprocessing
import pathlib
import random
import tempfile
import time
import traceback
import warnings

import pyarrow
from pyarrow import feather, parquet

from dpo_jax.data import detection, readers
from dpo_jax.data.fields import RowError
from dpo_jax.structs import UserError

PAIRS = [
  {"prompt": f"é question {i}?\n", "chosen": f'"yes", {i} 🙂', "rejected": "no; not"}
  for i in range(9)
]
CHATS = [
  {
    "prompt": [{"role": "user", "content": f"question {i}"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
    "score": None if i % 2 else i / 3,
    "when": 1_700_000_000 + i,
  }
  for i in range(9)
]
# What a file of rows is likely to contain in the wrong place.
WORDS = [
  *(b'"', b"{", b"}", b"[", b"]", b",", b":", b";", b"\t", b"\n", b"\r", b"\\", b"\\u", b"\\ud800"),
  *(b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"\x00"),
  *(b"\xff", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"PAR1"),
  *(b'"prompt"', b'"chosen"', b'"data": [', b"[{'role': 'user'", b"'", b"True", b"1", b"-1"),
]


def json_lines(rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def comma_separated(rows, separator=","):
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()


def table(rows):
  found = pyarrow.Table.from_pylist(rows)
  if "when" in found.column_names:
    when = found["when"].cast(pyarrow.timestamp("s"))
    found = found.set_column(found.column_names.index("when"), "when", when)
  return found


def written(write, *arguments, **options):
  file = io.BytesIO()
  write(*arguments, file, **options)
  return file.getvalue()


def arrow_stream(rows):
  file = io.BytesIO()
  with pyarrow.ipc.new_stream(file, table(rows).schema) as writer:
    writer.write_table(table(rows))
  return file.getvalue()


def compressed(data, codec):
  return pyarrow.compress(data, codec=codec, asbytes=True)


def accepted():
  """Returns kind -> the bytes of intact files."""
  columns = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
  text = {
    "JSONL": [json_lines(PAIRS), json_lines(CHATS)],
    "JSON": [
      json.dumps(PAIRS).encode(),
      json.dumps({"version": 1, "data": CHATS}, indent=2).encode(),
      json.dumps(columns).encode(),
      "\n".join(json.dumps(row, indent=1) for row in PAIRS).encode(),
    ],
    "CSV": [comma_separated(PAIRS), comma_separated(PAIRS, ";")],
    "TSV": [comma_separated(PAIRS, "\t")],
  }
  both = [json_lines(PAIRS), comma_separated(PAIRS)]
  return text | {
    "gzip": [gzip.compress(one, mtime=0) for one in both],
    "bzip2": [bz2.compress(one) for one in both],
    "xz": [lzma.compress(one) for one in both],
    "zstd": [compressed(one, "zstd") for one in both],
    "Parquet": [
      written(parquet.write_table, table(rows), compression=codec)
      for rows, codec in ((PAIRS, "none"), (CHATS, "snappy"))
    ],
    "Arrow": [
      written(feather.write_feather, table(rows), compression=codec)
      for rows, codec in ((PAIRS, "uncompressed"), (CHATS, "lz4"), (CHATS, "zstd"))
    ],
    "Arrow stream": [arrow_stream(PAIRS), arrow_stream(CHATS)],
  }


def damaged(data, rng):
  """Returns the bytes with one fault or a few."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    at = rng.randrange(len(data) + 1)
    to = min(at + rng.choice((1, 2, 8, 60, 400)), len(data))
    other = rng.randrange(len(data) + 1)
    fault = rng.choice(("flip", "flip", "cut", "end", "insert", "word", "repeat", "move", "byte"))
    if fault == "flip" and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif fault == "byte" and at < len(data):
      data[at] = rng.choice((0, 0x22, 0x7F, 0x80, 0xFF))
    elif fault == "cut":
      del data[at:to]
    elif fault == "end":
      del data[max(at, 1) :]
    elif fault == "insert":
      data[at:at] = rng.randbytes(to - at)
    elif fault == "word":
      data[at:at] = rng.choice(WORDS)
    elif fault == "repeat":
      data[at:at] = data[at:to]
    elif fault == "move":
      part = data[at:to]
      del data[at:to]
      data[other:other] = part
  return bytes(data)


def read(path):
  """Returns "read", "refused" or a traceback, from reading a file as training does."""
  try:
    rows = list(readers.read_rows(path))
    kind = detection.detect_kind(rows[0][1])
    row_format = detection.detect(rows[0][1], kind=kind)
    for _, row in rows:
      json.dumps(row)
      with contextlib.suppress(RowError):
        row_format.convert(row)
  except UserError as error:
    return "refused" if "\n" not in str(error) else f"a message of several lines: {error}"
  except BaseException:
    return traceback.format_exc()
  return "read"


def serve(connection):
  """Reads each file that is named, until None."""
  warnings.simplefilter("error")
  while path := connection.recv():
    connection.send(read(path))


def start():
  here, there = multiprocessing.Pipe()
  process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
  process.start()
  there.close()
  return process, here


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--minutes", type=float, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--seconds", type=float, default=20, help="a file that takes longer hangs")
  given = parser.parse_args()
  rng = random.Random(given.seed)
  kinds, counts, failures = accepted(), collections.defaultdict(collections.Counter), 0
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_readers_"))
  process, connection = start()
  path, until, seen = folder / "rows", time.monotonic() + 60 * given.minutes, set()
  for kind, intact in kinds.items():
    for data in intact:
      path.write_bytes(data)
      connection.send(path)
      assert connection.recv() == "read", kind
  while time.monotonic() < until:
    kind = rng.choice(list(kinds))
    path.write_bytes(damaged(rng.choice(kinds[kind]), rng))
    connection.send(path)
    try:
      result = connection.recv() if connection.poll(given.seconds) else "hangs"
    except EOFError:
      result = "crashed"
    counts[kind][result if result in ("read", "refused", "hangs", "crashed") else "traceback"] += 1
    if result in ("read", "refused"):
      continue
    failures += 1
    if result in ("hangs", "crashed"):
      process.kill()
      process, connection = start()
    last = result.strip().splitlines()[-1]
    if last not in seen:
      seen.add(last)
      kept = folder / f"failure_{failures}"
      kept.write_bytes(path.read_bytes())
      print(f"{kind}: {kept}\n{result}", flush=True)
  names = ("read", "refused", "traceback", "crashed", "hangs")
  print(f"{'':14}{'files':>9}" + "".join(f"{name:>11}" for name in names))
  total = collections.Counter()
  for kind, count in counts.items():
    total.update(count)
    print(f"{kind:14}{count.total():9}" + "".join(f"{count[name]:11}" for name in names))
  print(f"{'all':14}{total.total():9}" + "".join(f"{total[name]:11}" for name in names))
  return 1 if failures else 0


if __name__ == "__main__":
  raise SystemExit(main())
