"""The axis key, the records passed between layers of the package, and the user's error.

Names of arrays end in their axes, in order: `logps_NS` is an array [N, S]. Every letter has one
meaning in the whole package; tests/core/test_axes.py compares all names with this key.

  A   micro-batches of a step
  B   examples: pairs, unpaired completions, or prompts with K completions
  N   rows of tokens
  L   positions of a row
  S   slots of a row
  K   completions to a prompt
  P   pieces of an example in its row: the prompt and each completion
  Pr  pairs of a row
  G   groups of rows
  M   scored tokens of a group
  T   lines of a group: sequences one after the other, as attention kernels take them
  W   positions of a line
  Sq  sequences that share a line
  Tw  positions of all lines of a group, in one list of T * W
  Nl  positions of all rows of a group, in one list of (N / G) * L
  Tk  tokens, in one list

  D   width of the model
  Ff  width between the two maps of a feed-forward layer; output width of any map
  V   vocabulary
  H   query heads
  J   key/value heads
  Hj  query heads that share a key/value head
  Hd  size of a head
  Q   queries of one block of attention
  C   keys of one block or tile of attention
  Ti  tiles of queries
  Qh  queries of a tile times the query heads that share a key/value head
  E   experts
  Ek  experts chosen for a token
  As  assignments of tokens to experts, in one list of Tk * Ek
  R   rank of a LoRA adapter

  Sa  completions that are sampled at once: N prompts times K
  Lc  sampled tokens of a completion
  Rc  records of a file of stored log-probs
  Pc  processes
  Ph  phrases of the controlled task
  U   random numbers of a review of the controlled task

  X   prompts of a finite world, or prompts that are sampled from
  Y   all completions that exist in a finite world
  F   values of β on a frontier
  Lv  distinct levels of reward
  Sz  sizes of a data set
  Rs  data sets that are sampled anew

  c   chunks of scored tokens
  m   scored tokens of a chunk
  n   factors of a product
  x   one list of anything, or any number of leading axes

So `scored_GM` is an array [G, M], and `loss_B` has one entry per example. A digit is an axis of
that size: `logps_B2` is [B, 2].

A *completion* is what follows a prompt. A token is *scored* if its log-probability enters the loss;
prompt tokens are not scored, nor is *context* within a completion: a user's turn, or the result of
a tool. A *slot* is one completion whose log-probability is wanted. A
*sequence* is a prompt with one completion. A *group* is a run of consecutive rows on one device;
scored tokens are listed group by group, so that devices need not communicate to gather them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

# Data code makes numpy arrays and compiled code takes jax arrays; every record accepts both.
Array = jax.Array | np.ndarray
# Nested containers of arrays, for which Python has no static type.
PyTree = Any
# jax defines `Device` in an extension module that has no types.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]

# The records are NamedTuples: jax treats them as pytrees without registration, so they pass through
# jit, vmap and grad as they are. A field that is None has no leaves.


class PairLogps(NamedTuple):
  """Log-probabilities of B pairs of completions, summed over completion tokens, in nats.

  Attributes:
    chosen_B: log π(y_w|x) of the chosen completions.
    rejected_B: log π(y_l|x) of the rejected completions.
    chosen_tokens_B, rejected_tokens_B: numbers of scored completion tokens, or the sums of their
      weights: see `logprobs.slot_tokens`. Only losses and metrics that average over length read
      them; None where they are not known.
  """

  chosen_B: Array
  rejected_B: Array
  chosen_tokens_B: Array | None = None
  rejected_tokens_B: Array | None = None


class UnpairedLogps(NamedTuple):
  """Summed log-probabilities, in nats, of B unpaired completions, each with its own label.

  Attributes:
    completion_B: log π(y|x) of the labeled completion y to its own prompt x.
    mismatched_B: log π(y'|x) of a completion y' that belongs to another prompt; KTO estimates the
      KL divergence between policy and reference from it. None where the loss reads none.
    tokens_B: numbers of scored tokens of the labeled completions, or the sums of their weights, as
      in `PairLogps`; None where they are not known.
  """

  completion_B: Array
  mismatched_B: Array | None = None
  tokens_B: Array | None = None


class RankedLogps(NamedTuple):
  """Summed log-probabilities, in nats, of K completions to each of B prompts, best first.

  A prompt with fewer than K completions is padded at the end.

  Attributes:
    completions_BK: log π(y_k|x) of every completion.
    tokens_BK: numbers of scored completion tokens, or the sums of their weights, as in `PairLogps`;
      None where they are not known.
  """

  completions_BK: Array
  tokens_BK: Array | None = None


class TokenBatch(NamedTuple):
  """Rows of tokens, in one layout for padded, packed and prefix-shared data.

  The mask rule of attention: a query attends to a key if both have the same `pair`, the key's
  `position` is not later than the query's, and the key's `branch` is 0 or the query's own.

  `target` is the next token of the same branch. Two consequences: the last prompt token is repeated
  at the start of every branch, because it predicts the first token of every completion; and the
  last completion token is a target but never an input.

  Attributes:
    ids_NL: int32 input tokens; 0 in padding.
    position_NL: int32 position of the token within its own sequence, for rotary or learned
      positions.
    pair_NL: int32 index of the token's pair within the row; -1 is padding.
    branch_NL: int32 branch of the token: 0 the prompt that the completions share, 1 chosen,
      2 rejected, ... K.
    slot_NL: int32 index of the slot whose sum contains the target, in [0, S).
    target_NL: int32 the next token of the branch; 0 where nothing is scored.
    weight_NL: float32 weight of the target's log-prob in its slot's sum; 0 means not scored.
    scored_GM: int32 flat positions (row * L + column) of the scored tokens within each group's
      N / G rows; the rest is padded with (N / G) * L, one past the end.
    weight_NS: float32 weight of the slot's pair; 0 for an empty slot, and for a completion that is
      absent because another example of the batch has more of them. The K slots of a pair are
      neighbours, chosen first, so `reshape(-1, K)` of any [N, S] array lists pairs.
    score_NS: float32 score of the slot's completion: its reward, or for an unpaired completion 1 if
      it is desirable and 0 if not; 0 where no score is known.
    row_NS: int32 row of the data set that the slot came from; -1 for an empty or absent slot.
    reference_NL: float32 log-prob of the target under the reference, in nats; 0 where nothing is
      scored. None unless the reference's log-probs are stored.
    sequence_GTW: int32 flat position, as in `scored_GM`, of the token at each position of each
      line, which contains sequences (a prompt with one completion) one after the other; one past
      the end behind the last of them. None where attention reads rows.
    start_GTSq: int32 position of a line where each of its sequences starts, in ascending order;
      the rest is padded with W.
    place_NLK: int32 flat place (line * W + position) of the token in each of the group's sequences
      that contain it; these come first, and the rest is padded with T * W. The axis has size 1
      where sequences share no tokens.
  """

  # int32 and float32 throughout: jax without x64 would narrow wider types at every transfer.
  ids_NL: Array
  position_NL: Array
  pair_NL: Array
  branch_NL: Array
  slot_NL: Array
  target_NL: Array
  weight_NL: Array
  # Listed on host: a compiled program cannot find a varying number of scored tokens by itself.
  scored_GM: Array
  weight_NS: Array
  score_NS: Array
  row_NS: Array
  # A batch with one of these fields has another tree structure than a batch without it, so jax
  # compiles another program for it.
  reference_NL: Array | None = None
  sequence_GTW: Array | None = None
  start_GTSq: Array | None = None
  place_NLK: Array | None = None


class Head(NamedTuple):
  """The unembedding: logits = cap(hidden @ kernel.T + bias).

  Attributes:
    kernel_VD: one vector per vocabulary entry.
    bias_V: None for no bias.
    soft_cap: c in cap(z) = c tanh(z / c); None for no cap.
  """

  # Not a function to logits: the log-probs apply it to chunks of scored tokens, so that [N, L, V]
  # never exists in memory.
  kernel_VD: Array
  bias_V: Array | None = None
  soft_cap: float | None = None


class Routing(NamedTuple):
  """Load of the experts of a mixture, as sums over tokens and layers.

  Attributes:
    chosen_E: number of times each expert was chosen; it has no gradient.
    probs_E: probability that the router gives to each expert, summed.
    tokens: number of terms in these sums: every token counts once per layer.
  """

  chosen_E: Array
  probs_E: Array
  tokens: Array


class Model(NamedTuple):
  """Any language model, as pure functions of a parameter tree.

  Attributes:
    hidden: (params, batch: TokenBatch) -> hidden_NLD, the input of the head at every position. A
      model with dropout takes a random key as third argument; without a key it drops nothing.
    head: (params) -> Head.
    vocab: number of token ids the head can score.
    routed: like `hidden`, but returns (hidden_NLD, Routing); None unless the model is a mixture of
      experts.
  """

  # Functions rather than a Flax module: a model written with any library can be trained.
  hidden: Callable[..., Array]
  head: Callable[[PyTree], Head]
  vocab: int
  routed: Callable[..., tuple[Array, Routing]] | None = None


# A class of its own, because commands print this error as one line and every other error with its
# traceback.
class UserError(Exception):
  """Wrong input from the user. The message is one line: the value, the rule, and a way out."""
