"""Tokenizers and conversations: text to token ids, with the answer's tokens known exactly.

Prompt and answer are tokenised together, never apart: a token that holds any character of the
answer belongs to the answer. With `"answer "` + `"good"` and a usual BPE the tokens are `answer`
and ` good`, so the prompt is `answer` alone. The prompt is then what all answers of a row share.

A BOS stands once at the start if the tokenizer has the habit; an EOS ends every answer unless a
chat template ended the turn already. What a template writes behind the end of a turn belongs to the
next one, which nobody predicts.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from dpo_jax.data.chat_template import Template
from dpo_jax.data.fields import Conversation, Messages, Preference, RowError, conversation
from dpo_jax.structs import UserError

Ids = np.ndarray  # int32
Encoded = tuple[Ids, tuple[Ids, ...]]  # prompt and answers


def load_tokenizer(
  path: str | pathlib.Path, *, template_arguments: Mapping[str, Any] | None = None
) -> Tokenizer:
  """The tokenizer of a Hugging Face folder: its `tokenizer.json`, exactly as it is.

  Args:
    path: the folder.
    template_arguments: values that its chat template reads, such as `enable_thinking`.

  Raises:
    UserError: there is none, it is broken, or the template reads no such argument.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise UserError(f"no tokenizer folder {folder}; name a folder that holds tokenizer.json")
  file = folder / "tokenizer.json"
  if not file.is_file():
    raise UserError(
      f"{folder} holds no tokenizer.json; save it there with transformers:"
      " AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )
  try:
    text = file.read_text(encoding="utf-8")
    backend = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises bare Exception
    raise UserError(f"{file} is not a tokenizer: {error}") from None
  digest = hashlib.sha256(text.encode()).hexdigest()
  return Tokenizer(folder, backend, digest, template_arguments or {})


class Tokenizer:
  """Text to ids and back.

  Attributes:
    bos_id, eos_id: ids of the special tokens, None where there are none.
    adds_bos: whether every text begins with BOS.
    vocab_size: one more than the largest id.
    template: how conversations are written.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    backend: tokenizers.Tokenizer,
    digest: str,
    template_arguments: Mapping[str, Any],
  ):
    self._folder = folder
    self._backend = backend
    self._digest = digest
    self._settings = _read_settings(folder)
    self.template = Template(folder, self._settings, template_arguments)
    self.bos_id = self._special("bos")
    self.eos_id = self._special("eos")
    self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    self._special_ids = {
      id for id, token in backend.get_added_tokens_decoder().items() if token.special
    }
    begins = backend.encode("a").ids[:1] == [self.bos_id]
    self.adds_bos = self.bos_id is not None and bool(self._settings.get("add_bos_token", begins))
    # Ids of the text and nothing else, with the offsets of every character: post-processors add
    # special tokens and trim offsets, and a file may ask for padding or truncation.
    backend.post_processor = None
    backend.no_padding()
    backend.no_truncation()

  # --- text to ids --------------------------------------------------------------------------------

  def encode_preference(self, preference: Preference) -> Encoded:
    """Prompt ids and answer ids; raises `RowError` where nothing can be predicted or scored."""
    (encoded,) = self.encode_preferences([preference])
    if isinstance(encoded, RowError):
      raise encoded
    return encoded

  def encode_preferences(self, preferences: Sequence[Preference]) -> list[Encoded | RowError]:
    """`encode_preference` of many at once, on all cores; errors stand in their rows' places."""
    out: list[Encoded | RowError | None] = [None] * len(preferences)
    texts: list[str] = []
    jobs: list[tuple[int, list[int], bool]] = []  # row, where each answer begins, who ends the text
    for i, (prompt, completions, *_) in enumerate(preferences):
      if not isinstance(prompt, str) and (not prompt or isinstance(prompt[0], int)):
        out[i] = _as_they_stand(prompt, completions)
        continue
      try:
        whole, starts = self._render(prompt, completions)
      except RowError as error:
        out[i] = error
        continue
      texts += whole
      jobs.append((i, starts, not isinstance(prompt, str)))
    encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
    for i, starts, is_chat in jobs:
      pieces = [next(encodings) for _ in starts]
      try:
        out[i] = self._split(pieces, starts, is_chat)
      except RowError as error:
        out[i] = error
    return out

  def encode_prompt(self, prompt: str | Messages | Conversation) -> list[int]:
    """Ids that generation starts from; raises `RowError` where the prompt cannot be rendered."""
    text = prompt if isinstance(prompt, str) else self.template.start(conversation(prompt))
    try:
      text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
      raise RowError("text is not valid Unicode") from None
    return self._with_bos(self._backend.encode(text, add_special_tokens=False).ids)

  def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of some ids, with or without their special tokens."""
    return self._backend.decode([int(id) for id in ids], skip_special_tokens=not special)

  def token_text(self, id: int) -> str:
    """One entry of the vocabulary as it is written there."""
    return self._backend.id_to_token(int(id)) or f"<{id}>"

  def same_ids(self, other: Tokenizer) -> bool:
    """Whether every id is the same token to both."""
    return self._backend.get_vocab() == other._backend.get_vocab()

  def digest(self) -> str:
    """Changes whenever the ids of some text or conversation may."""
    about = [self.adds_bos, self.eos_id, self._stated_ends, self.template.source]
    settings = json.dumps([*about, self.template.arguments], sort_keys=True)
    return hashlib.sha256((self._digest + settings).encode()).hexdigest()

  def _split(self, encodings: list, starts: list[int], is_chat: bool) -> Encoded:
    """Prompt and answers from whole texts: the prompt is what no answer touches and all share."""
    texts = [encoding.ids for encoding in encodings]
    shared = min(
      _first_token(encoding, start) for encoding, start in zip(encodings, starts, strict=True)
    )
    while any(ids[:shared] != texts[0][:shared] for ids in texts):
      shared -= 1
    prompt = self._with_bos(texts[0][:shared])
    completions = [ids[shared:] for ids in texts]
    if not prompt and len(completions) == 1:
      # A text on its own, without BOS: its first token can only be given, not predicted.
      prompt, completions = completions[0][:1], [completions[0][1:]]
    if not prompt:
      raise RowError("no prompt token before the answer")
    if not all(completions):
      raise RowError("empty answer")
    if any(one == other for one, other in itertools.combinations(completions, 2)):
      raise RowError("equal answers")
    return _array(prompt), tuple(_array(self._with_end(ids, is_chat)) for ids in completions)

  def _with_bos(self, ids: list[int]) -> list[int]:
    # A template, or the text itself, may have written it already.
    return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids

  def _with_end(self, ids: list[int], is_chat: bool) -> list[int]:
    """An answer with its end token, once, and nothing behind it."""
    if self.eos_id is not None and ids[-1] == self.eos_id and not is_chat:
      return ids
    closing = self._closing(ids) if is_chat else []
    for at in closing:
      if ids[at] in self.end_ids:  # the first: a template, or the row itself, may write several
        return ids[: at + 1]
    if closing:
      return ids[: closing[-1] + 1]
    return ids if self.eos_id is None else [*ids, self.eos_id]

  def _closing(self, ids: list[int]) -> list[int]:
    """Where special tokens stand that close a turn, with only white space among and behind them."""
    found = []
    for at in range(len(ids) - 1, -1, -1):
      if ids[at] in self._special_ids or ids[at] == self.eos_id:
        found.insert(0, at)
      elif self.decode([ids[at]]).strip():
        break
    return found

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """What ends an answer: EOS, what the folder names as such, and what ends a template's turn."""
    own = () if self.eos_id is None else (self.eos_id,)
    closing = self._backend.encode(self.template.turn_end, add_special_tokens=False).ids
    turn = [id for id in closing if id in self._special_ids][:1]
    return tuple(dict.fromkeys((*own, *self._stated_ends, *turn)))

  @functools.cached_property
  def _stated_ends(self) -> list[int]:
    """End tokens of the model's configuration and of its generation's."""
    found = []
    for name in ("config.json", "generation_config.json"):
      value = _read_object(self._folder / name).get("eos_token_id")
      ids = value if isinstance(value, list) else [] if value is None else [value]
      if not all(type(id) is int and id >= 0 for id in ids):
        raise UserError(f"{self._folder / name}: eos_token_id is {value!r}, not ids; copy it again")
      found += ids
    return found

  # --- conversations ------------------------------------------------------------------------------

  def _render(self, prompt: Any, completions: Sequence) -> tuple[list[str], list[int]]:
    """Whole texts, one an answer, and the character each answer begins at."""
    if isinstance(prompt, str):
      return [prompt + answer for answer in completions], [len(prompt)] * len(completions)
    start, written = self.template.texts(conversation(prompt), completions)
    return [start + text for text in written], [len(start)] * len(written)

  def _special(self, name: str) -> int | None:
    """Id of a special token: by its text, or by its id in the model's configuration."""
    token = self._settings.get(f"{name}_token")
    if isinstance(token, dict):
      token = token.get("content")
    if token is not None and not isinstance(token, str):
      raise UserError(f"{self._folder}: {name}_token is {token!r}, not text; copy the files again")
    if token is not None:
      return self._backend.token_to_id(token)
    ids = self._settings.get(f"{name}_token_id")
    return ids[0] if isinstance(ids, list) and ids else ids if isinstance(ids, int) else None


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
  """What is said about the tokenizer beside it; files named later win."""
  settings: dict[str, Any] = {}
  for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
    settings |= {k: v for k, v in _read_object(folder / name).items() if v is not None}
  return settings


def _read_object(file: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file; nothing where there is none."""
  if not file.is_file():
    return {}
  try:
    found = json.loads(file.read_text("utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is not JSON: {error}") from None
  if not isinstance(found, dict):
    raise UserError(f"{file} holds a {type(found).__name__}, not an object; copy it again")
  return found


def _as_they_stand(prompt: list[int], completions: Sequence[list[int]]) -> Encoded | RowError:
  if not prompt:
    return RowError("empty prompt")
  return _array(prompt), tuple(_array(ids) for ids in completions)


def _first_token(encoding: tokenizers.Encoding, start: int) -> int:
  """Number of tokens that end at or before a character: those of the prompt."""
  for token, (_, end) in enumerate(encoding.offsets):
    if end > start:
      return token
  return len(encoding.ids)


def _array(ids: Sequence[int]) -> Ids:
  return np.asarray(ids, np.int32)
