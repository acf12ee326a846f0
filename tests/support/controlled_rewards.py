"""Computes the exact distribution of rewards on the embedded task."""

import itertools

import numpy as np

from dpo_jax.controlled import lexicon, reviews

WAYS = list(itertools.product(lexicon.KINDS, (False, True)))


def tables(kind, together):
  """Returns the tables of the aspects of a kind of review, and of its verdict."""
  aspects = [reviews.aspect_table(kind, a, together) for a in lexicon.TRAIT_OF[kind]]
  return [*aspects, reviews.verdict_table(kind, together)]


def reward_distribution(kind, together):
  """Returns the possible rewards of a completion and their probabilities, both exact."""
  # The value of every statement is a multiple of 1/8, so rewards lie on a grid and the
  # distribution of a sum is a convolution.
  step = 1 / 8

  def probabilities(table):
    return np.bincount(np.round((table.value_Ph + 3) / step).astype(int), table.prob_Ph, 49)

  *aspects, verdict = map(probabilities, tables(kind, together))
  prob = np.convolve(np.mean(aspects, axis=0), verdict)
  return reviews.UNIT * np.arange(len(prob)) * step - reviews.REWARD_BOUND, prob
