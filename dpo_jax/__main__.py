"""`python -m dpo_jax NAME FLAGS` is `dpo-jax NAME FLAGS` where nothing is installed."""

from dpo_jax.commands import console

if __name__ == "__main__":
  console.main()
