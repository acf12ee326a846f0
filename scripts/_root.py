"""Lets `python scripts/NAME.py` find the package without installing it: import this first."""

import pathlib
import sys


def _report(kind, error, trace):
  """Ctrl-C before the package is found, which then handles it."""
  if issubclass(kind, KeyboardInterrupt):
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)
  sys.__excepthook__(kind, error, trace)


sys.excepthook = _report

# In place of scripts/, which the interpreter puts there and where `evaluate` would shadow others.
# Last it may stand: processes that a script starts import the script anew, and with it this.
_scripts = pathlib.Path(__file__).resolve().parent
sys.path[0] = str(_scripts.parent)
sys.path.append(str(_scripts))

from dpo_jax.utils import interrupts  # noqa: E402  found by the path above

interrupts.install()  # before the imports of the command
