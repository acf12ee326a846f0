"""Recognizes what a file is by its first bytes, and opens it decompressed.

A file that contains no rows that can be read here is refused as what it is, with the way out.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from dpo_jax.structs import UserError

BOM = b"\xef\xbb\xbf"  # UTF-8's, which editors on Windows write
_HEAD = 4096  # bytes that are looked at; a tar archive shows itself after 257


class Kind(NamedTuple):
  """A kind of file.

  Attributes:
    format: "json", "csv", "parquet", "arrow" (file) or "arrow stream".
    compression: "gzip", "bzip2", "xz", "zstd" or "".
  """

  format: str
  compression: str = ""


# Name -> the first bytes, the usual suffixes, and the command that decompresses a file.
_COMPRESSIONS = {
  "gzip": ((b"\x1f\x8b",), (".gz", ".gzip"), "gunzip"),
  "bzip2": (tuple(b"BZh%d" % level for level in range(1, 10)), (".bz2",), "bunzip2"),
  "xz": ((b"\xfd7zXZ\x00", b"\x5d\x00\x00\x80\x00"), (".xz", ".lzma"), "unxz"),
  "zstd": ((b"\x28\xb5\x2f\xfd",), (".zst", ".zstd"), "zstd -d"),
}
_FORMATS = (
  (b"PAR1", "parquet"),
  (b"ARROW1", "arrow"),
  (b"\xff\xff\xff\xff", "arrow stream"),  # a continuation marker precedes its first message
)
# Suffixes of files that are binary: what has one of them and is something else is a mistake.
_BINARY_SUFFIXES = {
  ".parquet": ("Parquet", ("parquet",)),
  ".arrow": ("Arrow", ("arrow", "arrow stream")),
  ".feather": ("Feather", ("arrow",)),
}
_CSV_SUFFIXES = (".csv", ".tsv")

_EXPORT = "export its rows as JSONL, CSV or Parquet"
_ANOTHER = "name the data file, or export its rows as JSONL, CSV or Parquet"
# What begins with these bytes contains no rows for us: what it is, and the way out.
_REFUSED = (
  (b"version https://git-lfs", "a Git LFS pointer instead of the data", "git lfs pull"),
  (b"PARE", "an encrypted Parquet file", "decrypt it"),
  (b"FEA1", "a Feather file of version 1", "save it again with a current version of its library"),
  (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -d {path}"),
  (b"\xff\x06\x00\x00sNaPpY", "compressed by snappy", "decompress it"),
  (b"\x1f\x9d", "compressed by compress", "uncompress {path}"),
  (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and name the file of rows in it"),
  (b"Rar!", "a RAR archive", "unpack it and name the file of rows in it"),
  (b"\xd0\xcf\x11\xe0", "an Excel workbook", "save its sheet as CSV UTF-8"),
  (b"\x89HDF", "an HDF5 file", _EXPORT),
  (b"SQLite format 3", "an SQLite database", _EXPORT),
  (b"\x93NUMPY", "a NumPy array", _EXPORT),
  (b"Obj\x01", "an Avro file", _EXPORT),
  (b"ORC", "an ORC file", _EXPORT),
  (b"%PDF", "a PDF document", _ANOTHER),
  (b"GGUF", "a model in GGUF", _ANOTHER),
  (b"\x89PNG", "an image", _ANOTHER),
  (b"\xff\xd8\xff", "an image", _ANOTHER),
)
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<body")
_UTF_16 = "save it as UTF-8, such as with iconv -f UTF-16 -t UTF-8 {path}"


def recognize(path: pathlib.Path) -> Kind:
  """Recognizes a file by its first bytes; its name decides only where these leave it open.

  Raises:
    UserError: it contains no rows that can be read here, or is not what its name says.
  """
  with path.open("rb") as file:
    head = file.read(_HEAD)
  compression = _compression_of(head)
  if compression:
    with open_decompressed(path, compression) as file:
      head = file.read(_HEAD)
  kind = Kind(_format_of(head, path, compression), compression)
  _check_name(path, kind)
  return kind


@contextlib.contextmanager
def open_decompressed(path: pathlib.Path, compression: str) -> Iterator[BinaryIO]:
  """Opens a file for reading its decompressed bytes; a broken one is a `UserError`."""
  try:
    with _open(path, compression) as file:
      yield file
  except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
    raise _broken(path, compression, error) from None
  except OSError as error:
    # Of bz2 and pyarrow. One with a number comes from the system, and another reader reports it.
    if error.errno is not None or not compression:
      raise
    raise _broken(path, compression, error) from None


def _broken(path: pathlib.Path, compression: str, error: Exception) -> UserError:
  return UserError(f"{path}: broken {compression} ({error}); download the file again")


def _open(path: pathlib.Path, compression: str) -> BinaryIO:
  if compression == "gzip":
    return cast(BinaryIO, gzip.open(path))
  if compression == "bzip2":
    return cast(BinaryIO, bz2.open(path))
  if compression == "xz":
    return cast(BinaryIO, lzma.open(path))
  if compression == "zstd":
    import pyarrow  # slow to import; Python has zstd of its own only from 3.14

    stream = pyarrow.input_stream(str(path), compression="zstd")
    return cast(BinaryIO, io.BufferedReader(stream))
  return path.open("rb")


def _compression_of(head: bytes) -> str:
  for name, (starts, _, _) in _COMPRESSIONS.items():
    if head.startswith(starts):
      return name
  return ""


def _format_of(head: bytes, path: pathlib.Path, compression: str) -> str:
  """Returns the format of a file from its first bytes, decompressed; refuses what is none."""
  if again := _compression_of(head):
    command = _COMPRESSIONS[compression][2]
    raise UserError(f"{path} is {again} inside {compression}; decompress it once: {command} {path}")
  for start, name in _FORMATS:
    if head.startswith(start):
      if compression:  # these are read by random access
        what = name.split()[0].capitalize()
        raise UserError(
          f"{path} is {what} compressed by {compression}, and {what} compresses by itself;"
          f" {_COMPRESSIONS[compression][2]} {path}"
        )
      return name
  if refused := _refusal(head, path, compression):
    what, way_out = refused
    raise UserError(f"{path} is {what}; {way_out.format(path=path)}")
  text = head.removeprefix(BOM).lstrip()
  is_json = text[:1] in (b"{", b"[", b"")
  if not is_json and (_suffix(path, compression) in _CSV_SUFFIXES or _is_header(text)):
    return "csv"
  return "json"


def _refusal(head: bytes, path: pathlib.Path, compression: str) -> tuple[str, str] | None:
  """Returns what a file is that contains no rows for us, and the way out."""
  for start, what, way_out in _REFUSED:
    if head.startswith(start):
      return what, way_out
  if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
    return _zip_refusal(path, compression)
  if head[257:262] == b"ustar":
    return "a tar archive", "unpack it (tar -xf {path}) and name the file of rows in it"
  if re.match(rb"\x80[\x02-\x05]", head):
    return "a pickle, which is never loaded, since it may run any code", _EXPORT
  # safetensors: the length of a JSON header in 8 bytes, then the header. JSON text has no zeros.
  if head[8:9] == b"{" and head[4:8] == bytes(4):
    return "weights in safetensors", "name the data file (weights are named by --model)"
  if _suffix(path, compression) in (".array_record", ".tfrecord") or ".tfrecord" in path.name:
    return "a file of records", "name its folder, as TFDS wrote it"
  text = head.removeprefix(BOM).lstrip().lower()
  if text.startswith(_WEB_PAGE):
    return (
      "a web page (HTML) instead of the data",
      "download the file itself (its raw or resolve link)",
    )
  if text.startswith(b"<?xml"):
    return "XML", _EXPORT
  # ASCII in UTF-16 without a mark: every other byte is a zero.
  zeros = head.count(0)
  if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (head.isascii() and zeros * 3 > len(head)):
    return "text in UTF-16", _UTF_16
  if zeros:
    return "binary data of an unknown kind", _ANOTHER
  return None


def _zip_refusal(path: pathlib.Path, compression: str) -> tuple[str, str]:
  names: list[str] = []
  if not compression:
    # One that cannot be listed is refused as a zip archive all the same.
    with contextlib.suppress(zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
      names = zipfile.ZipFile(path).namelist()
  if any(name.startswith("xl/") for name in names):
    return "an Excel workbook", "save its sheet as CSV UTF-8"
  if any(name.endswith((".npy", "data.pkl")) for name in names):
    return "a file of arrays (NumPy or PyTorch)", _EXPORT
  return "a zip archive", "unzip it and name the file of rows in it"


def _is_header(text: bytes) -> bool:
  """Returns True if a text begins with a line of two or more column names."""
  line = text.splitlines()[0] if text else b""
  return any(
    separator in line
    and all(re.fullmatch(rb'\s*"?[A-Za-z_][\w.-]*"?\s*', one) for one in line.split(separator))
    for separator in (b",", b";", b"\t")
  )


def _suffix(path: pathlib.Path, compression: str) -> str:
  """Returns the suffix of a name, in lower case, without that of its compression."""
  name = pathlib.PurePath(path.name.lower())
  if compression and name.suffix in _COMPRESSIONS[compression][1]:
    name = name.with_suffix("")
  return name.suffix


def _check_name(path: pathlib.Path, kind: Kind) -> None:
  suffix = path.suffix.lower()
  for name, (_, suffixes, _) in _COMPRESSIONS.items():
    if suffix in suffixes and name != kind.compression:
      raise _misnamed(path, name)
  what, formats = _BINARY_SUFFIXES.get(_suffix(path, kind.compression), ("", (kind.format,)))
  if kind.format not in formats:
    raise _misnamed(path, what)


def _misnamed(path: pathlib.Path, what: str) -> UserError:
  return UserError(
    f"{path} is named {path.suffix} and is not {what}; download it again, or rename it"
  )
