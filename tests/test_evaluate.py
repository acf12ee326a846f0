"""Log-probs of every answer in order, rewards by name."""

import numpy as np
import pytest
import tiny

from dpo_jax import evaluate, logprobs, rewards
from dpo_jax.data.layout import collate
from dpo_jax.structs import UserError

# --- Log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_scorer_gives_every_answer_its_own_log_prob(answers):
  # Ragged batches and packed rows against one example a batch through the naive path.
  examples = tiny.pairs(7, answers=answers)
  params = tiny.init()
  scores = evaluate.make_scorer(tiny.MODEL, batch_size=3)(params, examples)
  for example, logp_K, tokens_K in zip(examples, *scores, strict=True):
    batch = collate([example], layout="padded", row_length=32)
    hidden = tiny.MODEL.hidden(params, batch)
    alone = logprobs.naive_slot_logps(hidden, tiny.MODEL.head(params), batch)
    np.testing.assert_allclose(logp_K, np.asarray(alone).reshape(-1)[:answers], rtol=1e-5)
    assert tokens_K.tolist() == [len(answer) for answer in example.answers]


def test_scores_as_pairs():
  pairs = evaluate.Scores(np.array([[-1.0, -2.0]]), np.array([[3, 4]])).pairs()
  assert [float(x[0]) for x in pairs] == [-1, -2, 3, 4]


# --- Rewards by name ------------------------------------------------------------------------------


def test_rewards_by_name_and_by_path():
  assert rewards.resolve("controlled") is rewards.REWARDS["controlled"]
  assert rewards.resolve("operator:add") is __import__("operator").add


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("controled", "did you mean 'controlled'"),
    ("", "there is controlled"),
    ("no_such_module:f", "no module named 'no_such_module'"),
    ("math:no_such", "'math' holds no 'no_such'"),
    ("math:pi", "no function but float"),
  ],
)
def test_a_reward_that_does_not_exist(name, message):
  with pytest.raises(UserError, match=message):
    rewards.resolve(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "good", [1.0, 2.0]])
def test_a_reward_that_is_no_number(value):
  with pytest.raises(UserError, match="one finite number"):
    rewards.values(lambda prompt, answer: value, ["p"], ["a"])
