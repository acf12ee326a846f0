"""Rules for where a completion ends: end tokens, further token ids, and texts."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import UserError


def eos_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the end tokens of the tokenizer, then those of the model's configuration, each once.

  Both are needed: chat models often end a turn with a token that only one of the two names.
  """
  return tuple(dict.fromkeys((*tokenizer.end_ids, *config.eos_ids)))


class Stops:
  """The stopping rules of one request.

  Attributes:
    tokenizer: decodes completions to look for `texts` in them.
    end_ids: end tokens; one of them as the last token means that the completion is finished.
    ids: other tokens at which the user wants to stop.
    texts: strings at which the user wants to stop. They may begin or end within a token.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    end_ids: Sequence[int],
    ids: Sequence[int] = (),
    texts: Sequence[str] = (),
  ):
    # The empty string is part of every text and would end each completion before its first token.
    if not all(texts):
      raise UserError("a text to stop at is empty; name a text at which to stop")
    self.tokenizer, self.end_ids = tokenizer, tuple(end_ids)
    self.ids, self.texts = tuple(ids), tuple(texts)

  def stop_length(self, ids: Sequence[int]) -> int | None:
    """Returns how many tokens it takes to complete the first of `texts`, None if none occurs.

    `sampler.generate` takes it as `stop_fn`.
    """

    def contains_stop(length: int) -> bool:
      # With special tokens, because a stop text may be the name of one, such as "<|im_end|>".
      text = self.tokenizer.decode(ids[:length], special=True)
      return any(stop in text for stop in self.texts)

    if not contains_stop(len(ids)):
      return None
    # A stop text that is complete stays in every longer prefix, so bisection finds the shortest
    # one with log(length) decodings instead of one per token.
    return bisect.bisect_left(range(len(ids) + 1), True, key=contains_stop)

  def finish_reason(self, ids: Sequence[int]) -> str:
    """Returns "end" after a token of `end_ids`, "stop" after `ids` or `texts`, else "length"."""
    if ids[-1] in self.end_ids:
      return "end"
    # A stop text may end within a token, so the last id alone does not tell.
    return "stop" if ids[-1] in self.ids or self.stop_length(ids) else "length"

  def truncate(self, text: str) -> str:
    """Returns the text before the earliest of `texts`, which is itself left out."""
    found = [at for stop in self.texts if (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]
