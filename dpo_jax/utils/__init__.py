"""Helpers that know nothing of training: flags, files, work folders, matrix products, malloc."""
