"""Helpers that know nothing of training: command lines, files, work folders, products, malloc."""
