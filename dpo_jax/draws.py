"""Answers drawn from a model and scored by a reward, and the preference pairs made of them.

X lists prompts, S samples of a prompt.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import rewards, sampling
from dpo_jax.data import chat, pipeline, sources
from dpo_jax.data.layout import Example
from dpo_jax.model import hf
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, UserError


class LanguageModel(NamedTuple):
  """A Hugging Face folder, loaded."""

  config: ModelConfig
  params: PyTree
  tokenizer: chat.Tokenizer


def load(path: str | pathlib.Path) -> LanguageModel:
  """Model and tokenizer of a folder, in float32."""
  tokenizer = chat.load_tokenizer(path)
  config, params = hf.load(path)
  pipeline.check_vocabulary(tokenizer, config.vocab)
  return LanguageModel(config, jax.device_put(params), tokenizer)


class Drawn(NamedTuple):
  """S answers to each of X prompts.

  Attributes:
    prompts: X texts.
    prompt_ids: X lists of token ids.
    answers: X lists of S texts.
    answer_ids: X lists of S lists of ids, the end token included where the model ended.
    reward_XS: their rewards.
  """

  prompts: list[str]
  prompt_ids: list[list[int]]
  answers: list[list[str]]
  answer_ids: list[list[list[int]]]
  reward_XS: np.ndarray

  def examples(self) -> list[Example]:
    """One example a prompt, with all its answers."""
    array = functools.partial(np.asarray, dtype=np.int32)
    texts = zip(self.prompt_ids, self.answer_ids, strict=True)
    return [Example(array(prompt), tuple(map(array, ids))) for prompt, ids in texts]


def read_prompts(path: str | pathlib.Path, field: str = "") -> list[Any]:
  """The prompt of every row of a file, a text or a list of messages; of `field`, or `prompt`."""
  prompts = []
  for where, row in sources.read_rows(path):
    try:
      prompts.append(sources.read_prompt({"prompt": row.get(field)} if field else row))
    except UserError as error:
      raise UserError(f"{where}: {error}") from None
  return prompts


def eos_ids(config: ModelConfig, tokenizer: chat.Tokenizer) -> tuple[int, ...]:
  """What ends an answer: the tokenizer's end token and those of the model's configuration."""
  own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  return tuple(dict.fromkeys((*own, *config.eos_ids)))


def encode_prompts(tokenizer: chat.Tokenizer, prompts: Sequence[Any]) -> list[list[int]]:
  """Token ids to sample from, at least one a prompt."""
  found = []
  for index, prompt in enumerate(prompts):
    try:
      found.append(tokenizer.encode_prompt(prompt))
    except sources.RowError as error:
      raise UserError(f"prompt {index}: {error}; mend the prompt or the model folder") from None
    if not found[-1]:
      raise UserError(f"prompt {index} has no token; an answer's first token needs one to follow")
  return found


def draw(
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
) -> Drawn:
  """Samples `num` answers a prompt and scores them; a prompt of messages is scored as rendered.

  Arguments as those of `sampling.generate`.
  """
  tokenizer = model.tokenizer
  prompt_ids = encode_prompts(tokenizer, prompts)
  answer_ids = sampling.generate(
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
  answers = [[tokenizer.decode(ids) for ids in each] for each in answer_ids]
  repeated = [text for text in texts for _ in range(num)]
  reward_Y = rewards.values(reward, repeated, [answer for each in answers for answer in each])
  return Drawn(texts, prompt_ids, answers, answer_ids, reward_Y.reshape(len(texts), num))


def label(drawn: Drawn, *, seed: int = 0) -> list[dict[str, Any]]:
  """Preference rows from neighbouring samples, by Bradley and Terry under the drawn rewards.

  Of samples a and b, a is chosen with probability σ(r(a) - r(b)). Equal answers make no row.
  """
  rng = np.random.default_rng(seed)
  rows = []
  for x, prompt in enumerate(drawn.prompts):
    for a in range(0, len(drawn.answers[x]) - 1, 2):
      margin = drawn.reward_XS[x, a] - drawn.reward_XS[x, a + 1]
      # Logistic noise: the margin beats it with probability σ(margin), and nothing overflows.
      chosen, rejected = (a, a + 1) if margin > rng.logistic() else (a + 1, a)
      if drawn.answer_ids[x][a] == drawn.answer_ids[x][a + 1]:
        continue
      rows.append(
        {
          "prompt": prompt,
          "chosen": drawn.answers[x][chosen],
          "rejected": drawn.answers[x][rejected],
          "chosen_reward": float(drawn.reward_XS[x, chosen]),
          "rejected_reward": float(drawn.reward_XS[x, rejected]),
          "prompt_ids": [int(id) for id in drawn.prompt_ids[x]],
          "chosen_ids": [int(id) for id in drawn.answer_ids[x][chosen]],
          "rejected_ids": [int(id) for id in drawn.answer_ids[x][rejected]],
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
  folder = next(parent for parent in path.absolute().parents if parent.exists())
  if not folder.is_dir():
    raise UserError(f"--out={path}: {folder} is no folder; name a file in a folder")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"--out={path}: {folder} may not be written to; name another folder")


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
