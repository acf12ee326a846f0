"""Generates text with a model.

  dpo-jax sample --model DIR --prompt "Once upon a time"
  dpo-jax sample --model DIR --prompt "Name three rivers." --chat --num 4 --seed 1
  dpo-jax sample --model DIR --prompt "Name three rivers." --instruction
  dpo-jax sample --model DIR --prompts prompts.jsonl --temperature 0 --max_tokens 64
  dpo-jax sample --model DIR --prompts prompts.txt --min_p 0.1 --out samples.jsonl

Prints each prompt with its completion; with --chat, or where a prompt is a list of messages, the
completion alone. A sample depends on the seed, on the number of its prompt and on its own number,
not on what else is sampled in the same call. Several devices share the rows.

--prompts reads rows (one JSON object per line) with a `prompt`, a string or a list of messages, and
`tools` if there are any; from a .txt file, one prompt per line. --out writes JSON lines with
`index` (of the prompt), `prompt`, `sample`, `text` (the completion), `tokens` (their number) and
`finish`: "end" for an end token, "stop" for --stop and --stop_ids, "length" for --max_tokens.

A completion ends with EOS, with the token that ends a turn of the chat template, or with an
eos_token_id of the folder's config.json or generation_config.json. Nothing else is read from
generation_config.json: temperature, top_k, top_p and the rest come from the flags.
"""

from absl import flags

from dpo_jax.utils import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("model", None, "model folder", required=True)
  flags.DEFINE_string("prompt", None, "text to continue")
  cli.define_path("prompts", None, "file of prompts, rows or lines")
  flags.DEFINE_bool("chat", False, "treat the text as a user's message; apply the chat template")
  flags.DEFINE_bool("instruction", False, "put the text under the headings of instruction rows")
  flags.DEFINE_string(
    "template", "", 'arguments of the chat template as JSON: {"enable_thinking": false}'
  )
  flags.DEFINE_integer("num", 1, "samples per prompt", lower_bound=1)
  flags.DEFINE_float("temperature", 1.0, "of sampling; 0 takes the likeliest token", lower_bound=0)
  flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0 keeps all", lower_bound=0)
  flags.DEFINE_float("top_p", 1.0, "keep the likeliest tokens up to this probability")
  flags.DEFINE_float("min_p", 0.0, "keep tokens at least this fraction as likely as the top one")
  flags.DEFINE_integer("max_tokens", 128, "new tokens at most", lower_bound=1)
  flags.DEFINE_multi_string("stop", [], "text that ends a sample; repeatable")
  flags.DEFINE_list("stop_ids", [], "token ids that end a sample: 13,198")
  flags.DEFINE_integer("seed", 0, "random seed", lower_bound=0)
  cli.define_path("out", "", "JSONL file to write the samples to instead of printing them")
  cli.define_force()


def main(argv: list[str]) -> None:
  del argv
  # Imported here, since these load jax, for which `--help` and a mistyped flag should not wait.
  from dpo_jax.data import chat_template
  from dpo_jax.distributed import executor
  from dpo_jax.generation import rollouts, sampler, stopping
  from dpo_jax.hf import peft
  from dpo_jax.structs import UserError
  from dpo_jax.utils import files

  knobs = {
    "max_tokens": FLAGS.max_tokens,
    "temperature": FLAGS.temperature,
    "top_k": FLAGS.top_k,
    "top_p": FLAGS.top_p,
    "min_p": FLAGS.min_p,
    "seed": FLAGS.seed,
    "num": FLAGS.num,
  }
  # The order is important: 1. flags; 2. prompts and tokenizer; 3. weights, which may take minutes
  # to read. A mistake shows in the first part that can know it.
  if (FLAGS.prompt is None) == (FLAGS.prompts is None):
    raise UserError("give either --prompt=TEXT or --prompts=FILE")
  sampler.check_sampling(**knobs)
  narrowed = [
    name for name in ("top_k", "top_p", "min_p") if FLAGS[name].value != FLAGS[name].default
  ]
  # A flag that would change nothing is most likely a mistake.
  if FLAGS.temperature == 0 and narrowed:
    raise UserError(
      f"--temperature=0 takes the likeliest token, which --{narrowed[0]} cannot change; keep one"
    )
  # Before sampling, which would be lost if the file could not be written.
  if FLAGS.out:
    files.check_output_file(FLAGS.out, force=FLAGS.force)
  prompts = [FLAGS.prompt] if FLAGS.prompts is None else rollouts.read_prompts(FLAGS.prompts)
  prompts = rollouts.frame(prompts, chat=FLAGS.chat, instruction=FLAGS.instruction)
  arguments = chat_template.read_arguments(FLAGS.template, "--template")
  config, tokenizer = rollouts.describe(FLAGS.model, template_arguments=arguments)
  if not tokenizer.template.source and not all(isinstance(prompt, str) for prompt in prompts):
    raise UserError(
      f"{FLAGS.model} has no chat template to write messages with; give the text as the model has"
      " learned it (messages were written 'User: …', a blank line, 'Assistant:')"
    )
  prompt_ids = rollouts.encode_prompts(tokenizer, prompts)
  sampler.check_prompts(config, prompt_ids, FLAGS.max_tokens)
  stops = stopping.Stops(
    tokenizer, stopping.eos_ids(config, tokenizer), _stop_ids(config.vocab), FLAGS.stop
  )

  # A complete copy on every device, each of which then completes its share of the rows.
  _, params = peft.load_model(FLAGS.model, shardings=executor.Executor().home)
  completions = sampler.generate(
    config,
    params,
    prompt_ids,
    eos_ids=(*stops.end_ids, *stops.ids),
    stop_fn=stops.stop_length if stops.texts else None,
    label="sampling",
    **knobs,
  )
  rows = rollouts.rows_of(stops, prompts, prompt_ids, completions)
  if FLAGS.out:
    files.write_json_lines(FLAGS.out, rows)
    print(f"{len(prompts) * FLAGS.num} samples of {len(prompts)} prompts in {FLAGS.out}")
    return
  for row in rows:
    if len(prompts) * FLAGS.num > 1:
      print(f"--- prompt {row['index']}, sample {row['sample']}")
    text = isinstance(row["prompt"], str)
    print(tokenizer.decode(prompt_ids[row["index"]]) * text + row["text"])


def _stop_ids(vocab: int) -> tuple[int, ...]:
  from dpo_jax.structs import UserError

  for text in FLAGS.stop_ids:
    # `isdecimal` accepts the digits of other scripts, and `int` a sign and underscores.
    if not (text.isascii() and text.isdecimal()) or int(text) >= vocab:
      raise UserError(f"--stop_ids names {text!r}; the model's ids go from 0 to {vocab - 1}")
  return tuple(map(int, FLAGS.stop_ids))
