"""Lets `python scripts/NAME.py` find the package without installing it: import this first."""

import pathlib
import sys

# In place of scripts/, which the interpreter puts there and where `evaluate` would shadow others.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
