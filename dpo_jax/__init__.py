"""Direct Preference Optimization in JAX, from its derivation to training at scale."""

__version__ = "0.1.0"
