"""Examples: a prompt and its completions as token ids, before they are laid out in rows.

Here examples are truncated, measured, read lazily, split into training and held-out ones, and given
mismatched completions. `collate` decides how they are laid out in the rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.structs import UserError


class Example(NamedTuple):
  """One prompt and its K completions as token ids.

  Attributes:
    prompt: int32 [P], P >= 1: the first completion token needs a token to be predicted from.
    completions: K arrays int32 [n_k], best first. Each includes its end token, unless it was
      truncated. The first has n_k >= 1; later ones may be absent, n_k = 0, but only after all that
      are present. An unpaired example has two: its own, and a mismatched one (see
      `with_mismatched`).
    weight: weight of the pair in losses and metrics.
    row: row of the data set that it came from.
    scores: a number per completion, as in `TokenBatch.score_NS`; or ().
    reference: float32 [n_k] per completion, log-probs of its tokens under the reference model, in
      nats; or ().
    token_weights: float32 [n_k] per completion, the weight of each token's log-prob in the sum of
      its completion, 0 or more; or () where all weights are 1. A token of weight 0 is context, such
      as the result of a tool: later tokens attend to it, and it is not scored. A completion that is
      present has at least one scored token.
  """

  prompt: np.ndarray
  completions: tuple[np.ndarray, ...]
  weight: float = 1.0
  row: int = 0
  scores: tuple[float, ...] = ()
  reference: tuple[np.ndarray, ...] = ()
  token_weights: tuple[np.ndarray, ...] = ()


class Measured(NamedTuple):
  """The lengths of some examples, for functions that read nothing else of them.

  Packing, sizes and padding depend on lengths alone, and the examples themselves may not fit in
  memory.

  Attributes:
    prompt_B: tokens of every prompt.
    tokens_BK: tokens of every completion; 0 if it is absent.
    scored_BK: tokens of every completion that are scored: those whose weight is not 0.
  """

  prompt_B: np.ndarray
  tokens_BK: np.ndarray
  scored_BK: np.ndarray

  @classmethod
  def concatenate(cls, *sets: Sequence[Example] | Measured) -> Measured:
    """Returns the lengths of several sets as one, with the largest K among them."""
    each = [lengths(some) for some in sets if len(some)]
    most = max(one.tokens_BK.shape[1] for one in each)
    return cls(*map(np.concatenate, zip(*(one.widened(most) for one in each), strict=True)))

  def select(self, index: Any) -> Measured:
    """Returns the lengths of the examples with these numbers."""
    return Measured(*(x_B[index] for x_B in self))

  def longest(self) -> np.ndarray:
    """Returns the tokens of the longest sequence of every example, prompt and completion: [B]."""
    return self.prompt_B + self.tokens_BK.max(axis=1)

  def widened(self, completions: int) -> Measured:
    """Returns the lengths with K = `completions`: those of the absent ones are 0."""
    more = ((0, 0), (0, completions - self.tokens_BK.shape[1]))
    return Measured(self.prompt_B, np.pad(self.tokens_BK, more), np.pad(self.scored_BK, more))


class Lazy(Sequence[Example]):
  """A sequence that reads each example when it is indexed, and keeps none.

  Attributes:
    read: number -> example.
    lengths: prompt and completion lengths of all examples. They are known without reading.
  """

  def __init__(self, read: Callable[[int], Example], lengths: Measured) -> None:
    self.read, self.lengths = read, lengths

  @classmethod
  def select(cls, examples: Sequence[Example], index: Sequence[int] | np.ndarray) -> Lazy:
    """Returns the examples with these numbers, in this order, without reading them."""
    return cls(lambda i: examples[int(index[i])], lengths(examples).select(index))

  def __len__(self) -> int:
    return len(self.lengths.prompt_B)

  def __getitem__(self, index: Any) -> Any:
    # A slice is read at once, into a list.
    if isinstance(index, slice):
      return [self.read(i) for i in range(*index.indices(len(self)))]
    return self.read(range(len(self))[index])


# --- truncation -----------------------------------------------------------------------------------


def truncate(
  prompt: np.ndarray,
  completions: Sequence[np.ndarray],
  token_weights: Sequence[np.ndarray] = (),
  *,
  max_length: int | None,
  prompt_floor: int = 64,
  mode: str = "drop",
  bos_id: int | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...], tuple[str, ...]] | None:
  """Fits every prompt + completion into `max_length` tokens. Nothing else truncates examples.

  The prompt is truncated first, from the left, since the question stands at its end; a BOS at its
  start is kept. At least `prompt_floor` tokens of it remain, BOS included, or half of `max_length`
  if that is less. If the longest completion still does not fit,

    mode "drop"  drops the example;
    mode "cut"   truncates the completions to the same length, so that none is favoured. A truncated
                 completion loses its end token, and gets no other: it does not really end there.

  Args:
    prompt: int32 [P].
    completions: K arrays int32 [n_k].
    token_weights: K arrays float32 [n_k], or none: as in `Example`.
    max_length: most tokens of the prompt and one completion, or None for no limit.
    prompt_floor: tokens of the prompt that are never cut.
    mode: "drop" or "cut".
    bos_id: the token to keep at the start of a truncated prompt; None keeps none.

  Returns:
    The prompt, the completions, their weights and what was truncated, a subset of ("prompt",
    "answer"); or None if the example is dropped.
  """
  if mode not in ("drop", "cut"):
    raise UserError(f"unknown truncation {mode!r}; choose 'drop' or 'cut'")
  completions, token_weights = tuple(completions), tuple(token_weights)
  if max_length is None:
    return prompt, completions, token_weights, ()
  longest = max(len(completion) for completion in completions)
  if len(prompt) + longest <= max_length:
    return prompt, completions, token_weights, ()

  # One token of the prompt at least: the first completion token is predicted from it.
  floor = max(1, min(prompt_floor, max_length // 2, len(prompt)))
  keep = min(len(prompt), max(floor, max_length - longest))
  room = max_length - keep
  if room < longest and (mode == "drop" or room < 1):
    return None
  cuts = ()
  if keep < len(prompt):
    # keep = 1 leaves no room for both BOS and text; the last token predicts the completion.
    bos = int(keep > 1 and bos_id is not None and prompt[0] == bos_id)
    prompt = np.concatenate([prompt[:bos], prompt[len(prompt) - keep + bos :]])
    cuts += ("prompt",)
  if room < longest:
    completions = tuple(completion[:room] for completion in completions)
    token_weights = tuple(weights[:room] for weights in token_weights)
    cuts += ("answer",)
  return prompt, completions, token_weights, cuts


# --- number of completions, and lengths -----------------------------------------------------------


def fill_up(examples: Sequence[Example], completions: int | None = None) -> list[Example]:
  """Gives all examples K completions, by adding absent ones (of no tokens) at the end.

  Args:
    examples: each with at most K completions.
    completions: K; by default the largest number that any example has.
  """
  most = max((len(example.completions) for example in examples), default=0)
  completions = most if completions is None else completions
  if most > completions:
    raise ValueError(f"an example has {most} completions; completions={completions} is too few")

  def filled(example: Example) -> Example:
    missing = completions - len(example.completions)

    def more(values: tuple[Any, ...], absent: Any) -> tuple[Any, ...]:
      # One value per completion, absent ones included; () stays ().
      return values + (absent,) * missing if values else ()

    return example._replace(
      completions=more(example.completions, np.zeros(0, np.int32)),
      scores=more(example.scores, 0.0),
      token_weights=more(example.token_weights, np.zeros(0, np.float32)),
    )

  return [filled(example) for example in examples]


def lengths(examples: Sequence[Example] | Measured) -> Measured:
  """Returns the lengths of prompts and completions, in tokens.

  Examples that know their `lengths` (`Lazy`, `Measured`) are not read.
  """
  if isinstance(examples, Measured):
    return examples
  known = getattr(examples, "lengths", None)
  if known is not None:
    return known
  prompt_B = np.array([len(example.prompt) for example in examples])
  tokens_BK = np.array([[len(ids) for ids in example.completions] for example in examples])
  scored_BK = tokens_BK.copy()
  for b, example in enumerate(examples):
    if example.token_weights:
      scored_BK[b] = [np.count_nonzero(weights) for weights in example.token_weights]
  return Measured(prompt_B, tokens_BK, scored_BK)


def weights_of(example: Example) -> tuple[np.ndarray, ...]:
  """Returns the weights of the completions' tokens, also where the example leaves them out."""
  return example.token_weights or tuple(
    np.ones(len(ids), np.float32) for ids in example.completions
  )


# --- held-out examples, mismatched completions ----------------------------------------------------


def split(
  examples: Sequence[Example],
  eval_fraction: float,
  seed: int = 0,
  dropped: Mapping[str, int] | None = None,
) -> tuple[list[Example], list[Example]]:
  """Splits examples by prompt, so that no prompt is both trained on and held out.

  If all have the same prompt (plain texts, which follow BOS alone), they are split one by one.

  Args:
    examples: in memory.
    eval_fraction: share of the prompts to hold out, 0 or more.
    seed: of the random choice.
    dropped: reason -> rows dropped before; only used in the error.

  Returns:
    Training and held-out examples, each in the order of the data.

  Raises:
    UserError: one of the two would be empty.
  """
  keys: list[Any] = [example.prompt.tobytes() for example in examples]
  what = "distinct prompts"
  if len(set(keys)) < 2:
    keys, what = [*range(len(examples))], "rows"
  # Distinct keys in the order of the data: a set would be in another order in every process.
  units = list(dict.fromkeys(keys))
  held_out = round(eval_fraction * len(units))
  if eval_fraction > 0 and not 0 < held_out < len(units):
    lost = ", ".join(f"{rows} dropped: {reason}" for reason, rows in (dropped or {}).items())
    raise UserError(
      f"eval fraction {eval_fraction} of {len(units)} {what}{lost and f' ({lost})'} leaves one side"
      " empty; set data.eval_fraction=0 to hold nothing out, or name other rows by data.eval_path"
    )
  # Whole prompts are chosen, not examples: see above.
  order = np.random.default_rng(seed).permutation(len(units))
  held_out_keys = {units[i] for i in order[:held_out]}
  pairs = list(zip(keys, examples, strict=True))
  train = [example for key, example in pairs if key not in held_out_keys]
  return train, [example for key, example in pairs if key in held_out_keys]


def with_mismatched(
  examples: Sequence[Example], *, max_length: int | None = None, seed: int = 0
) -> Sequence[Example]:
  """Gives every unpaired example a second completion: one that belongs to another prompt.

  `kto` estimates the KL divergence between policy and reference from these mismatched pairs. In a
  random order of the examples, each takes the completion of the next one with a different prompt.
  The choice depends only on the examples and the seed, so the log-prob under the reference is the
  same in every epoch. If no two examples share a prompt, every completion is used exactly once.
  A mismatched completion keeps its token weights. If it is cut before its first scored token, both
  of its log-probs are 0, and so is its estimate.

  Held-out examples must be split off before, so that no completion is both trained on and held out.

  Args:
    examples: each with one completion and its label; all are read once, and each again when it is
      indexed.
    max_length: most tokens of a prompt and completion; a longer mismatched completion is truncated.
    seed: of the random order.

  Returns:
    The examples in their order, with completions (own, mismatched) and the label as both scores.

  Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", section 4.
  """
  if not examples:
    return []
  other_B = _mismatched_partners(examples, seed)
  # The lengths of the result are known now; ids are read only when an example is indexed.
  prompt_B, tokens_BK, scored_BK = lengths(examples)
  tokens_B = whole_B = tokens_BK[other_B, 0]
  if max_length is not None:
    tokens_B = np.minimum(whole_B, max_length - prompt_B)

  def read(number: int) -> Example:
    example, other = examples[number], examples[int(other_B[number])]
    cut = slice(int(tokens_B[number]))
    weights = ()
    if example.token_weights or other.token_weights:
      weights = weights_of(example)[0], weights_of(other)[0][cut]
    return example._replace(
      completions=(example.completions[0], other.completions[0][cut]),
      token_weights=weights,
      scores=example.scores[:1] * 2,
    )

  # Which tokens of a completion are scored is known only by reading it. So those with context that
  # are cut are read; of the others, all that is left is scored.
  scored_B = np.minimum(scored_BK[other_B, 0], tokens_B)
  for i in np.flatnonzero((tokens_B < whole_B) & (scored_BK[other_B, 0] < whole_B)).tolist():
    scored_B[i] = np.count_nonzero(read(i).token_weights[1])
  return Lazy(
    read,
    Measured(
      prompt_B,
      np.stack([tokens_BK[:, 0], tokens_B], axis=1),
      np.stack([scored_BK[:, 0], scored_B], axis=1),
    ),
  )


def _mismatched_partners(examples: Sequence[Example], seed: int) -> np.ndarray:
  """Returns int64 [B]: for each example, the next one in a random order with a different prompt."""
  size = len(examples)
  # Digests instead of prompts: all prompts may be more than memory holds.
  prompts = [hashlib.blake2b(e.prompt.tobytes(), digest_size=16).digest() for e in examples]
  order_B = np.random.default_rng(seed).permutation(size)
  keys = [prompts[i] for i in order_B]
  if len(set(keys)) < 2:
    raise UserError(
      f"all {size} completions have the same prompt, and kto needs others; give rows with two"
      " prompts or more, both to train on and to hold out (data.eval_fraction=0 holds none out)"
    )
  # Backwards around the circle, so that each example can take over the partner of the next one if
  # they share a prompt; starting where the next one has a different prompt, so that it has one.
  start = next(at for at in range(size) if keys[at] != keys[(at + 1) % size])
  partner = list(range(size))  # positions in the random order; examples again in the last line
  for at in range(start, start - size, -1):
    at, after = at % size, (at + 1) % size
    partner[at] = after if keys[at] != keys[after] else partner[after]
  other_B = np.empty(size, np.int64)
  other_B[order_B] = order_B[partner]
  return other_B
