"""Reads rows of data files and turns them into arrays of tokens, with NumPy and without JAX."""
