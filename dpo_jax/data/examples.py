"""Examples: a prompt and its answers as token ids, before anything is laid out.

Cut to the window, measured, read as they are needed, divided into sides, and given answers to other
prompts. What stands in rows of a batch is decided in `collate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.structs import UserError


class Example(NamedTuple):
  """One prompt and its K answers as token ids.

  Attributes:
    prompt: int32 [P], P >= 1: the first answer token needs one to be predicted from.
    completions: K arrays int32 [n_k], n_k >= 1, best first; they hold the end token where the text
      really ends. The first is always there; others, behind those that are, may be absent: n_k = 0.
      Of an answer judged by itself: that answer, and one to another prompt.
    weight: weight of the pair in losses and metrics.
    row: row of the data set that it came from.
    scores: what is known of each answer besides its order, as `TokenBatch.score_NS` has it; or
      nothing.
    reference: float32 [n_k] for each answer, log-probs of its tokens under the reference, nats; or
      nothing.
  """

  prompt: np.ndarray
  completions: tuple[np.ndarray, ...]
  weight: float = 1.0
  row: int = 0
  scores: tuple[float, ...] = ()
  reference: tuple[np.ndarray, ...] = ()


class Measured(NamedTuple):
  """Stands for examples where their lengths are all that is asked of them: see `lengths`."""

  lengths: tuple[np.ndarray, np.ndarray]

  @classmethod
  def of(cls, *sets: Sequence[Example]) -> Measured:
    """Of several sets, as one; K is the most answers of any."""
    prompts, completions = zip(*(lengths(some) for some in sets if len(some)), strict=True)
    most = max(tokens_BK.shape[1] for tokens_BK in completions)
    wide = [np.pad(x_BK, ((0, 0), (0, most - x_BK.shape[1]))) for x_BK in completions]
    return cls((np.concatenate(prompts), np.concatenate(wide)))

  def some(self, index: np.ndarray | slice) -> Measured:
    """Those of some of them."""
    prompt_B, tokens_BK = self.lengths
    return Measured((prompt_B[index], tokens_BK[index]))


class Lazy(Sequence[Example]):
  """Examples that are read as they are asked for.

  Attributes:
    read: number -> example.
    lengths: of all of them, as `examples.lengths` gives them.
  """

  def __init__(
    self, read: Callable[[int], Example], lengths: tuple[np.ndarray, np.ndarray]
  ) -> None:
    self.read, self.lengths = read, lengths

  @classmethod
  def of(cls, examples: Sequence[Example], index: Sequence[int]) -> Lazy:
    """Some of them."""
    return cls(lambda i: examples[int(index[i])], Measured(lengths(examples)).some(index).lengths)

  def __len__(self) -> int:
    return len(self.lengths[0])

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self.read(i) for i in range(*index.indices(len(self)))]
    return self.read(range(len(self))[index])


# --- cutting --------------------------------------------------------------------------------------


def truncate(
  prompt: np.ndarray,
  completions: Sequence[np.ndarray],
  *,
  max_length: int | None,
  prompt_floor: int = 64,
  mode: str = "drop",
  bos_id: int | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[str, ...]] | None:
  """Fits every prompt + answer into `max_length` tokens: the one place where text is cut.

  The prompt is cut first and from the left, since the question stands at its end; a BOS at its
  start stays. It keeps at least `prompt_floor` tokens, BOS included, or half the window where that
  is less; a shorter prompt is kept whole. Where that is not enough,

    mode "drop"  gives the pair up;
    mode "cut"   cuts the answers too, at the same length for all, so that none is favoured. A cut
                 answer loses its end token with its tail and is given no other.

  Args:
    prompt: int32 [P].
    completions: K arrays int32.
    max_length: the window in tokens, or None for no limit.
    prompt_floor: tokens of the prompt that are never cut.
    mode: "drop" or "cut".
    bos_id: the token kept at the start of a cut prompt.

  Returns:
    The prompt, the answers and what was cut, a subset of ("prompt", "answer"); None if dropped.
  """
  if mode not in ("drop", "cut"):
    raise UserError(f"unknown truncation {mode!r}; choose 'drop' or 'cut'")
  completions = tuple(completions)
  if max_length is None:
    return prompt, completions, ()
  longest = max(len(answer) for answer in completions)
  if len(prompt) + longest <= max_length:
    return prompt, completions, ()

  floor = max(1, min(prompt_floor, max_length // 2, len(prompt)))
  keep = min(len(prompt), max(floor, max_length - longest))
  room = max_length - keep
  if room < longest and (mode == "drop" or room < 1):
    return None
  cuts = ()
  if keep < len(prompt):
    # keep = 1 leaves no room for both BOS and text: the last token is what predicts the answer.
    bos = int(keep > 1 and bos_id is not None and prompt[0] == bos_id)
    prompt = np.concatenate([prompt[:bos], prompt[len(prompt) - keep + bos :]])
    cuts += ("prompt",)
  if room < longest:
    completions = tuple(answer[:room] for answer in completions)
    cuts += ("answer",)
  return prompt, completions, cuts


# --- all with as many answers, and their lengths --------------------------------------------------


def fill_up(examples: Sequence[Example], completions: int | None = None) -> list[Example]:
  """The same examples, all with K answers: absent ones stand behind those there are.

  Args:
    examples: each with K answers or fewer.
    completions: K; by default the most that any has.
  """
  most = max((len(example.completions) for example in examples), default=0)
  completions = most if completions is None else completions
  if most > completions:
    raise ValueError(f"an example has {most} answers, {completions} are wanted")
  absent = np.zeros(0, np.int32)

  def filled(example: Example) -> Example:
    missing = completions - len(example.completions)
    scores = example.scores + (0.0,) * missing if example.scores else ()
    return example._replace(completions=example.completions + (absent,) * missing, scores=scores)

  return [filled(example) for example in examples]


def lengths(examples: Sequence[Example] | Measured) -> tuple[np.ndarray, np.ndarray]:
  """Prompt lengths [B] and answer lengths [B, K]; those that know their `lengths` are not read."""
  known = getattr(examples, "lengths", None)
  if known is not None:
    return known
  prompt_B = np.array([len(example.prompt) for example in examples])
  return prompt_B, np.array([[len(ids) for ids in example.completions] for example in examples])


# --- sides ----------------------------------------------------------------------------------------


def split(
  examples: Sequence[Example],
  eval_fraction: float,
  seed: int = 0,
  dropped: Mapping[str, int] | None = None,
) -> tuple[list[Example], list[Example]]:
  """Training and held-out examples; all examples of one prompt fall on the same side.

  Where all have the same prompt (texts that follow BOS alone) they are split one by one. Of rows
  `dropped` before, by reason, an error tells.
  """
  keys: list[bytes | int] = [example.prompt.tobytes() for example in examples]
  what = "distinct prompts"
  if len(set(keys)) < 2:
    keys, what = [*range(len(examples))], "rows"
  units = list(dict.fromkeys(keys))
  held = round(eval_fraction * len(units))
  if eval_fraction > 0 and not 0 < held < len(units):
    lost = ", ".join(f"{rows} dropped: {reason}" for reason, rows in (dropped or {}).items())
    raise UserError(
      f"eval fraction {eval_fraction} of {len(units)} {what}{lost and f' ({lost})'} leaves one side"
      " empty; set data.eval_fraction=0 to hold nothing out, or name other rows by data.eval_path"
    )
  order = np.random.default_rng(seed).permutation(len(units))
  away = {units[i] for i in order[:held]}
  pairs = list(zip(keys, examples, strict=True))
  train = [example for key, example in pairs if key not in away]
  return train, [example for key, example in pairs if key in away]


def with_mismatched(
  examples: Sequence[Example], *, max_length: int | None = None, seed: int = 0
) -> Sequence[Example]:
  """Judged answers, each with an answer to another prompt behind its own prompt.

  What `kto` estimates the distance between policy and reference from. The other answer is that of
  the next example, in an order drawn once, whose prompt is another. It depends on nothing but the
  examples and the seed, so its log-probability under the reference is the same in every epoch; and
  where no two examples share a prompt every answer serves once. Held-out examples are to be split
  off before, so that no answer gets from one side to the other.

  Args:
    examples: each with one answer and its label; read once, and again as they are asked for.
    max_length: the window; an answer that goes beyond it is cut at its end.
    seed: of the order.

  Returns:
    The examples in their order, with answers (judged, mismatched) and the label as both scores.
  """
  if not examples:
    return []
  other_B = _others(examples, seed)
  prompt_B, tokens_BK = lengths(examples)
  tokens_B = tokens_BK[other_B, 0]
  if max_length is not None:
    tokens_B = np.minimum(tokens_B, max_length - prompt_B)

  def read(number: int) -> Example:
    example, other = examples[number], examples[int(other_B[number])]
    completions = example.completions[0], other.completions[0][: tokens_B[number]]
    return example._replace(completions=completions, scores=example.scores[:1] * 2)

  return Lazy(read, (prompt_B, np.stack([tokens_BK[:, 0], tokens_B], axis=1)))


def _others(examples: Sequence[Example], seed: int) -> np.ndarray:
  """[B]: of each example, the next one in a drawn order whose prompt is another."""
  size = len(examples)
  # As digests: prompts themselves may be more than memory holds.
  prompts = [hashlib.blake2b(e.prompt.tobytes(), digest_size=16).digest() for e in examples]
  order_B = np.random.default_rng(seed).permutation(size)
  keys = [prompts[i] for i in order_B]
  if len(set(keys)) < 2:
    raise UserError(
      f"all {size} judged answers are to one prompt, and kto needs answers to others; give rows of"
      " two prompts or more, both to train on and to hold out (data.eval_fraction=0 holds none out)"
    )
  # Backwards round the circle, from an example whose next one has another prompt.
  start = next(at for at in range(size) if keys[at] != keys[(at + 1) % size])
  partner = list(range(size))
  for at in range(start, start - size, -1):
    at, after = at % size, (at + 1) % size
    partner[at] = after if keys[at] != keys[after] else partner[after]
  other_B = np.empty(size, np.int64)
  other_B[order_B] = order_B[partner]
  return other_B
