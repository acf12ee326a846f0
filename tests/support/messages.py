"""Messages of conversations, and rows converted by the format they are in."""

from dpo_jax.data import readers


def system(text):
  return {"role": "system", "content": text}


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


def reply(text):
  """A completion: a list of one message of the assistant."""
  return [assistant(text)]


def convert(row, **kwargs):
  """Returns the name of the row's format, and the row converted by it."""
  found = readers.detect(row, **kwargs)
  return found.name, found.convert(row)
