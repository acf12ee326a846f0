"""Runs `dpo-jax convert` from a checkout: dpo_jax/commands/convert_hf.py."""

import _root  # noqa: F401 (puts the package on the path)

from dpo_jax.commands import console

if __name__ == "__main__":
  console.run("convert")
