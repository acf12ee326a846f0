"""Training whose report has one picture: `python -m tests.support.one_picture`, as `dpo_jax.train`.

For runs whose numbers are read: ten pictures take longer than the steps of a small run.
"""

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

from dpo_jax import train
from dpo_jax.utils import cli


@contextlib.contextmanager
def one_picture() -> Iterator[None]:
  """Lets reports draw the first of their pictures only."""
  from dpo_jax.monitoring import plots  # loads matplotlib, which a run needs at its end only

  every = plots.curves

  def first(records):
    return dict(itertools.islice(every(records).items(), 1))

  with mock.patch.object(plots, "curves", first):
    yield


if __name__ == "__main__":
  train._export = one_picture()(train._export)
  cli.run(train.main, train.define_flags)
