"""Builds messages of conversations, and converts rows by their format."""

from dpo_jax.data import detection


def system(text):
  return {"role": "system", "content": text}


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


def reply(text):
  """Returns a completion: a list of one assistant message."""
  return [assistant(text)]


def convert(row, **kwargs):
  """Returns the name of a row's format, and the row converted by it."""
  found = detection.detect(row, **kwargs)
  return found.name, found.convert(row)
