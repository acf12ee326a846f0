"""What is reported of a batch: sums, each with its own count, added up wherever, divided once.

Means of means are wrong for ragged batches, packed rows and uneven shards; sums are not. Rewards
are β log π/π_ref, in reward units; log-probs and log-ratios are in nats.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps, RankedLogps, UnpairedLogps

# A sum and the count it is divided by; both add up over micro-batches and devices.
Sums = dict[str, tuple[Array, Array]]


def pair_sums(
  policy: PairLogps,
  reference: PairLogps | None,
  loss_B: Array,
  weight_B: Array,
  beta: float,
) -> Sums:
  """Loss, rewards and log-probs of pairs, and where the policy's probability goes.

  A pair preferred to neither side (a margin of exactly zero, as everywhere at the start of a run)
  counts one half towards accuracy. Drift is told where there is a reference, and what depends on
  lengths where these are known.

  Args:
    policy, reference: summed log-probs; with None for a reference, rewards are β log π.
    loss_B: of each pair.
    weight_B: what a pair counts; 0 is an empty place.
    beta: reward units per nat.

  Returns:
    Means over pairs, once divided, of `loss`, `rewards/…`, `logps/…` and

      drift/chosen, drift/rejected   Σ log π/π_ref over Σ tokens, nats a token
      drift/both_fell                share of pairs whose answers both lost probability
      drift/pair_mass                log (π(y_w)+π(y_l)) / (π_ref(y_w)+π_ref(y_l)), nats
      margins/chosen_longer          margin of rewards where the chosen answer has more tokens
      margins/chosen_shorter         where it has fewer
  """
  zero_B = jnp.zeros_like(policy.chosen_B)
  chosen_B, rejected_B = _log_ratios(policy, reference or PairLogps(zero_B, zero_B))
  margin_B = beta * (chosen_B - rejected_B)
  values = {
    "loss": loss_B,
    "rewards/chosen": beta * chosen_B,
    "rewards/rejected": beta * rejected_B,
    "rewards/accuracies": _above(margin_B),
    "rewards/margins": margin_B,
    "logps/chosen": policy.chosen_B,
    "logps/rejected": policy.rejected_B,
  }
  if reference is not None:
    values["drift/both_fell"] = (chosen_B < 0) & (rejected_B < 0)
    # In terms of log-ratios, exact near the reference: a sum of large log-probs would round.
    odds_B = reference.chosen_B - reference.rejected_B
    values["drift/pair_mass"] = jnp.logaddexp(
      jax.nn.log_sigmoid(odds_B) + chosen_B, jax.nn.log_sigmoid(-odds_B) + rejected_B
    )
  sums = {name: _weighted(value_B, weight_B) for name, value_B in values.items()}

  long_B, short_B = policy.chosen_tokens_B, policy.rejected_tokens_B
  if long_B is None or short_B is None:
    return sums
  sums["margins/chosen_longer"] = _weighted(margin_B, weight_B * (long_B > short_B))
  sums["margins/chosen_shorter"] = _weighted(margin_B, weight_B * (long_B < short_B))
  if reference is not None:
    sums["drift/chosen"] = _a_token(chosen_B, long_B, weight_B)
    sums["drift/rejected"] = _a_token(rejected_B, short_B, weight_B)
  return sums


def unpaired_sums(
  policy: UnpairedLogps,
  reference: UnpairedLogps,
  loss_B: Array,
  weight_B: Array,
  label_B: Array,
  beta: float,
) -> Sums:
  """The same for answers judged by themselves; `label_B` is 1 where desirable, 0 where not.

  `kl` is the mean log-ratio of the mismatched answers, nats, before any clipping at zero.
  """
  ratio_B = policy.completion_B - reference.completion_B
  sums = {
    "loss": _weighted(loss_B, weight_B),
    "kl": _weighted(policy.mismatched_B - reference.mismatched_B, weight_B),
  }
  for name, held_B in (("desirable", label_B > 0), ("undesirable", label_B <= 0)):
    sums[f"rewards/{name}"] = _weighted(beta * ratio_B, weight_B * held_B)
    sums[f"logps/{name}"] = _weighted(policy.completion_B, weight_B * held_B)
  return sums


def ranked_sums(
  policy: RankedLogps,
  reference: RankedLogps,
  loss_B: Array,
  weight_B: Array,
  present_BK: Array,
  beta: float,
  reward_BK: Array | None = None,
) -> Sums:
  """The same for K answers a prompt: listed best first or, with their rewards, in no order.

  Args:
    policy, reference: summed log-probs.
    loss_B: of each prompt.
    weight_B: what a prompt counts.
    present_BK: 1 where there is an answer.
    beta: reward units per nat.
    reward_BK: of answers sampled from the policy.

  Returns:
    Of ranked answers `rewards/best`, `rewards/rest`, `logps/best`, `logps/rest`, and of the best
    against each of the rest `rewards/accuracies` and `rewards/margins`; of samples, means of

      reward      r
      kl          log π/π_ref, nats
      objective   -r + β log π/π_ref, what on-policy training minimises
  """
  ratio_BK = policy.completions_BK - reference.completions_BK
  weight_BK = weight_B[:, None] * present_BK
  sums = {"loss": _weighted(loss_B, weight_B)}
  if reward_BK is not None:
    return sums | {
      "reward": _weighted(reward_BK, weight_BK),
      "kl": _weighted(ratio_BK, weight_BK),
      "objective": _weighted(beta * ratio_BK - reward_BK, weight_BK),
    }
  for name, part in (("best", slice(0, 1)), ("rest", slice(1, None))):
    sums[f"rewards/{name}"] = _weighted(beta * ratio_BK[:, part], weight_BK[:, part])
    sums[f"logps/{name}"] = _weighted(policy.completions_BK[:, part], weight_BK[:, part])
  margin_BK = beta * (ratio_BK[:, :1] - ratio_BK[:, 1:])
  return sums | {
    "rewards/accuracies": _weighted(_above(margin_BK), weight_BK[:, 1:]),
    "rewards/margins": _weighted(margin_BK, weight_BK[:, 1:]),
  }


def text_sums(logps_B: Array, tokens_B: Array, loss_B: Array, weight_B: Array) -> Sums:
  """The same for supervised rows: the loss is a mean over tokens, log-probs over sequences."""
  return {
    "loss": _a_token(loss_B, tokens_B, weight_B),
    "logps/chosen": _weighted(logps_B, weight_B),
  }


def divide(sums: Sums) -> dict[str, Array]:
  """Means from sums; not a number where nothing was counted."""
  safe = lambda count: jnp.where(count > 0, count, 1.0)
  return {
    name: jnp.where(count > 0, total / safe(count), jnp.nan)
    for name, (total, count) in sums.items()
  }


# -- parts ---------------------------------------------------------------------------------------


def _log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Array, Array]:
  return policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B


def _above(margin_x: Array) -> Array:
  """1 above zero, 0 below, one half at a tie."""
  return (margin_x > 0) + 0.5 * (margin_x == 0)


def _weighted(value_x: Array, weight_x: Array) -> tuple[Array, Array]:
  return jnp.sum(value_x * weight_x), jnp.sum(weight_x)


def _a_token(value_B: Array, tokens_B: Array, weight_B: Array) -> tuple[Array, Array]:
  """Summed values over the tokens of all answers: a long answer counts as much as it is long."""
  return jnp.sum(value_B * weight_B), jnp.sum(tokens_B * weight_B)
