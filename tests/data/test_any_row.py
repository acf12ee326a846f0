"""Whatever JSON a row contains, it is read, counted with a reason, or refused in one line."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data import detection, formats
from dpo_jax.data.fields import RowError
from dpo_jax.structs import UserError
from tests.support.random_texts import BY_MANY

# Names that the code looks for, and values that come close to what it expects there.
NAMES = st.sampled_from(
  [
    *(
      *formats.FIELD_NAMES,
      "response",
      "rank",
      "overall_score",
      "system_prompt",
      "replies",
      "images",
    ),
    *("rejected_response", "rejected_messages", "contents", "completions", "functions", "kto_tag"),
  ]
)
KEYS = st.sampled_from(
  (
    *("role", "content", "from", "value", "text", "type", "tool_calls", "function", "name"),
    *("arguments", "weight", "reasoning", "rank", "score", "messages", "replies", "answer"),
    *("parts", "candidates", "completion", "train", "tools"),
  )
)
PLAIN = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 3),
  st.floats(),
  st.sampled_from(
    ["user", "assistant", "tool", "a", "b", "tie", "1", "nan", "text", "", "{}", "[]"]
  ),
  st.sampled_from(['[{"role": "user"}]', "{'role': 1}", "[{", "{\\d}", "[[A]]", "\ud800", "1e999"]),
)
VALUES = st.recursive(
  PLAIN,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(KEYS, inner, max_size=4),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner}),
  ),
  max_leaves=6,
)
ROW = st.dictionaries(NAMES, VALUES, max_size=6)
SHAPES = st.sampled_from([one.fields for table in formats.FORMATS.values() for one in table])


@settings(BY_MANY, max_examples=120)
@given(
  rows=st.lists(ROW, min_size=1, max_size=3),
  needed=SHAPES,
  values=st.lists(VALUES, min_size=4, max_size=4),
  kind=st.sampled_from(detection.KINDS),
)
def test_any_row_is_read_or_refused_in_one_line(rows, needed, values, kind):
  # The first row has the fields of some format, so that its conversion is reached.
  rows[0] |= dict(zip(needed, values, strict=False))
  try:
    detection.detect_kind(rows[0])
    row_format = detection.detect(rows[0], kind=kind)
  except UserError as error:
    assert "\n" not in str(error)
    return
  for row in rows:
    try:
      row_format.convert(row)
    except (UserError, RowError) as error:
      assert str(error) and "\n" not in str(error)
