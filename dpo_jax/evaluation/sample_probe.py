"""Samples a policy during training and measures the samples: KL, entropy, diversity, length.

Metrics of pairs show how likely the policy finds given completions. Only its own samples show what
it generates.
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
from dpo_jax.evaluation.estimates import standard_error
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
  """Makes a function (params, reference) -> metrics of completions sampled at temperature 1.

  Prompts and random numbers are the same at every call, so that only the policy changes. Policy and
  reference share one compiled function, and all calls have the same shapes.

  Args:
    config: architecture of the model.
    logps_fn: (params, batch) -> logps_NS, in nats, as in training.
    examples: the source of the prompts. Every prompt is used once before any is used twice.
    samples: number of completions.
    eos_ids: end tokens; a completion ends with the first of them.
    max_tokens: most tokens of a completion; 0 takes the longest completion of the examples.
    seed: random seed of the samples.
    batch_size: completions per batch.
    dtype: type of activations while sampling.

  Returns:
    probe(params, reference), for parameter trees that are neither divided among devices nor have a
    device axis. With None for the reference, the metrics contain no KL. A metric is nan where
    nothing is counted:

      sampled/kl            mean of log π/π_ref per completion: KL(π ‖ π_ref), in nats
      sampled/kl_per_token  mean of log π/π_ref per token, in nats per token
      sampled/entropy       mean of -log π per token, in nats per token
      sampled/distinct_2    share of distinct bigrams among all; it also falls with `samples`
      sampled/repetition    share of 4-grams that occurred before in their completion
      sampled/tokens        mean tokens of a completion, end token included
      sampled/ended         share of completions that ended; the others were cut at `max_tokens`
      sampled/…_error       standard errors of kl, entropy and repetition, from two samples on

  Raises:
    UserError: `samples` is below 1, there is no example, or no prompt leaves positions for a
      completion.
  """
  if samples < 1:
    raise UserError(f"samples is {samples}; a probe needs 1 sample or more")
  if not examples:
    raise UserError("there is no held-out example to take prompts from; set some aside")
  max_tokens = max_tokens or max(len(ids) for example in examples for ids in example.completions)
  prompts = _prompts(examples, samples, max_tokens, config)
  # One shape for all calls, so that nothing compiles again during training.
  size = min(batch_size, samples)
  rows = {
    "layout": "padded",
    "row_length": max(map(len, prompts)) + max_tokens,
    "sizes": collate.Sizes(rows=size, rows_step=size, scored=max_tokens, slots=1),
  }
  score = functools.partial(_score, jax.jit(logps_fn), rows)
  generate = functools.partial(
    sampler.generate,
    config,
    prompts=prompts,
    max_tokens=max_tokens,
    seed=seed,
    eos_ids=eos_ids,
    batch_size=batch_size,
    dtype=dtype,
    label="sampling",
  )

  def probe(params: PyTree, reference: PyTree | None) -> dict[str, float]:
    # One device is enough. Parameters on several devices would make all of them compute the same.
    device = jax.local_devices()[0]
    params, reference = jax.device_put((params, reference), device)
    completions = [ids for (ids,) in generate(params)]
    sampled = [
      Example(np.asarray(prompt, np.int32), (np.asarray(completion, np.int32),))
      for prompt, completion in zip(prompts, completions, strict=True)
    ]
    # The policy's log-probs are computed anew: sampling uses the cache and `dtype`, which round
    # otherwise, and the KL is a small difference.
    policy_B, tokens = score(params, sampled), sum(map(len, completions))
    facts: dict[str, float] = {}
    tokens_B = np.array([*map(len, completions)])
    # With enough samples for one: alerts read them.
    errors = {"entropy_error": standard_error(-policy_B / np.maximum(tokens_B, 1), tokens_B)}
    if reference is not None:
      ratio_B = policy_B - score(reference, sampled)
      facts = {"kl": ratio_B.mean(), "kl_per_token": ratio_B.sum() / tokens}
      errors["kl_error"] = standard_error(ratio_B)
    facts |= text_facts(completions, eos_ids) | {"entropy": -policy_B.sum() / tokens}
    facts |= {name: error for name, error in errors.items() if np.isfinite(error)}
    return {f"sampled/{name}": float(value) for name, value in facts.items()}

  return probe


def _score(
  forward: logprobs.LogpsFn, rows: dict[str, Any], params: PyTree, sampled: Sequence[Example]
) -> np.ndarray:
  """Computes log-probs of whole completions, in nats: [B]. Batches have the size in `rows`."""
  size = rows["sizes"].rows
  # The last part has fewer rows than `size`; collate fills it up, and the rows behind are cut off.
  parts = [sampled[i : i + size] for i in range(0, len(sampled), size)]
  facts = [forward(params, collate.collate(part, **rows))[: len(part), 0] for part in parts]
  # float64 for the sums over samples.
  return np.concatenate(facts).astype(np.float64)


def _prompts(
  examples: Sequence[Example], samples: int, max_tokens: int, config: ModelConfig
) -> list[list[int]]:
  """Lists `samples` prompts that leave positions for a completion, distinct ones first."""
  room = config.max_positions - max_tokens if config.positions == "learned" else None
  # A dict keeps the order of first occurrence, so the choice does not depend on hashes. Preference
  # data repeats prompts.
  distinct_prompts = dict.fromkeys(tuple(example.prompt.tolist()) for example in examples)
  fitting_prompts = [list(ids) for ids in distinct_prompts if room is None or len(ids) <= room]
  if not fitting_prompts:
    raise UserError(
      f"no held-out prompt leaves room for a completion of {max_tokens} tokens in the model's"
      f" {config.max_positions} positions; sample shorter completions"
    )
  # A sample's random numbers depend on its place in the list, so a repeated prompt gets another
  # completion.
  return [fitting_prompts[i % len(fitting_prompts)] for i in range(samples)]


# --- metrics of the sampled tokens ----------------------------------------------------------------


def text_facts(completions: Sequence[Sequence[int]], eos_ids: Sequence[int]) -> dict[str, float]:
  """Computes diversity, repetition and length of completions; n-grams exclude the end token."""
  # A completion that was cut at `max_tokens` has no end token to remove.
  ended = [bool(ids) and ids[-1] in eos_ids for ids in completions]
  texts = [ids[: len(ids) - end] for ids, end in zip(completions, ended, strict=True)]
  bigrams = [gram for text in texts for gram in ngrams(text, 2)]
  fourgrams = [ngrams(text, 4) for text in texts]
  repeated = [len(grams) - len(set(grams)) for grams in fourgrams]
  counts = [*map(len, fourgrams)]
  facts = {
    "distinct_2": _share(len(set(bigrams)), len(bigrams)),
    "repetition": _share(sum(repeated), sum(counts)),
    "tokens": _share(sum(map(len, completions)), len(completions)),
    "ended": _share(sum(ended), len(completions)),
  }
  if np.count_nonzero(counts) > 1:
    share_B = np.array(repeated) / np.maximum(counts, 1)
    facts["repetition_error"] = standard_error(share_B, np.array(counts))
  return facts


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
  """Lists all runs of n consecutive ids."""
  return list(zip(*(ids[i:] for i in range(n)), strict=False))


def _share(part: int, whole: int) -> float:
  """Returns part / whole, or nan if there is nothing to count."""
  return part / whole if whole else float("nan")
