"""CSV is read as people's programs write it: cells are text, and what is unclear is refused."""

import pytest

from dpo_jax.data.readers import read_rows
from dpo_jax.structs import UserError
from tests.support.messages import convert


def read(folder, text, name="rows.csv"):
  """The rows of a file, with the part of each place after the file's name."""
  file = folder / name
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  return [(where.removeprefix(f"{file}:"), row) for where, row in read_rows(file)]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt", "rows"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_line_ends_and_names_of_files(tmp_path, separator, end, name):
  lines = ["prompt,chosen,rejected", "a,b,c", "", 'd,"e,",f']
  text = end.join(lines).replace(",", separator) + end
  expected = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "d", "chosen": f"e{separator}", "rejected": "f"},
  ]
  assert read(tmp_path, text, name) == [("2", expected[0]), ("4", expected[1])]
  assert [row for _, row in read(tmp_path, "\ufeff" + text, name)] == expected


def test_quoted_cells_hold_lines_quotes_and_separators(tmp_path):
  text = 'prompt,chosen\n"first\n""second"", third",x "y" z\n" ","\u2028\v"\n'
  assert read(tmp_path, text) == [
    ("2", {"prompt": 'first\n"second", third', "chosen": 'x "y" z'}),
    ("4", {"prompt": " ", "chosen": "\u2028\v"}),
  ]


def test_cells_are_text_and_empty_ones_are_absent(tmp_path):
  """Digits, NaN and booleans may be completions; where a number is needed, it is read later."""
  text = "prompt,chosen,rejected,label,score\n6*2?,12,012,1,1.50\n0/0?,NaN,None,True,\n"
  rows = [row for _, row in read(tmp_path, text)]
  assert rows == [
    {"prompt": "6*2?", "chosen": "12", "rejected": "012", "label": "1", "score": "1.50"},
    {"prompt": "0/0?", "chosen": "NaN", "rejected": "None", "label": "True"},
  ]
  assert convert(rows[0])[1].completions == ("12", "012")


def test_long_cells_and_names(tmp_path):
  long = "long " * 50_000  # more than csv's limit of 131,072 characters
  assert read(tmp_path, f"prompt,chosen\na,{long}\n") == [("2", {"prompt": "a", "chosen": long})]
  # pandas writes its index as a column without a name; names may have spaces around them.
  assert read(tmp_path, ", prompt ,chosen\n0,a,b\n") == [
    ("2", {"column 1": "0", "prompt": "a", "chosen": "b"})
  ]
  # A line that tells Excel the separator; one column has no separator.
  assert read(tmp_path, "sep=;\nprompt;chosen\na;b\n") == [("3", {"prompt": "a", "chosen": "b"})]
  assert read(tmp_path, "\n \nprompt;chosen\na;b\n") == [("4", {"prompt": "a", "chosen": "b"})]
  assert read(tmp_path, "text\nhello\n") == [("2", {"text": "hello"})]
  assert read(tmp_path, '{"text": "JSON named CSV"}') == [("1", {"text": "JSON named CSV"})]


def test_cells_are_texts(tmp_path):
  """Messages in a cell are read where a prompt or completion is wanted: a text may be JSON too."""
  for cell in ({"role": "user", "content": "a"}, {"a": 1}):
    quoted = str(cell).replace('"', '""')
    assert read(tmp_path, f'text\n"{quoted}"\n')[0][1] == {"text": str(cell)}


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("a,b\n1,2\n1,2,3\n", r":3: 3 cells and 2 columns, separated by commas; quote cells that"),
    ("a,b\n1\n", r":2: 1 cells and 2 columns"),
    ('a,b\n"1,2\n3,4\n', r":2: broken CSV \(unexpected end of data\); a cell with a quote"),
    ('a,b\n"1"x,2\n', r":2: broken CSV \(',' expected after '\"'\)"),
    ('a,b\n1,2\n"he said \\"no\\", then",2\n', r":3: broken CSV"),
    ("a,a\n1,2\n", r":1: two columns are named a; rename one"),
    ("a,b;c\n1,2\n", r":1: commas and semicolons both may separate"),
    (
      "What is a long" + " long" * 20 + ",Hm.\n",
      r":1: the first line .* it has 'What is a long long",
    ),
    ("a,b\n", r"contains no rows"),
    (b"a,b\n1,caf\xe9\n", r":2: byte 6 is not UTF-8; save the file as UTF-8 \(Excel: CSV UTF-8\)"),
  ],
)
def test_what_is_unclear_is_one_line_with_its_place(tmp_path, text, line):
  with pytest.raises(UserError, match=line) as raised:
    read(tmp_path, text)
  assert "\n" not in str(raised.value)


PAIR = ("pairs", ("1", "0"))


@pytest.mark.parametrize(
  ("text", "kind", "completions", "scores", "weight"),
  [
    ("prompt,completion,label\n6*2?,12,1\n", "unpaired", ("12",), (1.0,), 1),
    ("prompt,completion,label\n6*2?,012,False\n", "unpaired", ("012",), (0.0,), 1),
    ("prompt,chosen,rejected,margin,weight\nq,1,0,1.50,2\n", "pairs", ("1", "0"), (1.5, 0.0), 2),
    ("chosen,rejected,prompt,chosen_score,rejected_score\n1,0,q,4,-1e0\n", *PAIR, (4, -1), 1),
    ("prompt,answer_a,answer_b,preference\nq,1,0,2\n", "pairs", ("0", "1"), (1.0, 0.0), 1),
    ("prompt,answer_a,answer_b,preference\nq,1,0,model_a\n", "pairs", ("1", "0"), (1.0, 0.0), 1),
    ('prompt,answers,scores\nq,"[""1"", ""0""]","[1, 2.5]"\n', "ranked", ("0", "1"), (2.5, 1.0), 1),
  ],
)  # fmt: skip
def test_numbers_are_read_where_they_are_needed_and_completions_stay_text(
  tmp_path, text, kind, completions, scores, weight
):
  ((_, row),) = read(tmp_path, text)
  found = convert(row, kind=kind)[1]
  assert (found.completions, found.scores, found.weight) == (completions, scores, weight)
