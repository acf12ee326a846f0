"""The exact distribution of rewards on the embedded task."""

import itertools

import numpy as np

from dpo_jax.controlled import lexicon, reviews

WAYS = list(itertools.product(lexicon.KINDS, (False, True)))


def tables(kind, together):
  aspects = [reviews.aspect_table(kind, a, together) for a in lexicon.TRAIT_OF[kind]]
  return [*aspects, reviews.verdict_table(kind, together)]


def reward_distribution(kind, together):
  """The exact distribution of an answer's reward: its values, and their probabilities."""
  step = 1 / 8  # every statement's value is a multiple

  def probabilities(table):
    return np.bincount(np.round((table.value_Ph + 3) / step).astype(int), table.prob_Ph, 49)

  *aspects, verdict = map(probabilities, tables(kind, together))
  prob = np.convolve(np.mean(aspects, axis=0), verdict)
  return reviews.UNIT * np.arange(len(prob)) * step - reviews.REWARD_BOUND, prob
