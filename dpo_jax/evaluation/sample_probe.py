"""What a policy writes while it is trained: a few sampled answers, and numbers of them.

Pairs show how likely the policy finds given answers; only its own samples show what it has become.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax import logprobs
from dpo_jax.data import collate
from dpo_jax.data.examples import Example
from dpo_jax.generation import sampler
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import PyTree, UserError

Probe = Callable[[PyTree, PyTree | None], dict[str, float]]


def make_probe(
  config: ModelConfig,
  logps_fn: logprobs.LogpsFn,
  examples: Sequence[Example],
  *,
  samples: int,
  eos_ids: Sequence[int] = (),
  max_tokens: int = 0,
  seed: int = 0,
  batch_size: int = 64,
  dtype: str = "float32",
) -> Probe:
  """A function (params, reference) -> facts of answers sampled from the policy at temperature 1.

  Its prompts and random numbers are the same at every call, so that what changes is the policy.
  Policy and reference share one compiled function, and all calls one shape.

  Args:
    config: the model's.
    logps_fn: (params, batch) -> logps_NS, nats, as training has it.
    examples: whose prompts are answered, in turn and each of them once before any of them twice.
    samples: answers.
    eos_ids: an answer ends with the first of these.
    max_tokens: most tokens of an answer; 0 is the longest answer of the examples.
    seed: of the random numbers.
    batch_size: answers at a time.
    dtype: of activations while sampling.

  Returns:
    probe(params, reference), of trees that are not divided among devices, nor have a device axis.
    Without a reference (None) there is no `kl`. Its facts, NaN where nothing is counted:

      sampled/kl            mean of log π/π_ref over whole answers: KL(π ‖ π_ref), nats
      sampled/kl_per_token  the same over tokens, nats a token
      sampled/entropy       mean of -log π over tokens, nats a token
      sampled/distinct_2    distinct share of all bigrams; it falls with `samples` too
      sampled/repetition    share of 4-grams that occurred before in their answer
      sampled/tokens        mean length of an answer, end token included
      sampled/ended         share of answers that ended; the others were cut at `max_tokens`

  Raises:
    UserError: fewer than one sample, no example, or no prompt that leaves room for an answer.
  """
  if samples < 1:
    raise UserError(f"samples is {samples}; a probe needs 1 answer or more")
  if not examples:
    raise UserError("there is no held-out example to take prompts from; set some aside")
  max_tokens = max_tokens or max(len(ids) for example in examples for ids in example.completions)
  prompts = _prompts(examples, samples, max_tokens, config)
  size = min(batch_size, samples)
  rows = {
    "layout": "padded",
    "row_length": max(map(len, prompts)) + max_tokens,
    "sizes": collate.Sizes(rows=size, rows_step=size, scored=max_tokens, slots=1),
  }
  score = functools.partial(_score, jax.jit(logps_fn), rows)
  answer = functools.partial(
    sampler.generate,
    config,
    prompts=prompts,
    max_tokens=max_tokens,
    seed=seed,
    eos_ids=eos_ids,
    batch_size=batch_size,
    dtype=dtype,
  )

  def probe(params: PyTree, reference: PyTree | None) -> dict[str, float]:
    # One device is enough, and a tree that several hold would make all of them do the same.
    here = jax.local_devices()[0]
    params, reference = jax.device_put((params, reference), here)
    completions = [ids for (ids,) in answer(params)]
    array = lambda ids: np.asarray(ids, np.int32)
    sampled = [Example(array(x), (array(y),)) for x, y in zip(prompts, completions, strict=True)]
    policy_B, tokens = score(params, sampled), sum(map(len, completions))
    found = {}
    if reference is not None:
      ratio_B = policy_B - score(reference, sampled)
      found = {"kl": ratio_B.mean(), "kl_per_token": ratio_B.sum() / tokens}
    found |= text_facts(completions, eos_ids) | {"entropy": -policy_B.sum() / tokens}
    return {f"sampled/{name}": float(value) for name, value in found.items()}

  return probe


def _score(
  forward: logprobs.LogpsFn, rows: dict[str, Any], params: PyTree, sampled: Sequence[Example]
) -> np.ndarray:
  """Log-probs of whole answers, nats, so many rows at a time as `rows` has."""
  size = rows["sizes"].rows
  parts = [sampled[i : i + size] for i in range(0, len(sampled), size)]
  found = [forward(params, collate.collate(part, **rows))[: len(part), 0] for part in parts]
  return np.concatenate(found).astype(np.float64)


def _prompts(
  examples: Sequence[Example], samples: int, max_tokens: int, config: ModelConfig
) -> list[list[int]]:
  """So many prompts: the different ones that leave room for an answer, in order, over and over."""
  room = config.max_positions - max_tokens if config.positions == "learned" else None
  different = dict.fromkeys(tuple(example.prompt.tolist()) for example in examples)
  fitting = [list(ids) for ids in different if room is None or len(ids) <= room]
  if not fitting:
    raise UserError(
      f"no held-out prompt leaves room for an answer of {max_tokens} tokens in the model's"
      f" {config.max_positions} positions; sample shorter answers"
    )
  # A sample's random numbers come from its place in the list: a prompt repeated is answered anew.
  return [fitting[i % len(fitting)] for i in range(samples)]


# -- answers as text -----------------------------------------------------------------------------


def text_facts(completions: Sequence[Sequence[int]], eos_ids: Sequence[int]) -> dict[str, float]:
  """Diversity, repetition and length of answers; the end token is no part of an n-gram."""
  ended = [bool(ids) and ids[-1] in eos_ids for ids in completions]
  texts = [ids[: len(ids) - end] for ids, end in zip(completions, ended, strict=True)]
  bigrams = [gram for text in texts for gram in ngrams(text, 2)]
  fours = [ngrams(text, 4) for text in texts]
  return {
    "distinct_2": _share(len(set(bigrams)), len(bigrams)),
    "repetition": _share(
      sum(len(grams) - len(set(grams)) for grams in fours), sum(map(len, fours))
    ),
    "tokens": _share(sum(map(len, completions)), len(completions)),
    "ended": _share(sum(ended), len(completions)),
  }


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
  """All runs of n neighbours."""
  return list(zip(*(ids[i:] for i in range(n)), strict=False))


def _share(part: int, whole: int) -> float:
  return part / whole if whole else float("nan")
