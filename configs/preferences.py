"""Your model and your preferences: the configuration of commands that name none.

  python -m dpo_jax.train --model=MODEL_DIR --data=PREFERENCES.jsonl --workdir=runs/mine

The argument sets the same fields, in any order:

  --config=preferences:model=MODEL_DIR,data=PREFERENCES.jsonl,loss=ipo,beta=0.1

docs/getting_started.md has results for two public files.
"""

from dpo_jax import defaults


def get_config(arg: str = ""):
  """The configuration; `arg` is key=value pairs of model, reference, data, loss and beta."""
  given = defaults.parse(arg, ("model", "reference", "data", "loss", "beta"))
  config = defaults.get_config()
  config.model.path = given.get("model", "")
  config.reference.path = given.get("reference", "")
  config.data.path = given.get("data", "")
  config.loss = defaults.loss(given.get("loss", "sigmoid"))
  if "beta" in given:
    config.loss.beta = defaults.number(given, "beta", 0.1)
  return config.lock()
