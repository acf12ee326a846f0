"""Generates text from a model.

  python scripts/sample.py --model DIR --prompt "Once upon a time"
  python scripts/sample.py --model DIR --prompt "Name three rivers." --chat --num 4 --seed 1
  python scripts/sample.py --model DIR --prompts prompts.jsonl --temperature 0 --max_tokens 64

Prints each prompt with its continuation; with --chat, or where a prompt is a list of messages, the
model's answer alone. A sample depends on the seed, the number of its prompt and its own number, not
on what is sampled beside it.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax import cli

MODEL = flags.DEFINE_string("model", None, "model folder", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "text to go on from")
PROMPTS = flags.DEFINE_string("prompts", None, "file of rows with a `prompt`, text or messages")
CHAT = flags.DEFINE_bool("chat", False, "a text is a user's turn, rendered by the chat template")
NUM = flags.DEFINE_integer("num", 1, "samples a prompt", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0 keeps all", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "keep the likeliest tokens up to this probability")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "most tokens of a sample", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the random numbers", lower_bound=0)


def main(_):
  from dpo_jax import draws, sampling
  from dpo_jax.structs import UserError

  if (PROMPT.value is None) == (PROMPTS.value is None):
    raise UserError("give either --prompt=TEXT or --prompts=FILE")
  prompts = [PROMPT.value] if PROMPTS.value is None else draws.read_prompts(PROMPTS.value)
  if CHAT.value:
    turn = lambda text: [{"role": "user", "content": text}]
    prompts = [turn(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
  model = draws.load(MODEL.value)
  prompt_ids = draws.encode_prompts(model.tokenizer, prompts)
  answers = sampling.generate(
    model.config,
    model.params,
    prompt_ids,
    max_tokens=MAX_TOKENS.value,
    temperature=TEMPERATURE.value,
    top_k=TOP_K.value,
    top_p=TOP_P.value,
    seed=SEED.value,
    eos_ids=sorted({*model.config.eos_ids, model.tokenizer.eos_id} - {None}),
    num=NUM.value,
  )
  for index, (prompt, ids, samples) in enumerate(zip(prompts, prompt_ids, answers, strict=True)):
    for sample, answer in enumerate(samples):
      if len(prompts) * NUM.value > 1:
        print(f"--- prompt {index}, sample {sample}")
      print(model.tokenizer.decode(ids + answer if isinstance(prompt, str) else answer))


if __name__ == "__main__":
  cli.run(main)
