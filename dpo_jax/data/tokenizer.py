"""Converts prompts and completions to token ids, and finds exactly which tokens are completion.

Prompt and completion are tokenized together, never separately: BPE merges across the boundary, so
the tokens of two pieces are not those of the whole text. A token that contains any character of the
completion belongs to the completion. With `"answer "` + `"good"` a usual BPE gives `answer`
and ` good`, so the prompt is `answer` alone. The prompt of a row is what all its completions share.

A BOS stands once at the start if the tokenizer adds one by itself. An EOS ends every completion,
unless a chat template has already ended the turn. What a template writes after the end of a turn
belongs to the next turn, and is not trained on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from dpo_jax.data.chat_template import Template
from dpo_jax.data.fields import Conversation, Messages, Preference, RowError
from dpo_jax.data.messages import as_conversation
from dpo_jax.data.spans import Spans, Written, fill_weights, weigh
from dpo_jax.structs import UserError
from dpo_jax.utils import model_folder

Ids = np.ndarray  # int32


class Tokens(NamedTuple):
  """The token ids of one row.

  Attributes:
    prompt, completions, token_weights: as in `examples.Example`.
  """

  prompt: Ids
  completions: tuple[Ids, ...]
  token_weights: tuple[np.ndarray, ...] = ()


def load_tokenizer(
  path: str | pathlib.Path, *, template_arguments: Mapping[str, Any] | None = None
) -> Tokenizer:
  """Loads the tokenizer of a Hugging Face folder from its `tokenizer.json`.

  Args:
    path: the folder.
    template_arguments: values for its chat template, such as `enable_thinking`.

  Raises:
    UserError: the folder has no tokenizer, it is broken, or the template reads no such argument.
  """
  folder = pathlib.Path(path)
  if model_folder.is_run(folder) or (not folder.exists() and model_folder.hub_name(path)):
    raise UserError(model_folder.instead(path))
  if not folder.is_dir():
    raise UserError(f"no tokenizer folder {folder}; name a folder that holds tokenizer.json")
  file = folder / "tokenizer.json"
  if not file.is_file():
    raise UserError(
      f"{folder} contains no tokenizer.json; save it there with transformers:"
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
  """Converts text to token ids and back.

  Attributes:
    bos_id, eos_id: ids of the special tokens, None where there are none.
    adds_bos: True if every text begins with BOS.
    vocab_size: one more than the largest id.
    text_vocab_size: the same without added tokens, which ordinary text does not contain.
    template: renders conversations as text.
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
    added, ids = backend.get_added_tokens_decoder(), backend.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(ids.values(), default=-1)
    self.text_vocab_size = 1 + max(set(ids.values()) - set(added), default=-1)
    self._special_ids = {id for id, token in added.items() if token.special}
    # The order is important: 1. an encoding shows whether the post-processor adds BOS, 2. then the
    # post-processor is removed.
    begins = backend.encode("a").ids[:1] == [self.bos_id]
    self.adds_bos = self.bos_id is not None and bool(self._settings.get("add_bos_token", begins))
    # From here on `encode` gives the ids of the text alone, with exact character offsets:
    # post-processors add special tokens and trim offsets, and tokenizer.json may request padding or
    # truncation.
    backend.post_processor = None
    backend.no_padding()
    backend.no_truncation()

  # --- text to ids --------------------------------------------------------------------------------

  def encode_preference(self, preference: Preference) -> Tokens:
    """Returns the ids of a prompt and its completions.

    Raises:
      RowError: nothing can be trained on: no prompt token, an empty completion, or equal ones.
    """
    (encoded,) = self.encode_preferences([preference])
    if isinstance(encoded, RowError):
      raise encoded
    return encoded

  def encode_preferences(self, preferences: Sequence[Preference]) -> list[Tokens | RowError]:
    """Encodes many rows at once, on all cores.

    Returns:
      What `encode_preference` gives for each row, or the error that it would raise, in its place.
    """
    out: list[Any] = [None] * len(preferences)
    texts: list[str] = []
    jobs: list[tuple[int, int, list[Spans], bool]] = []  # row, start, spans, is a conversation
    for i, preference in enumerate(preferences):
      prompt = preference.prompt
      if not isinstance(prompt, str) and (not prompt or isinstance(prompt[0], int)):
        out[i] = _from_ids(preference)
        continue
      try:
        start, written = self._render(prompt, preference.completions)
      except RowError as error:
        out[i] = error
        continue
      texts += [start + one.text for one in written]
      jobs.append((i, len(start), [one.spans for one in written], not isinstance(prompt, str)))
    # One call for all rows: the library spreads a batch over its threads.
    encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
    for i, start, spans, is_chat in jobs:
      per_completion = [next(encodings) for _ in spans]
      try:
        out[i] = self._split(per_completion, start, spans, is_chat)
      except RowError as error:
        out[i] = error
    return out

  def encode_prompt(self, prompt: str | Messages | Conversation) -> list[int]:
    """Returns the ids that generation continues; raises `RowError` if it cannot be rendered."""
    text = (
      prompt if isinstance(prompt, str) else self.template.render_prompt(as_conversation(prompt))
    )
    try:
      text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
      raise RowError("text is not valid Unicode") from None
    return self._with_bos(self._backend.encode(text, add_special_tokens=False).ids)

  def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
    """Returns the text of some ids, with or without their special tokens."""
    return self._backend.decode([int(id) for id in ids], skip_special_tokens=not special)

  def token_text(self, id: int) -> str:
    """Returns an entry of the vocabulary as it is written there, e.g. `Ġgood`."""
    return self._backend.id_to_token(int(id)) or f"<{id}>"

  def same_ids(self, other: Tokenizer) -> bool:
    """Returns True if both tokenizers give every id to the same token."""
    return self._backend.get_vocab() == other._backend.get_vocab()

  def digest(self) -> str:
    """Returns a digest that changes whenever the ids of any text or conversation could change."""
    # A set: an export names end tokens that the folder it came from left to the template.
    return self._digest_with(sorted(self.end_ids))

  def older_digest(self) -> str:
    """Returns what `digest` was before it took all end tokens."""
    return self._digest_with(self._stated_ends)

  def _digest_with(self, ends: list[int]) -> str:
    about = [self.adds_bos, self.eos_id, ends, self.template.source]
    settings = json.dumps([*about, self.template.arguments], sort_keys=True)
    return hashlib.sha256((self._digest + settings).encode()).hexdigest()

  def _split(self, encodings: list, start: int, spans: list[Spans], is_chat: bool) -> Tokens:
    """Splits the tokens of whole texts into one shared prompt and the completions.

    Args:
      encodings: of prompt + completion, one per completion.
      start: the character at which the completions begin.
      spans: what is scored of each completion, in characters from its beginning.
      is_chat: True if a chat template rendered the texts.
    """
    sequences = [encoding.ids for encoding in encodings]
    # 1. The prompt ends before the first token that contains a character of any completion.
    shared = min(_first_token(encoding, start) for encoding in encodings)
    # 2. It must be the same for all: a completion may change how the tokens before it merge.
    while any(ids[:shared] != sequences[0][:shared] for ids in sequences):
      shared -= 1
    prompt = self._with_bos(sequences[0][:shared])
    completions = [ids[shared:] for ids in sequences]
    if not prompt and len(completions) == 1:
      # A text on its own, without BOS: nothing predicts its first token, so that is the prompt.
      prompt, completions = completions[0][:1], [completions[0][1:]]
    if not prompt:
      raise RowError("no prompt token before the completion")
    if not all(completions):
      raise RowError("empty completion")
    # Checked again after the texts: different texts may have equal ids (unknown words, trimming).
    if any(one == other for one, other in itertools.combinations(completions, 2)):
      raise RowError("equal completions")
    ended = tuple(_array(self._with_end(ids, is_chat)) for ids in completions)
    weights = [
      weigh(encoding.offsets[shared:], start, some, len(ids))
      for encoding, some, ids in zip(encodings, spans, ended, strict=True)
    ]
    return Tokens(_array(prompt), ended, fill_weights(weights, ended))

  def _with_bos(self, ids: list[int]) -> list[int]:
    # A template, or the text itself, may have written it already.
    if self.bos_id is None or not self.adds_bos or ids[:1] == [self.bos_id]:
      return ids
    return [self.bos_id, *ids]

  def _with_end(self, ids: list[int], is_chat: bool) -> list[int]:
    """Returns a completion with exactly one end token, which is its last token."""
    closing = self._closing(ids)
    # The first end token: a template, or the row itself, may write several. Generation stops at the
    # first one too.
    for at in closing:
      if ids[at] in self.end_ids:
        return ids[: at + 1]
    # A special token that closes the turn but is not known as an end serves as one; EOS after it
    # would be a token that the template never writes.
    if closing and is_chat:
      return ids[: closing[-1] + 1]
    return ids if self.eos_id is None else [*ids, self.eos_id]

  def _closing(self, ids: list[int]) -> list[int]:
    """Returns the positions of the special tokens at the end, white space aside, in order."""
    found = []
    # From the end, up to the first token that is text.
    for at in range(len(ids) - 1, -1, -1):
      if ids[at] in self._special_ids or ids[at] == self.eos_id:
        found.insert(0, at)
      elif self.decode([ids[at]]).strip():
        break
    return found

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """Ids that end a completion: EOS, those in the model's files, the template's end of turn."""
    own = () if self.eos_id is None else (self.eos_id,)
    closing = self._backend.encode(self.template.turn_end, add_special_tokens=False).ids
    turn = [id for id in closing if id in self._special_ids][:1]
    return tuple(dict.fromkeys((*own, *self._stated_ends, *turn)))

  @functools.cached_property
  def _stated_ends(self) -> list[int]:
    """Ids that config.json and generation_config.json name as end tokens."""
    found = []
    for name in ("config.json", "generation_config.json"):
      value = _read_object(self._folder / name).get("eos_token_id")
      ids = value if isinstance(value, list) else [] if value is None else [value]
      if not all(type(id) is int and id >= 0 for id in ids):
        raise UserError(f"{self._folder / name}: eos_token_id is {value!r}, not ids; copy it again")
      found += ids
    return found

  # --- conversations ------------------------------------------------------------------------------

  def _render(self, prompt: Any, completions: Sequence) -> tuple[str, list[Written]]:
    """Returns the text of a prompt, and those of the completions that follow it."""
    if isinstance(prompt, str):
      return prompt, [Written(completion) for completion in completions]
    conversation = as_conversation(prompt)
    conversation = conversation._replace(messages=self._without_ends(conversation.messages))
    return self.template.render(conversation, [self._without_ends(one) for one in completions])

  def _without_ends(self, messages: Messages) -> Messages:
    """Returns messages without end tokens that their texts were given: the template writes them."""

    def without(message: dict[str, Any]) -> dict[str, Any]:
      text = message["content"].rstrip()
      end = next((end for end in self._end_texts if text.endswith(end)), "")
      return {**message, "content": text.removesuffix(end)} if end else message

    return [without(message) for message in messages]

  @functools.cached_property
  def _end_texts(self) -> list[str]:
    """Texts of the end tokens that no one would write by chance."""
    return [self.token_text(id) for id in self.end_ids if id in self._special_ids]

  def _special(self, name: str) -> int | None:
    """Returns the id of a special token: by its text, or by its id in the model's configuration."""
    token = self._settings.get(f"{name}_token")
    if isinstance(token, dict):
      token = token.get("content")
    if token is not None and not isinstance(token, str):
      raise UserError(f"{self._folder}: {name}_token is {token!r}, not text; copy the files again")
    if token is not None:
      return self._backend.token_to_id(token)
    # Some models name several end tokens; the first is the usual one.
    ids = self._settings.get(f"{name}_token_id")
    return ids[0] if isinstance(ids, list) and ids else ids if isinstance(ids, int) else None


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the settings of a tokenizer from the files next to it."""
  settings: dict[str, Any] = {}
  # The order is important: later files win. config.json describes the model, so it comes first.
  for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
    settings |= {k: v for k, v in _read_object(folder / name).items() if v is not None}
  return settings


def _read_object(file: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a file; {} if there is no file."""
  if not file.is_file():
    return {}
  try:
    found = json.loads(file.read_text("utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is not JSON ({error}); copy or download it again") from None
  if not isinstance(found, dict):
    raise UserError(f"{file} contains a {type(found).__name__}, not an object; copy it again")
  return found


def _from_ids(preference: Preference) -> Tokens | RowError:
  # Rows of token ids are used unchanged: no BOS and no EOS is added.
  if not preference.prompt:
    return RowError("empty prompt")
  # pyright cannot know that content of another type than text and messages is ids.
  prompt, *completions = (_array(ids) for ids in (preference.prompt, *preference.completions))  # pyright: ignore[reportArgumentType]
  weights = [
    None if one is None else np.asarray(one, np.float32) for one in preference.token_weights
  ]
  return Tokens(prompt, tuple(completions), fill_weights(weights, completions))


def _first_token(encoding: tokenizers.Encoding, start: int) -> int:
  """Returns the number of tokens that end at or before a character: those of the prompt."""
  # By its end and not its start: a token that spans the boundary has characters of the completion.
  for token, (_, end) in enumerate(encoding.offsets):
    if end > start:
      return token
  return len(encoding.ids)


def _array(ids: Sequence[int]) -> Ids:
  return np.asarray(ids, np.int32)
