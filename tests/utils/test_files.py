"""A write succeeds as a whole, or leaves the old file or folder and nothing beside it."""

import os

import pytest

from dpo_jax.structs import UserError
from dpo_jax.utils import files


def test_where_to_write_is_checked_first(tmp_path):
  files.check_output_file(tmp_path / "new" / "folder" / "x.jsonl")
  with pytest.raises(UserError, match=r"is a folder; name a file"):
    files.check_output_file(tmp_path)
  (tmp_path / "file").write_text("kept")
  with pytest.raises(UserError, match=r"file is a file, and nothing can lie in it"):
    files.check_output_file(tmp_path / "file" / "x.jsonl")


def test_a_file_is_overwritten_only_by_force(tmp_path):
  (tmp_path / "file").write_text("kept")
  (tmp_path / "empty").touch()
  with pytest.raises(UserError, match=r"file exists; add --force to replace it, or name another"):
    files.check_output_file(tmp_path / "file")
  files.check_output_file(tmp_path / "file", force=True)
  files.check_output_file(tmp_path / "empty")
  with pytest.raises(UserError, match=r"is a folder; name a file"):
    files.check_output_file(tmp_path, force=True)


def test_a_failed_write_leaves_the_older_file_and_nothing_beside_it(tmp_path):
  out = tmp_path / "out.jsonl"
  files.write_json_lines(out, [{"a": 1}])
  with pytest.raises(TypeError):
    files.write_json_lines(out, [{"a": 2}, {"a": object()}])
  assert out.read_text() == '{"a": 1}\n' and list(tmp_path.iterdir()) == [out]
  (tmp_path / "folder").mkdir()
  with pytest.raises(OSError) as raised:
    files.write_json_lines(tmp_path / "folder", [])
  assert raised.value.filename == str(tmp_path / "folder")


def test_an_interrupted_write_leaves_the_older_file_and_nothing_beside_it(tmp_path):
  out = tmp_path / "weights"
  out.write_bytes(b"old")
  with pytest.raises(KeyboardInterrupt), files.replacing_file(out) as partial:
    partial.write_bytes(b"half of the n")
    raise KeyboardInterrupt
  assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def test_a_text_may_come_in_parts_and_has_the_mode_of_an_ordinary_file(tmp_path):
  files.write_text(tmp_path / "new" / "a", "añ\n")
  files.write_text(tmp_path / "new" / "b", iter(["a", "ñ\n"]))
  (tmp_path / "plain").write_text("")
  for name in "ab":
    path = tmp_path / "new" / name
    assert path.read_bytes() == "añ\n".encode()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
  assert len(list((tmp_path / "new").iterdir())) == 2


def test_two_writers_of_one_file_do_not_mix(tmp_path):
  out = tmp_path / "out"
  with files.replacing_file(out) as first, files.replacing_file(out) as second:
    first.write_text("first")
    second.write_text("second")
  assert out.read_text() == "first"  # its block ended last
  assert list(tmp_path.iterdir()) == [out]


def test_an_error_of_writing_names_the_users_file_and_one_of_reading_its_own(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="file") as raised:
    files.write_text(tmp_path / "file" / "folder" / "out", "a")
  assert raised.value.filename == str(tmp_path / "file" / "folder" / "out")
  parts = (path.read_text() for path in [tmp_path / "missing"])
  with pytest.raises(FileNotFoundError) as raised:
    files.write_text(tmp_path / "out", parts)
  assert raised.value.filename == str(tmp_path / "missing")


@pytest.mark.parametrize("failing", ["block", "rename"])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, failing):
  out = tmp_path / "model"
  with files.replacing_folder(out) as new:
    (new / "a").write_text("old")
  rename = os.rename

  def fail(source, target, **how):
    if failing == "rename" and os.fspath(source).endswith("new"):
      raise OSError("no")
    rename(source, target, **how)

  monkeypatch.setattr(os, "rename", fail)
  with pytest.raises((OSError, ValueError)), files.replacing_folder(out) as new:
    (new / "a").write_text("new")
    if failing == "block":
      raise ValueError
  assert (out / "a").read_text() == "old"
  assert list(tmp_path.iterdir()) == [out]
