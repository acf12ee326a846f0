"""Answers sampled from a model and scored by a reward, and the preference pairs made of them.

X lists prompts, S samples of a prompt.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from dpo_jax.data import encode, readers
from dpo_jax.data.examples import Example
from dpo_jax.data.fields import Conversation
from dpo_jax.data.tokenizer import Tokenizer, load_tokenizer
from dpo_jax.generation import rewards, sampler
from dpo_jax.hf import peft
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, UserError
from dpo_jax.utils import files


class LanguageModel(NamedTuple):
  """A Hugging Face folder, loaded."""

  config: ModelConfig
  params: PyTree
  tokenizer: Tokenizer


def describe(
  path: str | pathlib.Path, *, template_arguments: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, Tokenizer]:
  """Model and tokenizer of a folder, or adapter, without its weights, as `load` takes them."""
  config = peft.read_config(path)
  tokenizer = load_tokenizer(path, template_arguments=template_arguments)
  encode.check_vocabulary(tokenizer, config.vocab)
  return config, tokenizer


def load(path: str | pathlib.Path) -> LanguageModel:
  """Model and tokenizer of a folder, in float32; an adapter is merged into its base."""
  _, tokenizer = describe(path)
  here = SingleDeviceSharding(jax.local_devices()[0])
  return LanguageModel(*peft.load_model(path, shardings=here), tokenizer)


class Rollout(NamedTuple):
  """S answers to each of X prompts.

  Attributes:
    prompts: X texts.
    prompt_ids: X lists of token ids.
    completions: X lists of S texts.
    completion_ids: X lists of S lists of ids, the end token included where the model ended.
    reward_XS: their rewards.
  """

  prompts: list[str]
  prompt_ids: list[list[int]]
  completions: list[list[str]]
  completion_ids: list[list[list[int]]]
  reward_XS: np.ndarray

  def examples(self) -> list[Example]:
    """One example a prompt, with all its answers."""
    array = functools.partial(np.asarray, dtype=np.int32)
    texts = zip(self.prompt_ids, self.completion_ids, strict=True)
    return [Example(array(prompt), tuple(map(array, ids))) for prompt, ids in texts]


def read_prompts(path: str | pathlib.Path, field: str = "") -> list[Any]:
  """The prompt of every row of files, a text or a list of messages; of `field`, or `prompt`.

  Of a file named .txt, every line is a prompt, but for those that are blank.
  """
  prompts = []
  for file in readers.files(path):
    if pathlib.Path(file).suffix == ".txt":
      prompts += _read_lines(pathlib.Path(file))
      continue
    for where, row in readers.read_rows(file):
      try:
        prompts.append(readers.read_prompt(row | {"prompt": row.get(field)} if field else row))
      except UserError as error:
        raise UserError(f"{where}: {error}") from None
  return prompts


def _read_lines(path: pathlib.Path) -> list[str]:
  lines = []
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    try:
      lines.append(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
      raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None
  lines = [line for line in lines if line.strip()]
  if not lines:
    raise UserError(f"{path} holds no prompts; write one a line")
  return lines


def eos_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
  """What ends an answer: the tokenizer's end tokens and those of the model's configuration."""
  return tuple(dict.fromkeys((*tokenizer.end_ids, *config.eos_ids)))


class Stops:
  """What ends answers, and which of it did.

  Attributes:
    tokenizer: to read the answers with.
    end_ids: tokens that end a text.
    ids: other tokens that shall end an answer.
    texts: what shall end an answer wherever it begins, within tokens too.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    end_ids: Sequence[int],
    ids: Sequence[int] = (),
    texts: Sequence[str] = (),
  ):
    if not all(texts):
      raise UserError("a text to stop at is empty; name what an answer shall end with")
    self.tokenizer, self.end_ids = tokenizer, tuple(end_ids)
    self.ids, self.texts = tuple(ids), tuple(texts)

  def ends(self, ids: Sequence[int]) -> int | None:
    """Tokens up to the one that completes the first of the texts: for `sampler.generate`."""

    def holds(length: int) -> bool:
      text = self.tokenizer.decode(ids[:length], special=True)
      return any(stop in text for stop in self.texts)

    if not holds(len(ids)):
      return None
    return bisect.bisect_left(range(len(ids) + 1), True, key=holds)

  def finish(self, ids: Sequence[int]) -> str:
    """What ended an answer: "end" a token of `end_ids`, "stop" what was asked for, or "length"."""
    if ids[-1] in self.end_ids:
      return "end"
    return "stop" if ids[-1] in self.ids or self.ends(ids) else "length"

  def cut(self, text: str) -> str:
    """The text up to the first of the texts."""
    found = [at for stop in self.texts if (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def rows_of(
  stops: Stops,
  prompts: Sequence[Any],
  prompt_ids: Sequence[Sequence[int]],
  completions: Sequence[Sequence[Sequence[int]]],
) -> Iterator[dict[str, Any]]:
  """A row an answer, as `scripts/sample.py` writes them."""
  decode = stops.tokenizer.decode
  for index, (prompt, ids, samples) in enumerate(
    zip(prompts, prompt_ids, completions, strict=True)
  ):
    given = decode(ids) if isinstance(prompt, str) else ""
    asked = {"prompt": prompt}
    if isinstance(prompt, Conversation):
      asked = {"prompt": prompt.messages, "tools": prompt.tools}
    for number, answer in enumerate(samples):
      # Behind the prompt: some tokenizers drop the space before a text's first word.
      whole = decode([*ids, *answer]) if given else ""
      text = whole[len(given) :] if whole.startswith(given) and given else decode(answer)
      yield {"index": index, **asked, "sample": number} | {
        "text": stops.cut(text),
        "tokens": len(answer),
        "finish": stops.finish(answer),
      }


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Any]) -> list[list[int]]:
  """Token ids to sample from, at least one a prompt."""
  found = []
  for index, prompt in enumerate(prompts):
    try:
      found.append(tokenizer.encode_prompt(prompt))
    except readers.RowError as error:
      raise UserError(f"prompt {index}: {error}; mend the prompt or the model folder") from None
    if not found[-1]:
      raise UserError(f"prompt {index} has no token; an answer's first token needs one to follow")
  return found


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
) -> Rollout:
  """Samples `num` answers a prompt and scores them; a prompt of messages is scored as rendered.

  Arguments as those of `sampler.generate`.
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
  )
  pairs = zip(prompts, prompt_ids, strict=True)
  texts = [prompt if isinstance(prompt, str) else tokenizer.decode(ids) for prompt, ids in pairs]
  completions = [[tokenizer.decode(ids) for ids in each] for each in completion_ids]
  repeated = [text for text in texts for _ in range(num)]
  reward_Y = rewards.values(reward, repeated, [answer for each in completions for answer in each])
  return Rollout(texts, prompt_ids, completions, completion_ids, reward_Y.reshape(len(texts), num))


def label(rollout: Rollout, *, seed: int = 0) -> list[dict[str, Any]]:
  """Preference rows from neighbouring samples, by Bradley and Terry under their rewards.

  Of samples a and b, a is chosen with probability σ(r(a) - r(b)). Equal answers make no row.
  """
  rng = np.random.default_rng(seed)
  rows = []
  for x, prompt in enumerate(rollout.prompts):
    for a in range(0, len(rollout.completions[x]) - 1, 2):
      margin = rollout.reward_XS[x, a] - rollout.reward_XS[x, a + 1]
      # Logistic noise: the margin beats it with probability σ(margin), and nothing overflows.
      chosen, rejected = (a, a + 1) if margin > rng.logistic() else (a + 1, a)
      if rollout.completion_ids[x][a] == rollout.completion_ids[x][a + 1]:
        continue
      rows.append(
        {
          "prompt": prompt,
          "chosen": rollout.completions[x][chosen],
          "rejected": rollout.completions[x][rejected],
          "chosen_reward": float(rollout.reward_XS[x, chosen]),
          "rejected_reward": float(rollout.reward_XS[x, rejected]),
          "prompt_ids": [int(id) for id in rollout.prompt_ids[x]],
          "chosen_ids": [int(id) for id in rollout.completion_ids[x][chosen]],
          "rejected_ids": [int(id) for id in rollout.completion_ids[x][rejected]],
        }
      )
  return rows


def check_out(path: str | pathlib.Path) -> None:
  """A file can be written there, as far as can be told before anything is.

  Raises:
    UserError: it is a folder or a device, lies in what is no folder, or may not be written.
  """
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    raise UserError(f"--out={path} is {'a folder' if path.is_dir() else 'no file'}; name a file")
  files.check_writable(path, f"--out={path}")


def write_rows(path: str | pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  """Writes JSON lines, as `write_whole` does."""
  write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(path: str | pathlib.Path, parts: Iterable[str]) -> None:
  """Writes a text; a file of that name is replaced only by a whole one."""
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
      file.writelines(parts)
    os.replace(partial, path)
  except OSError as error:  # what the user named is `path`
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
