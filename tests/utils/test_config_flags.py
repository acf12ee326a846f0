"""The words of a command line before they are parsed: short flags, names, YAML, order."""

import pytest

from dpo_jax.utils import config_flags
from tests.support.paths import CONFIGS, ROOT

PREFERENCES = f"--config={CONFIGS / 'preferences.py'}"


@pytest.fixture(autouse=True)
def with_configuration(monkeypatch):
  monkeypatch.setattr(config_flags, "names", lambda: ["config"])


def expand(line, default="preferences"):
  return config_flags.expand(line.split(), default)[0]


def test_the_shortest_command():
  words, used = config_flags.expand(
    ["--model", "DIR", "--data", "FILE", "--loss=sigmoid", "--beta", "0.1", "--lr", "1e-6"],
    "preferences",
  )
  assert words == [
    PREFERENCES,
    "--config.model.path=DIR",
    "--config.data.path=FILE",
    "--config.loss.name=sigmoid",
    "--config.loss.beta=0.1",
    "--config.optimizer.learning_rate=1e-6",
  ]
  assert used["--config.loss.beta"] == "--beta"


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    # Any configuration, before or behind; both ways of writing a value; hyphens.
    ("--beta=0.1 --config=preferences", [PREFERENCES, "--config.loss.beta=0.1"]),
    ("--beta -1 --config preferences", [PREFERENCES, "--config.loss.beta=-1"]),
    ("--batch-size 8", [PREFERENCES, "--config.train.batch_size=8"]),
    ("-lora-rank=8", [PREFERENCES, "--config.lora.rank=8"]),
    # The last of several counts, as for all flags.
    ("--seed=1 --seed=2", [PREFERENCES, "--config.seed=1", "--config.seed=2"]),
    # What is not ours stays as it is, also a value that looks like a name.
    ("--workdir beta x", [PREFERENCES, "--workdir", "beta", "x"]),
    ("--config.loss.beta=1", [PREFERENCES, "--config.loss.beta=1"]),
    (
      "--config=preferences:loss=ipo,beta=1",
      [f"{PREFERENCES}:loss=ipo,beta=1"],
    ),
  ],
)
def test_words_become_what_the_library_understands(line, expected):
  assert expand(line) == expected


def test_a_command_without_a_default_has_no_configuration():
  assert expand("--out=x", default="") == ["--out=x"]


def test_files_of_fields_are_read_by_one_module(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  reader = f"--config={ROOT / 'dpo_jax' / 'configure.py'}"
  for name in ("my.yaml", "my.yml", "config.json"):
    (tmp_path / name).touch()
    assert expand(f"--config {name}") == [f"{reader}:{name}"]
  with pytest.raises(config_flags.RefusedError, match=r"my\.yaml:x: it takes no argument"):
    expand("--config=my.yaml:x")


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("--beta", "--beta needs a value: --beta=VALUE"),
    ("--beta --lr=1", "--beta needs a value"),
    ("--beta 1 --config.loss.beta=2", "--beta and --config.loss.beta are the same field"),
    ("--config.loss.beta 2 --beta=1", "--beta and --config.loss.beta are the same field"),
    ("--config=gone.yaml", r"gone.yaml: no such file; configurations are files \(.py, .yaml\)"),
  ],
)
def test_what_cannot_be_meant_is_refused(line, words):
  with pytest.raises(config_flags.RefusedError, match=words):
    expand(line)


def test_the_folder_of_a_run_has_its_configuration_in_it(tmp_path):
  (tmp_path / "config.json").touch()
  with pytest.raises(config_flags.RefusedError, match=r"a folder; did you mean .*/config\.json\?"):
    expand(f"--config={tmp_path}")


@pytest.mark.parametrize(
  ("word", "hint"),
  [
    ("my.yaml", "did you mean --config=my.yaml?"),
    ("llama_8b:lora", "did you mean --config=llama_8b:lora?"),
    ("loss.beta=0.1", "did you mean --beta=0.1?"),
    ("eval.every=9", "did you mean --config.eval.every=9?"),
    ("pairs.jsonl", "every option is written --name=value"),
  ],
)
def test_a_word_that_is_no_flag_gets_the_flag_that_was_meant(word, hint):
  assert config_flags.unexpected_word(word).endswith(hint) or hint in (
    config_flags.unexpected_word(word)
  )
