"""The words everything else is written in: axis letters and the records passed between layers.

Names of arrays end in their axes:

  A micro-batches of a step   B pairs               N rows of tokens     L positions of a row
  S slots of a row            G groups of rows      M scored tokens of a group
  D width                     H query heads         V vocabulary
  T texts of a group          W positions of a text
  K answers to a prompt; in the model, head size

A *slot* is one answer whose log-probability is wanted. A *group* is a run of consecutive rows that
one device holds; scored tokens are listed a group at a time, so gathering them is never
communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any


class PairLogps(NamedTuple):
  """Log-probabilities of B pairs of answers, summed over answer tokens, in nats.

  Token counts are only read by losses that average over length; None where nobody asks.
  """

  chosen_B: Array
  rejected_B: Array
  chosen_tokens_B: Array | None = None
  rejected_tokens_B: Array | None = None


class UnpairedLogps(NamedTuple):
  """Summed log-probabilities, in nats, of B answers that were each judged by themselves.

  Attributes:
    completion_B: of the judged answer to its own prompt.
    mismatched_B: of an answer to another prompt behind this prompt, from which the distance
      between policy and reference is estimated.
  """

  completion_B: Array
  mismatched_B: Array


class RankedLogps(NamedTuple):
  """Summed log-probabilities, in nats, of K answers to each of B prompts, best first.

  Token counts as in `PairLogps`. Rows of fewer than K answers are filled up at their end.
  """

  completions_BK: Array
  tokens_BK: Array | None = None


class TokenBatch(NamedTuple):
  """Rows of tokens: the one layout of padded, packed and prefix-shared data.

  A query may attend to a key when both have the same `pair`, the key's `position` is not later,
  and the key's `branch` is 0 or the query's own. `target` is always the next token of the same
  branch: the last prompt token is repeated at the head of every branch, and the last answer token
  is a target but never an input.

  Attributes:
    ids_NL: int32 input tokens; 0 in padding.
    position_NL: int32 position of the token within its own text; rotary and learned positions.
    pair_NL: int32 which pair of the row the token belongs to; -1 is padding.
    branch_NL: int32 0 shared prompt, 1 chosen, 2 rejected, ... K.
    slot_NL: int32 which slot of the row the target counts towards, in [0, S).
    target_NL: int32 the next token of the branch; 0 where nothing is scored.
    weight_NL: float32 weight of the target's log-prob in its slot's sum; 0 is not scored.
    scored_GM: int32 flat positions (row * L + column) of the scored tokens within each group's
      N / G rows; (N / G) * L, one past the end, fills what is left over.
    weight_NS: float32 weight of the pair that the slot belongs to; 0 is an empty slot, or one whose
      answer is absent because another row has more. The K slots of a pair are neighbours, chosen
      first, so `reshape(-1, K)` of any [N, S] array lists pairs.
    score_NS: float32 what is known of the answer in the slot besides its order: its reward, or for
      an answer judged by itself 1 if it is desirable and 0 if not; 0 where nothing is known.
    row_NS: int32 row of the data set that the slot came from; -1 is an empty or absent one.
    reference_NL: float32 log-prob of the target under the reference, nats, where that is stored; 0
      where nothing is scored. None where the reference is computed along.
    sequence_GTW: int32 flat position, as in `scored_GM`, of the token at each position of each
      sequence, a prompt with one answer; one past the end behind the sequence. None where attention
      takes the rows as they are.
    place_NLK: int32 flat place (text * W + position) of the token in each of its group's texts that
      has it, those first; T * W fills what is left over. K is 1 where no text shares a token.
  """

  ids_NL: Array
  position_NL: Array
  pair_NL: Array
  branch_NL: Array
  slot_NL: Array
  target_NL: Array
  weight_NL: Array
  scored_GM: Array
  weight_NS: Array
  score_NS: Array
  row_NS: Array
  reference_NL: Array | None = None
  sequence_GTW: Array | None = None
  place_NLK: Array | None = None


class Head(NamedTuple):
  """The unembedding: logits = cap(hidden @ kernel.T + bias), cap(z) = c tanh(z / c) if c is set."""

  kernel_VD: Array
  bias_V: Array | None = None
  soft_cap: float | None = None


class Routing(NamedTuple):
  """How tokens were spread over the experts of a mixture, as sums over tokens and layers.

  Attributes:
    chosen_E: how often each expert was chosen; no gradient.
    probs_E: what the router gave each.
    tokens: how many tokens the sums are over, once a layer.
  """

  chosen_E: Array
  probs_E: Array
  tokens: Array


class Model(NamedTuple):
  """Any language model: pure functions of a parameter tree.

  Attributes:
    hidden: (params, batch: TokenBatch) -> hidden_NLD, the input of the head at every position. A
      model with dropout takes a random key as third argument, and drops nothing without.
    head: (params) -> Head.
    vocab: number of token ids the head can score.
    routed: as `hidden`, with the `Routing` beside it; None but for a mixture of experts.
  """

  hidden: Callable[..., Array]
  head: Callable[[PyTree], Head]
  vocab: int
  routed: Callable[..., tuple[Array, Routing]] | None = None


class UserError(Exception):
  """Bad input. Its message is one line: the value, the rule it breaks and the way out."""
