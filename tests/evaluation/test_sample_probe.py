"""Tests of sample metrics on a language so small that every completion can be listed."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from dpo_jax import logprobs
from dpo_jax.data import collate
from dpo_jax.data.examples import Example
from dpo_jax.distributed.executor import MODES, Executor
from dpo_jax.evaluation import sample_probe
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError

VOCAB, END, LONGEST = 5, 2, 3
CONFIG = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.4,
  }
)
LOGPS = logprobs.make_logps_fn(transformer.build(CONFIG))
ids = functools.partial(np.array, dtype=np.int32)
PROMPTS = [ids([1, 3]), ids([4]), ids([3, 3, 4, 1])]
EXAMPLES = [Example(prompt, (ids([3] * LONGEST), ids([4]))) for prompt in PROMPTS]


@functools.cache
def params(seed):
  return jax.tree.map(np.asarray, transformer.init_params(CONFIG, seed))


def make(**changed):
  options = {"samples": 64, "eos_ids": (END,), "max_tokens": 8} | changed
  examples = options.pop("examples", EXAMPLES)
  return sample_probe.make_probe(CONFIG, options.pop("logps_fn", LOGPS), examples, **options)


def every_answer():
  """Lists all completions of at most LONGEST tokens, ended or cut."""
  others = [id for id in range(VOCAB) if id != END]
  ended = [(*start, END) for n in range(LONGEST) for start in itertools.product(others, repeat=n)]
  return ended + list(itertools.product(others, repeat=LONGEST))


def log_probs(seed, prompt):
  """Computes log π(y|x) of every completion, in nats, in another layout than the probe's."""
  examples = [Example(prompt, (ids(answer),), row=i) for i, answer in enumerate(every_answer())]
  batch = collate.collate(examples, layout="packed", row_length=64)
  out = np.zeros(len(examples))
  out[batch.row_NS[batch.row_NS >= 0]] = np.asarray(LOGPS(params(seed), batch))[batch.row_NS >= 0]
  return out


@pytest.mark.slow
def test_samples_agree_with_the_listed_language():
  length_Y = np.array([len(answer) for answer in every_answer()])
  ended_Y = np.array([answer[-1] == END for answer in every_answer()])
  kl, square, surprise, tokens, ended = 0.0, 0.0, 0.0, 0.0, 0.0
  for prompt in PROMPTS:
    policy_Y, reference_Y = log_probs(1, prompt), log_probs(0, prompt)
    p_Y = np.exp(policy_Y)
    np.testing.assert_allclose(p_Y.sum(), 1, rtol=1e-5)
    ratio_Y = policy_Y - reference_Y
    kl += p_Y @ ratio_Y / 3
    square += p_Y @ ratio_Y**2 / 3
    surprise -= p_Y @ policy_Y / 3
    tokens += p_Y @ length_Y / 3
    ended += p_Y @ ended_Y / 3
  count = 3 * 1024
  found = make(samples=count, batch_size=count, max_tokens=0)(params(1), params(0))
  error = math.sqrt((square - kl**2) / count)
  assert kl > 10 * error  # there is something to see
  assert abs(found["sampled/kl"] - kl) < 4 * error
  np.testing.assert_allclose(found["sampled/tokens"], tokens, rtol=0.03)
  np.testing.assert_allclose(found["sampled/ended"], ended, atol=0.03)
  np.testing.assert_allclose(found["sampled/entropy"], surprise / tokens, rtol=0.03)
  np.testing.assert_allclose(
    found["sampled/kl_per_token"], found["sampled/kl"] / found["sampled/tokens"], rtol=1e-6
  )


def test_a_policy_that_is_its_reference_is_nowhere():
  found = make()(params(0), params(0))
  assert found["sampled/kl"] == 0 == found["sampled/kl_per_token"]


def test_without_a_reference_there_is_no_distance():
  found = make()(params(0), None)
  with_one = make()(params(0), params(1))
  assert set(with_one) - set(found) == {"sampled/kl", "sampled/kl_per_token", "sampled/kl_error"}
  assert all(with_one[name] == value for name, value in found.items())


def test_the_seed_decides_and_the_number_of_answers_at_a_time_does_not():
  probe = make(seed=5)
  first = probe(params(1), params(0))
  assert probe(params(1), params(0)) == first == make(seed=5)(params(1), params(0))
  assert make(seed=6)(params(1), params(0)) != first
  fewer = make(seed=5, batch_size=10)(params(1), params(0))
  for name, value in first.items():
    np.testing.assert_allclose(fewer[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_one_compilation_for_policy_reference_and_every_call():
  traces = []

  def counted(*args):
    traces.append(1)
    return LOGPS(*args)

  probe = make(logps_fn=counted, samples=70)  # a second batch that is not full
  for seed in (0, 1, 2):
    probe(params(seed), params(0))
  assert len(traces) == 1


@pytest.mark.parametrize("mode", MODES)
def test_trees_placed_for_training_are_taken_one_copy_of(mode, monkeypatch):
  executor = Executor(mode)
  placed = [executor.unreplicate(executor.place(params(seed))) for seed in (1, 0)]
  held_by = []
  generate = sample_probe.sampler.generate

  def spy(config, tree, *args, **options):
    held_by.extend(len(leaf.devices()) for leaf in jax.tree.leaves(tree))
    return generate(config, tree, *args, **options)

  monkeypatch.setattr(sample_probe.sampler, "generate", spy)
  probe = make()
  expected = probe(params(1), params(0))
  held_by.clear()
  assert probe(*placed) == expected
  assert set(held_by) == {1}  # several devices would all do the same
  assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(placed))


def test_prompts_take_turns_and_a_prompt_is_answered_anew_each_time(monkeypatch):
  seen = {}
  generate = sample_probe.sampler.generate

  def spy(config, params, prompts, **options):
    seen["prompts"], seen["options"] = prompts, options
    seen["answers"] = generate(config, params, prompts, **options)
    return seen["answers"]

  monkeypatch.setattr(sample_probe.sampler, "generate", spy)
  make(examples=[*EXAMPLES, EXAMPLES[0]])(params(0), None)
  assert seen["prompts"] == [PROMPTS[i % 3].tolist() for i in range(64)]
  assert len({str(answer) for answer in seen["answers"][::3]}) > 1


def test_an_answer_may_be_as_long_as_the_longest_of_the_examples(monkeypatch):
  asked = []

  def generate(config, params, prompts, *, max_tokens, **options):
    asked.append(max_tokens)
    return [[[END]] for _ in prompts]

  monkeypatch.setattr(sample_probe.sampler, "generate", generate)
  for given in (0, 7):
    make(max_tokens=given)(params(0), None)
  assert asked == [LONGEST, 7]


def test_text_by_hand():
  completions = [[3, 3, 3, 3, 3, 3, END], [3, 4, END], [4]]
  found = sample_probe.text_facts(completions, (END,))
  assert found == {
    "distinct_2": 2 / 6,  # five times 3 3, once 3 4
    "repetition": 2 / 3,  # of three times 3 3 3 3
    "tokens": 11 / 3,
    "ended": 2 / 3,
  }


def test_the_error_of_repetition_by_hand():
  # Of 3 + 3 4-grams, 2 and 0 repeat: shares 2/3 and 0, mean 1/3, each 1/3 away. Of two values the
  # standard error is their distance over 2: deviation √2/3 over √2.
  completions = [[3, 3, 3, 3, 3, 3], [3, 4, 5, 6, 7, 8]]
  found = sample_probe.text_facts(completions, (END,))
  assert found["repetition"] == pytest.approx(1 / 3) == found["repetition_error"]


def test_answers_too_short_for_an_n_gram_are_not_a_number():
  found = sample_probe.text_facts([[3, END], [END]], (END,))
  assert math.isnan(found["distinct_2"]) and math.isnan(found["repetition"])
  assert found["tokens"] == 1.5


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"samples": 0}, "samples is 0"),
    ({"examples": []}, "no held-out example"),
  ],
)
def test_what_cannot_be_sampled_is_refused_before_training(change, message):
  with pytest.raises(UserError, match=message):
    make(**change)


def test_prompts_that_leave_no_room_are_passed_over():
  learned = dataclasses.replace(CONFIG, positions="learned", max_positions=LONGEST + 2)
  found = sample_probe._prompts(EXAMPLES, 3, LONGEST, learned)
  assert found == [[1, 3], [4], [1, 3]]
  tight = dataclasses.replace(learned, max_positions=LONGEST)
  refusal = "no held-out prompt leaves room for a completion of 3 tokens"
  with pytest.raises(UserError, match=refusal):
    sample_probe._prompts(EXAMPLES, 3, LONGEST, tight)
