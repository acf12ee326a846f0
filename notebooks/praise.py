"""A flawed reward for derivation.ipynb: it adds up words of praise and reads nothing else.

--reward notebooks.praise:reward
"""

import re

from dpo_jax.controlled import lexicon


def reward(prompt: str, completion: str) -> float:
  """Computes the sum over all words of their sentiment, -2 to 2; unknown words count 0.

  The sum has no bound, so a policy can raise it by repeating one word. That is the flaw.
  """
  del prompt
  return float(
    sum(lexicon.VALUE.get(word, 0) for word in re.findall(r"[a-z']+", completion.lower()))
  )
