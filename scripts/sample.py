"""Generates text from a model.

  python scripts/sample.py --model DIR --prompt "Once upon a time"
  python scripts/sample.py --model DIR --prompt "Name three rivers." --chat --num 4 --seed 1
  python scripts/sample.py --model DIR --prompts prompts.jsonl --temperature 0 --max_tokens 64
  python scripts/sample.py --model DIR --prompts prompts.txt --min_p 0.1 --out samples.jsonl

Prints each prompt with its continuation; with --chat, or where a prompt is a list of messages, the
model's answer alone. A sample depends on the seed, the number of its prompt and its own number, not
on what is sampled beside it; several devices share the rows.

--prompts takes rows (JSON, one a line) with a `prompt`, a text or a list of messages, and `tools`
if there are any; or, named .txt, a prompt on every line. --out takes JSON lines of `index` (of the
prompt), `prompt`, `sample`, `text` (of the answer), `tokens` (in it) and `finish`: "end" for an end
token, "stop" for --stop and --stop_ids, "length" for --max_tokens.

An answer ends with EOS, with what ends the chat template's turns, and with the eos_token_id of the
folder's config.json and generation_config.json. Nothing else of generation_config.json is read:
temperature, top_k, top_p and the rest are those of the flags.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax.utils import cli

MODEL = flags.DEFINE_string("model", None, "model folder", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "text to go on from")
PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts, rows or lines")
CHAT = flags.DEFINE_bool("chat", False, "a text is a user's turn, rendered by the chat template")
TEMPLATE = flags.DEFINE_string(
  "template", "", 'arguments of the chat template, as in {"enable_thinking": false}'
)
NUM = flags.DEFINE_integer("num", 1, "samples a prompt", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0 keeps all", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "keep the likeliest tokens up to this probability")
MIN_P = flags.DEFINE_float("min_p", 0.0, "keep tokens at least this times as likely as the first")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "most tokens of a sample", lower_bound=1)
STOP = flags.DEFINE_multi_string("stop", [], "text that ends a sample; may be given several times")
STOP_IDS = flags.DEFINE_list("stop_ids", [], "token ids that end a sample, as in 13,198")
SEED = flags.DEFINE_integer("seed", 0, "of the random numbers", lower_bound=0)
OUT = flags.DEFINE_string("out", "", "file to write the samples to, instead of printing them")


def main(_):
  from dpo_jax.data import chat_template
  from dpo_jax.distributed import executor
  from dpo_jax.generation import rollouts, sampler
  from dpo_jax.hf import peft
  from dpo_jax.structs import UserError

  knobs = {
    "max_tokens": MAX_TOKENS.value,
    "temperature": TEMPERATURE.value,
    "top_k": TOP_K.value,
    "top_p": TOP_P.value,
    "min_p": MIN_P.value,
    "seed": SEED.value,
    "num": NUM.value,
  }
  if (PROMPT.value is None) == (PROMPTS.value is None):
    raise UserError("give either --prompt=TEXT or --prompts=FILE")
  sampler.check_knobs(**knobs)
  narrowed = [flag.name for flag in (TOP_K, TOP_P, MIN_P) if flag.value != flag.default]
  if TEMPERATURE.value == 0 and narrowed:
    raise UserError(
      f"--temperature=0 takes the likeliest token, which --{narrowed[0]} cannot change; keep one"
    )
  if OUT.value:
    rollouts.check_out(OUT.value)
  prompts = [PROMPT.value] if PROMPTS.value is None else rollouts.read_prompts(PROMPTS.value)
  if CHAT.value:
    turn = lambda text: [{"role": "user", "content": text}]
    prompts = [turn(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

  arguments = chat_template.read_arguments(TEMPLATE.value, "--template")
  config, tokenizer = rollouts.describe(MODEL.value, template_arguments=arguments)
  if not tokenizer.template.source and not all(isinstance(prompt, str) for prompt in prompts):
    raise UserError(
      f"{MODEL.value} has no chat template to write messages with; give the text as the model has"
      " learned it (messages were written 'User: …', a blank line, 'Assistant:')"
    )
  prompt_ids = rollouts.encode_prompts(tokenizer, prompts)
  sampler.check_prompts(config, prompt_ids, MAX_TOKENS.value)
  stops = rollouts.Stops(
    tokenizer, rollouts.eos_ids(config, tokenizer), _stop_ids(config.vocab), STOP.value
  )

  _, params = peft.load_model(MODEL.value, shardings=executor.Executor().home)
  completions = sampler.generate(
    config,
    params,
    prompt_ids,
    eos_ids=(*stops.end_ids, *stops.ids),
    ends=stops.ends if stops.texts else None,
    **knobs,
  )
  rows = rollouts.rows_of(stops, prompts, prompt_ids, completions)
  if OUT.value:
    rollouts.write_rows(OUT.value, rows)
    print(f"{len(prompts) * NUM.value} samples of {len(prompts)} prompts in {OUT.value}")
    return
  for row in rows:
    if len(prompts) * NUM.value > 1:
      print(f"--- prompt {row['index']}, sample {row['sample']}")
    text = isinstance(row["prompt"], str)
    print(tokenizer.decode(prompt_ids[row["index"]]) * text + row["text"])


def _stop_ids(vocab: int) -> tuple[int, ...]:
  from dpo_jax.structs import UserError

  for text in STOP_IDS.value:
    if not (text.isascii() and text.isdecimal()) or int(text) >= vocab:
      raise UserError(f"--stop_ids names {text!r}; the model's ids go from 0 to {vocab - 1}")
  return tuple(map(int, STOP_IDS.value))


if __name__ == "__main__":
  cli.run(main)
