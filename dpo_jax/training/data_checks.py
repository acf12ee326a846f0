"""Checks of examples against the batches and the model that they are for."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_jax.data import collate, left_out
from dpo_jax.data.batches import Batching
from dpo_jax.data.examples import Example, lengths
from dpo_jax.model.config import ModelConfig, check_ids, check_positions
from dpo_jax.structs import UserError
from dpo_jax.utils import messages


def check_tokens(
  some: Sequence[Example],
  batching: Batching,
  ids: int,
  model_config: ModelConfig,
  purpose: str = "to train on",
) -> None:
  """Checks that every example fits in a row, and that the model has its ids and positions.

  Reports rows beyond the positions that a model with rotary ones was trained on.

  Args:
    some: one example or more.
    batching: the layout of rows.
    ids: number of ids of the tokenizer.
    model_config: of the policy.
    purpose: what the examples are for.

  Raises:
    UserError: it names the row.
  """
  # By lengths alone, in moments. Otherwise the run would stop at the batch that the row falls into.
  if batching.row_length and batching.layout != "padded":
    collate.check_fits(some, batching.layout, batching.row_length)
  tokens_B = lengths(some).longest()
  check_positions(some, tokens_B, model_config)
  # Rotary positions can be computed for any length, so these rows are trained on.
  line = left_out.beyond_positions(tokens_B, model_config.max_positions, purpose)
  if line:
    messages.warn(line)
  # No row has an id that the tokenizer lacks, so there is nothing to look for in most models. A
  # prepared set is read through once.
  if ids > model_config.vocab:
    check_ids(some, model_config)


def check_batch(size: int, accumulate: int, groups: int, count: int, path: str) -> None:
  """Checks that a batch does not have some row twice because there are fewer rows than it takes.

  Args:
    size: examples of a batch.
    accumulate, groups: micro-batches, and devices that divide each.
    count: number of examples.
    path: where they come from.
  """
  if size <= count:
    return
  # The largest that set-up would accept.
  fits = count // (groups * accumulate) * groups * accumulate
  way = f"set --batch_size={fits}"
  if not fits:
    way = (
      f"it must also divide among {groups} devices x {accumulate} micro-batches, so use"
      f" --config.parallel.devices=1 --accumulate=1 --batch_size={count}"
    )
  raise UserError(
    f"train.batch_size is {size} and {path} leaves {count} to train on, so that every update would"
    f" have the same rows several times; {way}, or give more rows"
  )
