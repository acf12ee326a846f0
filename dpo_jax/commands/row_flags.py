"""The flags that say how rows are read, the same for every command with --data."""

from typing import Any

from absl import flags

FLAGS = flags.FLAGS
# As in `data.detection` and `data.verdicts`, which load slowly; a test compares them.
TRAIN_ON = ("assistant", "last")
VERDICTS = (
  *("index1", "index0", "first_is_better", "signed", "positive_is_first"),
  *("words", "words0", "onehot"),
)


def define_flags() -> None:
  """Defines the flags."""
  flags.DEFINE_list("fields", [], "field names of the rows: prompt=question,chosen=better")
  flags.DEFINE_enum(
    "verdict",
    "",
    ["", *VERDICTS],
    "how `preference` names the better of two completions (default: found out from its values)",
  )
  flags.DEFINE_enum(
    "train_on",
    "assistant",
    TRAIN_ON,
    "which messages of a completion are scored: all that the assistant wrote, or the last one",
  )
  flags.DEFINE_enum(
    "on_bad_row", "stop", ["stop", "drop"], "what to do at a row that cannot be read"
  )


def read_options() -> dict[str, Any]:
  """Returns the values as options of `data.encode.Encoder`."""
  from dpo_jax.data import encode

  return {
    "fields": encode.read_fields(FLAGS.fields),
    "verdict": FLAGS.verdict,
    "train_on": FLAGS.train_on,
    "on_bad_row": FLAGS.on_bad_row,
  }
