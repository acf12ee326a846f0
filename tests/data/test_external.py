"""Data sets of other libraries are read as rows; the tests build them with those libraries."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dpo_jax.data import external, readers
from dpo_jax.structs import UserError

ROWS = [
  {
    "prompt": f"é {i}",
    "chosen": [{"role": "user", "content": f"é {i}"}, {"role": "assistant", "content": "🙂"}],
    "answers": ["a", "b", "c"][: 1 + i],
    "label": bool(i),
    "score": i / 2,
    "ids": [1, 2, i],
  }
  for i in range(3)
]


class Talks(tfds.core.GeneratorBasedBuilder):
  """A TFDS data set with every kind of field that preference rows have."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None

  def _info(self):
    f = tfds.features
    return tfds.core.DatasetInfo(
      builder=self,
      features=f.FeaturesDict(
        {
          "prompt": f.Text(),
          "chosen": f.Sequence({"role": f.Text(), "content": f.Text()}),
          "answers": f.Sequence(f.Text()),
          "label": np.bool_,
          "score": np.float32,
          "ids": f.Tensor(shape=(None,), dtype=np.int32),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(ROWS), "test": self._generate_examples(ROWS[:1])}

  def _generate_examples(self, rows):
    yield from enumerate(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  builder = Talks(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
  builder.download_and_prepare()
  return builder.data_dir


def test_a_folder_of_tfds_gives_the_rows_it_was_made_of(folder):
  assert [row for _, row in readers.read_rows(folder)] == ROWS
  assert list(readers.read_rows(f"{folder}:test")) == [(f"{folder}:test:row 1", ROWS[0])]
  assert [*map(str, readers.files([folder, f"{folder}:test"]))] == [str(folder), f"{folder}:test"]
  assert readers.files(f"{folder}:test,hf:a/b") == [f"{folder}:test", "hf:a/b"]


def test_what_is_not_there_is_one_line(folder, tmp_path):
  with pytest.raises(UserError, match=r"tfds:no_such_set: TFDS has no data set of this name"):
    list(readers.read_rows("tfds:no_such_set"))
  with pytest.raises(UserError, match=r"tfds:mnist is not prepared in .*; make it there with TFDS"):
    list(readers.read_rows("tfds:mnist"))
  with pytest.raises(UserError, match=r":dev: Unknown split 'dev'"):
    list(readers.read_rows(f"{folder}:dev"))
  (tmp_path / "features.json").write_text("{")
  with pytest.raises(UserError, match=str(tmp_path)):
    list(readers.read_rows(tmp_path))
  with pytest.raises(UserError, match=r"no data file .*nowhere:train"):
    readers.files(f"{tmp_path}/nowhere:train")


def test_a_prepared_set_is_no_file_of_rows(tmp_path):
  (tmp_path / external.PREPARED).touch()
  for given in (tmp_path, f"{tmp_path}:train"):
    with pytest.raises(UserError, match="is a prepared set, which only training reads"):
      readers.files(given)


def test_without_datasets_the_hub_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(UserError, match="pip install datasets"):
    next(readers.read_rows("hf:some/name"))


@pytest.mark.skipif(
  importlib.util.find_spec("datasets") is None, reason="needs pip install datasets"
)
def test_what_datasets_saved_is_read(tmp_path):
  import datasets

  some = [{**row, "score": None if row["label"] else row["score"]} for row in ROWS]
  made = datasets.Dataset.from_list(some)
  made.save_to_disk(tmp_path / "one")
  datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
  expected = [{k: v for k, v in row.items() if v is not None} for row in some]
  assert [row for _, row in readers.read_rows(tmp_path / "one")] == expected
  assert [row for _, row in readers.read_rows(f"{tmp_path}/two:test")] == expected[1:2]
  with pytest.raises(UserError, match="two has no split dev; it has train, test"):
    list(readers.read_rows(f"{tmp_path}/two:dev"))


def test_code_that_a_folder_names_is_not_run(folder, tmp_path, monkeypatch):
  """TFDS would import the module of a feature's class."""
  spoilt = tmp_path / "spoilt"
  shutil.copytree(folder, spoilt)
  described = (spoilt / "features.json").read_text()
  (tmp_path / "planted.py").write_text("raise SystemExit('run')")
  monkeypatch.syspath_prepend(tmp_path)
  own = "tensorflow_datasets.core.features.text_feature.Text"
  assert own in described
  (spoilt / "features.json").write_text(described.replace(own, "planted.Text", 1))
  with pytest.raises(UserError, match=r"features.json names planted.Text, which is not a class of"):
    next(external.read_rows(str(spoilt)))
