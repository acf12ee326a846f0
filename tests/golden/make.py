"""Writes tests/golden/logits.npz: what transformers computes for every model of `cases`.

python -m tests.golden.make
"""

import pathlib
import tempfile

import numpy as np
import torch

from tests.golden import cases, theirs

FILE = pathlib.Path(__file__).parent / "logits.npz"


def main() -> None:
  found = {}
  with torch.no_grad(), tempfile.TemporaryDirectory() as root:
    for index, case in enumerate(cases.CASES):
      model, _ = theirs.load(theirs.write(case, pathlib.Path(root) / str(index)))
      found[case] = theirs.logits(model, cases.IDS_NL)[:, ::3].numpy()
      print(f"{case}: {found[case].std():.3f}", flush=True)
  np.savez_compressed(FILE, **found)


if __name__ == "__main__":
  main()
