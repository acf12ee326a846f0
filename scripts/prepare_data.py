"""Runs `dpo-jax prepare` from a checkout: dpo_jax/commands/prepare_data.py."""

import _root  # noqa: F401 (puts the package on the path)

from dpo_jax.commands import console

if __name__ == "__main__":
  console.run("prepare")
