"""Rollouts: completions sampled from a model, their rewards, and preference pairs made of them."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from dpo_jax.data import canonical, detection, encode, formats, readers
from dpo_jax.data.examples import Example
from dpo_jax.data.fields import Conversation, RowError
from dpo_jax.data.tokenizer import Tokenizer, load_tokenizer
from dpo_jax.generation import rewards, sampler
from dpo_jax.generation.stopping import Stops, eos_ids
from dpo_jax.hf import peft
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils import progress


class LanguageModel(NamedTuple):
  """Configuration, parameters and tokenizer of a Hugging Face folder."""

  config: ModelConfig
  params: PyTree
  tokenizer: Tokenizer


def describe(
  path: str | pathlib.Path, *, template_arguments: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, Tokenizer]:
  """Returns the configuration and tokenizer of a model or adapter folder, without its weights.

  Args:
    path: a Hugging Face folder, or the folder of an adapter.
    template_arguments: variables for the chat template.

  Raises:
    UserError: the folder lacks something, or the tokenizer has ids that the model does not know.
  """
  config = peft.read_config(path)
  tokenizer = load_tokenizer(path, template_arguments=template_arguments)
  # A gather would clip ids beyond the embedding in silence.
  encode.check_vocabulary(tokenizer, config.vocab)
  encode.report_end(tokenizer)
  return config, tokenizer


def load(path: str | pathlib.Path) -> LanguageModel:
  """Loads a model folder in float32 to one device; an adapter is merged into its base."""
  # First what can fail quickly: weights may take minutes to read.
  _, tokenizer = describe(path)
  one_device = SingleDeviceSharding(jax.local_devices()[0])
  return LanguageModel(*peft.load_model(path, shardings=one_device), tokenizer)


class Rollout(NamedTuple):
  """S completions of each of X prompts, with rewards.

  Attributes:
    prompts: X texts.
    prompt_ids: X lists of token ids.
    completions: X lists of K texts.
    completion_ids: X lists of K lists of token ids, with the end token if the model produced it.
    reward_XK: the reward of each completion.
  """

  prompts: list[str]
  prompt_ids: list[list[int]]
  completions: list[list[str]]
  completion_ids: list[list[list[int]]]
  reward_XK: np.ndarray

  def examples(self) -> list[Example]:
    """Returns one example per prompt, with all its completions."""
    array = functools.partial(np.asarray, dtype=np.int32)
    all_ids = zip(self.prompt_ids, self.completion_ids, strict=True)
    return [Example(array(prompt), tuple(map(array, ids))) for prompt, ids in all_ids]


def read_prompts(path: str | pathlib.Path, field: str = "") -> list[Any]:
  """Reads the prompt of every row of some files; each is a text or a list of messages.

  Args:
    path: files as `data.readers.files` finds them. In a .txt file every line that is not blank is
      a prompt.
    field: the field of a row that contains the prompt; "" for `prompt`.

  Raises:
    UserError: a row has no usable prompt; it names the file and line.
  """
  prompts = []
  for file in readers.files(path):
    if pathlib.Path(file).suffix == ".txt":
      prompts += _read_lines(pathlib.Path(file))
      continue
    rows = list(readers.read_rows(file))
    chat = any(canonical.has_context(row) for _, row in rows)
    for where, row in rows:
      try:
        # As the field `prompt`, so that one reader checks every kind of prompt.
        row = row | {"prompt": row.get(field)} if field else row
        prompts.append(detection.read_prompt(row, chat=chat))
      except UserError as error:
        raise UserError(f"{where}: {error}") from None
  return prompts


def frame(prompts: Sequence[Any], *, chat: bool = False, instruction: bool = False) -> list[Any]:
  """Writes texts as messages of a user (`chat`), or under the headings of instruction rows.

  Raises:
    UserError: both are asked for, or `instruction` of what is not a text.
  """
  if chat and instruction:
    raise UserError("--chat and --instruction are two ways to write a prompt; keep one")
  if instruction and not all(isinstance(prompt, str) for prompt in prompts):
    raise UserError("--instruction is for texts, and some prompts are lists of messages")
  if instruction:
    return [formats.instruction_prompt(prompt) for prompt in prompts]
  return [
    [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
    for prompt in prompts
  ]


def _read_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a text file that are not blank."""
  lines = []
  # Split before decoding, so that an error can name the line. utf-8-sig drops a byte order mark.
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    try:
      lines.append(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
      raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None
  lines = [line for line in lines if line.strip()]
  if not lines:
    raise UserError(f"{path} holds no prompts; write one per line")
  return lines


def rows_of(
  stops: Stops,
  prompts: Sequence[Any],
  prompt_ids: Sequence[Sequence[int]],
  completions: Sequence[Sequence[Sequence[int]]],
) -> Iterator[dict[str, Any]]:
  """Yields one row per completion, in the format that the sampling command writes.

  Args:
    stops: the stopping rules; a text is cut at the first stop text.
    prompts: texts, message lists or conversations.
    prompt_ids: token ids of each prompt.
    completions: ids[prompt][sample].
  """
  decode = stops.tokenizer.decode
  for index, (prompt, ids, samples) in enumerate(
    zip(prompts, prompt_ids, completions, strict=True)
  ):
    prompt_text = decode(ids) if isinstance(prompt, str) else ""
    fields = {"prompt": prompt}
    if isinstance(prompt, Conversation):
      fields = {"prompt": prompt.messages, "tools": prompt.tools}
    for number, completion in enumerate(samples):
      # Decoded together with a prompt of text, because some tokenizers drop the space before the
      # first word of what they decode.
      sequence = decode([*ids, *completion]) if prompt_text else ""
      follows = prompt_text and sequence.startswith(prompt_text)
      text = sequence[len(prompt_text) :] if follows else decode(completion)
      yield {"index": index, **fields, "sample": number} | {
        "text": stops.truncate(text),
        "tokens": len(completion),
        "finish": stops.finish_reason(completion),
      }


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Any]) -> list[list[int]]:
  """Returns the token ids of every prompt, at least one each.

  Raises:
    UserError: a prompt cannot be encoded, or has no token.
  """
  encoded = []
  for index, prompt in enumerate(prompts):
    try:
      encoded.append(tokenizer.encode_prompt(prompt))
    except RowError as error:
      raise UserError(f"prompt {index}: {error}; correct the prompt or the model folder") from None
    if not encoded[-1]:
      raise UserError(f"prompt {index} has no token; a completion needs one to follow")
  return encoded


def sample(
  model: LanguageModel,
  prompts: Sequence[Any],
  reward: rewards.Reward,
  *,
  num: int,
  max_tokens: int,
  temperature: float = 1.0,
  seed: int = 0,
  batch_size: int = 256,
  width: int = 0,
  label: str = "",
) -> Rollout:
  """Samples `num` completions per prompt and computes their rewards.

  The reward of a prompt of messages gets the text that the chat template made of it.

  Args:
    model: the model to sample from.
    prompts: texts or message lists.
    reward: a function (prompt, completion) -> number.
    num, max_tokens, temperature, seed, batch_size, width, label: as in `sampler.generate`.

  Raises:
    UserError: a prompt cannot be encoded, or the reward fails.
  """
  tokenizer = model.tokenizer
  prompt_ids = encode_prompts(tokenizer, prompts)
  completion_ids = sampler.generate(
    model.config,
    model.params,
    prompt_ids,
    max_tokens=max_tokens,
    temperature=temperature,
    seed=seed,
    eos_ids=eos_ids(model.config, tokenizer),
    num=num,
    batch_size=batch_size,
    width=width,
    label=label,
  )
  texts = [
    prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    for prompt, ids in zip(prompts, prompt_ids, strict=True)
  ]
  # Without special tokens: a reward reads text, and an end token is none.
  completions = [[tokenizer.decode(ids) for ids in each] for each in completion_ids]
  # In the order of `generate`, all samples of a prompt after one another, for the reshape below.
  repeated = [text for text in texts for _ in range(num)]
  completed = [text for each in completions for text in each]
  with progress.Progress("computing rewards" if label else "", len(completed), "rewards") as shown:
    reward_B = rewards.values(reward, shown.of(repeated), completed)
  return Rollout(texts, prompt_ids, completions, completion_ids, reward_B.reshape(len(texts), num))


def label(rollout: Rollout, *, seed: int = 0) -> list[dict[str, Any]]:
  """Makes preference rows of samples 0 and 1, 2 and 3, ... of each prompt.

  Of samples a and b, a is chosen with probability σ(r(a) - r(b)): Bradley and Terry 1952. Two equal
  completions make no row.

  Args:
    rollout: completions with rewards.
    seed: random seed of the labels.
  """
  rng = np.random.default_rng(seed)
  rows = []
  for x, prompt in enumerate(rollout.prompts):
    # Each sample in one pair only, so that the pairs of a prompt are independent.
    for a in range(0, len(rollout.completions[x]) - 1, 2):
      margin = rollout.reward_XK[x, a] - rollout.reward_XK[x, a + 1]
      # Logistic noise is below the margin with probability σ(margin), and nothing overflows.
      chosen, rejected = (a, a + 1) if margin > rng.logistic() else (a + 1, a)
      # After the random number, so that equal completions do not change the labels of later pairs.
      if rollout.completion_ids[x][a] == rollout.completion_ids[x][a + 1]:
        continue
      # Ids beside the texts: encoded again, a text may split into other tokens than were sampled.
      rows.append(
        {
          "prompt": prompt,
          "chosen": rollout.completions[x][chosen],
          "rejected": rollout.completions[x][rejected],
          "chosen_reward": float(rollout.reward_XK[x, chosen]),
          "rejected_reward": float(rollout.reward_XK[x, rejected]),
          "prompt_ids": [int(id) for id in rollout.prompt_ids[x]],
          "chosen_ids": [int(id) for id in rollout.completion_ids[x][chosen]],
          "rejected_ids": [int(id) for id in rollout.completion_ids[x][rejected]],
        }
      )
  return rows
