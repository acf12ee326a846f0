"""Shows what a model will be trained on: texts, token ids, which are scored, and the ledger.

  python scripts/inspect_data.py --data pairs.jsonl --model DIR
  python scripts/inspect_data.py --data pairs.jsonl --model DIR --json

Prompt tokens are given, answer tokens scored; neighbouring tokens have different shades; ✂ is where
text was cut. Then come lengths, tokens that each layout computes, and what became of all rows. With
--json one object is printed: format, rows, pairs, dropped, truncated, tokens; of judged answers
also labels.

What the rows are is told from the first: judged answers if it has a label (unpaired, for loss kto),
ranked ones if it has a list of answers (plackett_luce), pairs if it has chosen and rejected, and
texts otherwise (sft). --kind says what to learn from them instead: pairs serve any of these.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

DATA = flags.DEFINE_string(
  "data", None, "file of rows, several separated by commas, or a pattern", required=True
)
MODEL = flags.DEFINE_string("model", None, "folder of the model or its tokenizer", required=True)
ROWS = flags.DEFINE_integer("rows", 3, "first rows to show", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "print the ledger alone, as one JSON object")
KIND = flags.DEFINE_enum(
  "kind",
  None,
  ["pairs", "text", "unpaired", "ranked"],
  "what to learn from the rows; by default what they are",
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "window in tokens, prompt and one answer together", lower_bound=2
)
PROMPT_FLOOR = flags.DEFINE_integer(
  "prompt_floor", 64, "tokens of a prompt that are never cut", lower_bound=1
)
TRUNCATION = flags.DEFINE_enum(
  "truncation", "drop", ["drop", "cut"], "what to do with answers that do not fit"
)
TEMPLATE = flags.DEFINE_string("template", "", "values that the chat template reads, as JSON")
FIELDS = flags.DEFINE_list("fields", [], "names of fields, as prompt=question,chosen=better")


def main(_):
  import json

  from dpo_jax.data import chat_template, encode
  from dpo_jax.data.tokenizer import load_tokenizer

  arguments = chat_template.read_arguments(TEMPLATE.value, "--template")
  tokenizer = load_tokenizer(MODEL.value, template_arguments=arguments)
  fields = encode.read_fields(FIELDS.value)
  kind = KIND.value or encode.detect_kind(DATA.value, fields)
  how = {
    "kind": kind,
    "max_length": MAX_LENGTH.value,
    "prompt_floor": PROMPT_FLOOR.value,
    "truncation": TRUNCATION.value,
    "fields": fields,
  }
  examples, ledger, _ = encode.load_examples(DATA.value, tokenizer, **how)
  if JSON.value:
    print(json.dumps(ledger.to_json()))
    return
  from rich.console import Console

  from dpo_jax.data import preview

  console = Console()
  encoder = encode.Encoder(tokenizer, **how)
  for row, outcome in enumerate(encode.first_rows(DATA.value, encoder, ROWS.value)):
    console.print(preview.show_row(row, outcome, tokenizer, kind=kind))
  console.print(preview.show_lengths(examples), preview.show_layouts(examples))
  console.print(preview.show_ledger(ledger, examples))


if __name__ == "__main__":
  cli.run(main)
