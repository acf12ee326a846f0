"""Metrics of a batch, as pairs of a sum and a count; `divide` makes means of them at the end.

Sums and counts can be added over micro-batches and devices. A mean of means would be wrong where
these have different numbers of pairs or tokens; one sum divided by one count is right.
Rewards are β log π/π_ref, in reward units. Log-probs and log-ratios are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, PairLogps, RankedLogps, UnpairedLogps

# From the name of a metric to (sum, count).
Sums = dict[str, tuple[Array, Array]]


def pair_sums(
  policy: PairLogps,
  reference: PairLogps | None,
  loss_B: Array,
  weight_B: Array,
  beta: float,
) -> Sums:
  """Sums the loss, rewards and log-probs of pairs, and the drift of the policy.

  Drift is how far the policy's log-probs have moved from the reference's: log π/π_ref.

  A margin of zero counts one half towards accuracy (see `in_order`); at the start of a run all
  margins are zero. Drift metrics need a reference, and metrics that depend on length need token
  counts; they are left out otherwise.

  Args:
    policy, reference: summed log-probs, in nats; with None for the reference, rewards are β log π.
    loss_B: loss of each pair.
    weight_B: weight of each pair in all sums; 0 for an empty slot.
    beta: β, in reward units per nat.

  Returns:
    Sums and counts. Once divided they are means over pairs of `loss`, `rewards/…`, `logps/…`, and

      drift/chosen, drift/rejected   Σ log π/π_ref over Σ tokens, in nats per token
      drift/both_fell                share of pairs whose completions both lost probability
      drift/pair_mass                log [(π(y_w)+π(y_l)) / (π_ref(y_w)+π_ref(y_l))], in nats
      margins/chosen_longer          mean margin of pairs whose chosen completion has more tokens
      margins/chosen_shorter         mean margin of pairs whose chosen completion has fewer tokens

    Tokens are those that are scored, here and wherever a length is meant.
  """
  zero_B = jnp.zeros_like(policy.chosen_B)
  # Without a reference the log-ratios are log-probs: rewards are then β log π.
  compared = reference or PairLogps(zero_B, zero_B)
  chosen_B, rejected_B = _log_ratios(policy, compared)
  margin_B = beta * (chosen_B - rejected_B)
  values = {
    "loss": loss_B,
    "rewards/chosen": beta * chosen_B,
    "rewards/rejected": beta * rejected_B,
    "rewards/accuracies": pairs_in_order(policy, compared),
    "rewards/margins": margin_B,
    "logps/chosen": policy.chosen_B,
    "logps/rejected": policy.rejected_B,
  }
  if reference is not None:
    values["drift/both_fell"] = (chosen_B < 0) & (rejected_B < 0)
    # With p = π_ref(y_w) / (π_ref(y_w) + π_ref(y_l)) this is log (p e^c + (1-p) e^r). It needs only
    # log-ratios, which are small near the reference; sums of log-probs of hundreds of nats would
    # round a small drift away.
    log_odds_B = reference.chosen_B - reference.rejected_B
    values["drift/pair_mass"] = jnp.logaddexp(
      jax.nn.log_sigmoid(log_odds_B) + chosen_B, jax.nn.log_sigmoid(-log_odds_B) + rejected_B
    )
  sums = {name: _weighted(value_B, weight_B) for name, value_B in values.items()}

  # Pairs of equal length are in neither of the two metrics.
  chosen_tokens_B, rejected_tokens_B = policy.chosen_tokens_B, policy.rejected_tokens_B
  if chosen_tokens_B is None or rejected_tokens_B is None:
    return sums
  sums["margins/chosen_longer"] = _weighted(
    margin_B, weight_B * (chosen_tokens_B > rejected_tokens_B)
  )
  sums["margins/chosen_shorter"] = _weighted(
    margin_B, weight_B * (chosen_tokens_B < rejected_tokens_B)
  )
  if reference is not None:
    sums["drift/chosen"] = _per_token(chosen_B, chosen_tokens_B, weight_B)
    sums["drift/rejected"] = _per_token(rejected_B, rejected_tokens_B, weight_B)
  return sums


def unpaired_sums(
  policy: UnpairedLogps,
  reference: UnpairedLogps | None,
  loss_B: Array,
  weight_B: Array,
  label_B: Array,
  beta: float,
) -> Sums:
  """Sums the loss, rewards and log-probs of unpaired completions, by label.

  Args:
    policy, reference: summed log-probs, in nats; with None for the reference, rewards are β log π.
    loss_B: loss of each completion.
    weight_B: weight of each completion in all sums.
    label_B: 1 where the completion is desirable, 0 where it is not.
    beta: β, in reward units per nat.

  Returns:
    Sums and counts of `loss`, of `rewards/…` and `logps/…` per label, and, where there are
    mismatched completions, of `kl`: their mean log-ratio, in nats, before it is limited to 0 or
    above.
  """
  ratio_B = policy.completion_B - (0 if reference is None else reference.completion_B)
  sums = {"loss": _weighted(loss_B, weight_B)}
  if policy.mismatched_B is not None and reference is not None:
    assert reference.mismatched_B is not None
    sums["kl"] = _weighted(policy.mismatched_B - reference.mismatched_B, weight_B)
  # Each label has its own count: in a batch without desirable completions their mean is nan, not 0.
  for name, in_class_B in (("desirable", label_B > 0), ("undesirable", label_B <= 0)):
    sums[f"rewards/{name}"] = _weighted(beta * ratio_B, weight_B * in_class_B)
    sums[f"logps/{name}"] = _weighted(policy.completion_B, weight_B * in_class_B)
  return sums


def ranked_sums(
  policy: RankedLogps,
  reference: RankedLogps | None,
  loss_B: Array,
  weight_B: Array,
  present_BK: Array,
  beta: float,
  reward_BK: Array | None = None,
) -> Sums:
  """Sums the metrics of K completions per prompt, ranked best first or sampled with rewards.

  Args:
    policy, reference: summed log-probs, in nats; with None for the reference, rewards are β log π.
    loss_B: loss of each prompt.
    weight_B: weight of each prompt in all sums.
    present_BK: 1 where there is a completion, 0 where there is padding.
    beta: β, in reward units per nat.
    reward_BK: rewards of completions sampled from the policy, in reward units; None for ranked
      completions.

  Returns:
    Sums and counts. For ranked completions: `rewards/best`, `rewards/rest`, `logps/best`,
    `logps/rest`, and `rewards/accuracies` and `rewards/margins` of the best one against each of the
    rest. For samples:

      reward      mean of r
      kl          mean of log π/π_ref, in nats
      objective   mean of -r + β log π/π_ref, which on-policy training minimizes
  """
  reference_BK = 0 if reference is None else reference.completions_BK
  ratio_BK = policy.completions_BK - reference_BK
  # Every completion that is present counts with its prompt's weight.
  weight_BK = weight_B[:, None] * present_BK
  sums = {"loss": _weighted(loss_B, weight_B)}
  if reward_BK is not None:
    # Samples are in no order, so a best one and accuracies have no meaning.
    return sums | {
      "reward": _weighted(reward_BK, weight_BK),
      "kl": _weighted(ratio_BK, weight_BK),
      "objective": _weighted(beta * ratio_BK - reward_BK, weight_BK),
    }
  # The first completion is the best one. Of the rest, every completion counts once, so a prompt
  # with more completions counts more.
  for name, part in (("best", slice(0, 1)), ("rest", slice(1, None))):
    sums[f"rewards/{name}"] = _weighted(beta * ratio_BK[:, part], weight_BK[:, part])
    sums[f"logps/{name}"] = _weighted(policy.completions_BK[:, part], weight_BK[:, part])
  margin_BK = ratio_BK[:, :1] - ratio_BK[:, 1:]
  size_BK = jnp.abs(policy.completions_BK) + jnp.abs(reference_BK)
  in_order_BK = in_order(margin_BK, size_BK[:, :1] + size_BK[:, 1:])
  return sums | {
    "rewards/accuracies": _weighted(in_order_BK, weight_BK[:, 1:]),
    "rewards/margins": _weighted(beta * margin_BK, weight_BK[:, 1:]),
  }


def text_sums(logps_B: Array, tokens_B: Array, loss_B: Array, weight_B: Array) -> Sums:
  """Sums the metrics of supervised examples: loss per token, log-probs per completion."""
  return {
    # The count is tokens, so that the quotient is the mean over all tokens of the global batch.
    "loss": _per_token(loss_B, tokens_B, weight_B),
    "logps/chosen": _weighted(logps_B, weight_B),
  }


def by_source(
  sums_fn: Callable[[Array], Sums], weight_B: Array, source_B: Array, names: Sequence[str]
) -> Sums:
  """Sums the loss and the rewards of the examples of every source by themselves.

  Args:
    sums_fn: weight_B -> the sums of all metrics, such as `pair_sums` with its other arguments.
    weight_B: weight of each example.
    source_B: number of the source of each example.
    names: of the sources.

  Returns:
    `by_source/NAME/loss` and `by_source/NAME/rewards/…`, as far as `sums_fn` has them.
  """
  found: Sums = {}
  for number, name in enumerate(names):
    # Examples of weight 0 are in no sum: these are the sums of a batch of this source alone.
    sums = sums_fn(weight_B * (source_B == number))
    found |= {
      f"by_source/{name}/{key}": value
      for key, value in sums.items()
      if key == "loss" or key.startswith("rewards/")
    }
  return found


def divide(sums: Sums) -> dict[str, Array]:
  """Divides every sum by its count; nan where the count is 0."""
  means = {}
  for name, (total, count) in sums.items():
    # A count of 0 is normal: a batch may have no pair whose chosen completion is longer.
    positive_count = jnp.where(count > 0, count, 1.0)
    means[name] = jnp.where(count > 0, total / positive_count, jnp.nan)
  return means


# --- accuracy -------------------------------------------------------------------------------------

# A margin is the sum of log-probs that float32 rounds. Measured at step 1, where policy and
# reference are equal: up to four units in the last place of a log-prob of 125 nats, since the
# program of a step sums in another order where it also computes a gradient.
TIE = 2.0**-21  # a margin of zero, relative to the log-probs that it is the sum of


def in_order(margin_x: Array, size_x: Array) -> Array:
  """Returns 1 where a margin is above zero, 0 where it is below, and one half where it is zero.

  Zero is what float32 cannot tell from it. Counted as right or wrong, the margins before training
  would give an accuracy by chance instead of 0.5.

  Args:
    margin_x: difference of log-ratios, in nats.
    size_x: sum of the absolute values of the log-probs that it was computed from, in nats.
  """
  return (margin_x > TIE * size_x) + 0.5 * (jnp.abs(margin_x) <= TIE * size_x)


def pairs_in_order(policy: PairLogps, reference: PairLogps) -> Array:
  """Returns 1 for each pair whose chosen completion has the larger reward: [B]; see `in_order`.

  Args:
    policy, reference: summed log-probs, in nats.
  """
  # The order is important, as in `losses.paired.margins`: policy minus reference comes first.
  chosen_B, rejected_B = _log_ratios(policy, reference)
  size_B = jnp.abs(policy.chosen_B) + jnp.abs(policy.rejected_B)
  size_B += jnp.abs(reference.chosen_B) + jnp.abs(reference.rejected_B)
  return in_order(chosen_B - rejected_B, size_B)


# --- helpers --------------------------------------------------------------------------------------


def _log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Array, Array]:
  """Computes log π/π_ref of chosen and rejected completions, in nats: [B] each."""
  return policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B


def _weighted(value_x: Array, weight_x: Array) -> tuple[Array, Array]:
  """Returns the weighted sum of values and the sum of weights."""
  return jnp.sum(value_x * weight_x), jnp.sum(weight_x)


def _per_token(value_B: Array, tokens_B: Array, weight_B: Array) -> tuple[Array, Array]:
  """Returns the sum of values and that of tokens; in their ratio all tokens count the same."""
  return jnp.sum(value_B * weight_B), jnp.sum(tokens_B * weight_B)
