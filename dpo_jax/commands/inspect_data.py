"""Shows what a model will be trained on: texts, token ids, which tokens are scored, and the ledger.

  dpo-jax inspect --data pairs.jsonl --model DIR
  dpo-jax inspect --data pairs.jsonl --model DIR --json

Prompt tokens are given, completion tokens are scored; neighbouring tokens have different shades; ✂
marks where text was cut, and ⟦ ⟧ what is not scored in a completion: a user's turn, or the result
of a tool. Then follow lengths, the tokens that each layout computes, and the ledger:
how many rows were kept, cut and dropped, and why. With --json one object is printed: format, rows,
pairs, dropped, truncated, tokens; for unpaired completions also labels.

The first rows decide what all are: unpaired completions if most have a label (loss kto), ranked
completions if they have a list of answers (plackett_luce), pairs if they have chosen and rejected,
and texts otherwise (sft). --kind overrides that: pairs can serve as any of these.
"""

from absl import flags

from dpo_jax.commands import row_flags
from dpo_jax.utils import cli, messages, model_folder

FLAGS = flags.FLAGS
DEFAULT = 512  # data.max_length of a run that sets none


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path(
    "data", None, "file of rows; several separated by commas, or a pattern", required=True
  )
  cli.define_path("model", None, "folder of the model or its tokenizer", required=True)
  flags.DEFINE_integer("rows", 3, "rows to show, from the first", lower_bound=0)
  flags.DEFINE_bool("json", False, "print the ledger alone, as one JSON object")
  flags.DEFINE_enum(
    "kind",
    None,
    ["pairs", "text", "unpaired", "ranked"],
    "how to use the rows (default: told by the first rows)",
  )
  flags.DEFINE_integer(
    "max_length",
    None,
    "tokens of a sequence at most: prompt and one completion together",
    lower_bound=2,
  )
  flags.DEFINE_integer("prompt_floor", 64, "prompt tokens that are never cut", lower_bound=1)
  flags.DEFINE_enum(
    "truncation", "drop", ["drop", "cut"], "what to do with completions that do not fit"
  )
  flags.DEFINE_string("template", "", "arguments of the chat template as JSON")
  row_flags.define_flags()


def main(argv: list[str]) -> None:
  del argv
  import json

  # Imported here: `--help` should not wait for tokenizers and readers of data files.
  from dpo_jax.data import chat_template, encode, left_out
  from dpo_jax.data.ledger import remarks
  from dpo_jax.data.tokenizer import load_tokenizer

  arguments = chat_template.read_arguments(FLAGS.template, "--template")
  tokenizer = load_tokenizer(FLAGS.model, template_arguments=arguments)
  encode.report_end(tokenizer)
  rows = row_flags.read_options()
  kind = FLAGS.kind or encode.detect_kind(FLAGS.data, rows["fields"])
  # The same arguments for the ledger and for the rows that are shown: both must cut alike.
  how = {
    "kind": kind,
    "max_length": FLAGS.max_length,
    "prompt_floor": FLAGS.prompt_floor,
    "truncation": FLAGS.truncation,
    **rows,
  }
  examples, ledger, _ = encode.load_examples(FLAGS.data, tokenizer, **how)
  positions = model_folder.positions(FLAGS.model)
  warnings = left_out.warnings(ledger.to_json(), positions=positions)
  if FLAGS.max_length is None:
    warnings += left_out.of_default(ledger.longer(DEFAULT), ledger.rows, positions)
  for line in warnings:
    messages.show(line)
  if FLAGS.json:
    print(json.dumps(ledger.to_json()))
    return
  # Behind the return above: with --json nothing is drawn.
  from rich.console import Console

  from dpo_jax.data import preview

  console = Console()
  encoder = encode.Encoder(tokenizer, **how)
  for row, outcome in enumerate(encode.first_rows(FLAGS.data, encoder, FLAGS.rows)):
    console.print(preview.show_row(row, outcome, tokenizer, kind=kind))
  console.print(preview.show_lengths(examples), preview.show_layouts(examples))
  console.print(preview.show_ledger(ledger, examples))
  for line in remarks(ledger.to_json()):
    console.print(line, markup=False, highlight=False, soft_wrap=True)
