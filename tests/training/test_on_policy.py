"""Training on samples: what is made of them, what is refused, and where it ends."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax import defaults, losses, train
from dpo_jax.controlled import word_tokenizer
from dpo_jax.data import batches
from dpo_jax.data.examples import Example
from dpo_jax.evaluation.evaluate import scorer
from dpo_jax.generation.rollouts import load
from dpo_jax.structs import UserError
from dpo_jax.training import on_policy

pytestmark = pytest.mark.usefixtures("one_picture")

GOOD = {"reward": "controlled", "num": 4, "max_tokens": 8, "temperature": 1.0, "prefer": "rank"}


def row(scores, completions=None):
  """One prompt with as many answers as scores, told apart by their only token."""
  completions = range(len(scores)) if completions is None else completions
  ids = tuple(np.array([a], np.int32) for a in completions)
  return Example(np.array([9], np.int32), ids, scores=tuple(map(float, scores)))


def sampler(prefer="rank", num=4, loss="sigmoid"):
  fields = dict.fromkeys(on_policy.Sampler.__dataclass_fields__)
  return on_policy.Sampler(**fields | {"prefer": prefer, "num": num, "loss": losses.resolve(loss)})


def tokens(example):
  return [int(answer[0]) for answer in example.completions]


def test_ranked_pairs_are_the_best_and_the_worst():
  (pair,) = sampler()._pairs([row([1, 5, -2, 5])], np.random.default_rng(0))
  assert tokens(pair) == [1, 2] and pair.scores == (5.0, -2.0) and pair.weight == 1


def test_bradley_terry_prefers_with_the_probability_of_the_rewards_difference():
  # σ(1) of neighbours (0, 1), and σ(-2) of neighbours (2, 3).
  rng, made = np.random.default_rng(0), sampler("bradley_terry")
  pairs = [made._pairs([row([1, 0, 0, 2])], rng) for _ in range(4000)]
  shares = np.mean([[tokens(a) == [0, 1], tokens(b) == [2, 3]] for a, b in pairs], axis=0)
  np.testing.assert_allclose(shares, 1 / (1 + np.exp([-1, 2])), atol=0.025)


def test_equal_answers_count_nothing_and_nothing_else_is_an_error():
  equal, other = row([1, 1], [7, 7]), row([1, 0])
  weights = [p.weight for p in sampler(num=2)._pairs([equal, other], np.random.default_rng(0))]
  assert weights == [0.0, 1.0]
  assert on_policy._ranked(row([2, 2, 2])).weight == 0
  ranked = on_policy._ranked(row([2, 5, 3]))
  assert tokens(ranked) == [1, 2, 0] and ranked.scores == (5.0, 3.0, 2.0) and ranked.weight == 1


@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce"])
def test_a_batch_without_any_preference_is_an_error(loss, monkeypatch):
  same = on_policy.rollouts.Rollout(
    ["a", "b"], [[5], [6]], [["x", "y"]] * 2, [[[7], [7]]] * 2, np.ones((2, 2))
  )
  monkeypatch.setattr(on_policy.rollouts, "sample", lambda *_, **__: same)
  fields = {
    "prompts": ["a", "b"],
    "batch_size": 2,
    "accumulate": 1,
    "seed": 0,
    "batching": batches.Batching(),
  }
  made = dataclasses.replace(sampler(num=2, loss=loss), **fields)
  with pytest.raises(UserError, match=r"nothing is left to prefer; raise loss\.beta") as error:
    made.batch(0, None)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("loss", "given", "words"),
  [
    ("sigmoid", {"reward": "controled"}, "did you mean 'controlled'"),
    ("sigmoid", {"num": 1}, "2 or more"),
    ("sigmoid", {"num": 3, "prefer": "bradley_terry"}, "even number"),
    ("sigmoid", {"prefer": "best"}, "known: rank, bradley_terry"),
    ("sigmoid", {"max_tokens": 0}, "1 or above"),
    ("sigmoid", {"temperature": 0.0}, "above 0"),
    ("policy_gradient", {"temperature": 0.7}, "at temperature 1"),
    ("kto", {}, "name policy_gradient, plackett_luce or a loss of pairs"),
    ("sft", {}, "name policy_gradient, plackett_luce or a loss of pairs"),
  ],
)
def test_what_makes_no_sense_is_refused_in_one_line(loss, given, words):
  with pytest.raises(UserError, match=words) as error:
    on_policy.check(losses.resolve(loss), **GOOD | given)
  assert "\n" not in str(error.value)


# --- where it ends --------------------------------------------------------------------------------

WORDS = ("sun", "rain", "snow")
LONGEST = 2


def weather(prompt: str, answer: str) -> float:
  """A reward without any pattern, of every answer there is."""
  del prompt
  places = {word: i for i, word in enumerate(WORDS, 1)}
  code = sum(places.get(word, 0) * 4**k for k, word in enumerate(answer.split()))
  return float(np.sin(7.0 * code + 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy_gradient", "sigmoid"])
def test_on_policy_training_ends_at_the_optimum(tmp_path, name):
  """π* ∝ π_ref exp(r/β) over all answers of two tokens, from samples and a reward alone.

  At π* the return r - β log π/π_ref of every answer is β log Z, and the baseline the same: the
  gradient of the assumed objective has no noise left there. Of preferences by Bradley-Terry the
  optimum is the same, but the noise of the labels stays: from 0.2 to 0.3 nats away it comes near.
  """
  word_tokenizer.write(tmp_path / "tokenizer", (*WORDS, *(f" {word}" for word in WORDS)))
  prompts = "\n".join(json.dumps({"prompt": word}) for word in WORDS)
  (tmp_path / "prompts.jsonl").write_text(prompts)
  texts = [{"prompt": p, "completion": f" {a}"} for p, a in itertools.product(WORDS, WORDS)]
  (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, texts)))
  train.execute(_supervised(tmp_path), tmp_path / "sft")
  train.execute(_on_policy(tmp_path, name), tmp_path / "run")

  reference, policy = load(tmp_path / "sft" / "export"), load(tmp_path / "run" / "export")
  vocab, eos = policy.config.vocab, policy.tokenizer.eos_id
  completions = [(eos,)] + [
    (first, second) for first in range(vocab) if first != eos for second in range(vocab)
  ]
  for word in WORDS:
    prompt = policy.tokenizer.encode_prompt(word)
    example = Example(np.array(prompt, np.int32), tuple(np.array(a, np.int32) for a in completions))
    log_p, log_ref = (scorer(m.config)(m.params, [example]).logp_BK[0] for m in (policy, reference))
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-4)
    reward = [weather(word, policy.tokenizer.decode(list(a))) for a in completions]
    log_best = log_ref + np.array(reward) / BETA
    log_best -= jax.nn.logsumexp(log_best)
    kl = lambda log_q, log_p=log_p: float((np.exp(log_p) * (log_p - log_q)).sum())
    assert kl(log_ref) > 0.1  # there was some way to go
    assert kl(log_best) < (5e-3 if name == "policy_gradient" else 6e-2)


BETA = 0.5


def _supervised(folder) -> ConfigDict:
  """A reference that is far from uniform and gives every answer some probability."""
  config = defaults.get_config()
  config.loss = defaults.loss("sft")
  config.model.tokenizer = str(folder / "tokenizer")
  config.model.scratch = ConfigDict(
    {
      "model_type": "llama",
      "hidden_size": 32,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "num_key_value_heads": 2,
      "intermediate_size": 64,
      "max_position_embeddings": 16,
      "tie_word_embeddings": False,
      "initializer_range": 0.2,
    }
  )
  config.data.update(path=str(folder / "sft.jsonl"), eval_fraction=0.0, max_length=8)
  config.train.update(steps=6, batch_size=8)
  config.optimizer.learning_rate = 3e-3
  config.parallel.devices = 1
  return config


def _on_policy(folder, name) -> ConfigDict:
  config = defaults.get_config()
  config.loss = defaults.loss(name, beta=BETA)
  config.model.path = str(folder / "sft" / "export")
  config.data.update(path=str(folder / "prompts.jsonl"), eval_fraction=0.0, max_length=8)
  config.on_policy.update(
    reward=f"{__name__}:weather", num=64, max_tokens=LONGEST, prefer="bradley_terry"
  )
  config.train.update(steps=400, batch_size=3)
  config.parallel.devices = 1
  config.optimizer.update(learning_rate=5e-3, schedule="linear", b2=0.98)
  if name == "sigmoid":  # the labels' noise leaves a distance that the rate sets
    config.optimizer.learning_rate = 2e-3
    config.train.steps = 1000
  return config
