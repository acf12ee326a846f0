"""What is reported of a batch: sums and counts, added up wherever, divided once at the end.

Means of means are wrong for ragged batches, packed rows and uneven shards; sums are not.
"""

from __future__ import annotations

import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps

Sums = dict[str, Array]


def pair_sums(
  policy: PairLogps, reference: PairLogps, loss_B: Array, weight_B: Array, beta: float
) -> Sums:
  """Weighted sums over pairs. Rewards are β log π/π_ref, in reward units; log-probs in nats.

  An answer preferred to neither side (a margin of exactly zero, as everywhere at the start of a
  run) counts one half towards accuracy.
  """
  chosen_B = beta * (policy.chosen_B - reference.chosen_B)
  rejected_B = beta * (policy.rejected_B - reference.rejected_B)
  margin_B = chosen_B - rejected_B
  values = {
    "loss": loss_B,
    "rewards/chosen": chosen_B,
    "rewards/rejected": rejected_B,
    "rewards/accuracies": (margin_B > 0) + 0.5 * (margin_B == 0),
    "rewards/margins": margin_B,
    "logps/chosen": policy.chosen_B,
    "logps/rejected": policy.rejected_B,
  }
  return {name: jnp.sum(value_B * weight_B) for name, value_B in values.items()} | {
    "pairs": jnp.sum(weight_B)
  }


def sequence_sums(logps_B: Array, loss_B: Array, weight_B: Array) -> Sums:
  """The same for supervised rows: log-probs in nats a sequence, the loss summed over tokens."""
  return {
    "loss": jnp.sum(loss_B * weight_B),
    "logps/chosen": jnp.sum(logps_B * weight_B),
    "pairs": jnp.sum(weight_B),
  }


def divide(sums: Sums, loss_count: Array) -> dict[str, Array]:
  """Means from sums: everything over its pairs, the loss over what it is averaged over."""
  pairs = sums["pairs"]
  means = {k: v / pairs for k, v in sums.items() if k not in ("pairs", "loss")}
  return {"loss": sums["loss"] / loss_count} | means
