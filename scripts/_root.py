"""Lets `python scripts/NAME.py` find the package without installing it: import this first."""

import pathlib
import sys


def _report(kind, error, trace):
  """Ctrl-C while modules are still being imported, which the command cannot catch itself."""
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
