"""Adds the configurations to the package; everything else of the build is in pyproject.toml."""

from setuptools import find_packages, setup

# pyproject.toml can either find packages or name them, and configs/ is found under no name of ours:
# it lies beside dpo_jax/, where its files have a short path, and is installed as dpo_jax.configs.
setup(
  packages=[*find_packages(include=["dpo_jax", "dpo_jax.*"]), "dpo_jax.configs"],
  package_dir={"dpo_jax.configs": "configs"},
)
