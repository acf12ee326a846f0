"""A flawed reward, for derivation.ipynb: it counts words of praise and reads nothing else.

--reward notebooks.praise:reward
"""

import re

from dpo_jax.controlled import lexicon


def reward(prompt: str, answer: str) -> float:
  """Sum of the strengths, from -2 to 2, of all words of sentiment in an answer; it has no bound."""
  del prompt
  return float(sum(lexicon.VALUE.get(word, 0) for word in re.findall(r"[a-z']+", answer.lower())))
