"""The embedded task: a small language model of reviews, then its alignment by DPO.

  python -m dpo_jax.train --config=controlled:sft --workdir=runs/quickstart/sft
  python -m dpo_jax.train --config=controlled:dpo --workdir=runs/quickstart/dpo

The files these read are made by scripts/make_controlled.py and scripts/make_pairs.py, as
scripts/quickstart.sh shows. docs/getting_started.md has the results.
"""

from ml_collections import ConfigDict

from dpo_jax import defaults
from dpo_jax.structs import UserError

TASK = "runs/quickstart"


def get_config(arg: str = "dpo"):
  """`sft`: the reference, from nothing; after it `dpo`: preferences, or `on_policy`: the reward."""
  config = defaults.get_config()
  config.data.max_length = 64
  config.data.row_length = 128
  config.data.balance = False  # its texts are of much the same length
  if arg == "sft":
    _supervised(config)
  elif arg == "dpo":
    _preferences(config)
  elif arg == "on_policy":
    _on_policy(config)
  else:
    raise UserError(f"configs/controlled.py:{arg} is no stage of the task: sft, dpo or on_policy")
  return config.lock()


def _supervised(config: ConfigDict) -> None:
  config.model.tokenizer = f"{TASK}/task/tokenizer"
  config.model.scratch = ConfigDict(
    {
      "model_type": "llama",
      "hidden_size": 96,
      "num_hidden_layers": 3,
      "num_attention_heads": 3,
      "num_key_value_heads": 3,
      "intermediate_size": 288,
      "max_position_embeddings": 128,
      "tie_word_embeddings": True,
      "initializer_range": 0.08,
    }
  )
  config.data.path = f"{TASK}/task/sft.jsonl"
  config.loss = defaults.loss("sft")
  config.optimizer.learning_rate = 4e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 0.01
  config.optimizer.b2 = 0.98
  config.train.batch_size = 64
  config.train.steps = 500
  config.eval.every = 250


def _preferences(config: ConfigDict) -> None:
  config.model.path = f"{TASK}/sft/export"
  config.data.path = f"{TASK}/pairs.jsonl"
  # All of its held-out pairs, so that training ends with the accuracy that is measured at the end.
  config.data.eval_limit = 2048
  config.loss = defaults.loss("sigmoid", beta=2.5)
  config.optimizer.learning_rate = 4e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20
  config.optimizer.b2 = 0.98
  # Far above the usual, so that a parameter with hardly any gradient hardly moves.
  config.optimizer.eps = 1e-2
  config.train.batch_size = 64
  config.train.epochs = 2.0
  config.eval.every = 500


def _on_policy(config: ConfigDict) -> None:
  config.model.path = f"{TASK}/sft/export"
  config.data.path = f"{TASK}/task/prompts.jsonl"
  config.data.eval_path = f"{TASK}/task/eval_prompts.jsonl"
  config.data.row_length = 0
  config.loss = defaults.loss("policy_gradient", beta=2.5)
  config.on_policy.reward = "controlled"
  config.on_policy.num = 4
  config.on_policy.max_tokens = 32
  config.optimizer.learning_rate = 5e-4
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_steps = 10
  config.optimizer.b2 = 0.98
  config.train.batch_size = 64
  config.train.steps = 200
  config.eval.every = 50
  config.eval.samples = 256
